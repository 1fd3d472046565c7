"""Code2Wav: frames of codebook indices -> waveform, causally, frame by frame (Qwen3-Omni report section 2.4).

Parameter names equal those of the public checkpoint below `code2wav.`, so weights load without a mapping.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from omnitrain.models.layers.causal_conv import (
    CausalConv1d,
    CausalConvTranspose1d,
    StreamingModule,
    init_states,
    step_through,
)
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.precision import full_precision
from omnitrain.models.layers.rope import Rotation
from omnitrain.models.layers.wave import (
    DILATIONS,
    Chain,
    ConvNeXtBlock,
    KVState,
    ResidualUnit,
    SlidingWindowTransformer,
    SnakeBeta,
    TransformerState,
)
from omnitrain.models.sizes import Code2WavConfig


class DecoderBlock(Chain):
    """Upsampling by `rate` to half the channels, then three residual units: [B, C, T] -> [B, C / 2, T * rate]."""

    def __init__(self, channels: int, rate: int, trim: str) -> None:
        super().__init__(
            SnakeBeta(channels),
            CausalConvTranspose1d(channels, channels // 2, 2 * rate, stride=rate, trim=trim),
            *[ResidualUnit(channels // 2, dilation) for dilation in DILATIONS],
        )


@dataclass
class Code2WavState:
    """Memory of a stream of frames, and of the codec's encoder: of the transformer, and of each convolutional stage."""

    transformer: TransformerState
    stages: list[Any]


def join_states(states: Sequence[Code2WavState]) -> Code2WavState:
    """The states of streams as that of one batch. ValueError if they are not equally many frames old."""
    ages = {state.transformer.frames for state in states}
    if len(ages) > 1:
        raise ValueError(f"streams of {sorted(ages)} frames cannot share a step; join those that are equally old")
    return _state_of(states)


def split_state(state: Code2WavState, streams: int) -> list[Code2WavState]:
    """The reverse of `join_states`."""
    return [_state_of([state], slice(b, b + 1)) for b in range(streams)]


