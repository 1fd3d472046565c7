"""Weights of a run: how a checkpoint is read, and what a training may start from (`module.init_from`).

A training starts from a run, a folder in the public format or, for its Thinker, a text model; whole or part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnitrain.files import LAST_CHECKPOINT, did_you_mean
from omnitrain.interop import checkpoint_folder
from omnitrain.interop.audio_tower import PROJECTION, TowerTensors
from omnitrain.interop.checksums import NO_CHECKPOINT, damage, newest_whole
from omnitrain.interop.codec_folder import (
    DESCRIPTION,
    WEIGHTS,
    codec_folder,
    is_codec_folder,
    read_codec_weights,
    read_description,
)
from omnitrain.interop.lora import merged
from omnitrain.interop.public_config import CheckpointError
from omnitrain.interop.public_format import SPEECH_PARTS, PublicTensors, load_part
from omnitrain.interop.stored import Stored, below, fill, shapes
from omnitrain.interop.text_model import is_text_model, load_text_model
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.code2wav import fingerprint
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel

INIT_PARTS = ("aut", "visual", "thinker")
"""What `module.init_from` can take from a folder each, by the names of the modules of `OmniModel`."""


def read_checkpoint(path: str | Path, find_damage: Callable[[Path], str | None] = damage) -> dict[str, Any]:
    """A checkpoint that a run has written, a file or a folder, on the CPU. The only place where one is read.

    Its tensors lie in the file until they are used; no code in the file runs. Of a folder, weights and moments are
    `StoredTensors`, each read whenever somebody asks for it.

    Args:
        find_damage: how it is looked at before it is read; see `checksums.damage`.

    Raises:
        FileNotFoundError: there is no such file.  OSError: it cannot be read.
        CheckpointError: it is damaged, or something else than a checkpoint; names the last good one beside it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: this run has not written a checkpoint yet")
    if (wrong := find_damage(path)) is not None:
        raise _unusable(path, wrong)
    try:
        if path.is_dir():
            checkpoint = checkpoint_folder.read(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, with advice that is not for users
        raise _unusable(path, NO_CHECKPOINT) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if isinstance(state, Stored):
        return checkpoint
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise _unusable(path, NO_CHECKPOINT)
    return checkpoint


def _unusable(path: Path, wrong: str) -> CheckpointError:
    good = newest_whole(path)
    cure = "copy it again, or train again" if good is None else f"the last good one is {good} (ckpt_path={good})"
    return CheckpointError(f"{path}: this {'folder' if path.is_dir() else 'file'} is {wrong}; {cure}")


def model_weights(checkpoint: str | Path) -> Mapping[str, Tensor]:
    """The model's weights in a checkpoint of a run, by their names in the model, low-rank adapters added to what they
    stand beside. Errors as `read_checkpoint`."""
    found = read_checkpoint(checkpoint)
    state = below(found["state_dict"], "model.")
    scale = (found.get("omnitrain") or {}).get("lora_scale")
    return state if scale is None else merged(state, scale)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path, *, assign: bool = False) -> None:
    """Replace all weights of `module` by those read from `checkpoint`; with `assign` they stay where and as they are,
    and the module needs none of its own. Raises CheckpointError if they do not fit."""
    if wrong := _differences(shapes(module.state_dict()), shapes(weights)):
        raise CheckpointError(
            f"{checkpoint} does not fit the model of its configuration: {len(wrong)} weights differ. First: "
            f"{'; '.join(wrong[:3])}"
        )
    if assign:
        module.load_state_dict(weights, assign=True)
    else:
        fill(module, weights)


Shapes = Mapping[str, tuple[int, ...]]


def _differences(own: Shapes, weights: Shapes) -> list[str]:
    """What is missing, unknown or of another shape in `weights`."""
    return [
        f"{name}: {weights.get(name, 'missing')} in the folder, {own.get(name, 'missing')} in the model"
        for name in sorted(own.keys() | weights.keys())
        if own.get(name) != weights.get(name)
    ]


def start_from(model: OmniModel | AuT, init_from: str | Path | Mapping[str, str | Path]) -> list[str]:
    """Replace `model`'s weights, or those of some parts. Returns what the user should know about it, a sentence each.

    Args:
        init_from: a run folder (its last checkpoint) or a folder in the public format; or such folders by part (`aut`,
            `visual`, `thinker`), the other parts stay as they are. A Thinker may also come from a text model
            (`interop.text_model`), an audio encoder from Qwen3-ASR (`interop.audio_tower`) or from a run of AuT.

    Raises ValueError: an unknown part; a weight is missing, unknown or of another shape; parts that speak may be
    missing as a whole. Others as `read_checkpoint`.
    """
    notices = []
    for part, folder in init_from.items() if isinstance(init_from, Mapping) else [(None, init_from)]:
        key = "module.init_from" if part is None else f"module.init_from.{part}"
        if part not in (None, *INIT_PARTS):
            hint = did_you_mean(part, INIT_PARTS, otherwise="parts are {}")
            raise ValueError(f"{key}: there is no such part; {hint}")
        if part == "aut":
            notices += _start_aut(model, Path(folder), key)
            continue
        weights, said = _weights_in(model, Path(folder), part, key)
        own, theirs = shapes(model.state_dict()), shapes(weights)
        if part is None:
            absent = tuple(part for part in SPEECH_PARTS if not any(name.startswith(part) for name in weights))
            own = {name: shape for name, shape in own.items() if not name.startswith(absent)}
        else:
            own, theirs = ({n: x for n, x in named.items() if n.startswith(f"{part}.")} for named in (own, theirs))
        _check_fit(own, theirs, key, folder)
        fill(model, weights, theirs)
        del weights  # before those of the next part are read
        notices += said
    return notices


