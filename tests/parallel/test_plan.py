"""What is rehearsed in a pretended world is what processes do that are there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ranks_plan
import torch
from forked_runs import Runs

from omnitrain.__main__ import main
from omnitrain.config.compose import run_config
from omnitrain.parallel.estimate import fastest_first
from omnitrain.parallel.gpus import GPUS, gpu
from omnitrain.parallel.ledger import (
    ACTIVATIONS,
    ALL_GATHER,
    ALL_TO_ALL,
    COLLECTIVES,
    GRADIENTS,
    MOMENTS,
    REDUCE_SCATTER,
    WEIGHTS,
    Ledger,
    Message,
)
from omnitrain.parallel.mesh import Mesh, MeshSizes
from omnitrain.parallel.rehearsal import fake_numbers, pretended_world
from omnitrain.runs.plan import PackSizes, Recipe, meshes, rehearse, spread_module, step

MESHES: dict[str, tuple[dict[str, int], list[str] | None]] = {
    "fsdp": ({"shard": 2}, None),
    "fsdp_ep": ({"shard": 2, "expert": 2}, None),
    "context": ({"shard": 1, "context": 2, "expert": 2}, None),
    "frozen": ({"shard": 2}, ["thinker", "router"]),
    "hybrid_ep": ({"data": 2, "shard": 2, "expert": 2}, None),
    "fsdp_ep_of_four": ({"shard": 4, "expert": 2}, None),
}


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Of the first process: number and bytes of messages of each kind, memory at the peak, and all gradients."""

    numbers: dict[str, int]
    bytes: dict[str, int]
    memory: Counter[str]
    gradients: int


def rehearsed(sizes: MeshSizes, train: list[str] | None) -> Rehearsed:
    """The step that `ranks_plan.count` does."""
    ledger = Ledger(GPUS["H100"])
    pack = ranks_plan.toy_pack()
    with pytest.MonkeyPatch.context() as patch, pretended_world(sizes.world), fake_numbers(as_on_gpu=False):
        patch.setattr("toy_training.init_weights", lambda *_: None)  # there is nothing to draw
        module = ranks_plan.toy_module(train)
        spread_module(module, Mesh.over(sizes, "cpu"), bf16=False)
        assert pack.mel is not None
        assert pack.patches is not None
        pack = replace(pack, mel=torch.empty(pack.mel.shape), patches=torch.empty(pack.patches.shape))
        memory = step(module, pack, ledger, passes=2)
    numbers = {name: sum(n for m, n in ledger.messages.items() if _counts(m, name)) for name in COLLECTIVES}
    sums = {name: sum(n for m, n in ledger.bytes.items() if _counts(m, name)) for name in COLLECTIVES}
    return Rehearsed(numbers=numbers, bytes=sums, memory=memory, gradients=ledger.now[GRADIENTS])


def _counts(message: Message, name: str) -> bool:
    return message.collective == name and message.processes > 1


@pytest.mark.parametrize("name", MESHES)
def test_it_counts_what_processes_do(runs: Runs, tmp_path: Path, name: str) -> None:
    sizes, train = MESHES[name]
    world = MeshSizes(**sizes).world
    run = runs.start(
        tmp_path, world, call="ranks_plan:count", given={"out": str(tmp_path), "sizes": sizes, "train": train}
    )
    plan = rehearsed(MeshSizes(**sizes), train)
    run.finish()
    real = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert plan.numbers == _filled(real[0]["numbers"])
    for collective in set(COLLECTIVES) - {ALL_TO_ALL}:
        assert plan.bytes[collective] == _filled(real[0]["bytes"])[collective], collective
    # Who sends more than its share of tokens depends on the routers; together they send what there is.
    assert world * plan.bytes[ALL_TO_ALL] == sum(_filled(process["bytes"])[ALL_TO_ALL] for process in real)
    held = real[0]["held"]
    assert (plan.memory[WEIGHTS], plan.gradients, plan.memory[MOMENTS]) == tuple(held.values())
    assert sum(plan.memory.values()) == pytest.approx(real[0]["peak"], rel=0.1)


