"""Whole runs through the command line, on toy data."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from omnitrain.__main__ import main
from omnitrain.config.saved import read_config


def losses(run_dir: Path) -> list[str]:
    with (run_dir / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


def test_a_sweep(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-m", "+recipe=quickstart", "seed=0,1", "trainer.max_steps=2", *toy]) == 0
    (sweep,) = (tmp_path / "runs" / "multirun").iterdir()
    assert (losses(sweep / "0"), losses(sweep / "1")) != ([], [])
    assert losses(sweep / "0") != losses(sweep / "1")
    assert [read_config(sweep / job).seed for job in "01"] == [0, 1]
    assert read_config(sweep / "1").paths.run_dir == str(sweep / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_sweep_has_no_single_folder(toy: list[str], tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-m", "seed=0,1", "paths.run_dir=here", "trainer.max_steps=2", *toy]) == 1
    assert "hydra.sweep.dir" in capsys.readouterr().err


def test_the_same_line_starts_and_continues(toy: list[str], tmp_path: Path, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    line = ["fit", "+recipe=quickstart", "ckpt_path=last", "optim.total_steps=4", *toy]
    assert main([*line, f"paths.run_dir={whole}", "trainer.max_steps=4"]) == 0
    assert main([*line, f"paths.run_dir={parts}", "trainer.max_steps=2"]) == 0
    assert main([*line, f"paths.run_dir={parts}", "trainer.max_steps=4"]) == 0
    assert "continued from" in capsys.readouterr().out
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name in ("config.yaml", "tokenizer.json", "data.json", "environment.json", "checkpoints/last.ckpt"):
        assert (whole / name).is_file(), name
    assert not list(whole.rglob("*.partial"))

    # Without ckpt_path=last a folder that holds a run is left alone.
    assert main(["fit", "+recipe=quickstart", f"paths.run_dir={whole}", *toy]) == 1
    assert "ckpt_path=last" in capsys.readouterr().err

    # The run folder by itself is enough for the other verbs.
    assert main(["validate", str(whole)]) == 0
    assert main(["predict", str(whole), "module.generation.max_new_tokens=3"]) == 0
    assert pq.read_table(whole / "predictions.parquet").num_rows == 6


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_verbs_that_need_weights_say_so(verb: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb, "+recipe=quickstart"]) == 1
    error = capsys.readouterr().err
    assert f"{verb} needs trained weights" in error
    assert "Traceback" not in error


def test_missing_checkpoint_file(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+recipe=quickstart", "ckpt_path=nothing.ckpt"]) == 1
    assert "there is no file nothing.ckpt" in capsys.readouterr().err


def test_missing_data_are_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+recipe=stamps", "paths.data_dir=nowhere"]) == 1
    error = capsys.readouterr().err
    assert "data: shard nowhere/stamps is missing" in error
    assert "Traceback" not in error


def test_a_thinker_that_would_have_to_search_stops_before_the_training(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+recipe=aut_transfer", "aut_run=none", "evaluation.beam=4", "paths.run_dir=run"]) == 1
    assert "evaluation.beam=4: a beam search is AuT's alone" in capsys.readouterr().err


def test_a_judge_that_is_not_there_stops_before_the_training(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+recipe=codec", "evaluation.judge=./nowhere", "paths.run_dir=run"]) == 1
    assert "the judge ./nowhere is no folder" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wrong_argument_is_named_with_its_place(toy: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+data.max_token=3", *toy]) == 1
    assert "max_token" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_one_folder(toy: list[str], tmp_path: Path) -> None:
    """Lightning starts the second process with a command line of its own; both must see the same run."""
    line = [sys.executable, "-m", "omnitrain", "fit", "+recipe=quickstart", "trainer=ddp", "trainer.accelerator=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*line, "trainer.max_steps=2", *toy], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(losses(folder)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
