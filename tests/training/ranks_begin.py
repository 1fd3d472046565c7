"""Processes that begin with a model of which each makes or reads its own shards alone. `test_mesh.py` starts them."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from toy_training import toy_model

from omnitrain.config.run_config import LoraConfig, ThinkerModuleConfig
from omnitrain.interop.public_format import load_pretrained
from omnitrain.models.deferred import LargeOnMeta
from omnitrain.models.presets import build, init_weights
from omnitrain.parallel.mesh import Mesh, MeshSizes
from omnitrain.parallel.state import local
from omnitrain.runs.plan import spread_module
from omnitrain.training.thinker import ThinkerModule

WAYS = ("drawn", "read", "begun from", "adapters")
LORA = LoraConfig(rank=2, targets=["attention", "experts"], parts=["thinker"])


def begin(way: str, folder: Path, *, deferred: bool) -> ThinkerModule:
    """A module with a model of 25 million numbers: drawn, that of a public folder, or another that begins with the
    weights of that folder; or with adapters in it."""
    config = ThinkerModuleConfig(init_from=str(folder) if way == "begun from" else None)
    if way == "adapters":
        config = ThinkerModuleConfig(lora=LORA)
    if way in ("read", "adapters"):
        return ThinkerModule(load_pretrained(folder, deferred=deferred), config)
    with LargeOnMeta() if deferred else nullcontext():
        thinker = {"d_model": 256, "layers": 4, "n_experts": 16, "expert_width": 384, "ffn": 1024}
        model = build("tiny", vocab_size=4096, thinker=thinker)
    init_weights(model, 7)
    return ThinkerModule(model, config)


def shards(out: str, jobs: list[tuple[str, dict[str, int]]]) -> None:
    """Ways and meshes; what was used goes to `out`/used.RANK.json, and who differs from `out`/WAY.pt fails."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=MeshSizes(**jobs[0][1]).world)
    torch.set_num_threads(1)
    importlib.import_module("peft")  # what is imported on the way takes its place now
    spread_module(ThinkerModule(toy_model()), Mesh.over(MeshSizes(**jobs[0][1]), "cpu"), bf16=False)
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed of large tensors goes back at once
    used = {}
    for way, sizes in jobs:
        mesh, whole = Mesh.over(MeshSizes(**sizes), "cpu"), torch.load(Path(out) / f"{way}.pt", mmap=True)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmHWM")
        module = begin(way, Path(out) / "public", deferred=True)
        assert sum(p.numel() for p in module.parameters() if p.is_meta) > 20e6
        spread_module(module, mesh, bf16=False)
        peak = _memory("VmHWM") - before
        used[way] = {"peak": peak, "own": sum(local(p).untyped_storage().nbytes() for p in module.parameters())}
        assert module.mesh is not None
        state = module.mesh.whole_state()
        assert state.keys() == whole.keys()
        assert all(torch.equal(x, whole[name]) for name, x in state.items()), way
        del module, state
    (Path(out) / f"used.{rank}.json").write_text(json.dumps(used))
    dist.destroy_process_group()


def _memory(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024
