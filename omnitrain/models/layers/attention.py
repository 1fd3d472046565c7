"""Attention over packed documents: `[N, heads, head_dim]` and `cu_seqlens`, nothing padded.

On CUDA in 16 bits one `torch.nn.attention.varlen` kernel serves the whole pack, and nothing is read back from the GPU.
Elsewhere each document is one call of `scaled_dot_product_attention`; documents of equal length (the windows of the
audio encoder, the frames of the vision encoder) share a call. How many calls depends on values, so to the compiler all
of them are one operation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnitrain.models.layers.transfer import sent


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    longest: int | None = None,
    cu_seqlens_key: Tensor | None = None,
    longest_key: int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v inside each document, grouped-query where key/value have fewer heads.

    Args:
        query: [N, H, D].  key, value: [M, H_kv, D], H a multiple of H_kv.
        cu_seqlens: int32 [B + 1], document borders in `query`.
        causal: position i sees positions <= i; where a document has more keys than queries (decoding with a cache),
            the last query sees the last key.
        longest: no document has more queries than that; the kernel of GPUs is started for so many. None: N, which is
            always enough, and starts blocks that have nothing to do.
        cu_seqlens_key, longest_key: of `key`/`value` if they differ from those of `query`.

    Returns:
        [N, H, D]
    """
    # Flash kernels read 16-bit floats only; fp32 on CUDA (parity runs) takes the per-document path below.
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        longest = len(query) if longest is None else longest
        if cu_seqlens_key is not None:
            longest_key = len(key) if longest_key is None else longest_key
        attended = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens if cu_seqlens_key is None else cu_seqlens_key,
            longest,
            longest if longest_key is None else longest_key,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(attended, Tensor)  # a tuple only when asked for more
        return attended
    cu_seqlens_key = cu_seqlens if cu_seqlens_key is None else cu_seqlens_key
    if torch.compiler.is_compiling():
        return _one_operation(query, key, value, cu_seqlens, cu_seqlens_key, causal)
    return _by_documents(query, key, value, cu_seqlens, cu_seqlens_key, causal)


def documents(cu_seqlens: Tensor, device: torch.device) -> tuple[Tensor, int | None]:
    """`cu_seqlens` on `device`, and the length of the longest document if that is known without waiting for the device:
    if `cu_seqlens` comes from the host."""
    if cu_seqlens.device.type == device.type:
        return cu_seqlens, None
    return sent(cu_seqlens, device), int(cu_seqlens.diff().max())


def _by_documents(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cu_seqlens_key: Tensor, causal: bool
) -> Tensor:
    borders_q, borders_k = cu_seqlens.tolist(), cu_seqlens_key.tolist()
    gqa = query.shape[1] != key.shape[1]
    if len(query) == 1 and len(borders_q) == 2:  # a generated token: nothing to sort, nothing to mask
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa).view(query.shape)

    lengths_q, lengths_k = ([end - start for start, end in pairwise(borders)] for borders in (borders_q, borders_k))
    q_parts, k_parts, v_parts = query.split(lengths_q), key.split(lengths_k), value.split(lengths_k)
    outputs: list[Tensor | None] = [None] * len(q_parts)
    for (n_q, n_k), alike in _of_equal_lengths(lengths_q, lengths_k).items():
        if n_q == 0:
            for b in alike:
                outputs[b] = q_parts[b]
            continue
        q, k, v = (_together(parts, alike) for parts in (q_parts, k_parts, v_parts))  # [docs, H, n, D]
        mask = _behind_cache(n_q, n_k, query.device) if causal and 1 < n_q < n_k else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and n_q == n_k and n_q > 1, enable_gqa=gqa
        )
        for b, o in zip(alike, out.transpose(1, 2), strict=True):
            outputs[b] = o
    return torch.cat([o for o in outputs if o is not None])


def _of_equal_lengths(lengths_q: list[int], lengths_k: list[int]) -> dict[tuple[int, int], list[int]]:
    """(queries, keys) -> the documents that have so many."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for b, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups[lengths].append(b)
    return groups


def _behind_cache(n_q: int, n_k: int, device: torch.device) -> Tensor:
    """bool [n_q, n_k]: which keys the last n_q of n_k positions see."""
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(n_k - n_q)


def _together(parts: Sequence[Tensor], alike: list[int]) -> Tensor:
    """[n, H, D] of each document -> [docs, H, n, D]; a single document is not copied."""
    if len(alike) == 1:
        return parts[alike[0]].transpose(0, 1).unsqueeze(0)
    return torch.stack([parts[b] for b in alike]).transpose(1, 2)


@torch.library.custom_op("omnitrain::attention", mutates_args=())
def _one_operation(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cu_seqlens_key: Tensor, causal: bool
) -> Tensor:
    return _by_documents(query, key, value, cu_seqlens, cu_seqlens_key, causal)


@torch.library.custom_op("omnitrain::attention_backward", mutates_args=())
def _gradients(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_key: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = softmax(s q k^T), dV = P^T dY, dS = P (dY v^T - rowsum(dY v^T P)), dQ = s dS k, dK = s dS^T q."""
    lengths_q, lengths_k = cu_seqlens.diff().tolist(), cu_seqlens_key.diff().tolist()
    d_query, d_key, d_value = (t.new_zeros(t.shape) for t in (query, key, value))
    q_parts = [t.split(lengths_q) for t in (query, upstream, d_query)]
    k_parts = [t.split(lengths_k) for t in (key, value, d_key, d_value)]
    kv_heads, scale = key.shape[1], query.shape[2] ** -0.5
    for (n_q, n_k), alike in _of_equal_lengths(lengths_q, lengths_k).items():
        if n_q == 0:
            continue
        q, dy = (_together(parts, alike).float().unflatten(1, (kv_heads, -1)) for parts in q_parts[:2])
        k, v = (_together(parts, alike).float().unsqueeze(2) for parts in k_parts[:2])  # [docs, H_kv, 1, n, D]
        scores = q @ k.mT * scale
        if causal:
            scores = scores.masked_fill(~_behind_cache(n_q, n_k, query.device), -torch.inf)
        p = scores.softmax(-1)
        dp = dy @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        grads = (ds @ k).flatten(1, 2), (ds.mT @ q).sum(2), (p.mT @ dy).sum(2)
        for gradient, parts in zip(grads, (q_parts[2], k_parts[2], k_parts[3]), strict=True):
            for b, part in zip(alike, gradient.transpose(1, 2), strict=True):
                parts[b].copy_(part)
    return d_query, d_key, d_value


@_one_operation.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@_gradients.register_fake
def _(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(upstream, *ctx.saved_tensors, ctx.causal), None, None, None


_one_operation.register_autograd(_backward, setup_context=_remember)
