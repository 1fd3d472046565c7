"""The codec: waveform <-> 16 codes a frame at 12.5 frames a second, 24 kHz (after Mimi: Défossez et al., 2024,
arXiv 2410.00037).

A causal encoder makes one latent of every 1920 samples, a split residual quantizer makes codes of the latent, and the
decoder is a `Code2Wav`, so that a trained codec is at the same time the last part of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omnitrain.models.code2wav import Code2Wav, Code2WavState
from omnitrain.models.layers.causal_conv import CausalConv1d, ConvState, StreamingModule, init_states, step_through
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.mel import log10_mel, mel_bank
from omnitrain.models.layers.precision import full_precision
from omnitrain.models.layers.wave import (
    DILATIONS,
    Chain,
    ConvNeXtBlock,
    ResidualUnit,
    SlidingWindowTransformer,
    SnakeBeta,
)
from omnitrain.models.sizes import CodecConfig


class EncoderBlock(Chain):
    """Three residual units, then downsampling by `rate` to twice the channels: [B, C, T] -> [B, 2 C, T / rate]."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__(
            *[ResidualUnit(channels, dilation) for dilation in DILATIONS],
            SnakeBeta(channels),
            CausalConv1d(channels, 2 * channels, 2 * rate, stride=rate),
        )


@cache
def _window_and_bank(window: int, bands: int, sample_rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hann window [window] and Slaney's mel filters [window // 2 + 1, bands]. No buffers: a model that is built on the
    meta device has them too."""
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.hann_window(window).to(device), mel_bank(window, bands, sample_rate).to(device)


class CausalLogMel(StreamingModule):
    """Log-mel spectrogram of samples up to and with the present hop: [B, 1, samples] -> [B, bands, samples / hop].

    Column i is of the `4 * hop` samples (Hann) up to (i + 1) * hop - 1; bands as Slaney's, from 0 to half the sample
    rate; log10 of amplitudes, at least 1e-5, plus 2, so that speech lies around 0.
    """

    def __init__(self, bands: int, hop: int, sample_rate: int = 24_000) -> None:
        super().__init__()
        self.bands, self.hop, self.window, self.sample_rate = bands, hop, 4 * hop, sample_rate

    def forward(self, x: Tensor) -> Tensor:
        return self._columns(F.pad(x, (self.window - self.hop, 0)))

    def init_state(self, batch: int) -> ConvState:
        return ConvState(torch.zeros(batch, 1, self.window - self.hop))  # no weights say where; the first piece does

    def step(self, x: Tensor, state: ConvState) -> Tensor:
        if x.shape[-1] == 0:
            return x.new_zeros(len(x), self.bands, 0)
        state.context = state.context.to(x)
        return self._columns(state.extend(x))

    def _columns(self, x: Tensor) -> Tensor:
        with full_precision(x):
            hann, bank = _window_and_bank(self.window, self.bands, self.sample_rate, x.device)
            frames = x[:, 0].float().unfold(-1, self.window, self.hop) * hann
            mel = log10_mel(torch.fft.rfft(frames), bank) + 2
        return rearrange(mel, "b t m -> b m t").to(x.dtype)


class CodecEncoder(nn.Module):
    """Waveform [B, samples] -> latents [B, samples / 1920, D], each from present and past samples only.

    Code2Wav in a mirror: a convolution, blocks that downsample by `downsample_rates`, a convolution to width D,
    ConvNeXt blocks with downsamplings by `downsampling_ratios`, and a sliding-window transformer over frames. With
    `mel_bands` a log-mel spectrogram stands for the blocks: nothing has to learn what a frequency is, and the encoder
    costs a fraction.

    Initial weights: as those of `Code2Wav`.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        channels, d = config.encoder_dim, config.decoder.d_model
        stages: list[StreamingModule]
        if config.mel_bands:
            stages = [CausalLogMel(config.mel_bands, math.prod(config.downsample_rates))]
            stages.append(CausalConv1d(config.mel_bands, d, 7))
        else:
            stages = [CausalConv1d(1, channels, 7)]
            for rate in config.downsample_rates:
                stages.append(EncoderBlock(channels, rate))
                channels *= 2
            stages += [SnakeBeta(channels), CausalConv1d(channels, d, 7)]
        for ratio in config.downsampling_ratios:
            stages += [ConvNeXtBlock(d) for _ in range(config.blocks)]
            stages.append(CausalConv1d(d, d, 2 * ratio, stride=ratio))
        self.stages = nn.ModuleList(stages)
        self.transformer = SlidingWindowTransformer(config, d)
        self.activation_checkpointing = False

    def forward(self, wav: Tensor) -> Tensor:
        """[B, samples] -> [B, T, D]. ValueError if the samples are no whole number of frames."""
        self._check(wav)
        first, *stages = self.stages
        with full_precision(wav):  # in 16 bit, 8 bits of sound would enter
            x = first(wav[:, None])
        for stage in stages:
            x = run(stage, x, checkpointed=self.activation_checkpointing)
        return self.transformer(rearrange(x, "b d t -> b t d"), checkpointed=self.activation_checkpointing)

    def init_state(self, batch: int) -> Code2WavState:
        """The state of `batch` streams before their first sample."""
        return Code2WavState(self.transformer.init_state(batch), init_states(self.stages, batch))

    def step(self, wav: Tensor, state: Code2WavState) -> Tensor:
        """The next whole frames of samples [B, t * 1920] -> their latents [B, t, D]; raises as `forward`."""
        self._check(wav)
        x = step_through(self.stages, wav[:, None], state.stages)
        return self.transformer.step(rearrange(x, "b d t -> b t d"), state.transformer)

    def _check(self, wav: Tensor) -> None:
        size = self.config.samples_per_frame
        if wav.ndim != 2 or wav.shape[1] % size:
            raise ValueError(f"wav has shape {tuple(wav.shape)}; expected [batch, a multiple of {size} samples]")


@dataclass(frozen=True)
class Quantized:
    """What the quantizer makes of latents [B, T, D].

    quantized: [B, T, D], the sum over the codebooks in use; its gradient passes to the latents as if nothing had been
        rounded (straight through). In training, of a share of the samples nothing is (`CodecConfig.unquantized`).
    codes: int64 [B, T, Q], of all codebooks, whether in use or not.
    semantic: [B, T, D], the share of codebook 0 in `quantized`, for a loss that gives it its meaning.
    n_used: int64 [B], codebooks from the first that `quantized` sums, where it is rounded.
    given, chosen: fp32 [Q, B, T, d], what each codebook was given (with a gradient to the latents) and its nearest
        vectors, for a loss that holds the two together.
    histogram: int64 [Q, K], how often each code was chosen. Histograms of batches and ranks may be added up.
    """

    quantized: Tensor
    codes: Tensor
    semantic: Tensor
    n_used: Tensor
    given: Tensor
    chosen: Tensor
    histogram: Tensor


class Codebooks(nn.Module):
    """`n` codebooks on one projection of the latents, each on what the ones before it left over.

    The codebooks are moving averages, not parameters (van den Oord et al., 2017, arXiv 1711.00937, appendix A.1): with
    n_k vectors of sum s_k assigned to code k in a batch,

        N_k <- decay N_k + (1 - decay) n_k,   m_k <- decay m_k + (1 - decay) s_k,
        e_k = m_k / N'_k,   N'_k = (N_k + eps) / (sum N + K eps) * sum N.

    `forward` reads them and notes what they were given; `update` moves them, once the step is known to be a good one.
    The first batch in training mode sets them by k-means. After each update, a code of which N_k is less than
    `revive_below` times the mean becomes a vector of the batch, drawn at random, with the mean as its count; on a first
    batch of fewer vectors than codes, this is also what fills the codebook in the batches that follow.

    In a process group, sums and counts are those of all ranks, and so are the vectors that are drawn from: two
    processes have the codebooks of one with both their batches, if rank 0 draws as it does. All ranks call in step.
    """

    EPS = 1e-5

    codebooks: Tensor
    counts: Tensor
    sums: Tensor
    initialised: Tensor

    def __init__(self, config: CodecConfig, n: int) -> None:
        super().__init__()
        self.config = config
        self.n = n
        k, d = config.decoder.codebook_size, config.codebook_dim
        self.input_proj = nn.Linear(config.decoder.d_model, d, bias=False)
        self.output_proj = nn.Linear(d, config.decoder.d_model, bias=False)
        self.register_buffer("codebooks", torch.zeros(n, k, d))
        self.register_buffer("counts", torch.zeros(n, k))
        self.register_buffer("sums", torch.zeros(n, k, d))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self._noted: tuple[Tensor, Tensor] | None = None

    def forward(self, latent: Tensor, n_used: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """latent [B, T, D], n_used int64 [B] of these codebooks -> quantized [B, T, D], codes int64 [B, T, n], given
        and chosen fp32 [n, B, T, d], histogram int64 [n, K]. In training mode, what `update` needs is noted."""
        z = self._project(latent)
        if self.training and not self.initialised:
            self._initialise(rearrange(z.detach(), "b t d -> (b t) d"), generator)
        codes, residuals, chosen = self._assign(z)
        used = torch.arange(self.n, device=z.device)[:, None] < n_used  # [n, B]

        # What codebook i was given is z less what the ones before it made; only z has a gradient.
        given = z + (residuals - z.detach())  # [n, B, T, d]
        total = (chosen * used[:, :, None, None]).sum(dim=0)
        straight = z + (total - z).detach()
        # A sample that uses none of these codebooks gets nothing from them, and gives their projection no gradient.
        straight = straight * (n_used > 0)[:, None, None]
        histogram = torch.stack([torch.bincount(c.flatten(), minlength=self.counts.shape[1]) for c in codes.unbind(-1)])
        if self.training:
            self._noted = rearrange(residuals, "n b t d -> n (b t) d"), rearrange(codes, "b t n -> n (b t)")
        return self._expand(straight), codes, given, chosen, histogram

    def unrounded(self, latent: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]: what `forward` would give if every vector were a code."""
        return self._expand(self._project(latent))

    def encode(self, latent: Tensor) -> Tensor:
        """[B, T, D] -> int64 [B, T, n]"""
        return self._assign(self._project(latent))[0]

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, T, <= n] -> [B, T, D]"""
        n = codes.shape[-1]
        index = torch.arange(n, device=codes.device)
        return self._expand(self.codebooks[index, codes].sum(dim=2))

    def tables(self) -> Tensor:
        """fp64 [n, K, D], on the CPU: what each code adds to the quantized latent. There, sums of products of numbers
        that fp16 holds are exact: such weights give the same table, and fingerprint, on every machine."""
        return self.codebooks.cpu().double() @ self.output_proj.weight.detach().cpu().double().T

    def _project(self, latent: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., d]: distances and averages are in fp32, whatever the model's precision."""
        with full_precision(latent):
            return self.input_proj(latent.to(self.input_proj.weight.dtype)).float()

    def _expand(self, z: Tensor) -> Tensor:
        """[..., d] -> [..., D], in the precision of the weights."""
        with full_precision(z):
            return self.output_proj(z.to(self.output_proj.weight.dtype))

    @torch.no_grad()
    def _assign(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest codes of z [B, T, d]: codes [B, T, n], what each codebook was given and chose, both [n, B, T, d]."""
        residual, codes, residuals, chosen = z.detach(), [], [], []
        for codebook in self.codebooks.float().unbind(0):
            residuals.append(residual)
            codes.append(nearest(residual, codebook))
            chosen.append(F.embedding(codes[-1], codebook))
            residual = residual - chosen[-1]
        return torch.stack(codes, dim=-1), torch.stack(residuals), torch.stack(chosen)

    @torch.no_grad()
    def _initialise(self, x: Tensor, generator: torch.Generator | None) -> None:
        """k-means (Lloyd) on x [N, d] and on what is left of it, from vectors of x drawn at random."""
        for i in range(self.n):
            drawn = _draw(len(x), self.counts.shape[1], x.device, generator)
            codebook = _vectors_of_all_ranks(x, drawn)
            for _ in range(self.config.kmeans_steps):
                counts, sums = self._sums(x, nearest(x, codebook))
                codebook = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), codebook)
            code = nearest(x, codebook)
            counts, sums = self._sums(x, code)
            self.codebooks[i], self.counts[i], self.sums[i] = codebook, counts, sums
            x = x - F.embedding(code, codebook)

    def _sums(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors assigned to each code and their sums over all ranks, for x [..., N, d] and codes [..., N]."""
        one_hot = F.one_hot(codes, self.counts.shape[1]).to(x.dtype)
        with full_precision(x):  # a product, since adding in place has no fixed order on CUDA
            counts, sums = one_hot.sum(dim=-2), one_hot.transpose(-1, -2) @ x
        both = _sum_over_ranks(torch.cat([counts[..., None], sums], dim=-1))
        return both[..., 0], both[..., 1:]

    @torch.no_grad()
    def update(self, generator: torch.Generator | None = None) -> None:
        """One step of the moving averages, from what the last `forward` in training mode was given and chose. Without
        it that batch has left no trace, but for the first one: the next sets the codebooks again."""
        if self._noted is None:
            raise RuntimeError("Codebooks.update: no forward pass in training mode since the last update")
        (x, codes), self._noted = self._noted, None  # [n, N, d] and [n, N]
        self.initialised.fill_(True)
        decay = self.config.decay
        counts, sums = self._sums(x, codes)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        total = self.counts.sum(dim=1, keepdim=True)
        smoothed = (self.counts + self.EPS) / (total + self.counts.shape[1] * self.EPS) * total
        self.codebooks.copy_(self.sums / smoothed[..., None])

        mean = total / self.counts.shape[1]  # [n, 1]
        dead = self.counts < self.config.revive_below * mean
        if dead.any():
            drawn = _draw(x.shape[1], self.counts.shape[1], x.device, generator)
            vectors = rearrange(_vectors_of_all_ranks(rearrange(x, "n m d -> m n d"), drawn), "k n d -> n k d")
            self.codebooks.copy_(torch.where(dead[..., None], vectors, self.codebooks))
            self.counts.copy_(torch.where(dead, mean, self.counts))
            self.sums.copy_(torch.where(dead[..., None], vectors * mean[..., None], self.sums))


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index int64 [...] of the row of codebook [K, d] next to each x [..., d]."""
    with full_precision(x):
        return (codebook.square().sum(dim=1) - 2 * x @ codebook.T).argmin(dim=-1)


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_ranks(x: Tensor) -> Tensor:
    if _grouped():
        torch.distributed.all_reduce(x)
    return x


def _draw(n_local: int, k: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """k random positions among the vectors of all ranks, equal on all of them; none twice before all were drawn."""
    n = int(_sum_over_ranks(torch.tensor(n_local, device=device)))
    order = torch.randperm(n, generator=generator, device=generator.device if generator else "cpu").to(device)
    index = order[torch.arange(k, device=device) % n]
    if _grouped():
        torch.distributed.broadcast(index, src=0)
    return index


def _vectors_of_all_ranks(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [k] of the ranks' x [N, ...] laid end to end: [k, ...]."""
    start = 0
    if _grouped():
        lengths = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=x.device)
        lengths[torch.distributed.get_rank()] = len(x)
        start = int(_sum_over_ranks(lengths)[: torch.distributed.get_rank()].sum())
    here = (index >= start) & (index < start + len(x))
    rows = x[(index - start).clamp(0, len(x) - 1)]
    return _sum_over_ranks(torch.where(here.view(-1, *[1] * (x.ndim - 1)), rows, 0))


def check_codes(codes: Tensor, quantizers: int, size: int) -> None:
    """ValueError unless codes are [B, T, n] of 1 <= n <= quantizers codebooks of `size` codes each."""
    if codes.ndim != 3 or not 1 <= codes.shape[2] <= quantizers:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; expected [batch, frames, 1 to {quantizers}]")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes lie in {int(codes.min())}..{int(codes.max())}; those of a codebook in 0..{size - 1}")


class ResidualVectorQuantizer(nn.Module):
    """Mimi's split quantizer: codebook 0 (semantic) and the residual codebooks 1 to Q - 1 (acoustic) each read the
    latent through a projection of their own, and their outputs are summed (arXiv 2410.00037, section 3.3).

    In training a share `dropout` of the samples is decoded from the first 1 to Q codebooks, drawn per sample
    (SoundStream, arXiv 2107.03312), so that fewer codes still give sound, and a share `unquantized` from latents that
    nothing rounded (as Mimi's, section 3.3): a codec that starts to learn learns sounds before codes.

    Initial weights: the projections as other linear maps; codebooks come from the first batch. All else that matters
    is in the state dict.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.semantic = Codebooks(config, 1)
        self.acoustic = Codebooks(config, config.decoder.quantizers - 1)

    def forward(
        self, latent: Tensor, n_quantizers: int | None = None, generator: torch.Generator | None = None
    ) -> Quantized:
        """latent [B, T, D] -> `Quantized`. In use are the first `n_quantizers` codebooks, 1 to Q (default: in training
        mode drawn per sample, otherwise all). Random draws are `generator`'s, by default the CPU's global one."""
        n_used = self._n_used(latent, n_quantizers, generator)
        semantic, *of_semantic = self.semantic(latent, torch.ones_like(n_used), generator)
        acoustic, *of_acoustic = self.acoustic(latent, n_used - 1, generator)
        codes, given, chosen, histogram = zip(of_semantic, of_acoustic, strict=True)
        quantized = semantic + acoustic
        if self.training and self.config.unquantized and n_quantizers is None:
            exact = self.semantic.unrounded(latent) + self.acoustic.unrounded(latent)
            quantized = torch.where(self._spared(latent, generator)[:, None, None], exact, quantized)
        return Quantized(
            quantized=quantized,
            codes=torch.cat(codes, dim=-1),
            semantic=semantic,
            n_used=n_used,
            given=torch.cat(given),
            chosen=torch.cat(chosen),
            histogram=torch.cat(histogram),
        )

    def update(self, generator: torch.Generator | None = None) -> None:
        """Move the codebooks by the last batch in training mode (`Codebooks.update`)."""
        self.semantic.update(generator)
        self.acoustic.update(generator)

    def encode(self, latent: Tensor) -> Tensor:
        """[B, T, D] -> codes int64 [B, T, Q]"""
        return torch.cat([self.semantic.encode(latent), self.acoustic.encode(latent)], dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T, n] of the first n codebooks, 1 <= n <= Q -> [B, T, D]. Raises as `check_codes`."""
        check_codes(codes, self.config.decoder.quantizers, self.config.decoder.codebook_size)
        latent = self.semantic.decode(codes[..., :1])
        return latent + self.acoustic.decode(codes[..., 1:]) if codes.shape[2] > 1 else latent

    def _spared(self, latent: Tensor, generator: torch.Generator | None) -> Tensor:
        """bool [B]: the samples that are decoded unrounded."""
        drawn = torch.rand(len(latent), generator=generator, device=generator.device if generator else "cpu")
        return (drawn < self.config.unquantized).to(latent.device)

    def _n_used(self, latent: Tensor, n_quantizers: int | None, generator: torch.Generator | None) -> Tensor:
        batch, quantizers = len(latent), self.config.decoder.quantizers
        if n_quantizers is not None:
            if not 1 <= n_quantizers <= quantizers:
                raise ValueError(f"n_quantizers is {n_quantizers}; expected 1 to {quantizers}")
            return torch.full((batch,), n_quantizers, device=latent.device)
        n_used = torch.full((batch,), quantizers)
        if self.training and self.config.dropout:
            device = generator.device if generator else torch.device("cpu")
            drawn = torch.randint(1, quantizers + 1, (batch,), generator=generator, device=device)
            dropped = torch.rand(batch, generator=generator, device=device) < self.config.dropout
            n_used = torch.where(dropped, drawn, quantizers)
        return n_used.to(latent.device)


@dataclass(frozen=True)
class CodecOutput(Quantized):
    """What training needs of a waveform [B, samples]: beside the quantizer's output

    wav: [B, samples], the reconstruction, not clamped (shorter if the decoder trims as the public one).
    latent: [B, T, D], before quantization.
    """

    wav: Tensor
    latent: Tensor


class Codec(nn.Module):
    """Encoder, quantizer and decoder; the decoder is a `Code2Wav` that is given quantized latents as its frames.

    Code2Wav's own table of code embeddings is not trained here; `fold_codebooks` makes it from the codebooks.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CodecEncoder(config)
        self.quantizer = ResidualVectorQuantizer(config)
        self.decoder = Code2Wav(config.decoder)
        self.decoder.code_embedding.requires_grad_(False)

    @property
    def samples_per_frame(self) -> int:
        return self.config.samples_per_frame

    @property
    def quantizers(self) -> int:
        return self.config.decoder.quantizers

    @property
    def bits_per_frame(self) -> float:
        """Bits that the codes of one frame hold, stored without further coding."""
        return self.quantizers * math.log2(self.config.decoder.codebook_size)

    def set_activation_checkpointing(self, parts: Collection[str]) -> None:
        """As of `OmniModel`; the parts are `encoder` and `decoder`."""
        self.encoder.activation_checkpointing = "encoder" in parts
        self.decoder.activation_checkpointing = "decoder" in parts

    def forward(self, wav: Tensor, n_quantizers: int | None = None) -> CodecOutput:
        """wav [B, samples] -> `CodecOutput`; `n_quantizers` as of the quantizer, whose `update` moves the codebooks."""
        latent = self.encoder(self._whole_frames(wav))
        quantized = self.quantizer(latent, n_quantizers)
        reconstruction = self.decoder.decode(quantized.quantized, clamp=False)[:, : wav.shape[1]]
        return CodecOutput(**vars(quantized), wav=reconstruction, latent=latent)

    def encode(self, wav: Tensor) -> Tensor:
        """[B, samples] -> codes int64 [B, T, Q], T = samples / 1920 rounded up (zeros fill the last frame)."""
        return self.quantizer.encode(self.encoder(self._whole_frames(wav)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T, n] of the first n codebooks -> waveform [B, samples] within [-1, 1]. Raises as
        `check_codes`."""
        return self.decoder.decode(self.quantizer.decode(codes))

    @torch.no_grad()
    def fold_codebooks(self) -> None:
        """Write Q times what each code adds to the latent into `decoder.code_embedding`: the decoder averages its Q
        embeddings, so `decoder(codes)` then is `decode(codes)` and the decoder can leave without the quantizer."""
        tables = torch.cat([self.quantizer.semantic.tables(), self.quantizer.acoustic.tables()])
        self.decoder.code_embedding.weight.copy_(rearrange(self.config.decoder.quantizers * tables, "q k d -> (q k) d"))

    def _whole_frames(self, wav: Tensor) -> Tensor:
        if wav.ndim != 2 or wav.shape[1] == 0:
            raise ValueError(f"wav has shape {tuple(wav.shape)}; expected [batch, samples], at least one sample")
        return F.pad(wav, (0, -wav.shape[1] % self.config.samples_per_frame))
