"""Log-mel amplitudes: what the codec's encoder may read, and what its training compares."""

from __future__ import annotations

from torch import Tensor
from torchaudio.functional import melscale_fbanks


def mel_bank(window: int, bands: int, sample_rate: int) -> Tensor:
    """Slaney's filters from 0 to half the sample rate, fp32 [window // 2 + 1, bands]."""
    return melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney", mel_scale="slaney")


def log10_mel(spectrum: Tensor, bank: Tensor, floor: float = 1e-5) -> Tensor:
    """Complex spectra [..., window // 2 + 1] -> log10 of mel amplitudes, at least `floor`, [..., bands]."""
    # sqrt has no gradient at 0: silence is common in speech.
    amplitude = (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-12).sqrt()
    return (amplitude @ bank).clamp(min=floor).log10()
