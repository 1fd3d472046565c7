"""Ranks that hold unequal data: nothing that one process happens to hold may stop the others or change a number."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Kill, Runs
from test_talker_module import talking_model

ALL = ["thinker", "talker", "mtp"]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_rows(one: Path, several: Path) -> None:
    pairs = list(zip(rows(one), rows(several), strict=True))
    assert len(pairs) > 2
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if value and not name.startswith("skipped_samples"):  # the toy counts those per rank
                # A factor is a quotient of two gradients' norms.
                rel = 1e-5 if "loss" in name else 1e-3 if "factor" in name else 1e-4
                assert float(theirs[name]) == pytest.approx(float(value), rel=rel, abs=1e-5), name


def assert_same_weights(one: dict[str, torch.Tensor], several: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == several.keys()
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_thinker(runs: Runs, tmp_path: Path, ranks: int) -> None:
    """Ranks validate on 3, 1, 0 and 2 packs; in training some are without sound or without pictures."""
    for devices in (1, ranks):
        out = tmp_path / str(devices)
        toy = {"out": str(out), "devices": devices, "steps": 4, "val_every": 2, "uneven": True}
        runs.start(out, devices, toy=toy).finish()
    assert_same_rows(tmp_path / "1", tmp_path / str(ranks))


@pytest.mark.parametrize("train", [["talker", "mtp"], ALL])
@pytest.mark.parametrize("ranks", [2, 4])
def test_talker(runs: Runs, tmp_path: Path, ranks: int, train: list[str]) -> None:
    """In some ranks nobody speaks; what is learnt is what one process learns from all the packs."""
    for devices in (1, ranks):
        out = tmp_path / str(devices)
        given = {"out": str(out), "ranks": devices, "parts": ranks, "train": train}
        runs.start(out, devices, call="ranks_speech:talker", given=given).finish()
    assert_same_rows(tmp_path / "1", tmp_path / str(ranks))
    one = torch.load(tmp_path / "1/final.0.pt")
    start = talking_model().state_dict()
    assert max(float((one[f"model.{name}"] - value).abs().max()) for name, value in start.items()) > 1e-3
    for rank in range(ranks):
        assert_same_weights(one, torch.load(tmp_path / f"{ranks}/final.{rank}.pt"), atol=1e-5)


@pytest.mark.parametrize("train", [["talker", "mtp"], ALL])
@pytest.mark.parametrize(
    "mesh", [{"shard": 2}, {"shard": 2, "expert": 2}, {"shard": 1, "context": 2}, {"shard": 2, "context": 2}]
)
def test_talker_on_a_mesh(runs: Runs, tmp_path: Path, mesh: dict[str, int], train: list[str]) -> None:
    processes = mesh["shard"] * mesh.get("context", 1)
    for devices, sizes in ((1, None), (processes, mesh)):
        out = tmp_path / str(devices)
        given = {"out": str(out), "ranks": devices, "parts": 2, "train": train, "mesh": sizes}
        runs.start(out, devices, call="ranks_speech:talker", given=given).finish()
    assert_same_rows(tmp_path / "1", tmp_path / str(processes))
    one, spread = (torch.load(tmp_path / f"{ranks}/final.0.pt") for ranks in (1, processes))
    assert_same_weights(one, spread, atol=1e-5)


def test_aut_on_a_mesh(runs: Runs, tmp_path: Path) -> None:
    """Its validation writes, each rank as often as its own recordings need."""
    for devices, sizes in ((1, None), (2, {"shard": 2})):
        out = tmp_path / str(devices)
        given = {"out": str(out), "ranks": devices, "mesh": sizes}
        runs.start(out, devices, call="ranks_speech:aut", given=given).finish()
    assert_same_rows(tmp_path / "1", tmp_path / "2")
    one, spread = (torch.load(tmp_path / f"{ranks}/final.0.pt") for ranks in (1, 2))
    assert_same_weights(one, spread, atol=1e-5)


def test_a_step_in_which_nobody_speaks_moves_nothing(runs: Runs, tmp_path: Path) -> None:
    for silent in (False, True):
        out = tmp_path / str(silent)
        given = {"out": str(out), "ranks": 1, "parts": 2, "train": ["talker", "mtp"], "silent": silent}
        runs.start(out, call="ranks_speech:talker", given=given).finish()
    assert_same_weights(torch.load(tmp_path / "False/final.0.pt"), torch.load(tmp_path / "True/final.0.pt"), atol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_codec(runs: Runs, tmp_path: Path, ranks: int) -> None:
    """Weights of the codec and its discriminators, and codebooks, which no gradient moves, are those of one process
    that has the rows of all ranks in a batch."""
    for devices in (1, ranks):
        out = tmp_path / str(devices)
        given = {"out": str(out), "ranks": devices, "parts": ranks}
        runs.start(out, devices, call="ranks_speech:codec", given=given).finish()
    assert_same_rows(tmp_path / "1", tmp_path / str(ranks))
    one = torch.load(tmp_path / "1/final.0.pt")
    assert any("codebooks" in name for name in one)
    for rank in range(ranks):
        assert_same_weights(one, torch.load(tmp_path / f"{ranks}/final.{rank}.pt"), atol=1e-5)


@pytest.mark.parametrize("number", [None, signal.SIGKILL])
def test_a_rank_that_fails_ends_the_others(runs: Runs, tmp_path: Path, number: int | None) -> None:
    """Data that are damaged in one rank alone, and a rank that is killed: the other one ends, and soon."""
    toy: dict[str, Any] = {"out": str(tmp_path), "devices": 2, "steps": 10_000, "delay": 0.01}
    run = runs.start(tmp_path, 2, toy=toy | ({"fail": (1, 3)} if number is None else {}))
    if number is not None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(run.pids[1], number)
    begun = time.monotonic()
    status = run.wait()
    assert time.monotonic() - begun < 60
    assert status[0] != 0
    assert status[1] == (1 if number is None else -number)
    if number is None:
        assert "this rank's data are damaged" in (tmp_path / "printed.1.txt").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_in_a_validation(runs: Runs, tmp_path: Path, rank: int) -> None:
    """SIGTERM to one rank while all validate, on unequally many packs: all save and leave."""
    toy = {"out": str(tmp_path), "devices": 2, "steps": 8, "val_every": 2, "uneven": True}
    kill = Kill("omnitrain.training.thinker:ThinkerModule.validation_step", 2 - rank, signal.SIGTERM, rank)
    assert runs.start(tmp_path, 2, kill, toy=toy).wait() == [143, 143]
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_ranks_hide_different_words(runs: Runs, tmp_path: Path) -> None:
    toy = {"out": str(tmp_path), "devices": 2, "steps": 2, "checkpoint_every": 2, "word_dropout": 0.3}
    runs.start(tmp_path, 2, toy=toy).finish()
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["omnitrain"]["ranks"]
    first, second = (rank["rng"]["torch"] for rank in saved)
    assert not torch.equal(first, second)
