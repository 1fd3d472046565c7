"""A model spread over processes learns what one process learns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import ranks_begin
import torch
import torch.distributed.checkpoint as dcp
from forked_runs import Run, Runs
from safetensors.torch import load_file

from omnitrain.interop.public_format import save_pretrained
from omnitrain.interop.start_from import read_checkpoint
from omnitrain.parallel.mesh import MeshSizes
from omnitrain.runs.convert import to_ckpt

MESHES: dict[str, dict[str, int]] = {
    "fsdp": {"shard": 2},
    "fsdp_ep": {"shard": 2, "expert": 2},
    "hybrid": {"data": 2, "shard": 2},
    "hybrid_ep": {"data": 2, "shard": 2, "expert": 2},
    "fsdp_ep_of_four": {"shard": 4, "expert": 2},
    "context": {"shard": 1, "context": 2},
    "fsdp_ep_cp": {"shard": 2, "expert": 2, "context": 2},
}


def start_toy(runs: Runs, out: Path, mesh: dict[str, int] | None = None, **toy: Any) -> Run:
    devices = 1 if mesh is None else mesh.get("data", 1) * mesh["shard"] * mesh.get("context", 1)
    return runs.start(out, ranks=devices, toy={"out": str(out), "devices": devices, "mesh": mesh, **toy})


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_equal_runs(one: Path, other: Path) -> None:
    expected, found = (torch.load(out / "final.pt") for out in (one, other))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for one_row, other_row in zip(rows(one), rows(other), strict=True):
        assert one_row.keys() == other_row.keys()
        for name, value in one_row.items():
            if value and not name.startswith("skipped_samples"):  # the toy counts those per rank
                rel = 1e-5 if "loss" in name else 1e-4
                assert float(other_row[name]) == pytest.approx(float(value), rel=rel, abs=1e-5), name


@pytest.fixture(scope="module")
def one(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process, validated on unequal shares."""
    out = tmp_path_factory.mktemp("one")
    start_toy(runs, out, steps=6, accumulate=2, val_every=3, uneven=True).finish()
    return out


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_equals_one_process(runs: Runs, tmp_path: Path, one: Path, name: str) -> None:
    """Over steps in which some ranks, or all, have no audio or no picture; with accumulation, clipping, the balance
    loss and validation packs that are not equally many on each rank."""
    start_toy(runs, tmp_path, MESHES[name], steps=6, accumulate=2, val_every=3, uneven=True).finish()
    assert_equal_runs(one, tmp_path)


def assert_read_as_torch_reads(folder: Path, whole: Path) -> None:
    """What we read of the folder is what `torch.distributed.checkpoint` reads; each number is in it once; and the file
    `whole` that is made of it holds the same."""
    found, reader = read_checkpoint(folder), dcp.HuggingFaceStorageReader(str(folder))
    described = reader.read_metadata().state_dict_metadata
    theirs = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in described.items()}
    dcp.load(theirs, storage_reader=reader, no_dist=True)
    [optimizer] = found["optimizer_states"]
    ours = {f"state_dict.{name}": x for name, x in found["state_dict"].items()}
    ours |= {f"optimizer_states.0.{n}.{m}": x for n, state in optimizer["state"].items() for m, x in state.items()}
    steps = {name for name in ours if name.endswith(".step")}
    assert ours.keys() - steps == theirs.keys()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    assert sum(x.numel() for file in files for x in file.values()) == sum(x.numel() for x in theirs.values())
    to_ckpt(folder, whole)
    one = torch.load(whole, weights_only=True)
    assert one.keys() == found.keys()
    assert all(torch.equal(x, one["state_dict"][name]) for name, x in found["state_dict"].items())
    moments = one["optimizer_states"][0]["state"]
    assert all(torch.equal(x, moments[n][m]) for n, s in optimizer["state"].items() for m, x in s.items())


def test_a_frozen_part_stays_as_it_is_on_a_mesh(runs: Runs, tmp_path: Path) -> None:
    """Encoders that do not learn, of packs that two of four processes share."""
    given: dict[str, Any] = {"steps": 6, "accumulate": 2, "train": ["thinker"], "balance": 0}
    start_toy(runs, tmp_path / "one", **given).finish()
    start_toy(runs, tmp_path / "mesh", {"shard": 2, "context": 2}, **given).finish()
    assert_equal_runs(tmp_path / "one", tmp_path / "mesh")