def _filled(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in COLLECTIVES}


def test_a_ledger_follows_storages() -> None:
    ledger = Ledger(GPUS["H100"])
    weight = torch.zeros(100)
    ledger.mark(WEIGHTS, [weight])
    with ledger:
        kept = torch.ones(100) @ torch.ones(100, 50)
        view = kept[:10]
        del kept
        assert ledger.now == {WEIGHTS: 400, ACTIVATIONS: 200}  # the view keeps the whole
        del view
    assert ledger.now == {WEIGHTS: 400, ACTIVATIONS: 0}
    assert sum(ledger.peak.values()) == 400 + 4 * (100 + 100 * 50 + 50)
    assert ledger.operations == 2 * 100 * 50


def test_messages_cross_nodes_through_the_cards_of_those_who_take_part() -> None:
    one = GPUS["H100"]
    inside = one.message_seconds("all-gather", 10**9, 8, 8)
    whole_nodes = one.message_seconds("all-gather", 10**9, 64, 8)
    one_of_each = one.message_seconds("all-gather", 10**9, 8, 1)
    assert inside < whole_nodes < one_of_each
    assert one.message_seconds("all-reduce", 10**9, 8, 1) == 2 * one_of_each
    assert one.message_seconds("all-to-all", 10**9, 8, 8) == pytest.approx(inside)
    with pytest.raises(ValueError, match="use one of H100"):
        gpu("V100")


def planned(*overrides: str) -> Recipe:
    return Recipe.of(run_config(["model=tiny", "trainer=gpu", *overrides]), document=256)


def test_meshes_are_those_of_the_run() -> None:
    assert [vars(m) for m in meshes(planned(), [8])] == [{"data": 1, "shard": 8, "expert": 8, "context": 1}]
    fsdp = list(meshes(planned("parallel=fsdp"), [8, 128], [1, 2]))
    assert [(m.data, m.shard, m.expert, m.context) for m in fsdp] == [
        (1, 8, 1, 1), (1, 4, 1, 2), (1, 128, 1, 1), (2, 64, 1, 1), (1, 64, 1, 2), (2, 32, 1, 2),
    ]  # fmt: skip


def test_a_pack_keeps_the_budgets() -> None:
    assert planned("data.max_tokens=1024").pack == PackSizes(tokens=1024, document=256, audio=26, picture=32)
    small = planned("data.max_tokens=1024", "data.max_mel_frames=400", "data.max_patches=64")
    assert (small.pack.audio, small.pack.picture) == (13, 4)


def test_kernels_of_cuda_do_the_same_in_bf16() -> None:
    """Weights and gradients are as large; in bf16, half is gathered, and what the equations ask for is what runs."""
    recipe = planned("parallel=fsdp", "data.max_tokens=512")
    bf16, fp32 = (rehearse(recipe, MeshSizes(shard=8), GPUS["H100"], as_on_gpu=gpu) for gpu in (True, False))
    assert bf16.memory[WEIGHTS] == fp32.memory[WEIGHTS]
    assert 2 * bf16.of(ALL_GATHER)[1] == fp32.of(ALL_GATHER)[1]
    assert bf16.of(REDUCE_SCATTER) == fp32.of(REDUCE_SCATTER)
    # What runs is at least what the equations ask for, of which nothing is computed again here.
    assert 1 <= bf16.operations / bf16.model_operations < 1.3
    assert fastest_first([fp32, bf16])[0] is bf16


def test_the_verb_prints_tables_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    line = ["model=tiny", "trainer=gpu", "data.max_tokens=512", "--gpus", "8", "--document", "512", "--out", str(page)]
    assert main(["plan", *line]) == 0
    printed = capsys.readouterr().out
    assert "all-to-all" in printed
    assert "1 x 8 x 1" in printed
    assert "<svg" in page.read_text()
    assert "0.6 of the stated 989" in page.read_text()
    assert main(["plan", "model=codec_tiny", "module=codec"]) == 1
    assert "Thinker" in capsys.readouterr().err
