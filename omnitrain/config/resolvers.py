"""What `${omnitrain.NAME:...}` means in a configuration."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from omnitrain.config.locations import PACK, PACK_ANNOUNCEMENTS, PACK_SPEECH
from omnitrain.models.sizes import codec_vocabulary


def sample_weight(tokens: float, per_sample: float) -> float:
    """How a mix that is meant in tokens becomes the mixture's weights, which count samples (docs/mixing.md): `tokens`
    is a source's share of the tokens, `per_sample` those of its average sample. Shares and weights are relative to
    those of the other sources. Raises ValueError for a share below zero, or samples of no length."""
    if tokens < 0 or per_sample <= 0:
        raise ValueError(f"mix: tokens ({tokens}) must not be negative, and per_sample ({per_sample}) must be positive")
    return round(1000 * tokens / per_sample, 4)


@cache
def _tokenizer(path: str) -> Any:
    from omnitrain.data.chat import ChatTokenizer

    return ChatTokenizer.from_file(path)


@cache
def _geometry(folder: str) -> Any:
    from omnitrain.interop.public_config import read_config
    from omnitrain.interop.public_files import public_geometry

    audio, vision = public_geometry(Path(folder), read_config(folder, speech=False)[0])
    return SimpleNamespace(audio=audio, vision=vision)


def _codec_size(name: str | None, field: str, otherwise: Any) -> Any:
    from omnitrain.config.codec_sizes import codec_size

    return codec_size(name, field, otherwise)


def register_resolvers() -> None:
    """Tell OmegaConf about them. Can be called again."""
    resolvers = {
        "pack": lambda: str(PACK),
        "pack_speech": lambda: str(PACK_SPEECH),
        "pack_announcements": lambda: str(PACK_ANNOUNCEMENTS),
        "sample_weight": sample_weight,
        "sum": lambda a, b: a + b,
        "codec_vocabulary": lambda name, codebook_size: codec_vocabulary(codebook_size)[name],
        "codec_size": lambda name, field, otherwise: otherwise if name is None else _codec_size(name, field, otherwise),
        "half": lambda number: number // 2,
        "vocab_size": lambda path: _tokenizer(str(path)).vocab_size,
        "public": lambda folder, field: attrgetter(field)(_geometry(str(folder))),
        "special_tokens": lambda path: dict(_tokenizer(str(path)).special_ids),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"omnitrain.{name}", resolver, replace=True)
