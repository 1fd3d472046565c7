"""Attention over packed documents: `[N, heads, head_dim]` and `cu_seqlens`, nothing padded.

On CUDA one `torch.nn.attention.varlen` kernel serves the whole pack. On CPU each document is one call of
`scaled_dot_product_attention`; documents of equal length (the windows of the audio encoder, the frames of the vision
encoder) share a call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    cu_seqlens_key: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v inside each document, grouped-query where key/value have fewer heads.

    Args:
        query: [N, H, D].  key, value: [M, H_kv, D], H a multiple of H_kv.
        cu_seqlens: int32 [B + 1], document borders in `query`.
        causal: position i sees positions <= i; where a document has more keys than queries (decoding with a cache),
            the last query sees the last key.
        cu_seqlens_key: int32 [B + 1], borders in `key`/`value` if they differ from those of `query`.

    Returns:
        [N, H, D]
    """
    cu_seqlens_key = cu_seqlens if cu_seqlens_key is None else cu_seqlens_key
    # Flash kernels read 16-bit floats only; fp32 on CUDA (parity runs) takes the per-document path below.
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens_key,
            int(cu_seqlens.diff().max()),
            int(cu_seqlens_key.diff().max()),
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(attended, Tensor)  # a tuple only when asked for more
        return attended

    borders_q, borders_k = cu_seqlens.tolist(), cu_seqlens_key.tolist()
    gqa = query.shape[1] != key.shape[1]
    if len(query) == 1 and len(borders_q) == 2:  # a generated token: nothing to sort, nothing to mask
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa).view(query.shape)

    lengths_q, lengths_k = ([end - start for start, end in pairwise(borders)] for borders in (borders_q, borders_k))
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for b, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups[lengths].append(b)
    q_parts, k_parts, v_parts = query.split(lengths_q), key.split(lengths_k), value.split(lengths_k)
    outputs: list[Tensor | None] = [None] * len(q_parts)
    for (n_q, n_k), documents in groups.items():
        if n_q == 0:
            for b in documents:
                outputs[b] = q_parts[b]
            continue
        q, k, v = (_together(parts, documents) for parts in (q_parts, k_parts, v_parts))  # [docs, H, n, D]
        mask = None
        if causal and 1 < n_q < n_k:  # chunked prefill behind a cache
            mask = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and n_q == n_k and n_q > 1, enable_gqa=gqa
        )
        for b, o in zip(documents, out.transpose(1, 2), strict=True):
            outputs[b] = o
    return torch.cat([o for o in outputs if o is not None])


def _together(parts: Sequence[Tensor], documents: list[int]) -> Tensor:
    """[n, H, D] of each document -> [docs, H, n, D]; a single document is not copied."""
    if len(documents) == 1:
        return parts[documents[0]].transpose(0, 1).unsqueeze(0)
    return torch.stack([parts[b] for b in documents]).transpose(1, 2)
