"""TM-RoPE: rotary positions with three ids (time, height, width) per token (report section 2.3).

A head's D/2 frequencies are dealt out to the three axes in turn, t h w t h w ..., so that every axis owns high and low
frequencies; what remains once h and w have their share belongs to t. Which ids a token has is data
(`data/positions.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnitrain.models.layers.norms import inverse_rms
from omnitrain.models.layers.transfer import sent
from omnitrain.models.sizes import axis_of_frequency

Rotation = tuple[Tensor, Tensor]
"""cos and sin of rotation angles, fp32."""


def tm_rope_angles(position_ids: Tensor, sections: tuple[int, int, int], theta: float) -> Tensor:
    """Rotation angles of TM-RoPE (report section 2.3; RoPE: Su et al. 2021, arXiv 2104.09864, section 3.2).

        angle[n, i] = position_ids[a(i), n] * theta^(-2 i / D),   i = 0 .. D/2 - 1,   a = `axis_of_frequency`

    Args:
        position_ids: [3, N]: t, h, w, whole or fractional.  sections: frequencies of t, h, w; their sum is D/2.

    Returns:
        fp32 [N, D/2]
    """
    half = sum(sections)
    exponent = torch.arange(0, 2 * half, 2, dtype=torch.float32, device=position_ids.device) / (2 * half)
    frequency = 1.0 / (theta**exponent)  # [D/2]
    axes = sent(torch.tensor(axis_of_frequency(sections)), position_ids.device)
    # fp32 whatever the model's precision: ids reach tens of thousands, where bf16 knows multiples of 128 only.
    return position_ids.float().index_select(0, axes).T * frequency


def tm_rope(position_ids: Tensor, sections: tuple[int, int, int], theta: float) -> Rotation:
    """cos and sin of `tm_rope_angles`."""
    angle = tm_rope_angles(position_ids, sections, theta)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of x [..., D] in fp32 by the angles whose cos and sin are [..., D/2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """`rotate` x [N, H, D] by angles [N, D/2], forth (1) or back (-1), without a copy of it."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin, value=direction)
    return out


class NormRotate(torch.autograd.Function):
    """`rotate(rms_norm(x) * weight)` for the query and key heads, in one node that keeps x alone.

    x [N, H, D] are the projections of queries and keys side by side; the first `n_query` heads take `weight_q`, the
    others `weight_k` (the q/k norm of Qwen3). Returns [N, H, D]. Computed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, n_query: int, eps: float
    ) -> Tensor:
        r = inverse_rms(x.float(), eps)
        ctx.save_for_backward(x, weight_q, weight_k, cos, sin, r)
        ctx.n_query = n_query
        normed = (x.float() * r).mul_(per_head(weight_q, weight_k, n_query, x.shape[1]))
        return _rotate_into(torch.empty_like(normed), normed, cos, sin, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_q, weight_k, cos, sin, r = ctx.saved_tensors
        n_query, dim = ctx.n_query, x.shape[-1]
        weight = per_head(weight_q, weight_k, n_query, x.shape[1])
        dy = grads[0].float()
        dy = _rotate_into(torch.empty_like(dy, memory_format=torch.contiguous_format), dy, cos, sin, -1.0)
        normed = x.float() * r
        product = normed * dy
        d_weight = product.sum(0)  # [H, D]
        dx = dy.mul_(weight)
        mean = torch.mul(normed, dx, out=product).sum(-1, keepdim=True).div_(dim)
        dx = dx.addcmul_(normed, mean, value=-1.0).mul_(r)
        d_q = d_weight[:n_query].sum(0).to(weight_q.dtype)
        d_k = d_weight[n_query:].sum(0).to(weight_k.dtype)
        return dx.to(x.dtype), d_q, d_k, None, None, None, None


def norm_rotate(
    x: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, n_query: int, eps: float
) -> Tensor:
    """`NormRotate` written out, in as few kernels as there are: a generated token is one row. Autograd goes through it
    too, but keeps more."""
    x32, half = x.float(), x.shape[-1] // 2
    normed = F.rms_norm(x32, (x.shape[-1],), None, eps).mul_(per_head(weight_q, weight_k, n_query, x.shape[1]))
    a, b = normed[..., :half], normed[..., half:]
    turned = normed * torch.cat([cos, cos], dim=-1).unsqueeze(1)
    return turned.addcmul_(torch.cat([-b, a], dim=-1), torch.cat([sin, sin], dim=-1).unsqueeze(1)).to(x.dtype)


def per_head(weight_q: Tensor, weight_k: Tensor, n_query: int, heads: int) -> Tensor:
    """The norm's weight of every head, fp32 [H, D]."""
    return torch.cat([weight_q.expand(n_query, -1), weight_k.expand(heads - n_query, -1)]).float()
