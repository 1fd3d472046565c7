"""AuT, the audio encoder: 10-ms mel frames -> 12.5 features a second (Qwen3-Omni report section 2.2).

Parameter names equal those of the public checkpoint below `thinker.audio_tower.`, so weights load without a mapping.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.precision import residual
from omnitrain.models.layers.transfer import sent
from omnitrain.models.sizes import AuTConfig

CHUNKS_PER_SEGMENT = 64
"""One-second chunks that go through the encoder together: bounds the memory of long recordings. Windows do not see each
other, so where segments end changes nothing."""
CHUNKS_PER_CONVOLUTION = 16
"""Chunks convolved at once, each of which takes about 12 MB at full size."""


@dataclass
class AuTState:
    """What `AuTEncoder.step` remembers of one recording: less than a window.

    Attributes:
        window_frames: attention window in mel frames.
        projected: features are those of `forward`; else those of `encode`.
        frames: mel frames of the recording so far.
        waiting: [n, n_mels], n < window_frames, those whose window is not yet full.
    """

    window_frames: int
    projected: bool
    waiting: Tensor
    frames: int = 0
    finished: bool = False


class _Segment(NamedTuple):
    """Windows that are encoded together; their chunks end to end."""

    chunk_lengths: list[int]
    """Mel frames of each chunk."""
    edges: list[int]
    """Per chunk: where the convolutions' own zero padding begins."""
    windows: list[int]
    """Features of each attention window."""


