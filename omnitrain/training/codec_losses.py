"""What the codec minimises: distances of spectrograms and waveforms, what discriminators say, words in codebook 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnitrain.models.discriminators import Opinion
from omnitrain.models.layers.ctc import ByteHead, ctc_losses
from omnitrain.models.layers.mel import log10_mel, mel_bank
from omnitrain.models.layers.precision import full_precision

Opinions = Sequence[Opinion]
"""What each of `Discriminators` says of the same audio."""


class MelDistance(nn.Module):
    """Mean absolute difference of log10-mel spectrograms, mean over resolutions.

    As in Kumar et al. 2023 (arXiv 2306.06546, section 3.4): short windows see attacks, long ones harmonics.
    """

    def __init__(self, sample_rate: int, windows: Sequence[int], n_mels: Sequence[int], floor: float = 1e-5) -> None:
        super().__init__()
        self.windows, self.floor = tuple(windows), floor
        for window, bands in zip(windows, n_mels, strict=True):
            self.register_buffer(f"bank_{window}", mel_bank(window, bands, sample_rate), persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def log_mel(self, wav: Tensor, window: int) -> Tensor:
        """wav [B, S] -> log10 mel amplitudes [B, T, M]"""
        spectrum = torch.stft(
            wav, window, window // 4, window=self.get_buffer(f"hann_{window}"), return_complex=True, pad_mode="constant"
        )
        return log10_mel(spectrum.transpose(1, 2), self.get_buffer(f"bank_{window}"), self.floor)

    def forward(self, wav: Tensor, target: Tensor) -> Tensor:
        """wav, target [B, S] -> scalar, in powers of ten of amplitude (1 is 20 dB); in fp32 also under autocast"""
        with full_precision(wav):
            wav, target = wav.float(), target.float()
            distances = [(self.log_mel(wav, w) - self.log_mel(target, w)).abs().mean() for w in self.windows]
            return torch.stack(distances).mean()


def gan_discriminator_loss(real: Opinions, fake: Opinions) -> Tensor:
    """What the discriminators minimise: the hinge loss (Lim & Ye 2017, arXiv 1705.02894), mean over discriminators.

        max(0, 1 - D(x)) + max(0, 1 + D(G(x)))

    `fake` is of detached audio: the generator learns from `gan_generator_loss` alone.
    """
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for (r, _), (f, _) in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def gan_generator_loss(fake: Opinions) -> Tensor:
    """What the codec minimises against them: -D(G(x)), mean over discriminators (Lim & Ye 2017, arXiv 1705.02894)."""
    return torch.stack([-f.mean() for f, _ in fake]).mean()


def feature_magnitudes(real: Opinions) -> Tensor:
    """[L]: mean |D_l(x)| of each layer of each discriminator."""
    return torch.stack([layer.detach().abs().mean() for _, layers in real for layer in layers])


def feature_matching_loss(real: Opinions, fake: Opinions, magnitudes: Tensor | None = None) -> Tensor:
    """Mean over discriminators and layers of |D_l(x) - D_l(G(x))| / mean |D_l(x)| (Kumar et al. 2019, arXiv 1910.06711;
    scaled as in EnCodec, arXiv 2210.13438, section 3.4). `magnitudes` [L]: `feature_magnitudes` of a larger batch
    that this one is a part of."""
    magnitudes = feature_magnitudes(real) if magnitudes is None else magnitudes
    distances = [
        (a.detach() - b).abs().mean()
        for (_, fa), (_, fb) in zip(real, fake, strict=True)
        for a, b in zip(fa, fb, strict=True)
    ]
    return (torch.stack(distances) / magnitudes.clamp(min=1e-6)).mean()


def codebook_users(n_used: Tensor, quantizers: int) -> Tensor:
    """fp32 [Q]: how many of the samples use each codebook, of int64 [B] codebooks in use."""
    return (torch.arange(quantizers, device=n_used.device)[:, None] < n_used).float().sum(dim=1)


def rvq_commitment_loss(given: Tensor, chosen: Tensor, n_used: Tensor, users: Tensor | None = None) -> Tensor:
    """What holds the encoder to its codes (van den Oord et al. 2017, arXiv 1711.00937, eq. 3; residual: SoundStream,
    arXiv 2107.03312).

        L_q = mean of (r_q - sg[e_q])^2,   r_q = z - sum_{p < q} sg[e_p]

    over the samples that use codebook q; 0 where none does. The gradient goes to the latents z alone: the codebooks are
    moving averages.

    Args:
        given: r, fp32 [Q, B, T, d].  chosen: e, the same shape.  n_used: int64 [B], codebooks in use (see `Quantized`).
        users: fp32 [Q], by how many samples the sums are divided, by default `codebook_users(n_used, Q)`.

    Returns:
        fp32 [Q]
    """
    used = torch.arange(len(given), device=given.device)[:, None] < n_used  # [Q, B]
    distance = (given - chosen).square().mean(dim=(2, 3))
    users = codebook_users(n_used, len(given)) if users is None else users
    return (distance * used).sum(dim=1) / torch.where(users > 0, users, 1)


class ContentHead(nn.Module):
    """Reads the spoken text off codebook 0, trained by CTC (Graves 2006).

    What this head can read, codebook 0 carries, so that it becomes the *semantic* codebook without a teacher model.
    `dim` is the width of codebook 0's vectors.
    """

    def __init__(self, dim: int, slots: int = 3, width: int = 256) -> None:
        super().__init__()
        # The text of a sound needs its neighbours, but the codes shall still carry it: one narrow convolution.
        self.context = nn.Conv1d(dim, width, 3, padding=1)
        self.out = ByteHead(width, slots)

    def log_probs(self, semantic: Tensor) -> Tensor:
        """semantic [B, T, dim] -> [B, T * slots, 257]"""
        x = F.gelu(self.context(semantic.transpose(1, 2))).transpose(1, 2)
        return self.out(x)

    def forward(self, semantic: Tensor, spans: Sequence[tuple[int, int, int, str]]) -> tuple[Tensor, int]:
        """CTC loss of semantic [B, T, dim]: nats, and the bytes of text that they are of. `spans`: (row, first frame,
        end frame, text) of each whole utterance; those with more bytes than slots are left out."""
        log_probs, slots = self.log_probs(semantic), self.out.slots
        targets = [list(text.lower().encode()) for *_, text in spans]
        found = ctc_losses([log_probs[row, a * slots : b * slots] for row, a, b, _ in spans], targets)
        losses = [loss for loss in found if loss is not None]
        n_bytes = sum(len(target) for loss, target in zip(found, targets, strict=True) if loss is not None)
        return (torch.stack(losses).sum() if losses else semantic.new_zeros(())), n_bytes


def si_sdr(wav: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, arXiv 1811.02508). [B, S] -> [B]"""
    wav, target = wav - wav.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)
    scale = (wav * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=1e-8)
    projected = scale * target
    ratio = projected.square().sum(-1) / (wav - projected).square().sum(-1).clamp(min=1e-8)
    return 10 / math.log(10) * ratio.clamp(min=1e-8).log()
