"""What the codec minimises: distances of spectrograms and waveforms, the judges' verdicts, the words in codebook 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

Judgement = list[tuple[Tensor, list[Tensor]]]
"""Per judge: score map, features (`Discriminators.forward`)."""


class MelDistance(nn.Module):
    """Mean absolute difference of log10-mel spectrograms, mean over resolutions.

    As in Kumar et al. 2023 (arXiv 2306.06546, section 3.4): short windows judge attacks, long ones harmonics.
    """

    def __init__(self, sample_rate: int, windows: Sequence[int], n_mels: Sequence[int], floor: float = 1e-5) -> None:
        super().__init__()
        self.windows, self.floor = tuple(windows), floor
        for window, bands in zip(windows, n_mels, strict=True):
            bank = melscale_fbanks(
                window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney", mel_scale="slaney"
            )
            self.register_buffer(f"bank_{window}", bank, persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def log_mel(self, wav: Tensor, window: int) -> Tensor:
        """wav [B, S] -> log10 mel amplitudes [B, T, M]"""
        spectrum = torch.stft(
            wav, window, window // 4, window=self.get_buffer(f"hann_{window}"), return_complex=True, pad_mode="constant"
        )
        # sqrt has no gradient at 0: silence is common in speech.
        amplitude = (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-12).sqrt()
        return (amplitude.transpose(1, 2) @ self.get_buffer(f"bank_{window}")).clamp(min=self.floor).log10()

    def forward(self, wav: Tensor, target: Tensor) -> Tensor:
        """wav, target [B, S] -> scalar, in powers of ten of amplitude (1 is 20 dB)"""
        distances = [(self.log_mel(wav, w) - self.log_mel(target, w)).abs().mean() for w in self.windows]
        return torch.stack(distances).mean()


def judge_loss(real: Judgement, fake: Judgement) -> Tensor:
    """Hinge loss of the judges (Lim & Ye 2017, arXiv 1705.02894), mean over judges. `fake` must be detached audio."""
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for (r, _), (f, _) in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def generator_losses(real: Judgement, fake: Judgement) -> tuple[Tensor, Tensor]:
    """The generator's hinge loss, and feature matching: mean absolute difference of the judges' features relative to
    the mean size of the real ones (Kumar et al. 2019, arXiv 1910.06711; scaled as in EnCodec)."""
    hinge = torch.stack([-f.mean() for f, _ in fake]).mean()
    matching = [
        (a.detach() - b).abs().mean() / a.detach().abs().mean().clamp(min=1e-6)
        for (_, fa), (_, fb) in zip(real, fake, strict=True)
        for a, b in zip(fa, fb, strict=True)
    ]
    return hinge, torch.stack(matching).mean()


class ContentHead(nn.Module):
    """Reads the spoken text off codebook 0: `slots` UTF-8 bytes (or blanks) per frame, trained by CTC (Graves 2006).

    What this head can read, codebook 0 carries, so that it becomes the *semantic* codebook without a teacher model.
    Speech has some 15 letters a second and a frame is 80 ms: one slot per frame would be too few.

    Args:
        dim: width of codebook 0's vectors.
    """

    BLANK = 256

    def __init__(self, dim: int, slots: int = 3, width: int = 256) -> None:
        super().__init__()
        self.slots = slots
        # The text of a sound needs its neighbours, but the codes shall still carry it: one narrow convolution.
        self.context = nn.Conv1d(dim, width, 3, padding=1)
        self.out = nn.Linear(width, slots * 257)

    def log_probs(self, semantic: Tensor) -> Tensor:
        """semantic [B, T, dim] -> [B, T * slots, 257]"""
        x = F.gelu(self.context(semantic.transpose(1, 2))).transpose(1, 2)
        return self.out(x).unflatten(-1, (self.slots, 257)).flatten(1, 2).log_softmax(-1)

    def forward(self, semantic: Tensor, spans: Sequence[tuple[int, int, int, str]]) -> Tensor | None:
        """CTC loss in nats per byte of text.

        Args:
            semantic: [B, T, dim].
            spans: (row, first frame, end frame, text) of each whole utterance. Those with more bytes than slots are
                left out.

        Returns:
            scalar, or None if there is no text.
        """
        log_probs = self.log_probs(semantic)
        losses, n_bytes = [], 0
        for row, start, end, text in spans:
            target = list(text.lower().encode())
            repeats = sum(a == b for a, b in pairwise(target))
            if not target or len(target) + repeats > (end - start) * self.slots:
                continue
            emitted = log_probs[row, start * self.slots : end * self.slots].unsqueeze(1)
            labels = torch.tensor([target], dtype=torch.int64, device=semantic.device)
            lengths = torch.tensor([emitted.shape[0]]), torch.tensor([len(target)])
            losses.append(F.ctc_loss(emitted, labels, *lengths, blank=self.BLANK, reduction="sum"))
            n_bytes += len(target)
        return torch.stack(losses).sum() / n_bytes if losses else None


def si_sdr(wav: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, arXiv 1811.02508). [B, S] -> [B]"""
    wav, target = wav - wav.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)
    scale = (wav * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=1e-8)
    projected = scale * target
    ratio = projected.square().sum(-1) / (wav - projected).square().sum(-1).clamp(min=1e-8)
    return 10 / math.log(10) * ratio.clamp(min=1e-8).log()
