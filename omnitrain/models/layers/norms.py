"""RMSNorm (Zhang & Sennrich, 2019, arXiv 1910.07467), the only norm of the language decoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis, computed in fp32 whatever the dtype of x.

    `forward(x [..., D]) -> [..., D]` in the dtype of x.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # `_RMSNorm` is for a backward pass that is not compiled; on one row it costs more.
        if x.is_cuda or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)
        return _RMSNorm.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as an axis of length one: [..., D] -> [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass, no squared copy of x
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """On CPU autograd through `F.rms_norm` keeps and re-reads several [N, D] intermediates; this keeps x alone.

    With r = 1 / rms(x), x' = x r and g = w dy:  dx = r (g - x' mean(g x')),  dw = sum over rows of dy x'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = inverse_rms(x.float(), eps)
        ctx.save_for_backward(x, weight, r)
        return (x.float() * r).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        normed = x.float() * r
        product = normed * grads[0]
        d_weight = product.reshape(-1, product.shape[-1]).sum(0)
        mean = (product @ weight.float()).div_(product.shape[-1]).unsqueeze(-1)
        # x' and the product are ours: reuse their memory for dx.
        dx = torch.mul(grads[0], weight, out=product) if product.dtype == grads[0].dtype else grads[0].float() * weight
        dx = dx.addcmul_(normed, mean, value=-1.0).mul_(r)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
