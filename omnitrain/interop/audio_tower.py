"""The audio encoder alone, from whatever public folder has one: Qwen3-Omni, whole or its Thinker, and Qwen3-ASR.

Qwen3-ASR (arXiv 2601.21337) hears with an AuT of its own sizes, d 896 with 18 layers or d 1024 with 24. It lies in
folders of two layouts: as published, with keys `thinker.audio_tower.` and sizes in `thinker_config.audio_config`; and
as transformers writes it, with keys `model.audio_tower.`, whose projection is `model.multi_modal_projector.`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from omnitrain.interop.public_config import AUDIO, FILE, FULL, THINKER, CheckpointError, Section, architecture_of
from omnitrain.interop.public_format import TensorFiles
from omnitrain.interop.stored import Stored
from omnitrain.models.aut import AuTEncoder
from omnitrain.models.sizes import AuTConfig

ASR = "Qwen3ASRForConditionalGeneration"
ASR_AUDIO = replace(AUDIO, defaults={
    "d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "output_dim": 3584,
    "downsample_hidden_size": 480, "num_mel_bins": 128, "n_window_infer": 800, "n_window": 50,
})  # fmt: skip
"""The encoder's table, with the defaults of transformers for Qwen3-ASR."""
PREFIXES = ("thinker.audio_tower.", "audio_tower.", "model.audio_tower.")
_PROJECTOR = {"proj1.": "model.multi_modal_projector.linear_1.", "proj2.": "model.multi_modal_projector.linear_2."}


PROJECTION = ("proj1.", "proj2.")
"""Of `AuTEncoder`: what makes its features those of one Thinker."""


def read_tower(folder: Path) -> tuple[AuTConfig, str]:
    """Sizes of the audio encoder in a public folder, and the prefix of its keys. Raises CheckpointError if there is
    none, or one of strange sizes."""
    root = Section.of(folder / FILE)
    architecture = architecture_of(root)
    if architecture not in (FULL, THINKER, ASR):
        raise CheckpointError(
            f"{root.path}: architectures is {architecture!r}; an audio encoder is read from {FULL}, {THINKER} or {ASR}"
        )
    place = root.section("thinker_config") if root.get("thinker_config", None) else root
    table = ASR_AUDIO if architecture == ASR else AUDIO
    with TensorFiles(folder, "") as files:
        prefix = next((p for p in PREFIXES if f"{p}conv_out.weight" in files.file_of), None)
        if prefix is None:
            raise files.missing(f"{PREFIXES[0]}conv_out.weight")
    return table.read(place.section("audio_config", optional=True)), prefix


class TowerTensors(Stored):
    """The weights of the audio encoder in a public folder by their names in `AuTEncoder`, as they are stored. Raises
    CheckpointError: no such encoder, other sizes than `ours` (the message says which to set), a tensor that is missing
    or cannot be read."""

    def __init__(self, folder: Path, ours: AuTConfig) -> None:
        theirs, prefix = read_tower(folder)
        _check_sizes(folder / FILE, theirs, ours)
        with torch.device("meta"):
            self.shapes = {name: tuple(x.shape) for name, x in AuTEncoder(theirs).named_parameters()}
        self._files = TensorFiles(folder, "")
        self._keys = {name: _key(name, prefix, self._files) for name in self.shapes}
        for name in sorted(self._keys, key=lambda name: str(self._files.file_of.get(self._keys[name], ""))):
            self._files.check(self._keys[name], self.shapes[name])

    def region(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        inside = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        return self._files.get(self._keys[name], self.shapes[name], inside)


def _key(name: str, prefix: str, files: TensorFiles) -> str:
    key = f"{prefix}{name}"
    if key in files.file_of:
        return key
    return next((to + name.removeprefix(start) for start, to in _PROJECTOR.items() if name.startswith(start)), key)


def _check_sizes(path: Path, theirs: AuTConfig, ours: AuTConfig) -> None:
    """CheckpointError if the weights of an encoder of sizes `theirs` are none for `ours`. The width that it projects to
    and the window of its attention may differ."""
    names = [f.name for f in fields(AuTConfig) if f.name not in ("out_dim", "window_frames")]
    wrong = {name: getattr(theirs, name) for name in names if getattr(theirs, name) != getattr(ours, name)}
    if wrong:
        said = ", ".join(f"{name} {value} (model: {getattr(ours, name)})" for name, value in wrong.items())
        override = ",".join(f"{name}:{value}" for name, value in wrong.items())
        raise CheckpointError(
            f"{path}: its audio encoder has other sizes than the model's: {said}. Write '+model.aut={{{override}}}'"
        )
