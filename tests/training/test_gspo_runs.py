"""GSPO from the command line: killed amid rollouts and training, and in two processes."""

from __future__ import annotations

import csv
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from forked_runs import Kill, Runs
from test_cli_resume import assert_identical

SAMPLE = "omnitrain.training.gspo:sample_answers"
JUDGE = "omnitrain.training.gspo:worth"
UPDATE = "torch.optim.adamw:AdamW.step"
TABLE = "omnitrain.training.gspo:write_parquet"


def line(toy: list[str], out: Path, *more: str) -> list[str]:
    return [
        "fit", *toy, "module=gspo", f"paths.run_dir={out}", "ckpt_path=last", "trainer.max_steps=6",
        "+module.rewards.letters={_target_:omnitrain.tasks.rewards.ErrorRate,measure:cer}", "module.answers=3",
        "module.rollout.max_new_tokens=5", "module.steps_per_rollout=3", "module.kl=0.05", "optim.lr=3e-3",
        "optim.eps=1e-4", "module.loss.balance_coefficient=0.0",
        "module.clip=[0.2,0.2]", "data.streams=2", "callbacks.checkpoint.every_n_steps=2", *more,
    ]  # fmt: skip


def kept(out: Path) -> dict[str, Any]:
    checkpoint = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    tables = {path.name: pq.read_table(path).to_pylist() for path in sorted((out / "rollouts").iterdir())}
    rows = (out / "metrics.csv").read_bytes()
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "OmniDataModule")
    return {**{key: checkpoint[key] for key in names}, "rollouts": tables, "metrics": rows}


def test_kills_amid_a_phase(runs: Runs, toy: list[str], tmp_path: Path) -> None:
    """While answers are sampled and judged, in an update, before the table is there: equal to the last bit."""
    runs.start(tmp_path / "whole", argv=line(toy, tmp_path / "whole")).finish()
    for kill in (Kill(SAMPLE, 4), Kill(JUDGE, 2), Kill(UPDATE, 2), Kill(TABLE, 1)):
        run = runs.start(tmp_path / "killed", 1, kill, argv=line(toy, tmp_path / "killed"))
        assert run.wait() == [-SIGKILL], kill
    runs.start(tmp_path / "killed", argv=line(toy, tmp_path / "killed")).finish()
    whole, killed = kept(tmp_path / "whole"), kept(tmp_path / "killed")
    assert len(whole["rollouts"]) == 6
    assert_identical(whole, killed, "run")


def test_two_processes_equal_one(runs: Runs, toy: list[str], tmp_path: Path) -> None:
    """Each samples answers to its own prompts, of its own lengths; what is learnt and logged is what one has learnt. In
    one phase: in the next, rounding could choose another token. Without the
    balance of experts, which knows of a step's packs as they come."""
    two = line(toy, tmp_path / "two", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=3")
    run = runs.start(tmp_path / "two", 2, argv=two)
    alone = line(toy, tmp_path / "one", "trainer.accumulate_grad_batches=2", "trainer.max_steps=3")
    runs.start(tmp_path / "one", argv=alone).finish()
    run.finish()
    one, both = kept(tmp_path / "one"), kept(tmp_path / "two")
    answers = [
        sorted((row["step"], row["sample"], row["answer"]) for table in found["rollouts"].values() for row in table)
        for found in (one, both)
    ]
    assert answers[0] == answers[1]
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(
            both["state_dict"][name], value, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    logged = [list(csv.DictReader(found["metrics"].decode().splitlines())) for found in (one, both)]
    for a, b in zip(*logged, strict=True):
        for name in (n for n in a if n.startswith("rollout/")):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-5), name
