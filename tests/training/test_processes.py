"""Runs as processes of their own: several ranks, kills, SIGTERM."""

from __future__ import annotations

import csv
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Run, Runs


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "final.pt")


def start_toy(runs: Runs, out: Path, devices: int = 1, **toy: Any) -> Run:
    return runs.start(out, ranks=devices, toy={"out": str(out), "devices": devices, **toy})


def wait_for(condition: Callable[[], bool], run: Run, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and run.alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(runs: Runs, tmp_path: Path, accumulate: int) -> None:
    """Two ranks with half of each batch, among them steps in which one rank, or both, have no audio or no picture: same
    weights, same logged losses. The balance loss takes part."""
    two = start_toy(runs, tmp_path / "two", devices=2, steps=6, accumulate=accumulate, val_every=3)
    start_toy(runs, tmp_path / "one", steps=6, accumulate=accumulate, val_every=3).finish()
    two.finish()
    one_weights, two_weights = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one_weights.items():
        torch.testing.assert_close(two_weights[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    rows = []
    for out in (tmp_path / "one", tmp_path / "two"):
        with (out / "metrics.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    for one_row, two_row in zip(*rows, strict=True):
        assert one_row.keys() == two_row.keys()
        for name, value in one_row.items():
            if value and not name.startswith("skipped_samples"):  # the toy counts those per rank
                assert float(two_row[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name


def test_two_processes_resume_exactly(runs: Runs, tmp_path: Path) -> None:
    common: dict[str, Any] = {"devices": 2, "accumulate": 2, "val_every": 2}
    start_toy(runs, tmp_path / "whole", steps=5, **common).finish()
    start_toy(runs, tmp_path / "pieces", steps=2, **common).finish()
    start_toy(runs, tmp_path / "pieces", steps=5, **common).finish()
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "pieces")[name], value), name
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "pieces/metrics.csv").read_bytes()


@pytest.mark.parametrize(("devices", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGUSR2)])
def test_signal_saves_after_the_current_step(runs: Runs, tmp_path: Path, devices: int, number: int) -> None:
    run = start_toy(runs, tmp_path, devices=devices, steps=10_000, accumulate=2, delay=0.01)
    metrics = tmp_path / "metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4, run)
    run.signal(number)
    assert run.wait() == [143] * devices
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == len(metrics.read_text().splitlines()) - 1
    assert checkpoint["ToyData"]["position"] == 2 * checkpoint["global_step"]


@pytest.mark.parametrize("devices", [1, 2])
def test_launcher_gets_its_signal_after_the_checkpoint(runs: Runs, tmp_path: Path, devices: int) -> None:
    """In a job of submitit SIGTERM saves and goes on; SIGUSR2 saves and is handed over."""
    run = start_toy(runs, tmp_path, devices, steps=10_000, delay=0.01, checkpoint_every=10_000, launcher=True)
    metrics, saved = tmp_path / "metrics.csv", tmp_path / "checkpoints/last.ckpt"

    def steps() -> int:
        return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0

    wait_for(lambda: steps() > 3, run)
    assert not saved.exists()
    run.signal(signal.SIGTERM)
    wait_for(saved.exists, run)
    until = steps() + 5
    wait_for(lambda: steps() > until, run)
    assert run.alive()
    before = torch.load(saved, weights_only=True)["global_step"]
    run.signal(signal.SIGUSR2)
    assert run.wait() == [7, 143][:devices]
    assert torch.load(saved, weights_only=True)["global_step"] == steps() > before
