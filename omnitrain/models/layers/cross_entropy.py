"""Cross-entropy of a large vocabulary without the logits of the whole batch.

One chunk of positions at a time: logits, log-sum-exp, and, when a gradient is wanted, at once the gradients too. So a
chunk's logits [chunk, V] are the most that ever exists, and they are computed once (compare Wijmans et al. 2024, "Cut
your losses", arXiv 2411.09009, which recomputes them).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnitrain.models.layers.precision import full_precision
from omnitrain.models.layers.transfer import sent


class CrossEntropy(NamedTuple):
    """total: fp32 [], sum over the positions of weight times nll; differentiable.  nll: fp32 [N], in nats, 0 where
    there is no label; for the log, without a gradient."""

    total: Tensor
    nll: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    chunk: int = 1024,
    ignore_index: int = -100,
    compiled: bool = False,
) -> CrossEntropy:
    """nll = -log softmax(hidden @ weight.T)[label] of each position, and their weighted sum.

    Positions without a label are dropped before the product with `weight`, so they cost nothing.

    Args:
        hidden: [N, D].  weight: [V, D].
        labels: int64 [N], `ignore_index` where nothing is predicted. Best on the host: which positions have one decides
            shapes.
        weights: fp32 [N], of the positions in the sum, where the labels are; None: all 1. Their gradient is not made.
        chunk: positions per product; memory is chunk * V * 4 bytes.
        compiled: each chunk in fused kernels (`torch.compile`).

    Raises ValueError: if a label lies outside [0, V).
    """
    rows = (labels != ignore_index).nonzero().squeeze(1)
    targets = labels[rows]
    if len(rows) and not (int(targets.min()) >= 0 and int(targets.max()) < weight.shape[0]):
        raise ValueError(
            f"labels must lie in [0, {weight.shape[0]}) (the rows of weight) or be {ignore_index}, "
            f"found {int(targets.min())} to {int(targets.max())}"
        )
    device = hidden.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
    scale = None if weights is None else sent(weights[rows], device)
    rows, targets = sent(rows, device), sent(targets, device)
    options = _Options(chunk, dtype, len(labels), _compiled() if compiled else _of_chunk)
    return CrossEntropy(*_ChunkedCrossEntropy.apply(hidden[rows], weight, targets, scale, rows, options))


class _Options(NamedTuple):
    chunk: int
    dtype: torch.dtype  # of the products' factors
    positions: int
    of_chunk: Any


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None, rows: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        need = ctx.needs_input_grad[:2]
        found = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need[0] else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need[1] else None
        with full_precision(hidden):
            head = weight.to(options.dtype)
            for start in range(0, len(targets), options.chunk):
                part = slice(start, start + options.chunk)
                found[part], gradient = options.of_chunk(
                    hidden[part].to(options.dtype), targets[part], None if scale is None else scale[part],
                    head, need[0], d_weight,
                )  # fmt: skip
                if d_hidden is not None:
                    d_hidden[part] = gradient
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        nll = torch.zeros(options.positions, dtype=torch.float32, device=hidden.device).index_copy_(0, rows, found)
        total = nll.sum() if scale is None else (nll.index_copy(0, rows, found * scale)).sum()
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: the saved tensors must survive a second backward pass.
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if part is None else (part * grads[0]).to(dtype) for part, dtype in parts), *[None] * 4


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b added up in fp32, and kept so: fp32 [M, N], for matrices of any precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _of_chunk(
    h: Tensor, target: Tensor, scale: Tensor | None, head: Tensor, need_hidden: bool, d_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """nll [n] of hidden states h [n, D], and the gradient of sum(scale * nll) in them, if it is needed; that in the
    head [V, D] is added to `d_weight`."""
    target = target.unsqueeze(1)
    logits = _product(h, head.T)  # [n, V]; what follows happens in place
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, target)
    total = logits.exp_().sum(-1, keepdim=True)
    nll = (total.log() - chosen).squeeze(1)
    if not need_hidden and d_weight is None:
        return nll, None
    # softmax - one hot = (exp(logits) - total * one hot) / total: the division is left to the [n, D] side.
    d_logits = logits.scatter_add_(1, target, -total).to(h.dtype)
    share = 1 / total if scale is None else scale.unsqueeze(1) / total
    d_hidden = _product(d_logits, head).mul_(share) if need_hidden else None
    if d_weight is not None:
        product = (h * share).to(h.dtype)
        if d_weight.dtype == product.dtype:
            d_weight.addmm_(d_logits.T, product)
        else:
            d_weight.add_(_product(d_logits.T, product))
    return nll, d_hidden


@cache
def _compiled() -> Any:
    return torch.compile(_of_chunk, fullgraph=True, dynamic=True)
