"""Checkpoints in the public Qwen3-Omni layout, in and out.

A folder holds `config.json` and `model.safetensors`, or several files with `model.safetensors.index.json`. Two layouts
are read and written: "full" (`Qwen3OmniMoeForConditionalGeneration`, keys `thinker.model...`, `thinker.audio_tower...`,
and of the speaking parts `talker...`, `code2wav...`) and "thinker" (`Qwen3OmniMoeThinkerForConditionalGeneration`, the
Thinker's keys without the first part).

Where our tensors are joined (queries, keys and values; gate and up; all experts of a layer), one of ours is many of
theirs. `_pieces` says which, in both directions.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnitrain.data.encode import SampleEncoder
from omnitrain.files import atomic, write_json
from omnitrain.interop.public_config import (
    FULL,
    MOST_PARAMETERS,
    CheckpointError,
    Layout,
    Section,
    public_config,
    read_config,
)
from omnitrain.interop.public_files import write_companions
from omnitrain.interop.stored import Stored, fill
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import OmniConfig

SPEECH_PARTS = ("talker.", "code2wav.")
"""How the keys of the speaking parts start, ours and the public ones; only a full checkpoint has them."""

Pieces = list[tuple[str, tuple[int | slice, ...]]]
"""Public key, and which part of our tensor it is."""

Track = Callable[[list[tuple[str, Any]]], Iterable[tuple[str, Any]]]
"""Passes named parameters on, one after the other, and may show how far it is."""


def load_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    speech: bool = True,
    track: Track = iter,
    deferred: bool = False,
) -> OmniModel:
    """The Thinker with its encoders, and Talker and Code2Wav where they are, from a folder in the public layout.

    Args:
        dtype: None keeps the stored one.
        speech: False leaves Talker and Code2Wav out; they are not even read.
        track: shows progress.
        deferred: the model stays on `meta`, and each process reads what it needs of it later (`models.deferred`); of
            the stored dtypes.

    The model is described on `meta`; then the files are read one after the other, tensor by tensor, so that memory
    never holds more than the model and one file (which is mapped, not copied).

    Raises CheckpointError: a file, key or field is missing, unknown, cut off, or of the wrong shape or dtype.
    """
    folder = Path(folder)
    config, prefix = read_config(folder, speech=speech)
    model = empty_model(config, folder / "config.json")
    if deferred:
        stored = PublicTensors(folder, speech=speech)
        empty = {n: torch.empty(shape, dtype=stored.dtype(n), device="meta") for n, shape in stored.shapes.items()}
        model.load_state_dict(empty, assign=True)
        fill(model, stored)
    else:
        with TensorFiles(folder, prefix) as checkpoint:
            checkpoint.check_all_wanted(named := dict(model.named_parameters()), config)
            tensors = checkpoint.read(named, config, dtype=dtype, device=device, track=track)
        model.load_state_dict(tensors, assign=True)
    model.source = folder
    return model.requires_grad_(True)


class PublicTensors(Stored):
    """The weights in a folder in the public layout, or those of one part, by their names in `OmniModel`. `speech`: with
    those of Talker and Code2Wav. Raises as `load_pretrained` and `load_part`, but for what shows only in reading."""

    def __init__(self, folder: Path, *, speech: bool = True, part: str | None = None) -> None:
        self._config, prefix = read_config(folder, speech=speech)
        model = empty_model(self._config, folder / "config.json")
        if part is not None and getattr(model, part) is None:
            raise _no_part(folder, part)
        self._files = TensorFiles(folder, prefix)
        self._like: dict[str, Tensor] = dict(model.named_parameters())
        if part is None:
            self._files.check_all_wanted(self._like, self._config)
        else:
            self._like = {name: x for name, x in self._like.items() if name.startswith(f"{part}.")}
        self.shapes = {name: tuple(x.shape) for name, x in self._like.items()}
        pieces = [(k, x[i].shape) for n, x in self._like.items() for k, i in self._files.pieces(n, x, self._config)]
        for key, shape in sorted(pieces, key=lambda piece: str(self._files.file_of.get(piece[0]))):
            self._files.check(key, shape)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored; of several pieces in different dtypes none loses anything."""
        keys = [key for key, _ in self._files.pieces(name, self._like[name], self._config)]
        return functools.reduce(torch.promote_types, {FLOATS[self._files.header(key)[1]] for key in keys})

    def region(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._files.region(name, self._like[name], self._config, offset, shape)


def _range(index: int | slice, size: int) -> tuple[int, int]:
    """First and last position, and one more, that `index` means of `size`."""
    return (index, index + 1) if isinstance(index, int) else index.indices(size)[:2]


def load_part(folder: str | Path, part: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights of one part (`aut`, `visual`, `thinker`, `talker`, `code2wav`) of a folder in the public layout by
    their names in it; nothing else is read. `dtype` None keeps the stored one. Raises CheckpointError as
    `load_pretrained`, and if there is no such part."""
    folder = Path(folder)
    config, prefix = read_config(folder)
    module = getattr(empty_model(config, folder / "config.json"), part)
    if module is None:
        raise _no_part(folder, part)
    with TensorFiles(folder, prefix) as checkpoint:
        named = {f"{part}.{name}": x for name, x in module.named_parameters()}
        tensors = checkpoint.read(named, config, dtype=dtype)
    return {name.removeprefix(f"{part}."): x for name, x in tensors.items()}


def _no_part(folder: Path, part: str) -> CheckpointError:
    return CheckpointError(f"{folder / 'config.json'}: describes no {part}; a full checkpoint ({FULL}) has one")


def left_out(config: OmniConfig) -> tuple[str, ...]:
    """Of `SPEECH_PARTS` those that the model lacks."""
    return tuple(part for part in SPEECH_PARTS if getattr(config, part.removesuffix(".")) is None)


def empty_model(config: OmniConfig, path: Path) -> OmniModel:
    """The model on `meta`: no memory is needed yet."""
    try:
        with torch.device("meta"):
            model = OmniModel(config)
    except RuntimeError as error:  # more numbers than 64 bits count
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: describes a model that cannot be built: {reason}") from error
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    if (total := sum(sizes.values())) > MOST_PARAMETERS:
        largest = max(sizes, key=sizes.__getitem__)
        raise CheckpointError(
            f"{path}: describes {total:.2g} parameters, most of them in {SECTIONS[largest]}; at most "
            f"{MOST_PARAMETERS:.0e} are built"
        )
    return model


SECTIONS = {
    "aut": "thinker_config.audio_config", "visual": "thinker_config.vision_config",
    "thinker": "thinker_config.text_config", "talker": "talker_config", "code2wav": "code2wav_config",
}  # fmt: skip
"""Where `config.json` describes the parts of `OmniModel`."""


class TensorFiles:
    """The safetensors files of a folder, at most one of them open at a time; remembers which keys were read."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix, self.read_keys = folder, prefix, set[str]()
        self._open: tuple[Path, Any] | None = None
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.listing, self.file_of = index, _read_index(index)
            return
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder}: no *.safetensors and no {index.name}")
        self.listing, self.file_of = paths[0] if len(paths) == 1 else folder, {}
        for path in paths:
            self.file_of |= dict.fromkeys(self._file(path).keys(), path)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = None

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # unmapped before the next one is mapped
            self._open = path, _open(path)
        return self._open[1]

    def get(self, key: str, expected: Sequence[int] | None = None, inside: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor under `key`, or what is `inside` these slices, and then nothing else is read. Raises as
        `check`."""
        self.check(key, expected)
        return self._ask(key, "get_tensor") if inside is None else self._ask(key, "get_slice")[inside]

    def check(self, key: str, expected: Sequence[int] | None = None) -> None:
        """Raise CheckpointError if there is no tensor under `key`, or nothing that can be trained, or it is not of the
        `expected` shape. Its numbers are not read."""
        if key not in self.file_of:
            raise self.missing(key)
        path, (shape, dtype) = self.file_of[key], self.header(key)
        if expected is not None and shape != list(expected):
            raise CheckpointError(
                f"{path}: key {key!r} has shape {shape}, config.json asks for {list(expected)}; use the config.json "
                "that belongs to these weights"
            )
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: key {key!r} is stored as {dtype}; expected one of {', '.join(FLOATS)}: quantised weights are "
                "not trained here, use the folder that they were made from"
            )

    def header(self, key: str) -> tuple[list[int], str]:
        """Shape and dtype of a tensor that is there; its numbers are not read."""
        stored = self._ask(key, "get_slice")
        return stored.get_shape(), stored.get_dtype()

    def _ask(self, key: str, method: str) -> Any:
        """What a method of the file that holds `key` says of it."""
        path = self.file_of[key]
        file = self._file(path)
        self.read_keys.add(key)
        try:
            return getattr(file, method)(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: key {key!r} cannot be read ({error}); copy this file again, and the index from the same place"
            ) from error

    def missing(self, key: str) -> CheckpointError:
        """What is to be said of a key that no file has."""
        near = sorted(k for k in self.file_of if k.rpartition(".")[0] == key.rpartition(".")[0])
        beside = f" (beside it there are {', '.join(near[:4])})" if near else ""
        return CheckpointError(
            f"{self.listing}: key {key!r} is missing, though config.json describes it{beside}; copy the folder again, "
            "with the config.json that belongs to its weights"
        )

    def pieces(self, name: str, parameter: Tensor, config: OmniConfig) -> Pieces:
        """The keys that make up our tensor `name`. Experts are also read as one tensor per layer, as transformers has
        them in memory."""
        pieces = _pieces(name, parameter, config, self.prefix)
        stacked = f"{pieces[0][0].partition('.experts.')[0]}.experts.{name.rpartition('.')[2]}_proj"
        return [(stacked, ())] if stacked in self.file_of else pieces

    def read(
        self,
        named: Mapping[str, Tensor],
        config: OmniConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        track: Track = iter,
    ) -> dict[str, Tensor]:
        """Tensors like those in `named` (on `meta`, by our names), file by file. `dtype` None keeps the stored one."""
        wanted = [(k, (name, index)) for name, x in named.items() for k, index in self.pieces(name, x, config)]
        for key, _ in wanted:
            if key not in self.file_of:
                raise self.missing(key)
        wanted.sort(key=lambda piece: self.file_of[piece[0]])
        out: dict[str, Tensor] = {}
        for key, (name, index) in track(wanted):
            tensor = self.get(key, named[name][index].shape)
            if name not in out:
                out[name] = torch.empty(named[name].shape, dtype=dtype or tensor.dtype, device=device)
            elif dtype is None:  # of several pieces in different dtypes none loses anything
                out[name] = out[name].to(torch.promote_types(out[name].dtype, tensor.dtype))
            out[name][index].copy_(tensor)
        return {name: out[name] for name in named}

    def region(
        self, name: str, like: Tensor, config: OmniConfig, offset: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """The part of `shape` that begins at `offset` of the tensor that we call `name` and that is `like` this one (on
        `meta`); nothing else is read. Of several pieces in different dtypes none loses anything."""
        out: Tensor | None = None
        for key, index in self.pieces(name, like, config):
            place = [_range(index[d] if d < len(index) else slice(None), n) for d, n in enumerate(like.shape)]
            both = [(max(a, o), min(b, o + n)) for (a, b), o, n in zip(place, offset, shape, strict=True)]
            if any(a >= b for a, b in both):
                continue
            kept = [d for d in range(len(place)) if d >= len(index) or isinstance(index[d], slice)]
            inside = tuple(slice(both[d][0] - place[d][0], both[d][1] - place[d][0]) for d in kept)
            found = self.get(key, like[index].shape, inside)
            if out is None:
                out = torch.empty(tuple(shape), dtype=found.dtype)
            elif out.dtype != found.dtype:
                out = out.to(torch.promote_types(out.dtype, found.dtype))
            target = out[tuple(slice(a - o, b - o) for (a, b), o in zip(both, offset, strict=True))]
            target.copy_(found.reshape(target.shape))
        assert out is not None, f"{name}: no numbers at {tuple(offset)}"
        return out

    def unread(self, left_out: tuple[str, ...]) -> list[str]:
        """Keys that nobody asked for, but those of parts that are left out of a full checkpoint."""
        return self._others(self.read_keys, left_out)

    def _others(self, known: Collection[str], left_out: tuple[str, ...]) -> list[str]:
        return [key for key in sorted(self.file_of.keys() - known) if not (self.prefix and key.startswith(left_out))]

    def check_all_wanted(self, named: Mapping[str, Tensor], config: OmniConfig, extra: Collection[str] = ()) -> None:
        """Refuse keys that are neither of `named` (as in `read`) nor `extra`, before anything is read."""
        known = {key for name, x in named.items() for key, _ in self.pieces(name, x, config)}
        for key in self._others(known.union(extra), left_out(config)):
            raise CheckpointError(
                f"{self.file_of[key]}: unknown key {key!r}; config.json describes no tensor of that name: remove it "
                "from the file, or use the config.json that belongs to these weights"
            )


FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Dtypes of weights that can be trained, as safetensors writes them."""


def _read_index(index: Path) -> dict[str, Path]:
    """Key -> file of its tensor. Raises CheckpointError for a file elsewhere, or one that is not there."""
    weight_map = Section.of(index).section("weight_map").values
    if strange := [name for name in weight_map.values() if name != Path(str(name)).name]:
        raise CheckpointError(f"{index}: weight_map names {strange[0]!r}; expected a file of the same folder")
    there = {name: (index.parent / name).is_file() for name in set(weight_map.values())}
    for key, name in weight_map.items():
        if not there[name]:
            raise CheckpointError(f"{index}: key {key!r} is in {name}, which is not there; copy that file too")
    return {key: index.parent / name for key, name in weight_map.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if (lost := _cut_off(path)) is not None:
            raise CheckpointError(f"{path}: the file is cut off in key {lost!r}; copy it again") from error
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}; copy it again") from error


def _cut_off(path: Path) -> str | None:
    """The first tensor that the file's header describes, and that does not lie in it as a whole."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
            ends = {key: 8 + length + entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"}
        beyond = {key: end for key, end in ends.items() if end > path.stat().st_size}
        return min(beyond, key=beyond.__getitem__) if beyond else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None  # the header itself is damaged


_PLACES = (
    ("aut.", "{thinker}audio_tower."),
    ("visual.", "{thinker}visual."),
    ("thinker.lm_head.", "{thinker}lm_head."),
    ("thinker.", "{thinker}model."),
    ("talker.mtp.code_embedding", "talker.code_predictor.model.codec_embedding"),
    ("talker.mtp.code_head", "talker.code_predictor.lm_head"),
    ("talker.mtp.", "talker.code_predictor.model."),
    *((f"talker.{part}.", f"talker.model.{part}.") for part in ("layers", "norm", "codec_embedding")),
)
"""How our names start and the public ones; the first that fits. All others, such as Code2Wav's, are the public ones."""

_RENAMED = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.router": "mlp.gate",
    "mlp.down": "mlp.down_proj",
    "mlp.shared_expert.down": "mlp.shared_expert.down_proj",
    "mlp.shared_gate": "mlp.shared_expert_gate",
}
"""Modules of a decoder layer that are one for one."""


def _pieces(name: str, parameter: Tensor, config: OmniConfig, prefix: str) -> Pieces:
    """The public keys that make up our parameter `name`, in order; `prefix` stands before those of the Thinker."""
    ours, theirs = next((place for place in _PLACES if name.startswith(place[0])), ("", ""))
    public = theirs.format(thinker=prefix) + name.removeprefix(ours)
    if name.startswith("talker.mtp.code_"):
        return [(f"{public}.{q}.weight", (q,)) for q in range(len(parameter))]
    match = re.fullmatch(r"(thinker|talker|talker\.mtp)\.layers\.\d+\.(.+)", name)
    if match is None:
        return [(public, ())]
    layer, (module, _, kind) = public.removesuffix(match[2]), match[2].rpartition(".")
    if module == "attention.qkv":
        talker = config.talker
        c = {"thinker": config.thinker, "talker": talker, "talker.mtp": talker and talker.mtp}[match[1]]
        assert c is not None
        q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
        rows = {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k)}
        return [(f"{layer}self_attn.{x}_proj.{kind}", (r,)) for x, r in rows.items()]
    if match[2] == "mlp.experts.down":
        return [(f"{layer}mlp.experts.{e}.down_proj.weight", (e,)) for e in range(len(parameter))]
    if "gate_up" in match[2]:
        width = parameter.shape[-2] // 2
        halves = {"gate": slice(0, width), "up": slice(width, None)}
        if module == "mlp.experts":
            experts = range(len(parameter))
            return [(f"{layer}mlp.experts.{e}.{x}_proj.weight", (e, r)) for e in experts for x, r in halves.items()]
        mlp = module.removesuffix("gate_up")
        return [(f"{layer}{mlp}{x}_proj.weight", (r,)) for x, r in halves.items()]
    return [(f"{layer}{_RENAMED[module]}.{kind}", ())]


