"""`omnitrain convert`: runs and checkpoints as public folders, and back; a codec's run as a folder to pass on."""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch

from omnitrain.config.compose import run_config
from omnitrain.config.run_config import PretrainedConfig, RunConfig
from omnitrain.config.saved import read_config, write_config
from omnitrain.config.typed import ConfigError, Named
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.settings import DataConfig, MediaLimits
from omnitrain.files import CONFIG, LAST_CHECKPOINT, PUBLIC, TOKENIZER, atomic, read_json, write_json, write_text
from omnitrain.interop import public_config
from omnitrain.interop.checkpoint_folder import on_disk
from omnitrain.interop.codec_folder import DESCRIPTION, NOTICE, WEIGHTS, read_codec_weights, save_codec_weights
from omnitrain.interop.public_files import RECORD, copy_companions
from omnitrain.interop.public_format import Track, empty_model, load_pretrained, save_pretrained
from omnitrain.interop.start_from import load_weights, model_weights, read_checkpoint
from omnitrain.interop.stored import Stored
from omnitrain.interop.text_model import is_text_model
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import OmniConfig
from omnitrain.runs.experiment import build_data
from omnitrain.runs.export_codec import describe, notice
from omnitrain.runs.load import is_run, load_codec, public_encoder, run_sizes, run_tokenizer

_UNTRAINED = {"pytorch-lightning_version": L.__version__, "epoch": 0, "global_step": 0}
"""What Lightning asks of a checkpoint of which it reads the weights alone."""


def to_hf(
    source: Path,
    out: Path,
    *,
    layout: public_config.Layout | None = None,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    track: Track = iter,
) -> None:
    """Write a run (its last checkpoint), one of its checkpoints or a public folder to `out` in the public layout, with
    tokenizer, processor, chat template and generation files of the model that it came from. `layout` and `base` as in
    `save_pretrained`. Weights are written in `dtype`; None: that of the public folder that the run began as, else as
    they are stored.

    Raises ValueError or FileNotFoundError: no such thing, or `out` holds something else; one line that says which.
    """
    record = _record(source, out, "to-hf")
    with ExitStack() as stack:
        if _is_checkpoint(source) or is_run(source):
            model, encoder = _of_run(source, lambda: stack.enter_context(_scratch(out)))
            if dtype is None and model.source is not None:
                dtype = public_config.stored_dtype(model.source)
        else:
            model, encoder = load_pretrained(source, track=track), None
        if dtype is not None:
            model = model.to(dtype)
        with _written(out, record) as partial:
            save_pretrained(model, partial, layout=layout, base=base, encoder=encoder, track=track)


def to_ckpt(source: Path, out: Path, *, track: Track = iter) -> None:
    """Write the checkpoint that several processes have written, a folder or the last one of a run, as the file that one
    process would have written. Memory holds one tensor at a time; the disk, all of them twice meanwhile.

    Raises ValueError or FileNotFoundError: no such checkpoint, it is a file already, or there is something at `out`.
    """
    if not _is_checkpoint(source) and is_run(source):
        source = source / LAST_CHECKPOINT
    if source.is_file():
        raise ValueError(f"{source} is one file already")
    if out.exists():
        raise ValueError(f"{out} is there already; name a new file")
    checkpoint = read_checkpoint(source)
    places = [("state_dict", (checkpoint, "state_dict"))]
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        places += [(f"optimizer_states.{i}.{n}", (optimizer["state"], n)) for n in optimizer["state"]]
    with _scratch(out) as scratch:
        for name, (place, key) in track(places):
            (scratch / name).mkdir()
            place[key] = on_disk(place[key], scratch / name)
        with atomic(out) as partial:
            torch.save(checkpoint, partial)


