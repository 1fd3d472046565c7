"""What Code2Wav and the codec are made of: a sliding-window transformer over frames, and causal convolutional blocks.

Everything here has two faces over one set of weights (see `causal_conv`): `forward` for whole signals, `step` for the
pieces of a stream. Parameter names are those of the public checkpoint below `code2wav.`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omnitrain.models.layers.causal_conv import CausalConv1d, ConvState, StreamingModule, init_states, step_through
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.precision import residual
from omnitrain.models.layers.rope import Rotation, rotate
from omnitrain.models.sizes import TransformerConfig

DILATIONS = (1, 3, 9)
"""Of the residual units behind each upsampling: kernel 7 thrice spans 79 columns."""


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
        q, k = rotate(q, *rotation), rotate(k, *rotation)
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

    def forward(self, x: Tensor, *, checkpointed: bool = False) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        rotation, mask = self._geometry(x, first=0, past=0)
        x = residual(x, self.norm)
        for layer in self.layers:
            x = run(layer, x, rotation, mask, checkpointed=checkpointed)
        return self.norm(x)

    def init_state(self, batch: int) -> TransformerState:
        c = self.config
        empty = self.norm.weight.new_zeros(batch, c.kv_heads, c.window - 1, self.head_dim)
        return TransformerState([KVState(empty, empty) for _ in self.layers])

    def step(self, x: Tensor, state: TransformerState) -> Tensor:
        """The next frames [B, t, D] -> [B, t, D]; `state` moves on."""
        return self.step_at(x, *self.advance(x, state), state.layers)

    def advance(self, x: Tensor, state: TransformerState) -> tuple[Rotation, Tensor]:
        """Where the next frames x [B, t, D] stand: their angles and mask. `state` counts them."""
        geometry = self._geometry(x, first=state.frames, past=self.config.window - 1)
        state.frames += x.shape[1]
        return geometry

    def step_at(self, x: Tensor, rotation: Rotation, mask: Tensor, states: list[KVState]) -> Tensor:
        """`step` for frames that stand where `advance` says: the same operations for every piece of a size."""
        for layer, past in zip(self.layers, states, strict=True):
            x = layer(x, rotation, mask, past)
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


class Chain(StreamingModule):
    """Modules one after the other, under the public name `block`: [B, C, T] -> [B, C', T']."""

    def __init__(self, *stages: StreamingModule) -> None:
        super().__init__()
        self.block = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.block:
            x = stage(x)
        return x

    def init_state(self, batch: int) -> list[Any]:
        return init_states(self.block, batch)

    def step(self, x: Tensor, state: list[Any]) -> Tensor:
        return step_through(self.block, x, state)
