"""Code2Wav: frames of codebook indices -> waveform, causally, frame by frame (Qwen3-Omni report, section 2.4).

Parameter names equal those of the public checkpoint below `code2wav.`, so weights load without a mapping.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omnitrain.models.layers.causal_conv import (
    CausalConv1d,
    CausalConvTranspose1d,
    ConvState,
    StreamingModule,
    init_states,
    step_through,
)
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.sizes import Code2WavConfig, TransformerConfig

Rotation = tuple[Tensor, Tensor]
"""cos and sin, fp32 [T, head_dim / 2]."""

DILATIONS = (1, 3, 9)
"""Of the residual units behind each upsampling: kernel 7 thrice spans 79 columns."""


# ---------------------------------------------------------------------------------------------------------- transformer


@dataclass
class KVState:
    """Keys (turned already) and values of the last window - 1 frames, each [B, kv_heads, window - 1, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass
class TransformerState:
    """Memory of a stream: the layers' keys and values, and how many frames have passed."""

    layers: list[KVState]
    frames: int = 0


class SlidingWindowAttention(nn.Module):
    """Causal multi-head attention with rotary positions; which frames a frame sees is the mask's business."""

    def __init__(self, config: TransformerConfig, dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, dim // config.heads
        self.q_proj = nn.Linear(dim, config.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, config.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, config.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor, past: KVState | None) -> Tensor:
        """x [B, T, D], mask bool [T, keys] -> [B, T, D]; with a `past` its frames stand before x, and it moves on."""
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", d=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        if past is not None:
            kept = past.keys.shape[2]
            k, v = torch.cat([past.keys, k], dim=2), torch.cat([past.values, v], dim=2)
            past.keys, past.values = k[:, :, k.shape[2] - kept :].clone(), v[:, :, v.shape[2] - kept :].clone()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)"""

    def __init__(self, config: TransformerConfig, dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, config.ffn, bias=False)
        self.up_proj = nn.Linear(dim, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LayerScale(nn.Module):
    """A learned factor per channel, small at the start (Touvron et al., 2021, arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.scale * x


class TransformerLayer(nn.Module):
    """x + scale * attention(norm x), then x + scale * mlp(norm x)."""

    def __init__(self, config: TransformerConfig, dim: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dim, config.norm_eps)
        self.self_attn = SlidingWindowAttention(config, dim)
        self.self_attn_layer_scale = LayerScale(dim, config.layer_scale)
        self.post_attention_layernorm = RMSNorm(dim, config.norm_eps)
        self.mlp = SwiGLU(config, dim)
        self.mlp_layer_scale = LayerScale(dim, config.layer_scale)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor, past: KVState | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rotation, mask, past))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class SlidingWindowTransformer(nn.Module):
    """Pre-norm transformer over frames; frame t sees the frames t - window + 1 to t. For whole signals or in pieces.

    Rotary positions count from the first frame of the stream and keep counting; only their differences matter.
    """

    def __init__(self, config: TransformerConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = dim // config.heads
        self.layers = nn.ModuleList([TransformerLayer(config, dim) for _ in range(config.layers)])
        self.norm = RMSNorm(dim, config.norm_eps)
        self.activation_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        rotation, mask = self._geometry(x, first=0, past=0)
        for layer in self.layers:
            x = run(layer, x, rotation, mask, checkpointed=self.activation_checkpointing)
        return self.norm(x)

    def init_state(self, batch: int) -> TransformerState:
        c = self.config
        empty = self.norm.weight.new_zeros(batch, c.kv_heads, c.window - 1, self.head_dim)
        return TransformerState([KVState(empty, empty) for _ in self.layers])

    def step(self, x: Tensor, state: TransformerState) -> Tensor:
        """The next frames [B, t, D] -> [B, t, D]; `state` moves on."""
        rotation, mask = self._geometry(x, first=state.frames, past=self.config.window - 1)
        for layer, past in zip(self.layers, state.layers, strict=True):
            x = layer(x, rotation, mask, past)
        state.frames += x.shape[1]
        return self.norm(x)

    def _geometry(self, x: Tensor, first: int, past: int) -> tuple[Rotation, Tensor]:
        """Angles of the frames of x, of which `first` is the first one's number, and the mask [T, past + T]."""
        config = self.config
        key = torch.arange(first - past, first + x.shape[1], device=x.device)
        query = key[past:]
        exponent = torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim
        angle = query.float()[:, None] / config.rope_theta**exponent
        distance = query[:, None] - key
        mask = (distance >= 0) & (distance < config.window) & (key >= 0)  # before frame 0 the state is empty
        return (angle.cos(), angle.sin()), mask


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of [B, heads, T, d] in fp32."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def run(part: Callable[..., Tensor], *inputs: Any, checkpointed: bool) -> Tensor:
    """part(*inputs), its activations made again in the backward pass if `checkpointed`."""
    if checkpointed and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(part, *inputs, use_reentrant=False))
    return part(*inputs)