def to_codec(source: Path, out: Path, *, megabytes: float = 10.0) -> None:
    """Write the codec of a run to `out`, a folder that can be passed on (`interop.codec_folder`), with what is to be
    known about it. Its codes have a fingerprint of their own: fp16 moves the codebooks by a little.

    Raises ValueError or FileNotFoundError: no run of a codec, not scored yet, or its data are gone; its weights take
    more than `megabytes` (of 1e6 bytes); `out` holds something else.
    """
    if not is_run(source, "one of a codec"):
        raise ValueError(
            f"{source} is no run of `omnitrain fit +recipe=codec`, which alone says what it was trained on"
        )
    record, codec, config = _record(source, out, "to-codec"), load_codec(source), read_config(source)
    assert isinstance(codec, Codec)
    with _written(out, record) as partial:
        save_codec_weights(codec, partial / WEIGHTS)
        size = (partial / WEIGHTS).stat().st_size / 1e6
        if size > megabytes:
            raise ValueError(
                f"{source}: the weights take {size:.1f} MB in fp16, and at most {megabytes:g} are written; train a "
                f"smaller codec, or allow more with --megabytes {math.ceil(size)}"
            )
        stored = Codec(codec.config).eval().requires_grad_(False)
        load_weights(stored, read_codec_weights(stored, partial), partial / WEIGHTS)
        stored.fold_codebooks()
        steps = int(read_checkpoint(source / LAST_CHECKPOINT)["global_step"])
        description = describe(stored, config, build_data(config), source, steps)
        write_json(partial / DESCRIPTION, description)
        write_text(partial / NOTICE, notice(description))


def from_hf(source: Path, out: Path, *, track: Track = iter) -> None:
    """Write a public folder to `out` as a run that has not been trained here yet: what `fit module.init_from=`,
    `generate` and `talk` read. Raises as `to_hf`."""
    if not (source / public_config.FILE).is_file():
        raise ValueError(f"{source}: no folder in the public format (it has no {public_config.FILE})")
    if is_text_model(source):
        raise ValueError(
            f"{source} holds a text model, which is a part of a model only: start from it with "
            f"module.init_from={{thinker: {source}}}"
        )
    record = _record(source, out, "from-hf")
    tokenizer = ChatTokenizer.from_dir(source)
    model = load_pretrained(source, track=track)
    encoder = public_encoder(source, model.config, tokenizer)
    with _written(out, record) as partial:
        tokenizer.save(partial / TOKENIZER)
        copy_companions(source, partial / PUBLIC)
        write_config(_run_of(model.config, encoder, partial), partial)
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        for _name, path in track([(LAST_CHECKPOINT, partial / LAST_CHECKPOINT)]):  # for the time that it takes
            path.parent.mkdir()
            torch.save({"state_dict": state, **_UNTRAINED}, path)


def _run_of(sizes: OmniConfig, encoder: SampleEncoder, folder: Path) -> RunConfig:
    """The default configuration with the model and the encoder of a public folder."""
    config = run_config()
    tokenizer = str(folder / TOKENIZER)
    data = replace(config.data.config, tokenizer=tokenizer, audio=encoder.audio, vision=encoder.vision)
    return replace(
        config,
        model=Named(target="omnitrain.models.omni.OmniModel", config=sizes),
        data=replace(config.data, config=data),
        paths=replace(config.paths, run_dir=str(folder)),
    )


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and path.suffix == ".ckpt")


@contextmanager
def _scratch(out: Path) -> Generator[Path]:
    """A folder beside `out` for as long as the block takes."""
    beside = out.resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=beside) as folder:
        yield Path(folder)