def public_tensors(model: OmniModel, layout: Layout = "thinker", track: Track = iter) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under their public names, as views; without Talker and Code2Wav in layout "thinker"."""
    prefix = "thinker." if layout == "full" else ""
    for name, parameter in track(list(model.named_parameters())):
        if layout == "full" or not name.startswith(SPEECH_PARTS):
            for key, index in _pieces(name, parameter, model.config, prefix):
                yield key, parameter.detach()[index]


def save_pretrained(
    model: OmniModel,
    folder: str | Path,
    *,
    layout: Layout | None = None,
    base: str | Path | None = None,
    encoder: SampleEncoder | None = None,
    max_shard_bytes: int = 5 * 10**9,
    track: Track = iter,
) -> None:
    """Write the model in the public layout, with tokenizer, chat template, preprocessors and generation settings: those
    of the folder that the model was loaded from (`OmniModel.source`), or made for it (`public_files`).

    Args:
        layout: "full", or "thinker" (then without Talker and Code2Wav). Default: "full" if the model can speak.
        base: a full checkpoint that the model was loaded from. What the model was loaded without (Talker, Code2Wav),
            configuration and other files (tokenizer, chat template) go along, so that the folder replaces it. Sets
            layout "full".
        encoder: of the model's prompts, which says its tokenizer and how media are read. Without it, and without a
            folder that the model came from, the tokenizer is that of the embedded pack, if it has the model's size and
            special tokens, or none is written.
        max_shard_bytes: weights beyond this many bytes go to several files with an index.
        track: shows progress.

    Raises CheckpointError: `base` is no full checkpoint, or one of other sizes than the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    speaks = model.talker is not None or model.code2wav is not None
    layout = layout or ("full" if speaks else "thinker")
    with ExitStack() as stack:
        others: Iterator[tuple[str, Tensor]] = iter(())
        if base is not None:
            base, layout = Path(base), "full"
            base_config, prefix = read_config(base)
            if not prefix:
                raise CheckpointError(f"{base / 'config.json'}: base must be a full checkpoint ({FULL})")
            sizes = {part: getattr(model.config, part) for part in ("thinker", "aut", "vision", "talker", "code2wav")}
            if any(size is not None and size != getattr(base_config, part) for part, size in sizes.items()):
                raise CheckpointError(f"{base / 'config.json'}: describes a model of other sizes than the one to save")
            checkpoint = stack.enter_context(TensorFiles(base, prefix))
            theirs = left_out(model.config)
            others = ((k, checkpoint.get(k)) for k in sorted(checkpoint.file_of) if k.startswith(theirs))
            config = Section.of(base / "config.json").values
        else:
            config = public_config(model.config, layout, model.thinker.lm_head.weight.dtype)
        _write_shards(folder, chain(public_tensors(model, layout, track), others), max_shard_bytes)
    write_json(folder / "config.json", config)
    write_companions(folder, model.config, model.source if base is None else Path(base), encoder)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """Replace the weights in `folder`. Those that stand there stay until all of the new ones are on disk."""
    shards: dict[Path, list[str]] = {}  # file -> its keys
    total, size, pending = 0, 0, dict[str, Tensor]()

    def flush() -> None:
        path = folder / f"model-{len(shards) + 1:05d}.safetensors.partial"
        with atomic(path) as partial:
            save_file(pending, partial, metadata={"format": "pt"})
        shards[path] = list(pending)
        pending.clear()

    for key, tensor in tensors:
        if pending and size + tensor.nbytes > limit:
            flush()
            size = 0
        pending[key] = tensor.to("cpu", copy=not tensor.is_contiguous()).contiguous().clone()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    for old in set(folder.glob("model*.safetensors*")) - shards.keys():
        old.unlink()
    if len(shards) == 1:
        next(iter(shards)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (shard, keys) in enumerate(shards.items(), start=1):
        path = shard.rename(folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors")
        weight_map |= dict.fromkeys(keys, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