# --------------------------------------------------------------------------------------------------------- convolutions


class SnakeBeta(StreamingModule):
    """x + sin^2(x exp(alpha)) / exp(beta), a learned frequency and size per channel.

    Snake: Ziyin et al., 2020, arXiv 2006.08195; with a size of its own: BigVGAN, arXiv 2206.04658. alpha = beta = 0 at
    the start. `forward(x [B, C, T]) -> [B, C, T]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _Snake.apply(x, *self._frequency_and_size())

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """What does not change in a stream."""
        return self._frequency_and_size()

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        frequency, size = state
        return torch.addcmul(x, (x * frequency).sin_().square_(), size).to(x.dtype)

    def _frequency_and_size(self) -> tuple[Tensor, Tensor]:
        """fp32, each [C, 1]"""
        return self.alpha.float().exp()[:, None], 1 / (self.beta.float().exp()[:, None] + 1e-9)


class _Snake(torch.autograd.Function):
    """y = x + size * sin^2(a), a = frequency * x, in fp32 whatever the dtype of x [B, C, T]; the others are [C, 1].

    At 24 kHz these are most of the activations, and autograd would keep several tensors for each; this keeps x alone.
    dx = dy (1 + size * frequency * sin 2a), and summed over batch and time: d_frequency = dy * size * x * sin 2a,
    d_size = dy * sin^2 a.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frequency: Tensor, size: Tensor) -> Tensor:
        ctx.save_for_backward(x, frequency, size)
        return (x * frequency).sin_().square_().mul_(size).add_(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, frequency, size = ctx.saved_tensors
        angle = x * frequency
        sine = angle.sin()
        double = angle.cos_().mul_(sine).mul_(2)  # sin(2 a) = 2 sin a cos a
        d_size = sine.square_().mul_(grads[0]).sum((0, 2))[:, None]
        double.mul_(grads[0])
        d_frequency = torch.mul(double, x, out=sine).sum((0, 2))[:, None] * size
        return double.mul_(size * frequency).add_(grads[0]).to(x.dtype), d_frequency, d_size


class ConvNeXtBlock(StreamingModule):
    """x + gamma * mlp(norm(depthwise convolution of x)), causal (ConvNeXt, arXiv 2201.03545). gamma starts at 1e-6.

    `forward(x [B, D, T]) -> [B, D, T]`
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = CausalConv1d(dim, dim, 7, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self._mlp(self.dwconv(x))

    def init_state(self, batch: int) -> ConvState:
        return self.dwconv.init_state(batch)

    def step(self, x: Tensor, state: ConvState) -> Tensor:
        return x + self._mlp(self.dwconv.step(x, state))

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.norm(rearrange(x, "b d t -> b t d"))
        x = self.gamma * self.pwconv2(F.gelu(self.pwconv1(x)))
        return rearrange(x, "b t d -> b d t")


class ResidualUnit(StreamingModule):
    """x + conv2(snake(conv1(snake(x)))): a dilated convolution of 7, then one of 1. `forward(x [B, C, T]) -> same`."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv1d(channels, channels, 7, dilation=dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act2(self.conv1(self.act1(x))))

    def init_state(self, batch: int) -> list[Any]:
        return init_states([self.act1, self.conv1, self.act2], batch)

    def step(self, x: Tensor, state: list[Any]) -> Tensor:
        return x + self.conv2(step_through([self.act1, self.conv1, self.act2], x, state))


class DecoderBlock(StreamingModule):
    """Upsampling by `rate` to half the channels, then three residual units: [B, C, T] -> [B, C / 2, T * rate]."""

    def __init__(self, channels: int, rate: int, trim: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [
                SnakeBeta(channels),
                CausalConvTranspose1d(channels, channels // 2, 2 * rate, stride=rate, trim=trim),
                *[ResidualUnit(channels // 2, dilation) for dilation in DILATIONS],
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.block:
            x = stage(x)
        return x

    def init_state(self, batch: int) -> list[Any]:
        return init_states(_streaming(self.block), batch)

    def step(self, x: Tensor, state: list[Any]) -> Tensor:
        return step_through(_streaming(self.block), x, state)


def _streaming(modules: nn.ModuleList) -> list[StreamingModule]:
    return cast(list[StreamingModule], list(modules))


# ----------------------------------------------------------------------------------------------------------- model


@dataclass
class Code2WavState:
    """Memory of a stream of frames: of the transformer, and of each convolutional stage in order."""

    transformer: TransformerState
    stages: list[Any]


def join_states(states: Sequence[Code2WavState]) -> Code2WavState:
    """The states of streams that are equally many frames old as that of one batch.

    Raises:
        ValueError: they are not equally old.
    """
    ages = {state.transformer.frames for state in states}
    if len(ages) > 1:
        raise ValueError(f"streams of {sorted(ages)} frames cannot share a step; join those that are equally old")
    layers = [
        KVState(torch.cat([past.keys for past in pasts]), torch.cat([past.values for past in pasts]))
        for pasts in zip(*(state.transformer.layers for state in states), strict=True)
    ]
    stages = [_joined(stages) for stages in zip(*(state.stages for state in states), strict=True)]
    return Code2WavState(TransformerState(layers, ages.pop()), stages)


def split_state(state: Code2WavState, streams: int) -> list[Code2WavState]:
    """The reverse of `join_states`."""
    return [
        Code2WavState(
            TransformerState(
                [KVState(past.keys[b : b + 1], past.values[b : b + 1]) for past in state.transformer.layers],
                state.transformer.frames,
            ),
            [_one_of(stage, b) for stage in state.stages],
        )
        for b in range(streams)
    ]


def _joined(states: Sequence[Any]) -> Any:
    """States of one stage as one: a `ConvState`, a list of states, or what all streams have alike."""
    first = states[0]
    if isinstance(first, ConvState):
        return ConvState(torch.cat([state.context for state in states]), first.skip)
    return [_joined(inner) for inner in zip(*states, strict=True)] if isinstance(first, list) else first


def _one_of(state: Any, b: int) -> Any:
    if isinstance(state, ConvState):
        return ConvState(state.context[b : b + 1], state.skip)
    return [_one_of(inner, b) for inner in state] if isinstance(state, list) else state


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
        """Codes int64 [B, T, Q] -> frames [B, T, D].

        Raises:
            ValueError: if there are not Q codebooks, or a code is outside of its codebook.
        """
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
        """Frames [B, T, D] -> waveform [B, samples].

        Args:
            clamp: to [-1, 1]. Training says no: a clamped sample has no gradient.
        """
        checkpointed = self.pre_transformer.activation_checkpointing = self.activation_checkpointing
        x = rearrange(self.pre_transformer(x), "b t d -> b d t")
        for stage in self._stages():
            x = run(stage, x, checkpointed=checkpointed)
        return _waveform(x, clamp)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T, Q] -> waveform [B, config.samples(T)], within [-1, 1]. Raises as `embed`."""
        return self.decode(self.embed(codes))

    def init_state(self, batch: int) -> Code2WavState:
        """The state of `batch` streams before their first frame."""
        return Code2WavState(self.pre_transformer.init_state(batch), init_states(self._stages(), batch))

    def step(self, codes: Tensor, state: Code2WavState) -> Tensor:
        """The next t frames of codes [B, t, Q] -> the samples that they complete, [B, samples]. Raises as `embed`."""
        return self.decode_step(self.embed(codes), state)

    def decode_step(self, x: Tensor, state: Code2WavState, clamp: bool = True) -> Tensor:
        """`decode` for the next t frames [B, t, D] of a stream; `state` moves on."""
        x = rearrange(self.pre_transformer.step(x, state.transformer), "b t d -> b d t")
        return _waveform(step_through(self._stages(), x, state.stages), clamp)

    def _stages(self) -> list[StreamingModule]:
        """The modules between transformer and waveform, in order."""
        upsample = [stage for pair in self.upsample for stage in _streaming(cast(nn.ModuleList, pair))]
        return [*upsample, *_streaming(self.decoder)]


def _waveform(x: Tensor, clamp: bool) -> Tensor:
    x = rearrange(x, "b 1 n -> b n")
    return x.clamp(-1, 1) if clamp else x


def fingerprint(code2wav: Code2Wav) -> str:
    """8 hex digits that tell codecs apart: CRC-32 of the table of code embeddings as fp32.

    Codec frames carry it, so that no model learns the codes of one codec and speaks through another. A `Codec` has that
    of its decoder once `fold_codebooks` has written the table, and a copy of the decoder keeps it (but for one in 16
    bit, whose table is another).
    """
    table = code2wav.code_embedding.weight.detach().float().cpu().contiguous()
    return f"{zlib.crc32(table.numpy().tobytes()):08x}"