def _of_run(path: Path, scratch: Callable[[], Path]) -> tuple[OmniModel, SampleEncoder]:
    """Weights, as they are stored, and the encoder of a run folder or of a checkpoint in one. What lies in parts is put
    together in a folder that `scratch` gives."""
    above = path.absolute().parents[:2] if _is_checkpoint(path) else [path]
    run = next((folder for folder in above if (folder / CONFIG).is_file()), None)
    if run is None:
        raise ValueError(f"{path}: no checkpoint in the folder of its run (there is no {CONFIG} above it)")
    checkpoint = path if _is_checkpoint(path) else run / LAST_CHECKPOINT
    config = read_config(run)
    sizes = config.model.config
    if isinstance(sizes, PretrainedConfig):
        sizes = run_sizes(sizes, run)
    if not isinstance(sizes, OmniConfig):
        raise ValueError(
            f"{run} is the run of a codec, and the public layout has no place for its encoder: convert the run of a "
            f"Talker that was trained with codec={run}; its Code2Wav is this codec's decoder"
        )
    data = config.data.config
    assert isinstance(data, DataConfig)
    tokenizer = ChatTokenizer.from_file(run_tokenizer(run))
    encoder = SampleEncoder(tokenizer=tokenizer, audio=data.audio, vision=data.vision, limits=MediaLimits())
    model = empty_model(sizes, run / CONFIG)
    weights = model_weights(checkpoint)
    weights = on_disk(weights, scratch()) if isinstance(weights, Stored) else weights
    load_weights(model, weights, checkpoint, assign=True)
    model.source = came_from(run)
    return model, encoder


def came_from(run: Path, before: tuple[Path, ...] = ()) -> Path | None:
    """The public folder that the model of a run began as, be it some runs ago; None if there is none. Its files will
    be copied and passed on, so a stranger's run folder may name nothing else: ValueError if its own ones are links that
    lead out of it."""
    if (own := run / PUBLIC).is_dir():
        for path in (own, *own.iterdir()):
            if not path.resolve().is_relative_to(run.resolve()):
                raise ValueError(f"{path} is a link that leads out of the run folder; put the file itself there")
        return own
    try:
        config = read_config(run)
    except ConfigError:  # a run that has been deleted since
        return None
    if isinstance(config.model.config, PretrainedConfig):
        return Path(config.model.config.folder)
    start: Any = config.module.config.init_from
    start = Path(start.get("thinker", "")) if isinstance(start, Mapping) else Path(start or "")
    if (start / CONFIG).is_file() and start.resolve() not in before:
        return came_from(start, (*before, start.resolve()))
    if not (start / public_config.FILE).is_file():
        return None
    architecture = public_config.architecture_of(public_config.Section.of(start / public_config.FILE))
    return start if architecture in (public_config.FULL, public_config.THINKER) else None


def keep_public(source: Path, run: Path) -> None:
    """Copy what stands beside the weights of the public folder `source` into a run that begins as it, so that neither
    its sizes nor the way back need that folder again."""
    copy_companions(source, run / PUBLIC)
    shutil.copyfile(source / public_config.FILE, run / PUBLIC / public_config.FILE)


def _record(source: Path, out: Path, verb: str) -> dict[str, Any]:
    """What `out` will say about itself. What is there now may only be an earlier conversion of the same `source`, with
    nothing added; ValueError if it is something else."""
    # The checksum tells folders of one name apart, and not where they lie: people pass conversions on.
    place = f"{zlib.crc32(str(source.resolve()).encode()):08x}"
    made = {"verb": f"omnitrain convert {verb}", "from": source.resolve().name, "place": place}
    if out.is_file():
        raise ValueError(f"{out} is a file; name a folder")
    if there := _files(out):
        record = read_json(out / RECORD) if RECORD in there else {}
        if not isinstance(record, dict) or {key: record.get(key) for key in made} != made:
            raise ValueError(f"{out} is not empty, and no conversion of {source}; name a new folder, or empty it")
        files = record.get("files")
        known = [RECORD, *files] if isinstance(files, list) else [RECORD]
        if added := sorted(there.difference(map(str, known))):
            raise ValueError(f"{out} holds {added[0]}, which no conversion wrote; name a new folder, or move it away")
    return made


@contextmanager
def _written(out: Path, record: dict[str, Any]) -> Generator[Path]:
    """A folder that becomes `out` once it is whole."""
    with atomic(out.resolve()) as partial:
        partial.mkdir()
        yield partial
        write_json(partial / RECORD, record | {"files": sorted(_files(partial))})


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