def test_a_run_goes_on_with_another_number_of_processes(runs: Runs, tmp_path: Path) -> None:
    """4 processes, 2, 1 and 4 again, two steps each; a step has the same eight samples throughout. Several leave a
    folder, one a file. Without the balance loss, whose shares of experts are those of the packs of a step up to now,
    and so depend on how many go together."""
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    start_toy(runs, tmp_path / "whole", steps=8, accumulate=4, val_every=2, balance=0).finish()
    for steps, mesh, accumulate in (
        (2, MESHES["fsdp_ep_of_four"], 1),
        (4, MESHES["fsdp"], 2),
        (6, None, 4),
        (8, MESHES["hybrid_ep"], 1),
    ):
        start_toy(runs, tmp_path / "parts", mesh, steps=steps, accumulate=accumulate, val_every=2, balance=0).finish()
        assert last.is_dir() == (mesh is not None)
        if mesh is not None:
            assert len(list(last.glob("*.safetensors"))) == MeshSizes(**mesh).world
            assert_read_as_torch_reads(last, tmp_path / f"{steps}.ckpt")
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_training_goes_on_while_a_checkpoint_is_written(runs: Runs, tmp_path: Path) -> None:
    """Two steps are done before the first one is; the next one waits for it, and the end for the next."""
    runs.start(tmp_path, call="ranks_checkpoint:held_up", given={"out": str(tmp_path)}).finish()
    order = (tmp_path / "order.txt").read_text().split("\n")
    assert [event for event in order if event != "written"] == [f"step {i}" for i in range(4)]
    assert order.index("written") > order.index("step 3")
    assert order.count("written") == 2
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert len(list(last.glob("*.safetensors"))) > 2
    found, final = read_checkpoint(last), torch.load(tmp_path / "final.pt")
    assert found["global_step"] == 4
    assert all(torch.equal(found["state_dict"][f"model.{name}"], x) for name, x in final.items())
    assert read_checkpoint(tmp_path / "checkpoints" / "previous.ckpt")["global_step"] == 2


def test_each_makes_and_reads_its_own_shards(runs: Runs, tmp_path: Path) -> None:
    """Weights are drawn, read from a public folder (as the model or to begin with) and given adapters as one process
    does it, bit for bit; and none of the four has at any time more than its shards, what it has read of the file (whose
    pages the system may take back), two tensors, and 16 MB."""
    save_pretrained(ranks_begin.begin("drawn", tmp_path, deferred=False).model, folder := tmp_path / "public")
    for way in ranks_begin.WAYS:
        state = ranks_begin.begin(way, folder, deferred=False).state_dict()
        torch.save(state, tmp_path / f"{way}.pt")
    whole, largest = sum(x.nbytes for x in state.values()), max(x.nbytes for x in state.values())
    jobs = [(way, MESHES["hybrid_ep" if way == "begun from" else "fsdp_ep_of_four"]) for way in ranks_begin.WAYS]
    runs.start(tmp_path, 4, call="ranks_begin:shards", given={"out": str(tmp_path), "jobs": jobs}).finish()
    for rank in range(4):
        for way, used in json.loads((tmp_path / f"used.{rank}.json").read_text()).items():
            assert used["own"] < (0.51 if way == "begun from" else 0.26) * whole
            read = 0 if way == "drawn" else used["own"]
            assert used["peak"] < used["own"] + read + 2 * largest + 16e6, (rank, way, used)


def test_compiled_layers_on_a_mesh_equal_one_process_that_compiles_nothing(runs: Runs, tmp_path: Path) -> None:
    """FSDP2 and given-out experts, each layer compiled (but for the exchange of tokens), activations computed again but
    for attention; steps of other lengths, a validation, and a checkpoint from which one process goes on uncompiled.
    (Graphs alone are made here; what becomes of them: `models/test_compiling.py`.)"""
    start_toy(runs, tmp_path / "whole", steps=4, val_every=2).finish()
    recomputed = {"recomputed": ("thinker", "aut", "visual"), "kept": ("attention",)}
    start_toy(runs, tmp_path / "parts", MESHES["fsdp_ep"], steps=2, val_every=2, compile="eager", **recomputed).finish()
    start_toy(runs, tmp_path / "parts", steps=4, val_every=2).finish()
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