class AuTAttention(nn.Module):
    """Multi-head attention inside each window, both directions, no rotary positions."""

    def __init__(self, config: AuTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """[T, D] -> [T, D]; windows of at most `longest` features"""
        q, k, v = (
            rearrange(project(x), "t (h d) -> t h d", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = varlen_attention(q, k, v, cu_seqlens, causal=False, longest=longest)
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

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """[T, D] -> [T, D]"""
        x = x + self.self_attn(self.self_attn_layer_norm(x), cu_seqlens, longest)
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
        self.kept_activations: Collection[str] = ()

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
        return self._by_segments(mel, mel_lengths, window_frames, projected=True)

    def silence(self) -> tuple[Tensor, Tensor]:
        """mel [8, n_mels] and mel_lengths [1] of a recording in which nothing is heard, of one feature."""
        return self.ln_post.weight.new_zeros(8, self.config.n_mels), torch.tensor([8])

    def encode(self, mel: Tensor, mel_lengths: Tensor, window_frames: int | None = None) -> Tensor:
        """Steps 1 to 3 and the LayerNorm: what AuT's own decoder reads. The projection that follows it belongs to the
        Thinker, and is not trained with AuT.

        Beyond `mel` and the features, memory does not grow with the length of the recordings: segments of
        `CHUNKS_PER_SEGMENT` go through all layers one after the other, and with activation checkpointing the backward
        pass computes them again one at a time. Within one segment, checkpointing is by layers.

        Args:
            mel: [F, n_mels], log-mel frames of 10 ms, recordings end to end.
            mel_lengths: int64 [A], frames per recording; best on the host, which reads them.
            window_frames: attention window in mel frames, a multiple of `chunk_frames`; default: the configuration's.

        Returns:
            [T, d_model], recordings end to end.

        Raises ValueError: if `mel_lengths` does not sum to F, a recording is empty, or the window is no whole number of
        chunks.
        """
        return self._by_segments(mel, mel_lengths, window_frames, projected=False)

    def init_state(self, window_frames: int | None = None, *, projected: bool = True) -> AuTState:
        """The state of a recording of which nothing has been heard. Raises ValueError as `encode` for the window.

        `projected`: `step` gives what `forward` gives; else what `encode` gives."""
        window_frames = window_frames or self.config.window_frames
        self.config.chunks(window_frames)
        nothing = self.ln_post.weight.new_zeros(0, self.config.n_mels)
        return AuTState(window_frames=window_frames, projected=projected, waiting=nothing)

    def step(self, mel: Tensor, state: AuTState) -> Tensor:
        """The next mel frames of one recording, as many as there are -> the features that became final.

        Attention sees its whole window, both ways, so a window's features come when its last frame does, those of a
        last, shorter window from `finish`. All of them together are what `forward` gives for the whole recording: bit
        for bit if pieces are whole segments (`CHUNKS_PER_SEGMENT` in whole windows), else within rounding, since
        matrix products of other sizes round otherwise. How a recording is cut within windows changes nothing.

        Args:
            mel: [F, n_mels], F >= 0.
            state: of `init_state`; changed in place, and kept below one window.

        Returns:
            [T, out_dim] (or d_model, see `AuTState.projected`), T >= 0.

        Raises ValueError: frames of another size, or after `finish`.
        """
        if state.finished:
            raise ValueError("this recording has been finished; begin another with init_state()")
        if mel.ndim != 2 or mel.shape[1] != self.config.n_mels:
            raise ValueError(f"mel has shape {tuple(mel.shape)}; expected [F, {self.config.n_mels}]")
        state.frames += len(mel)
        mel = torch.cat([state.waiting.to(mel), mel]) if len(state.waiting) else mel
        full = len(mel) // state.window_frames * state.window_frames
        state.waiting = mel[full:].clone()  # not a view, which would keep all of the piece
        return self._encode_piece(mel[:full], state)

    def finish(self, state: AuTState) -> Tensor:
        """The features of the last, shorter window, after the last `step`: [T, out_dim], T = 0 where there is none."""
        rest, state.waiting, state.finished = state.waiting, state.waiting[:0], True
        return self._encode_piece(rest, state)

    def _encode_piece(self, mel: Tensor, state: AuTState) -> Tensor:
        """A piece that begins where a window does, as the recording of its own that it may be taken for: only one that
        is shorter than a chunk has another border if it is all that there is."""
        lengths = torch.tensor([len(mel)] if len(mel) else [], dtype=torch.int64)
        whole = None if state.frames < self.config.chunk_frames else self.config.chunk_frames
        return self._by_segments(mel, lengths, state.window_frames, projected=state.projected, edge=whole)

    def project(self, features: Tensor) -> Tensor:
        """`encode`'s features [T, d_model] -> those that the Thinker reads, [T, out_dim]."""
        return self.proj2(F.gelu(self.proj1(features)))

    def _by_segments(
        self, mel: Tensor, mel_lengths: Tensor, window_frames: int | None, *, projected: bool, edge: int | None = None
    ) -> Tensor:
        """As `encode`, or as `forward` if `projected`. `edge`: see `_segments`."""
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
            return self.ln_post.weight.new_zeros(0, config.out_dim if projected else config.d_model)

        if self.reference_padding and edge is None:
            edge = max(lengths)
        segments = list(_segments(lengths, config.chunk_frames, chunks_per_window, edge))
        pieces = mel.split([sum(segment.chunk_lengths) for segment in segments])
        several = len(segments) > 1
        by_layers = self.activation_checkpointing and not several
        features = [
            run(
                self._segment, piece, segment, projected, by_layers,
                checkpointed=self.activation_checkpointing and several, kept=self.kept_activations,
            )
            for piece, segment in zip(pieces, segments, strict=True)
        ]  # fmt: skip
        return torch.cat(features) if several else features[0]

    def _segment(self, mel: Tensor, segment: _Segment, projected: bool, by_layers: bool) -> Tensor:
        """[F, n_mels] -> [T, d_model], or [T, out_dim] if `projected`; `by_layers`: with checkpointing of each."""
        x = residual(self._convolve(mel, segment, by_layers), self.ln_post)  # [T, D]
        longest = max(segment.windows)
        cu_seqlens = sent(torch.tensor([0, *accumulate(segment.windows)], dtype=torch.int32), x.device)
        for layer in self.layers:
            x = run(layer, x, cu_seqlens, longest, checkpointed=by_layers, kept=self.kept_activations)
        x = self.ln_post(x)
        return self.project(x) if projected else x

    def _convolve(self, mel: Tensor, segment: _Segment, checkpointed: bool) -> Tensor:
        """[F, n_mels] -> [T, D], positions added."""
        size = self.config.chunk_frames
        lengths = torch.tensor(segment.chunk_lengths)
        length = sent(lengths, mel.device)
        edge = sent(torch.tensor(segment.edges), mel.device) if min(segment.edges) < size else None

        column = torch.arange(size, device=mel.device)
        inside = column < length[:, None]  # [chunks, size]
        source = (length.cumsum(0) - length)[:, None] + column
        frames = mel[source.clamp(max=len(mel) - 1)] * inside[..., None]
        images = rearrange(frames, "n time mel -> n 1 mel time").to(self.conv2d1.weight.dtype)
        parts = images.split(CHUNKS_PER_CONVOLUTION)
        edges = [None] * len(parts) if edge is None else edge.split(CHUNKS_PER_CONVOLUTION)
        columns = torch.cat(
            [
                run(self._three_convolutions, part, edge_part, checkpointed=checkpointed)
                for part, edge_part in zip(parts, edges, strict=True)
            ]
        )  # [chunks, 13, D]
        place = torch.arange(columns.shape[1], device=mel.device)
        columns = columns + sinusoids(place, columns.shape[2]).to(columns.dtype)
        # How many columns are kept is known on the host; a mask on the GPU would have to be waited for.
        kept = torch.arange(columns.shape[1]) < _halved(lengths, 3)[:, None]
        return columns.flatten(0, 1)[sent(kept.flatten().nonzero().squeeze(1), mel.device)]

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


def _segments(lengths: list[int], chunk: int, chunks_per_window: int, edge: int | None) -> Iterator[_Segment]:
    """Recordings of `lengths` mel frames, cut into windows, and as many of these together as fill a segment.

    `edge`: mel frames behind which all recordings see the convolutions' own padding; None: each behind its own end.
    """
    segment = _Segment([], [], [])
    for n in lengths:
        for start in range(0, n, chunk * chunks_per_window):
            full, rest = divmod(min(n - start, chunk * chunks_per_window), chunk)
            chunk_lengths = [chunk] * full + [rest] * (rest > 0)
            if segment.windows and len(segment.chunk_lengths) + len(chunk_lengths) > CHUNKS_PER_SEGMENT:
                yield segment
                segment = _Segment([], [], [])
            segment.chunk_lengths.extend(chunk_lengths)
            segment.edges.extend([min(n if edge is None else edge, chunk)] * len(chunk_lengths))
            segment.windows.append(sum(_halved(frames, 3) for frames in chunk_lengths))
    yield segment
