"""Experts given out over processes: tokens travel to them and back (GShard, arXiv 2006.16668, without capacities).

Each of the P processes keeps E / P neighbouring experts of every layer. Before the experts run, each process sends the
rows of its tokens to those that keep the experts that they were routed to; behind them, the results travel back, and
each token's are weighed and added where it came from. Nobody drops a token, and every process runs its experts on just
the rows that all processes have for them, so the gradient of an expert is the sum over all tokens without a reduction.

The layer knows nothing of this: two hooks around `SwiGLUExperts` change its input and its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnitrain.models.layers.moe import Routing, SwiGLUExperts, sort_by_expert


@dataclass
class _Sent:
    """What is needed to put results where their tokens came from."""

    inverse: Tensor  # [N, k], where each choice of a token stands among the rows that were sent
    weights: Tensor  # [N, k]
    sent: list[int]  # rows for each process
    received: list[int]


class TokenExchange:
    """The two hooks of one layer's experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._under_way: list[_Sent] = []

    def before(self, experts: nn.Module, inputs: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        """x [N, D] and its routing -> the rows [M, D] that all processes have for the experts here, and theirs."""
        x, routing = inputs
        order, inverse, counts = sort_by_expert(routing)
        processes = self.group.size()
        counts_there = _exchange_counts(counts, self.group).view(processes, -1)  # [from, local expert]
        sent = counts.view(processes, -1).sum(1).tolist()
        received = counts_there.sum(1).tolist()
        rows = Exchange.apply(x[order // inverse.shape[1]], sent, received, self.group)
        local = torch.arange(counts_there.shape[1], device=x.device).repeat(processes)
        choice = local.repeat_interleave(counts_there.flatten(), output_size=len(rows))
        here = Routing(
            experts=choice[:, None],
            weights=rows.new_ones(len(rows), 1),
            counts=counts_there.sum(0).float(),
            prob_sums=routing.prob_sums,
        )
        self._under_way.append(_Sent(inverse, routing.weights, sent, received))
        return rows, here

    def after(self, experts: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Results [M, D] of the experts here -> [N, D], the weighted sums of this process's tokens."""
        told = self._under_way.pop()
        rows = Exchange.apply(output, told.received, told.sent, self.group)
        return torch.einsum("nk, nkd -> nd", told.weights.to(rows.dtype), rows[told.inverse]).to(output.dtype).clone()


class Exchange(torch.autograd.Function):
    """rows [M, D], those for each process end to end -> rows from each process end to end; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """int64 [E], rows for each expert -> [E], rows from each process for each of the experts here."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts, group=group)
    return out


def numbers_of_experts(model: nn.Module) -> list[int]:
    """How many the layers of `model` have that have any."""
    return sorted({len(module.gate_up) for module in model.modules() if isinstance(module, SwiGLUExperts)})


def give_out_experts(model: nn.Module, group: dist.ProcessGroup) -> dict[str, int]:
    """Leave in `model` the experts of this process, and let tokens travel. Returns how many experts there are in all,
    by the name of their module. ValueError where they cannot be divided evenly."""
    found = {}
    for name, experts in model.named_modules():
        if not isinstance(experts, SwiGLUExperts):
            continue
        n, processes, here = len(experts.gate_up), group.size(), group.rank()
        if n % processes:
            raise ValueError(f"parallel.expert={processes}: does not divide the {n} experts of {name}")
        for key, parameter in list(experts.named_parameters(recurse=False)):
            part = parameter.detach()[here * n // processes : (here + 1) * n // processes].clone()  # or on `meta`
            setattr(experts, key, nn.Parameter(part, requires_grad=parameter.requires_grad))
        exchange = TokenExchange(group)
        experts.register_forward_pre_hook(torch.compiler.disable(exchange.before))
        experts.register_forward_hook(torch.compiler.disable(exchange.after))
        found[name] = n
    return found
