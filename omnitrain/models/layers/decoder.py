"""Layers of the language decoders: Thinker, Talker and MTP are made of these.

The residual stream is packed, [N, D]; documents are kept apart by `cu_seqlens`. MTP, whose sequences all have the same
length, uses `Attention.project` and attends on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.moe import SwiGLUExperts, TopKRouter
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.rope import NormRotate, Rotation, norm_rotate
from omnitrain.models.sizes import DecoderConfig, MTPConfig


class KVCache(Protocol):
    """What the attention layers need of a cache (`generation/cache.py` has one).

    longest: positions of the longest document, once the first layer has appended.
    """

    longest: int

    def append(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the new positions of every document in decoder layer `layer` (from 0): key (already rotated) and value
        [N, H_kv, head_dim], documents end to end, with borders cu_seqlens int32 [B + 1].

        Returns:
            keys, values [M, H_kv, head_dim] of all positions up to now, in the same order, and their borders [B + 1].
        """
        ...


class Attend(Protocol):
    """Called as `varlen_attention` is."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        *,
        causal: bool,
        longest: int | None = None,
        cu_seqlens_key: Tensor | None = None,
        longest_key: int | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DecoderOutput:
    """hidden [N, D]: after the final norm.  router_counts, router_prob_sums: [L, E] over the L layers with experts (see
    `Routing`)."""

    hidden: Tensor
    router_counts: Tensor
    router_prob_sums: Tensor


class Attention(nn.Module):
    """Causal grouped-query attention with RMSNorm on every query and key head (Qwen3) and rotary positions.

    The projections of queries, keys and values are one matrix: rows [q heads, k heads, v heads] x head_dim. `attend` is
    what parallelism replaces, where a pack is shared.
    """

    def __init__(self, c: DecoderConfig | MTPConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.qkv = nn.Linear(c.d_model, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.attention_bias)
        self.out = nn.Linear(c.heads * c.head_dim, c.d_model, bias=c.attention_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.attend: Attend = varlen_attention

    def project(self, x: Tensor, rope: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, head_dim], keys and values [N, H_kv, head_dim] of x [N, D], normed and rotated; rope = (cos,
        sin), each [N, head_dim / 2]."""
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, self.head_dim)
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        by_hand = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # which fuses what is written out
        turn = NormRotate.apply if by_hand else norm_rotate
        qk = turn(qk, self.q_norm.weight, self.k_norm.weight, *rope, heads, self.q_norm.eps)
        q, k = qk.split([heads, kv_heads], dim=1)
        return q, k, v

    def forward(
        self, x: Tensor, rope: Rotation, cu_seqlens: Tensor, longest: int | None, layer: int, cache: KVCache | None
    ) -> Tensor:
        """x [N, D], rope = (cos, sin) each [N, head_dim / 2] -> [N, D]"""
        q, k, v = self.project(x, rope)
        if cache is None:
            y = self.attend(q, k, v, cu_seqlens, causal=True, longest=longest)
        else:
            k, v, borders = cache.append(layer, k, v, cu_seqlens)
            y = self.attend(
                q, k, v, cu_seqlens, causal=True, longest=longest, cu_seqlens_key=borders, longest_key=cache.longest
            )
        return self.out(y.reshape(len(x), self.heads * self.head_dim))


class DenseMLP(nn.Module):
    """SwiGLU (Shazeer, 2020, arXiv 2002.05202): down(silu(gate x) * up x). `gate_up` holds gate rows, then up rows."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]"""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SparseMLP(nn.Module):
    """Router and experts, and where `shared_width` is positive one more expert that sees every token, weighted by a
    sigmoid of its own (the Talker's)."""

    def __init__(self, c: DecoderConfig, *, shared_width: int = 0) -> None:
        super().__init__()
        self.router = TopKRouter(c.d_model, c.n_experts, c.top_k, c.normalise_top_k)
        self.experts = SwiGLUExperts(c.d_model, c.expert_width, c.n_experts)
        self.shared_expert = DenseMLP(c.d_model, shared_width) if shared_width else None
        self.shared_gate = nn.Linear(c.d_model, 1, bias=False) if shared_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> [N, D], router counts [E], router probability sums [E]"""
        routing = self.router(x)
        y = self.experts(x, routing)
        if self.shared_expert is not None and self.shared_gate is not None:
            y = y + self.shared_gate(x).sigmoid() * self.shared_expert(x)
        return y, routing.counts, routing.prob_sums


class DecoderLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, layer: int, c: DecoderConfig, mlp: SparseMLP | DenseMLP) -> None:
        super().__init__()
        self.layer = layer  # its index, from 0: its place in the cache
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = mlp

    def forward(
        self, x: Tensor, rope: Rotation, cu_seqlens: Tensor, longest: int | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[N, D] -> [N, D], and the router's counts and probability sums [E] if this layer has experts. `longest`: see
        `varlen_attention`."""
        x = x + self.attention(self.attention_norm(x), rope, cu_seqlens, longest, self.layer, cache)
        y = self.mlp(self.mlp_norm(x))
        if isinstance(y, tuple):
            y, counts, prob_sums = y
            return x + y, counts, prob_sums
        return x + y, None, None
