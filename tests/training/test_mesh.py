"""A model spread over processes learns what one process learns."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Run, Runs

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
                assert float(other_row[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


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


def test_a_run_goes_on_with_another_number_of_processes(runs: Runs, tmp_path: Path) -> None:
    """4 processes, 2, 1 and 4 again, two steps each; a step has the same eight samples throughout. Without the balance
    loss, whose shares of experts are those of the packs of a step up to now, and so depend on how many go together."""
    start_toy(runs, tmp_path / "whole", steps=8, accumulate=4, val_every=2, balance=0).finish()
    for steps, mesh, accumulate in (
        (2, MESHES["fsdp_ep_of_four"], 1),
        (4, MESHES["fsdp"], 2),
        (6, None, 4),
        (8, MESHES["hybrid_ep"], 1),
    ):
        start_toy(runs, tmp_path / "parts", mesh, steps=steps, accumulate=accumulate, val_every=2, balance=0).finish()
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
