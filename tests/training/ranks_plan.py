"""A step of a toy in one process of several that are there, counted by what it hands to `torch.distributed`.
`parallel/test_plan.py` starts them, and rehearses the same step."""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from toy_training import toy_model, toy_sample

from omnitrain.config.run_config import LossConfig, OptimConfig, ThinkerModuleConfig
from omnitrain.data.batch import EncodedSample, PackedBatch
from omnitrain.parallel.gpus import GPUS
from omnitrain.parallel.ledger import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, Ledger
from omnitrain.parallel.mesh import Mesh, MeshSizes
from omnitrain.parallel.state import local
from omnitrain.runs.plan import spread_module, step
from omnitrain.training.thinker import ThinkerModule

WRAPPED = {
    "all_gather_into_tensor": (ALL_GATHER, 0), "all_gather_single": (ALL_GATHER, 0),
    "reduce_scatter_tensor": (REDUCE_SCATTER, 1), "reduce_scatter_single": (REDUCE_SCATTER, 1),
    "all_reduce": (ALL_REDUCE, 0), "all_to_all_single": (ALL_TO_ALL, 1),
}  # fmt: skip
"""Functions of torch.distributed (of 2.11 and 2.13), and which argument has the bytes that a `Ledger` counts."""


def toy_pack() -> PackedBatch:
    """What two processes and four experts share evenly: positions, and media."""
    samples = [toy_sample(kind, 0) for kind in ("audio", "audio", "image", "image", "text")]
    short = -sum(map(len, samples)) % 8
    return PackedBatch.pack([*samples, _text(short or 8)])


def _text(n: int) -> EncodedSample:
    whole = toy_sample("text", 0)
    cut = {name: getattr(whole, name)[..., [0] * n] for name in ("input_ids", "labels", "token_types", "position_ids")}
    return replace(whole, **cut)


def toy_module(train: list[str] | None = None) -> ThinkerModule:
    config = ThinkerModuleConfig(train=train, activation_checkpointing=["thinker"], loss=LossConfig(chunk=16))
    return ThinkerModule(toy_model(), config, OptimConfig())


def count(out: str, sizes: dict[str, int], train: list[str] | None = None) -> None:
    """A step of two packs; what this process has counted goes to `out`/RANK.json."""
    rank, mesh = int(os.environ["LOCAL_RANK"]), MeshSizes(**sizes)
    dist.init_process_group("gloo", rank=rank, world_size=mesh.world)
    module = toy_module(train)
    spread_module(module, Mesh.over(mesh, "cpu"), bf16=False)
    numbers, sums = Counter[str](), Counter[str]()
    for name in WRAPPED:
        if hasattr(dist, name):
            _wrap(name, numbers, sums)
    peak = step(module, toy_pack(), Ledger(GPUS["H100"]), passes=2)
    found = {"numbers": numbers, "bytes": sums, "peak": sum(peak.values()), "held": _held(module)}
    (Path(out) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _held(module: ThinkerModule) -> dict[str, int]:
    """Bytes of this process's weights and gradients, padding included, from the tensors themselves; and how many of
    both moments and the step numbers there must be: a moment is as large as its weight, without padding."""
    learning = [local(p) for p in module.model.parameters() if p.grad is not None]
    gradients = [local(p.grad) for p in module.model.parameters() if p.grad is not None]
    moments = sum(2 * p.nbytes + 4 for p in learning)
    weights = map(local, module.model.parameters())
    return {"weights": _stored(weights), "gradients": _stored(gradients), "moments": moments}


def _stored(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _wrap(name: str, numbers: Counter[str], sums: Counter[str]) -> None:
    original, (kind, place) = getattr(dist, name), WRAPPED[name]

    def counted(*arguments: Any, **keywords: Any) -> Any:
        given = inspect.signature(original).bind(*arguments, **keywords)
        if dist.get_world_size(given.arguments.get("group")) > 1:
            numbers[kind] += 1
            sums[kind] += list(given.arguments.values())[place].nbytes
        return original(*arguments, **keywords)

    setattr(dist, name, counted)