def _state_of(states: Sequence[Any], rows: slice | None = None) -> Any:
    """A state of all streams of `states`, or of some `rows` of the first: so its tensors, in lists and dataclasses. All
    else the streams have alike, numbers and what a stage computes once (a tuple)."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states)) if rows is None else first[rows]
    if isinstance(first, list):
        return [_state_of(inner, rows) for inner in zip(*states, strict=True)]
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{name: _state_of([vars(s)[name] for s in states], rows) for name in vars(first)})
    return first


class Code2Wav(nn.Module):
    """Codes -> waveform, with left context only.

    1. The codes of a frame are looked up in one table of quantizers * codebook_size rows; their mean is the frame.
    2. A transformer over frames, each of which sees the last `window` ones.
    3. Upsampling by `upsampling_ratios`, a ConvNeXt block behind each.
    4. A convolution to `decoder_dim` channels, decoder blocks that upsample by `upsample_rates`, and a convolution to
       one channel, clamped to [-1, 1].

    Whole signals go through `forward`; a stream goes piece by piece through `step`, with the same samples. With
    trim="public" the first piece gives fewer samples (`Code2WavConfig.samples`), every later one all of its own.

    Initial weights: linear maps and embeddings normal with standard deviation 0.02; convolutions normal with
    1 / sqrt(inputs that reach an output) (for a transposed one: channels * kernel / stride), biases 0; all else (norms,
    layer scales, alpha, beta, gamma) as constructed.
    """

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.config = config
        d, trim = config.d_model, config.trim
        self.code_embedding = nn.Embedding(config.quantizers * config.codebook_size, d)
        self.pre_transformer = SlidingWindowTransformer(config, d)
        self.upsample = nn.ModuleList(
            nn.ModuleList([CausalConvTranspose1d(d, d, ratio, stride=ratio, trim=trim), ConvNeXtBlock(d)])
            for ratio in config.upsampling_ratios
        )
        channels = config.decoder_dim
        decoder: list[StreamingModule] = [CausalConv1d(d, channels, 7)]
        for rate in config.upsample_rates:
            decoder.append(DecoderBlock(channels, rate, trim))
            channels //= 2
        self.decoder = nn.ModuleList([*decoder, SnakeBeta(channels), CausalConv1d(channels, 1, 7)])
        self.activation_checkpointing = False

    def embed(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T, Q] -> frames [B, T, D]. ValueError if there are not Q codebooks, or a code is not in
        its codebook."""
        config = self.config
        if codes.ndim != 3 or codes.shape[2] != config.quantizers:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; expected [batch, frames, {config.quantizers}], "
                f"one code for each of the {config.quantizers} codebooks"
            )
        wrong = (codes < 0) | (codes >= config.codebook_size)
        if wrong.any():
            b, t, q = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"codes[{b}, {t}, {q}] is {int(codes[b, t, q])}; codes of codebook {q} lie in "
                f"0..{config.codebook_size - 1}"
            )
        offset = torch.arange(config.quantizers, device=codes.device) * config.codebook_size
        return self.code_embedding(codes + offset).mean(dim=2)

    def decode(self, x: Tensor, clamp: bool = True) -> Tensor:
        """Frames [B, T, D] -> waveform [B, samples]; `clamp` to [-1, 1] but in training: clamped, a sample has no
        gradient."""
        checkpointed = self.activation_checkpointing
        x = rearrange(self.pre_transformer(x, checkpointed=checkpointed), "b t d -> b d t")
        *stages, last = self._stages()
        for stage in stages:
            x = run(stage, x, checkpointed=checkpointed)
        with full_precision(x):  # 16 bit would be heard: 8 bits of sound
            x = last(x.to(self.code_embedding.weight.dtype))
        wav = rearrange(x, "b 1 n -> b n")
        return wav.clamp(-1, 1) if clamp else wav

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T, Q] -> waveform [B, config.samples(T)], within [-1, 1]. Raises as `embed`."""
        return self.decode(self.embed(codes))

    def init_state(self, batch: int) -> Code2WavState:
        """The state of `batch` streams before their first frame."""
        return Code2WavState(self.pre_transformer.init_state(batch), init_states(self._stages(), batch))

    def step(self, codes: Tensor, state: Code2WavState) -> Tensor:
        """The next t frames of codes [B, t, Q] -> the samples that they complete, [B, samples]. Raises as `embed`."""
        return self.decode_step(self.embed(codes), state)

    def decode_step(self, x: Tensor, state: Code2WavState, later_piece: Callable[..., Tensor] | None = None) -> Tensor:
        """`decode` for the next t frames [B, t, D] of a stream; `state` moves on. `later_piece`: `self.decode_piece`,
        compiled; the first piece, of which trim="public" cuts something, does without."""
        begun = state.transformer.frames > 0
        geometry = self.pre_transformer.advance(x, state.transformer)
        decode = later_piece if later_piece is not None and begun else self.decode_piece
        return decode(x, *geometry, state.transformer.layers, state.stages)

    def decode_piece(
        self, x: Tensor, rotation: Rotation, mask: Tensor, layers: list[KVState], stages: list[Any]
    ) -> Tensor:
        """`decode_step` behind `SlidingWindowTransformer.advance`: the same operations for every piece of a size."""
        x = rearrange(self.pre_transformer.step_at(x, rotation, mask, layers), "b t d -> b d t")
        return rearrange(step_through(self._stages(), x, stages), "b 1 n -> b n").clamp(-1, 1)

    def _stages(self) -> list[nn.Module]:
        """The modules between transformer and waveform, in order."""
        return [*(stage for pair in self.upsample for stage in cast(nn.ModuleList, pair)), *self.decoder]


def of_first_codebooks(code2wav: Code2Wav, quantizers: int) -> dict[str, Tensor]:
    """The weights of a Code2Wav of fewer `quantizers` that does with their codes what a residual codec does that leaves
    the others out: the mean of n of Q embeddings, each times n / Q, is their part of the mean of all."""
    c, state = code2wav.config, code2wav.state_dict()
    if quantizers == c.quantizers:
        return state
    rows = state["code_embedding.weight"][: quantizers * c.codebook_size]
    return state | {"code_embedding.weight": rows * (quantizers / c.quantizers)}


def fingerprint(code2wav: Code2Wav) -> str:
    """8 hex digits that tell codecs apart: CRC-32 of the table of code embeddings as fp32.

    Codec frames carry it, so that no model learns the codes of one codec and speaks through another. A `Codec` has that
    of its decoder once `fold_codebooks` has written the table, and a copy of the decoder keeps it (but for one in 16
    bit, whose table is another).
    """
    table = code2wav.code_embedding.weight.detach().float().cpu().contiguous()
    return f"{zlib.crc32(table.numpy().tobytes()):08x}"
