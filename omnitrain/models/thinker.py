"""Thinker: the mixture-of-experts decoder that reads text, sound and pictures and writes text (report section 2.1,
2.3).

All documents of a batch stand end to end, [N, D] with `cu_seqlens`. What a position *is* (word, sound, picture) was
decided before: its embedding is in `inputs_embeds`, its place in `position_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.moe import SwiGLUExperts, TopKRouter
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.rope import NormRotate, tm_rope


@dataclass(frozen=True, kw_only=True)
class ThinkerConfig:
    """Names follow the paper; the public configuration's names stand beside them where they differ.

    Attributes:
        d_model: width of the residual stream (`hidden_size`)
        heads, kv_heads, head_dim: grouped-query attention; head_dim need not be d_model / heads
        ffn: width of a dense layer's SwiGLU (`intermediate_size`)
        n_experts, top_k, expert_width: MoE layers (`num_experts`, `num_experts_per_tok`, `moe_intermediate_size`)
        normalise_top_k: mixing weights sum to one (`norm_topk_prob`)
        dense_layers: indices of layers with a dense MLP (`mlp_only_layers`)
        sparse_step: layer i has experts if (i + 1) is a multiple of it (`decoder_sparse_step`)
        mrope_sections: frequencies of t, h, w; they sum to head_dim / 2
        rope_theta: base of the rotary frequencies
        accept_hidden_layer: the Talker reads the residual stream after this many layers (before deepstack is added)
        balance_coefficient: weight of the balance loss (`router_aux_loss_coef`)
        max_positions: longest position id the model is meant for (`max_position_embeddings`)
    """

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    n_experts: int
    top_k: int
    expert_width: int
    normalise_top_k: bool = True
    dense_layers: tuple[int, ...] = ()
    sparse_step: int = 1
    mrope_sections: tuple[int, int, int] = (24, 20, 20)
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    attention_bias: bool = False
    accept_hidden_layer: int = 0
    balance_coefficient: float = 0.001
    max_positions: int = 65536

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ValueError(f"mrope_sections {self.mrope_sections} must sum to head_dim / 2 = {self.head_dim // 2}")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k ({self.top_k}) must lie in 1..n_experts ({self.n_experts})")
        if not 0 <= self.accept_hidden_layer < self.layers:
            raise ValueError(
                f"accept_hidden_layer ({self.accept_hidden_layer}) must lie in 0..{self.layers - 1} (layers - 1)"
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


class KVCache(Protocol):
    """What the attention layers need of a cache (`generation/cache.py` has one)."""

    def append(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the new positions of every document and return everything known so far.

        Args:
            layer: index of the decoder layer, from 0.
            key, value: [N, H_kv, head_dim], the new positions, documents end to end; keys are already rotated.
            cu_seqlens: int32 [B + 1], borders of the new positions.

        Returns:
            keys, values: [M, H_kv, head_dim], per document all positions up to now, documents end to end in the same
            order; cu_seqlens_key: int32 [B + 1], their borders.
        """
        ...


@dataclass(frozen=True)
class ThinkerOutput:
    """hidden [N, D]: after the final norm (times `lm_head.weight.T` = logits).  accept_hidden [N, D]: residual stream
    after `accept_hidden_layer` layers, for the Talker.  router_counts, router_prob_sums: [L, E] over the L layers with
    experts (see `Routing`)."""

    hidden: Tensor
    accept_hidden: Tensor
    router_counts: Tensor
    router_prob_sums: Tensor


