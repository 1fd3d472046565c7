"""Mixture of experts with the tokens sorted by expert (docs/moe.md).

Each token goes to its top-k experts. Sorted by expert, the tokens of one expert are contiguous rows, so that an expert
is three plain matrix products on them: no padding, no capacity, no dropped token, and no zeros multiplied. On CPU the
experts run one after the other inside a single autograd node; on CUDA in 16 bit one `grouped_mm` kernel does them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnitrain.models.layers.precision import full_precision

FEW_TOKENS = 2
"""Up to here tokens are not sorted by expert where nothing is learnt: less than half the time for one token (one CPU
core, 8 experts of width 192), nothing gained from four on."""


@dataclass(frozen=True)
class Routing:
    """Where each token goes, and what the balance loss needs.

    experts: int64 [N, k].  weights: [N, k], the mixing weights.
    counts: fp32 [E], tokens sent to each expert (no gradient).  prob_sums: fp32 [E], sum over tokens of the router's
    softmax (with gradient, unless the router is frozen). Both are *sums* over this pack: the balance loss adds them up
    over the whole global batch before it multiplies them.
    """

    experts: Tensor
    weights: Tensor
    counts: Tensor
    prob_sums: Tensor


class TopKRouter(nn.Module):
    """Softmax over all experts, then the k largest, normalised to sum one if `normalise` (Qwen3: `norm_topk_prob`).

    `given`, int64 [N, k], are experts to be taken instead of the k largest, weighted by what the softmax says of them
    now (routing replay, GSPO, arXiv 2507.18071, section 5.3).
    """

    given: Tensor | None = None

    def __init__(self, dim: int, n_experts: int, top_k: int, normalise: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.top_k = top_k
        self.normalise = normalise

    def forward(self, x: Tensor) -> Routing:
        """x [N, D] -> Routing of N tokens."""
        with full_precision(x):  # in 16 bit, rounding would choose among close experts
            probs = F.linear(x.float(), self.weight.float()).softmax(-1)  # [N, E]
        if self.given is None:
            weights, experts = probs.topk(self.top_k, dim=-1)
        else:
            experts, weights = self.given, probs.gather(1, self.given)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        chosen = experts.flatten()  # not `bincount`, which waits for the GPU to know how many there are
        counts = chosen.new_zeros(probs.shape[1]).scatter_add_(0, chosen, torch.ones_like(chosen)).float()
        # A frozen router cannot be balanced; its loss would teach what stands before it to look like other tokens.
        balanced = probs if self.weight.requires_grad else probs.detach()
        return Routing(experts=experts, weights=weights.to(x.dtype), counts=counts, prob_sums=balanced.sum(0))


class SwiGLUExperts(nn.Module):
    """E gated MLPs, down_e(silu(gate_e x) * up_e x), as two stacked tensors.

    gate_up: [E, 2 * width, D] (gate rows, then up rows).  down: [E, D, width].
    grouped: as one product over all experts, where otherwise they would run one after the other: for the compiler, and
        for checkpointing that keeps their products, which both look at single operations.
    """

    def __init__(self, dim: int, width: int, n_experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * width, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, width))
        self.grouped = False

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, D] -> [N, D], the weighted sum of each token's experts."""
        autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
        if (x.is_cuda and dtype == torch.bfloat16) or self.grouped or torch.compiler.is_compiling():
            return self._grouped(x.to(dtype), routing, dtype).to(x.dtype)
        if 0 < len(x) <= FEW_TOKENS and not torch.is_grad_enabled():
            return self._one_by_one(x, routing)
        return _ExpertLoop.apply(x, self.gate_up, self.down, routing.weights, *sort_by_expert(routing))

    def _one_by_one(self, x: Tensor, routing: Routing) -> Tensor:
        """For a few generated tokens: sorting them would take longer than their experts."""
        rows = []
        for token, experts, weights in zip(x, routing.experts.tolist(), routing.weights, strict=True):
            inner = []
            for e in experts:
                gate, up = torch.mv(self.gate_up[e], token).chunk(2)
                inner.append(torch.mv(self.down[e], F.silu(gate).mul_(up)))
            rows.append(torch.mv(torch.stack(inner, dim=1), weights))
        return torch.stack(rows)

    def _grouped(self, x: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
        order, inverse, counts = sort_by_expert(routing)
        ends = counts.cumsum(0).to(torch.int32)
        gate_up = _products(_ToExperts.apply(x, order, inverse), self.gate_up.to(dtype).transpose(1, 2), ends)
        gate, up = gate_up.chunk(2, dim=-1)
        y = _products(F.silu(gate) * up, self.down.to(dtype).transpose(1, 2), ends)
        # Summed in the order of each token's choices, inside a product: added where they land, in 16 bit, the sums
        # would depend on which expert is ready first.
        rows = _FromExperts.apply(y, order, inverse)  # [N, k, D]
        return torch.einsum("nk, nkd -> nd", routing.weights.to(dtype), rows)


def _products(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [M, K], of which expert e has those up to ends[e], times matrices [E, K, N] -> [M, N]."""
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:  # which the compiler alone knows the shapes of
        return _grouped_mm(rows, matrices, ends)
    return F.grouped_mm(rows, matrices, offs=ends)


@torch.library.custom_op("omnitrain::grouped_mm", mutates_args=())
def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a [M, K], b [E, K, N] -> [M, N]; or a [K, M], b [M, N] -> [E, K, N], for each group of M."""
    return F.grouped_mm(a, b, offs=ends)


@_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(*([] if b.ndim == 3 else [len(ends)]), a.shape[0], b.shape[-1])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, matrices, ends = ctx.saved_tensors
    need_rows, need_matrices = ctx.needs_input_grad[:2]
    d_rows = _grouped_mm(upstream.contiguous(), matrices.transpose(1, 2), ends) if need_rows else None
    return d_rows, _grouped_mm(rows.T, upstream.contiguous(), ends) if need_matrices else None, None


_grouped_mm.register_autograd(_gradients, setup_context=_remember)


class _ToExperts(torch.autograd.Function):
    """x [N, D] -> [N * k, D], a row for each of a token's choices, sorted by expert; see `sort_by_expert`. Its backward
    pass, and that of `_FromExperts`, gather: what adds up in place has no fixed order on CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order // inverse.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].sum(1), None, None


class _FromExperts(torch.autograd.Function):
    """The reverse: y [N * k, D], sorted by expert -> [N, k, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].flatten(0, 1)[order], None, None


def sort_by_expert(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the N * k (token, choice) pairs by expert, its inverse [N, k], and the int64 count of each expert."""
    flat = routing.experts.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse.view_as(routing.experts), routing.counts.long()


def rows_by_expert(routing: Routing) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, the tokens that go to it, which of their choices it is) for every expert that has any; int64 [n]."""
    order, inverse, counts = sort_by_expert(routing)
    k = inverse.shape[1]
    return [(e, order[rows] // k, order[rows] % k) for e, rows in _slices(counts)]


def _sum_of_rows(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """out[n] = sum_j weights[n, j] * rows[index[n, j]]: gather, weigh and add in one pass over `rows`."""
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)


class _ExpertLoop(torch.autograd.Function):
    """The experts one after the other, each on its contiguous rows.

    Kept for the backward pass: x [N, D] and the products gate_up(x) [N * k, 2 * width]; the gathered rows, the
    activation and the experts' outputs are made again, one expert at a time. The gradient of a mixing weight needs no
    output y = W a either: <dy, W a> = <W^T dy, a>, and W^T dy is there anyway. The experts' gradients are written
    straight into their slices of one tensor, where autograd through `gate_up[e]` would add E mostly-zero tensors.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        order: Tensor,
        inverse: Tensor,
        counts: Tensor,
    ) -> Tensor:
        token = order // inverse.shape[1]
        width = down.shape[2]
        h = x.new_empty(len(order), gate_up.shape[1])
        y = x.new_empty(len(order), x.shape[1])
        for e, rows in _slices(counts):
            torch.mm(x.index_select(0, token[rows]), gate_up[e].T, out=h[rows])
            a = F.silu(h[rows, :width]).mul_(h[rows, width:])
            torch.mm(a, down[e].T, out=y[rows])
        ctx.save_for_backward(x, gate_up, down, weights, token, order, inverse, counts, h)
        return _sum_of_rows(y, inverse, weights)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, token, order, inverse, counts, h = ctx.saved_tensors
        need_x, need_gate_up, need_down = ctx.needs_input_grad[:3]
        width = down.shape[2]
        sorted_weights = weights.flatten()[order].unsqueeze(1)
        d_weights = x.new_empty(len(order))
        d_gate_up = torch.empty_like(gate_up) if need_gate_up else None
        d_down = torch.empty_like(down) if need_down else None
        for gradient in (d_gate_up, d_down):
            if gradient is not None:
                gradient[counts == 0] = 0  # experts that nobody chose
        dx_rows = x.new_empty(len(order), x.shape[1]) if need_x else None
        for e, rows in _slices(counts):
            gate, up = h[rows, :width], h[rows, width:]
            dy = grads[0].index_select(0, token[rows])
            da = dy @ down[e]  # before weighing
            silu = F.silu(gate)
            a = silu * up
            torch.linalg.vecdot(da, a, out=d_weights[rows])
            if d_down is not None:
                torch.mm(dy.T, a.mul_(sorted_weights[rows]), out=d_down[e])
            da.mul_(sorted_weights[rows])
            dh = torch.empty_like(h[rows])
            torch.mul(da, silu, out=dh[:, width:])
            torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dh[:, :width])
            if d_gate_up is not None:
                torch.mm(dh.T, x.index_select(0, token[rows]), out=d_gate_up[e])
            if dx_rows is not None:
                torch.mm(dh, gate_up[e], out=dx_rows[rows])
        dx = _sum_of_rows(dx_rows, inverse, None) if dx_rows is not None else None
        return dx, d_gate_up, d_down, d_weights[inverse], None, None, None


def _slices(counts: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows among the sorted tokens) for every expert that has any."""
    found, start = [], 0
    for e, n in enumerate(counts.tolist()):
        if n:
            found.append((e, slice(start, start + n)))
        start += n
    return found
