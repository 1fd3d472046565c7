"""FSDP2 (arXiv 2304.11277) for the models of this library: which modules are gathered together.

One unit is a layer of any stack (Thinker, Talker, MTP, AuT's encoder, vision encoder, Code2Wav's transformer), another
the experts of a layer where they are given out. What is left (embeddings, heads, norms, convolutional stems,
projections) is one unit more, gathered once a step: everything outside of a layer may be called in any order, by any
method.

Gradients are summed over processes, not averaged: the training divides them by the global batch's targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from omnitrain.models.aut_decoder import AuTDecoderLayer
from omnitrain.parallel.context import slice_packs
from omnitrain.parallel.experts import give_out_experts
from omnitrain.parallel.mesh import Mesh

STACKS = ("layers", "blocks")
"""Names of the lists of layers."""


def spread(
    model: nn.Module, mesh: Mesh, *, compute: torch.dtype | None = None, offload: bool = False
) -> dict[str, int]:
    """Leave of `model` on each process its shards, and let the processes gather what they need. A collective.

    Args:
        compute: what weights are gathered as (bf16 halves the traffic); None: as they are. They are kept as they are,
            and gradients are added up in fp32.
        offload: shards wait on the host.

    Returns:
        How many experts there are in all, by the name of the module that keeps some of them.

    Raises ValueError: experts, or heads where packs are shared, that cannot be dealt out.
    """
    if mesh.sizes.context > 1:
        slice_packs(model, mesh.context.get_group())
    given_out = give_out_experts(model, mesh.experts["expert"].get_group()) if mesh.sizes.expert > 1 else {}
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for name, module in model.named_modules():
        if name in given_out:
            fully_shard(module, mesh=mesh.shards_of_experts, **options)
    for stack in [m for n, m in model.named_modules() if n.rpartition(".")[2] in STACKS]:
        assert isinstance(stack, nn.ModuleList)
        for layer in stack:
            if not isinstance(layer, AuTDecoderLayer):  # asked for keys and values before it runs
                fully_shard(layer, mesh=mesh.shards, **options)
    fully_shard(model, mesh=mesh.shards, reshard_after_forward=False, **options)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_reduce_scatter_unused_params(True)
    vars(model)["within"] = _within
    register_fsdp_forward_method(model, "within")
    return given_out


def within(model: nn.Module, compute: Callable[..., Any], *arguments: Any) -> Any:
    """compute(*arguments), with what of `model` stands outside of its layers gathered, if it is spread. Tensors that a
    backward pass begins at must be in the result, or in a tuple of it. In it, `model.forward(...)` is to be written for
    `model(...)`, which would let go at its end of what is gathered."""
    gathered = getattr(model, "within", None)
    return compute(*arguments) if gathered is None else gathered(compute, *arguments)


def _within(compute: Callable[..., Any], *arguments: Any) -> Any:
    return compute(*arguments)


def gather_all(model: nn.Module) -> None:
    """All of `model` on each process, until `shard_again`: in between, no module asks for the others. A collective."""
    within(model, int)  # so that its root is known
    for unit in units(model):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def shard_again(model: nn.Module) -> None:
    for unit in units(model):
        unit.set_reshard_after_forward(unit is not model, recurse=False)
        unit.reshard()


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """What is gathered together."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))
