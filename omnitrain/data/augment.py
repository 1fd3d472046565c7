"""Recordings as they might also have sounded: another speed, noise, a room.

What is drawn is a function of the seed and the sample's place in the stream, so that a resumed run hears the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import add_noise, fftconvolve, speed

from omnitrain.data.batch import EncodedSample
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import Sample, Segment
from omnitrain.data.settings import AugmentConfig


@dataclass(frozen=True, kw_only=True)
class AugmentingEncoder:
    """A `SampleEncoder` of training whose recordings are changed anew at each place of the stream."""

    encoder: SampleEncoder
    config: AugmentConfig
    seed: int

    def at(self, source: int, position: int) -> Callable[[Sample, Callable[[Segment], bytes]], EncodedSample]:
        """The encoder for the sample at place `position` of source number `source`."""

        def changed(wave: np.ndarray, sample_rate: int) -> np.ndarray:
            return augment(wave, sample_rate, self.config, random.Random(f"{self.seed}/{source}/{position}"))

        return replace(self.encoder, augment=changed)


def augment(wave: np.ndarray, sample_rate: int, config: AugmentConfig, draw: random.Random) -> np.ndarray:
    """wave float32 [T] at `sample_rate` Hz -> [T'], as `draw` decides. What would grow louder than 1 is turned down."""
    x = torch.from_numpy(wave)
    factor = draw.choice(config.speeds)
    if factor != 1:
        x = speed(x, sample_rate, factor)[0]
    generator = torch.Generator().manual_seed(draw.getrandbits(62))
    if draw.random() < config.room_share:
        echo = room(draw.uniform(*config.room_seconds), sample_rate, generator)
        whole = fast_length(len(x) + len(echo) - 1) + 1 - len(echo)  # of x, with silence behind it
        x = fftconvolve(torch.nn.functional.pad(x, (0, whole - len(x))), echo)[: len(x)]
    if draw.random() < config.noise_share:
        noise = coloured_noise(len(x), draw.uniform(0, 2), generator)
        x = add_noise(x, noise, torch.tensor(draw.uniform(*config.noise_snr)))
    peak = float(x.abs().max()) if len(x) else 0.0
    return (x / max(1.0, peak)).numpy()


def room(seconds: float, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Impulse response [seconds * sample_rate] of a room: the direct sound, and noise that falls by 60 dB in `seconds`
    (Polack 1988), of the same energy or less."""
    n = max(2, round(seconds * sample_rate))
    tail = torch.randn(n, generator=generator) * 10 ** (-3 * torch.arange(n) / n)
    energy = float(torch.rand((), generator=generator))
    response = tail / tail.norm() * energy**0.5
    response[0] = 1.0
    return response


def coloured_noise(samples: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Noise [samples] whose power falls with frequency as f ** -exponent: 0 white, 1 pink, 2 brown."""
    n = fast_length(samples)
    spectrum = torch.fft.rfft(torch.randn(n, generator=generator))
    frequency = torch.arange(len(spectrum)).clamp(min=1).float()
    return torch.fft.irfft(spectrum * frequency ** (-exponent / 2), n=n)[:samples]


def fast_length(n: int) -> int:
    """`n` or a little more (an eighth at most): 8 to 16 times a power of two. A Fourier transform of such a length is
    four times as fast as one whose length has large primes."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step
