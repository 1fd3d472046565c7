"""Cross-entropy of a large vocabulary without the logits of the whole batch.

One chunk of positions at a time: logits, log-sum-exp, and, when a gradient is wanted, at once the gradients too. So a
chunk's logits [chunk, V] are the most that ever exists, and they are computed once (compare Wijmans et al. 2024, "Cut
your losses", arXiv 2411.09009, which recomputes them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnitrain.models.layers.precision import full_precision


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024, ignore_index: int = -100
) -> Tensor:
    """-log softmax(hidden @ weight.T)[label] per position, in fp32.

    Positions without a label are dropped before the product with `weight`, so they cost nothing.

    Args:
        hidden: [N, D].  weight: [V, D].  labels: int64 [N], `ignore_index` where nothing is predicted.
        chunk: positions per product; memory is chunk * V * 4 bytes.

    Returns:
        fp32 [N], in nats; 0 where there is no label. Differentiable in `hidden` and `weight`. The gradients are ready
        after the forward pass if every position counts alike in the loss (`nll.sum() * c`); other weightings per
        position are exact too, at the price of computing the logits again.

    Raises ValueError: if a label lies outside [0, V).
    """
    rows = (labels != ignore_index).nonzero().squeeze(1)
    targets = labels[rows]
    if len(rows) and not (int(targets.min()) >= 0 and int(targets.max()) < weight.shape[0]):
        raise ValueError(
            f"labels must lie in [0, {weight.shape[0]}) (the rows of weight) or be {ignore_index}, "
            f"found {int(targets.min())} to {int(targets.max())}"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    nll = _ChunkedCrossEntropy.apply(hidden[rows], weight, targets, chunk, dtype)
    return torch.zeros(len(labels), dtype=torch.float32, device=hidden.device).index_copy(0, rows, nll)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        need = ctx.needs_input_grad[:2]
        ctx.chunk, ctx.dtype = chunk, dtype
        d_hidden, d_weight = _passes(hidden, weight, targets, chunk, dtype, nll, None, need)
        ctx.save_for_backward(hidden, weight, targets, d_hidden, d_weight)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, d_hidden, d_weight = ctx.saved_tensors
        grad = grads[0]
        if len(grad) and not bool((grad == grad[0]).all()):
            need = ctx.needs_input_grad[:2]
            d_hidden, d_weight = _passes(hidden, weight, targets, ctx.chunk, ctx.dtype, None, grad, need)
        else:
            # Not in place: the saved tensors must survive a second backward pass.
            scale = grad[0] if len(grad) else grad.new_zeros(())
            d_hidden, d_weight = (None if part is None else part * scale for part in (d_hidden, d_weight))
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b added up in fp32, and kept so: fp32 [M, N], for matrices of any precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _passes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    dtype: torch.dtype,
    nll: Tensor | None,
    scale: Tensor | None,
    need: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Fill `nll` if given; return the gradients of sum(scale * nll) in `hidden` and `weight` as far as needed. `dtype`
    is that of the products' factors."""
    d_hidden = torch.empty_like(hidden) if need[0] else None
    d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need[1] else None
    with full_precision(hidden):
        head = weight.to(dtype)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part].to(dtype), targets[part].unsqueeze(1)
            logits = _product(h, head.T)  # [chunk, V]; what follows happens in place
            logits -= logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            if nll is not None:
                nll[part] = (total.log() - chosen).squeeze(1)
            if not any(need):
                continue
            # softmax - one hot = (exp(logits) - total * one hot) / total: the division is left to the [chunk, D] side.
            d_logits = logits.scatter_add_(1, target, -total).to(dtype)
            share = 1 / total if scale is None else scale[part].unsqueeze(1) / total
            if d_hidden is not None:
                d_hidden[part] = _product(d_logits, head).mul_(share)
            if d_weight is not None:
                product = (h * share).to(dtype)
                if d_weight.dtype == product.dtype:
                    d_weight.addmm_(d_logits.T, product)
                else:
                    d_weight.add_(_product(d_logits.T, product))
    return d_hidden, d_weight