class Attention(nn.Module):
    """Causal grouped-query attention with RMSNorm on every query and key head (Qwen3) and rotary positions.

    The projections of queries, keys and values are one matrix: rows [q heads, k heads, v heads] x head_dim.
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qkv = nn.Linear(
            config.d_model, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=config.attention_bias
        )
        self.out = nn.Linear(config.heads * config.head_dim, config.d_model, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor, layer: int, cache: KVCache | None
    ) -> Tensor:
        """x [N, D], rope = (cos, sin) each [N, head_dim / 2] -> [N, D]"""
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, self.head_dim)
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        qk = NormRotate.apply(qk, self.q_norm.weight, self.k_norm.weight, *rope, heads, self.q_norm.eps)
        q, k = qk.split([heads, kv_heads], dim=1)
        cu_seqlens_key = None
        if cache is not None:
            k, v, cu_seqlens_key = cache.append(layer, k, v, cu_seqlens)
        y = varlen_attention(q, k, v, cu_seqlens, causal=True, cu_seqlens_key=cu_seqlens_key)
        return self.out(y.reshape(len(x), heads * self.head_dim))


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
    """Router and experts."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.router = TopKRouter(config.d_model, config.n_experts, config.top_k, config.normalise_top_k)
        self.experts = SwiGLUExperts(config.d_model, config.expert_width, config.n_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> [N, D], router counts [E], router probability sums [E]"""
        routing = self.router(x)
        return self.experts(x, routing), routing.counts, routing.prob_sums


class DecoderLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: ThinkerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp: SparseMLP | DenseMLP = (
            SparseMLP(config) if config.is_sparse(layer) else DenseMLP(config.d_model, config.ffn)
        )

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[N, D] -> [N, D], and the router's counts and probability sums [E] if this layer has experts"""
        x = x + self.attention(self.attention_norm(x), rope, cu_seqlens, self.layer, cache)
        y = self.mlp(self.mlp_norm(x))
        if isinstance(y, tuple):
            y, counts, prob_sums = y
            return x + y, counts, prob_sums
        return x + y, None, None


class Thinker(nn.Module):
    """Decoder-only transformer with experts, TM-RoPE and deepstack (report section 2.1; Qwen3-VL's deepstack).

    After each of the first layers, one more level of the vision encoder's features is added at the visual positions:
    shallow layers of the encoder see edges and glyphs that its last layer no longer carries.
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.layers)])
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.activation_checkpointing = False

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        visual_mask: Tensor | None = None,
        deepstack: list[Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> ThinkerOutput:
        """Run the decoder over packed documents.

        Args:
            inputs_embeds: [N, D].  position_ids: int64 [3, N].  cu_seqlens: int32 [B + 1].
            visual_mask: bool [N], where `deepstack` goes.  deepstack: per level [visual_mask.sum(), D].
            cache: keys and values of earlier calls; `inputs_embeds` are then the new positions only.

        Raises:
            ValueError: if deepstack has more levels than there are layers, or not one row per visual position.
        """
        config = self.config
        visual = _visual_rows(visual_mask, deepstack, config.layers)
        rope = tm_rope(position_ids, config.mrope_sections, config.rope_theta)
        x, accept_hidden = inputs_embeds, inputs_embeds
        counts, prob_sums = [], []
        for i, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x, count, prob_sum = checkpoint(layer, x, rope, cu_seqlens, None, use_reentrant=False)
            else:
                x, count, prob_sum = layer(x, rope, cu_seqlens, cache)
            if i + 1 == config.accept_hidden_layer:
                accept_hidden = x
            if deepstack is not None and visual is not None and i < len(deepstack):
                x = x.index_add(0, visual, deepstack[i].to(x.dtype))
            if count is not None:
                counts.append(count)
                prob_sums.append(prob_sum)
        none = x.new_zeros(0, config.n_experts, dtype=torch.float32)
        return ThinkerOutput(
            hidden=self.norm(x),
            accept_hidden=accept_hidden,
            router_counts=torch.stack(counts) if counts else none,
            router_prob_sums=torch.stack(prob_sums) if prob_sums else none,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] after the final norm -> [N, V]"""
        return self.lm_head(hidden)


def _visual_rows(mask: Tensor | None, deepstack: list[Tensor] | None, layers: int) -> Tensor | None:
    if not deepstack:
        return None
    if mask is None:
        raise ValueError("deepstack features were given without visual_mask")
    if len(deepstack) > layers:
        raise ValueError(f"{len(deepstack)} deepstack levels for {layers} decoder layers: lower the number of levels")
    rows = mask.nonzero().squeeze(1)
    for level, features in enumerate(deepstack):
        if len(features) != len(rows):
            raise ValueError(f"deepstack level {level} has {len(features)} rows for {len(rows)} visual positions")
    return rows
