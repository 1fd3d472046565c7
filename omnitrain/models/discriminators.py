"""Discriminators of waveforms, training aids of the codec: no public checkpoint has them.

Two kinds, because each hears what the other misses: folded waveforms show periodic errors (pitch, buzz), complex
spectrograms at several resolutions show smeared harmonics and missing noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from omnitrain.models.sizes import DiscriminatorConfig

Opinion = tuple[Tensor, list[Tensor]]
"""Score map, and the features of each layer."""


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample side by side (HiFi-GAN, Kong et al. 2020, arXiv 2010.05646, section 2.3)."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        channels = [1, *(width * min(2**i, 16) for i in range(4))]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0))) for a, b in pairwise(channels)
        )
        self.out = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> Opinion:
        """wav [B, S] -> score map, features of each layer"""
        wav = F.pad(wav, (0, -wav.shape[-1] % self.period), mode="reflect")
        x = rearrange(wav, "b (t p) -> b 1 t p", p=self.period)
        return _opinion(x, self.convs, self.out, 0.1)


class STFTDiscriminator(nn.Module):
    """Looks at the complex spectrogram (EnCodec, Défossez et al. 2022, arXiv 2210.13438, section 3.4)."""

    hann: Tensor

    def __init__(self, window: int, width: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        convs = [nn.Conv2d(2, width, (3, 9), padding=(1, 4))]
        for dilation in (1, 2, 4):
            convs.append(nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4)))
        convs.append(nn.Conv2d(width, width, (3, 3), padding=(1, 1)))
        self.convs = nn.ModuleList(weight_norm(conv) for conv in convs)
        self.out = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)))

    def forward(self, wav: Tensor) -> Opinion:
        """wav [B, S] -> score map, features of each layer"""
        spectrum = torch.stft(
            wav, self.window, self.window // 4, window=self.hann, normalized=True, return_complex=True
        )
        x = rearrange(torch.view_as_real(spectrum), "b f t c -> b c t f")
        return _opinion(x, self.convs, self.out, 0.2)


def _opinion(x: Tensor, convs: Iterable[nn.Module], out: nn.Module, slope: float) -> Opinion:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), slope)
        features.append(x)
    return out(x), features


class Discriminators(nn.ModuleList):
    """All of them. `forward(wav [B, S])` gives each one's score map and features.

    Initial weights keep the size of what passes (He et al. 2015, arXiv 1502.01852), biases are 0. PyTorch's own make it
    a hundredth, so that for hundreds of steps nothing is told apart.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__(
            [PeriodDiscriminator(period, config.period_width) for period in config.periods]
            + [STFTDiscriminator(window, config.stft_width) for window in config.stft_windows]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight = torch.empty_like(module.weight)
                module.weight = nn.init.kaiming_normal_(weight, a=0.15)  # the weight norm takes it apart
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, wav: Tensor) -> list[Opinion]:
        return [discriminator(wav) for discriminator in self]
