"""Mimi, a public codec at the rate of ours: codes without training one (Défossez et al., 2024, arXiv 2410.00037)."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnitrain.files import read_json
from omnitrain.interop.public_config import CheckpointError
from omnitrain.models.codec import check_codes

SAMPLE_RATE, FRAME_RATE, QUANTIZERS = 24000, 12.5, 16


def mimi_codebook_size(folder: Path) -> int | None:
    """Codes of each codebook of the Mimi in a folder; None if there is none. Needs no transformers."""
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "mimi":
        return None
    return int(config.get("codebook_size", 2048))  # a key that is left out has the default of MimiConfig


class MimiCodec(nn.Module):
    """`transformers.MimiModel` with the interface of `omnitrain.models.codec.Codec` and its first codebooks. It can
    speak in the place of a Code2Wav (`generation.speech.WholeDecoder`).

    The first codebook is the semantic one; the others refine the sound, so that any number from the first can be kept.
    The weights are frozen.
    """

    samples_per_frame = round(SAMPLE_RATE / FRAME_RATE)

    def __init__(self, model: Any, quantizers: int = QUANTIZERS) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.quantizers = quantizers
        self.codebook_size: int = model.config.codebook_size

    @classmethod
    def from_folder(cls, path: str | Path, quantizers: int = QUANTIZERS) -> MimiCodec:
        """Load a Mimi from a local folder in the layout of transformers; nothing is downloaded. Raises CheckpointError
        if it holds no Mimi, or one of another sample rate or frame rate, or with fewer codebooks than `quantizers`;
        ImportError without transformers."""
        path, described = Path(path), Path(path) / "config.json"
        if not described.is_file():
            raise CheckpointError(f"{described}: not found; expected the folder of a Mimi model")
        try:
            from transformers import MimiConfig, MimiModel
        except ImportError as error:
            raise ImportError("Mimi is run by transformers: pip install 'transformers>=5.20,<6'") from error

        values, _ = MimiConfig.get_config_dict(path, local_files_only=True)
        if values.get("model_type") != "mimi":
            raise CheckpointError(f"{described}: model_type is {values.get('model_type')!r}; expected 'mimi'")
        config = MimiConfig.from_dict(values)
        rate, frames, codebooks = config.sampling_rate, config.frame_rate, config.num_quantizers
        if rate != SAMPLE_RATE:
            raise CheckpointError(f"{path}: sampling_rate is {rate} Hz; expected {SAMPLE_RATE} Hz")
        if frames != FRAME_RATE:
            raise CheckpointError(f"{path}: frame rate is {frames:g} a second; expected {FRAME_RATE:g}")
        if codebooks < quantizers:
            raise CheckpointError(f"{path}: num_quantizers is {codebooks}; {quantizers} codebooks are needed")
        try:
            model = MimiModel.from_pretrained(path, local_files_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:  # its advice would be to run the code
            raise CheckpointError(f"{path}: its weights are damaged, or hold something else than tensors") from error
        return cls(model, quantizers)

    @property
    def bits_per_frame(self) -> float:
        """As of `Codec`."""
        return self.quantizers * math.log2(self.codebook_size)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """[B, samples] at 24 kHz -> codes int64 [B, T, quantizers], T = samples / 1920 rounded up."""
        return self.model.encode(wav[:, None], num_quantizers=self.quantizers).audio_codes.transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T, n] of the first n codebooks, 1 <= n <= quantizers -> [B, T * 1920]. Errors as
        `check_codes`."""
        check_codes(codes, self.quantizers, self.codebook_size)
        codes = codes.to(self.model.device)
        return self.model.decode(codes.transpose(1, 2)).audio_values[:, 0]
