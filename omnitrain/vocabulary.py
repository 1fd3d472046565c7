"""What data and models call by the same numbers: kinds of positions, and the special codes of the Talker."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
"""Values of `token_types`: what stands at a position. Encoder outputs are scattered to IMAGE/VIDEO/AUDIO positions."""


@dataclass(frozen=True, kw_only=True)
class SpecialCodes:
    """Special codes of the Talker, numbered behind the codes of codebook 0, 0 .. codebook_size - 1."""

    codebook_size: int
    codec_pad: int
    codec_bos: int
    codec_eos: int
    codec_nothink: int
    codec_think_bos: int
    codec_think_eos: int

    def special_codes(self) -> dict[str, Any]:
        """The fields of this class, by name."""
        return {f.name: getattr(self, f.name) for f in fields(SpecialCodes)}
