"""AuT, the audio encoder: 10-ms mel frames -> 12.5 features a second (Qwen3-Omni report section 2.2).

Parameter names equal those of the public checkpoint below `thinker.audio_tower.`, so weights load without a mapping.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.precision import residual
from omnitrain.models.sizes import AuTConfig

CHUNKS_PER_CONVOLUTION = 64
"""One-second chunks convolved at once: bounds the memory of long recordings (about 12 MB a chunk at full size)."""


class AuTAttention(nn.Module):
    """Multi-head attention inside each window, both directions, no rotary positions."""

    def __init__(self, config: AuTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        q, k, v = (
            rearrange(project(x), "t (h d) -> t h d", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = varlen_attention(q, k, v, cu_seqlens, causal=False)
        return self.out_proj(rearrange(y, "t h d -> t (h d)"))


class AuTLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), with a GELU between the mlp's two matrices."""

    def __init__(self, config: AuTConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn = AuTAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.d_model)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        x = x + self.self_attn(self.self_attn_layer_norm(x), cu_seqlens)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AuTEncoder(nn.Module):
    """Mel frames -> features, for recordings laid end to end.

    1. Every recording is cut into chunks of 1 s (100 frames), the last one shorter, and each chunk goes alone through
       three 3x3 convolutions of stride 2 over (mel, time): 13 columns a second.
    2. A linear map of each column and sinusoid positions 0..12, which start anew in each chunk.
    3. A pre-norm transformer whose attention sees windows of up to `window_frames` (1 to 8 s). With short windows the
       same weights serve streaming; training draws the window's length (report: 1 to 8 s).
    4. LayerNorm and a two-layer projection to the Thinker's width.

    A recording gives the same features alone and among others; no recordings give [0, out_dim]. The columns at the
    end of a short last chunk see zeros in the place of the missing frames; in a recording of less than 1 s, whose only
    chunk is short, they see the convolutions' own zero padding, as in the reference when it encodes that recording
    alone. (The reference pads to the longest chunk of its *batch*, so there the last column of such a recording depends
    on its neighbours. `reference_padding`, off unless set, does the same among the recordings of a call.)
    """

    def __init__(self, config: AuTConfig) -> None:
        super().__init__()
        self.config = config
        c = config.conv_hidden
        self.conv2d1 = nn.Conv2d(1, c, 3, stride=2, padding=1)
        self.conv2d2 = nn.Conv2d(c, c, 3, stride=2, padding=1)
        self.conv2d3 = nn.Conv2d(c, c, 3, stride=2, padding=1)
        self.conv_out = nn.Linear(c * _halved(config.n_mels, 3), config.d_model, bias=False)
        self.layers = nn.ModuleList([AuTLayer(config) for _ in range(config.layers)])
        self.ln_post = nn.LayerNorm(config.d_model)
        self.proj1 = nn.Linear(config.d_model, config.d_model)
        self.proj2 = nn.Linear(config.d_model, config.out_dim)
        self.activation_checkpointing = self.reference_padding = False

    def output_lengths(self, mel_lengths: Tensor) -> Tensor:
        """Features per recording, int64 [A], from mel frames per recording [A]: 13 per full second, 1 to 13 for the
        rest."""
        chunk = self.config.chunk_frames
        return mel_lengths // chunk * _halved(chunk, 3) + _halved(mel_lengths % chunk, 3)

    def forward(self, mel: Tensor, mel_lengths: Tensor, window_frames: int | None = None) -> Tensor:
        """Encode recordings for the Thinker; arguments and errors as in `encode`.

        Returns:
            [T, out_dim], T = `output_lengths(mel_lengths).sum()`, recordings end to end.
        """
        return self.proj2(F.gelu(self.proj1(self.encode(mel, mel_lengths, window_frames))))

    def encode(self, mel: Tensor, mel_lengths: Tensor, window_frames: int | None = None) -> Tensor:
        """Steps 1 to 3 and the LayerNorm: what AuT's own decoder reads. The projection that follows it belongs to the
        Thinker, and is not trained with AuT.

        Args:
            mel: [F, n_mels], log-mel frames of 10 ms, recordings end to end.
            mel_lengths: int64 [A], frames per recording.
            window_frames: attention window in mel frames, a multiple of `chunk_frames`; default: the configuration's.

        Returns:
            [T, d_model], recordings end to end.

        Raises ValueError: if `mel_lengths` does not sum to F, a recording is empty, or the window is no whole number of
        chunks.
        """
        config = self.config
        lengths = mel_lengths.tolist()
        if sum(lengths) != len(mel) or mel.shape[1] != config.n_mels:
            expected = f"[{sum(lengths)}, {config.n_mels}], the sum of mel_lengths by n_mels"
            raise ValueError(f"mel has shape {tuple(mel.shape)}; expected {expected}")
        for i, n in enumerate(lengths):
            if n < 1:
                raise ValueError(f"mel_lengths[{i}] is {n}: a recording without frames")
        chunks_per_window = config.chunks(window_frames or config.window_frames)
        if not lengths:
            return self.ln_post.weight.new_zeros(0, config.d_model)

        x = residual(self._convolve(mel, lengths), self.ln_post)  # [T, D]
        window = chunks_per_window * _halved(config.chunk_frames, 3)
        cu_seqlens = _window_borders(self.output_lengths(mel_lengths).tolist(), window).to(x.device)
        for layer in self.layers:
            x = run(layer, x, cu_seqlens, checkpointed=self.activation_checkpointing)
        return self.ln_post(x)

    def _convolve(self, mel: Tensor, lengths: list[int]) -> Tensor:
        """[F, n_mels] -> [T, D], positions added."""
        size = self.config.chunk_frames
        chunk_lengths, edges = [], []  # per chunk: frames, and where the convolutions' own zero padding begins
        for n in lengths:
            full, rest = divmod(n, size)
            chunk_lengths += [size] * full + [rest] * (rest > 0)
            edge = max(lengths) if self.reference_padding else n
            edges += [min(edge, size)] * (full + (rest > 0))
        length = torch.tensor(chunk_lengths, device=mel.device)
        edge = torch.tensor(edges, device=mel.device) if min(edges) < size else None

        column = torch.arange(size, device=mel.device)
        inside = column < length[:, None]  # [chunks, size]
        source = (length.cumsum(0) - length)[:, None] + column
        frames = mel[source.clamp(max=len(mel) - 1)] * inside[..., None]
        images = rearrange(frames, "n time mel -> n 1 mel time").to(self.conv2d1.weight.dtype)

        parts = images.split(CHUNKS_PER_CONVOLUTION)
        edge_parts = [None] * len(parts) if edge is None else edge.split(CHUNKS_PER_CONVOLUTION)
        columns = torch.cat(
            [
                run(self._three_convolutions, part, edge_part, checkpointed=self.activation_checkpointing)
                for part, edge_part in zip(parts, edge_parts, strict=True)
            ]
        )  # [chunks, 13, D]
        place = torch.arange(columns.shape[1], device=mel.device)
        columns = columns + sinusoids(place, columns.shape[2]).to(columns.dtype)
        kept = place < _halved(length, 3)[:, None]
        return columns[kept]

    def _three_convolutions(self, x: Tensor, edge: Tensor | None) -> Tensor:
        """[chunks, 1, n_mels, frames] -> [chunks, columns, D]; activations at and past `edge` [chunks] are zeroed."""
        for i, convolution in enumerate((self.conv2d1, self.conv2d2, self.conv2d3), start=1):
            x = F.gelu(convolution(x))
            if edge is not None:
                x = x * (torch.arange(x.shape[-1], device=x.device) < _halved(edge, i)[:, None])[:, None, None]
        return self.conv_out(rearrange(x, "n c mel time -> n time (c mel)"))


def _halved(n, times: int):
    """Length (int or tensor) after `times` convolutions of stride 2: halves, rounded up."""
    for _ in range(times):
        n = (n + 1) // 2
    return n


def sinusoids(positions: Tensor, channels: int) -> Tensor:
    """fp32 [N, channels] of positions [N]: sines, then cosines, of wave lengths from 2 pi to 20000 pi (Whisper's)."""
    half = torch.arange(channels // 2, device=positions.device)
    angle = positions[:, None] * torch.exp(-math.log(10000) / (channels // 2 - 1) * half.float())
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _window_borders(tokens: list[int], window: int) -> Tensor:
    """Attention windows as int32 borders: every recording is cut into pieces of `window` tokens and a rest."""
    borders = [0]
    for n in tokens:
        start = borders[-1]
        borders += [*range(start + window, start + n, window), start + n]
    return torch.tensor(borders, dtype=torch.int32)