def _start_aut(model: OmniModel | AuT, folder: Path, key: str) -> list[str]:
    """Replace the weights of the audio encoder. Its projection stays as it is, where the folder has none for this
    Thinker; that is said."""
    weights = _aut_in(model, folder, key)
    own, theirs = shapes(model.aut.state_dict()), shapes(weights)
    found, wanted = theirs.get("proj2.bias"), own.get("proj2.bias")
    if found != wanted:
        own, theirs = ({n: x for n, x in w.items() if not n.startswith(PROJECTION)} for w in (own, theirs))
    _check_fit(own, theirs, key, folder)
    fill(model.aut, weights, theirs)
    if wanted in (found, None):  # AuT itself has none
        return []
    why = "was trained without one" if found is None else f"has one to width {found[0]}"
    into = f"this Thinker has width {wanted[0]} and the encoder there {why}"
    return [f"{key}={folder}: the projection (aut.proj1, aut.proj2) stays as it was drawn: {into}"]


def _aut_in(model: OmniModel | AuT, folder: Path, key: str) -> Mapping[str, Tensor]:
    """The weights of the audio encoder in `folder` by their names in `AuTEncoder`: of a run of the Thinker or of AuT,
    or of a public folder."""
    if (folder / LAST_CHECKPOINT).exists():
        return below(model_weights(folder / LAST_CHECKPOINT), "aut.")
    _check_public(folder, key)
    return TowerTensors(folder, model.aut.config)


def _check_fit(own: Shapes, weights: Shapes, key: str, folder: str | Path) -> None:
    if wrong := _differences(own, weights):
        raise ValueError(
            f"{key}={folder}: {len(wrong)} weights do not fit this model; choose the model preset that the "
            f"folder holds. First: {'; '.join(wrong[:3])}"
        )


def _check_public(folder: Path, key: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{key}={folder}: neither the folder of a run ({LAST_CHECKPOINT}) nor one in the public format "
            "(config.json)"
        )


def start_codec_from(module: nn.Module, folder: str | Path) -> None:
    """Replace all weights of a codec's training module (codec, discriminators, content head) by those of a run; or
    those of the codec by the ones that `convert to-codec` wrote (``builtin``: omnitrain's own); or those of its decoder
    by the Code2Wav of a folder in the public format, whose codes the new encoder and quantizer do not know. Raises
    ValueError if it is none of these, or one of other sizes."""
    folder = codec_folder(folder)
    checkpoint = folder / LAST_CHECKPOINT
    if checkpoint.exists():
        load_weights(module, read_checkpoint(checkpoint)["state_dict"], checkpoint)
    elif is_codec_folder(folder):
        codec = module.get_submodule("model")
        assert isinstance(codec, Codec)
        load_codec_folder(codec, folder)
    elif (folder / "config.json").is_file():
        load_weights(module.get_submodule("model.decoder"), load_part(folder, "code2wav", torch.float32), folder)
    else:
        raise ValueError(
            f"module.init_from: there is no {checkpoint}; give the folder of a codec's run, or one in the public format"
        )


def load_codec_folder(codec: Codec, folder: Path) -> None:
    """Replace the weights of `codec` by those that `convert to-codec` wrote to `folder`. Raises CheckpointError if they
    are of other sizes, damaged, or not those that its codec.json describes."""
    load_weights(codec, read_codec_weights(codec, folder), folder / WEIGHTS)
    codec.fold_codebooks()
    found, noted = fingerprint(codec.decoder), read_description(folder)["fingerprint"]
    if found != noted:
        raise CheckpointError(
            f"{folder / WEIGHTS}: its codes have the fingerprint {found}, and {DESCRIPTION} says {noted}: the two do "
            "not belong together; get the folder again"
        )


def _weights_in(
    model: OmniModel | AuT, folder: Path, part: str | None, key: str
) -> tuple[Mapping[str, Tensor], list[str]]:
    """All weights that `folder` holds, by their names in `OmniModel`, and what is to be said about them."""
    if (folder / LAST_CHECKPOINT).exists():
        return model_weights(folder / LAST_CHECKPOINT), []
    _check_public(folder, key)
    if not is_text_model(folder):
        if part is None:
            speaks = isinstance(model, OmniModel) and model.talker is not None
            return PublicTensors(folder, speech=speaks), []
        return PublicTensors(folder, part=part), []
    if part != "thinker" or not isinstance(model, OmniModel):
        raise ValueError(f"{key}={folder}: it holds a text model; write module.init_from={{thinker: {folder}}}")
    text = load_text_model(folder, model)
    if text.missing_rows is None:
        return text.weights, []
    last = model.config.thinker.vocab_size - 1
    return text.weights, [
        f"{key}={folder}: token ids {text.missing_rows} to {last} have no row there; their word embedding and output "
        "row are the mean of the others"
    ]
