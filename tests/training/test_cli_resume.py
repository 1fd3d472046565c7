"""The command line killed again and again, on real data: a resumed run equals an uninterrupted one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Runs
from test_processes import killed_and_resumed

KILLS = int(os.environ.get("OMNITRAIN_KILLS", "10"))


def arguments(run_dir: Path, workers: int) -> list[str]:
    return [
        "fit", "+recipe=quickstart", f"paths.run_dir={run_dir}", "ckpt_path=last", f"data.num_workers={workers}",
        "data.max_tokens=256", "data.max_mel_frames=1600", "data.max_patches=1600", "trainer.max_steps=60",
        "trainer.val_check_interval=20", "trainer.limit_val_batches=2", "trainer.log_every_n_steps=3",
        "callbacks.checkpoint.every_n_steps=2", "callbacks.progress=null", "optim.warmup_steps=5",
        "evaluation.after_fit=false",
    ]  # fmt: skip


def assert_identical(a: Any, b: Any, where: str) -> None:
    """Nested containers equal to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_resume_is_exact(runs: Runs, tmp_path: Path, workers: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Another number of workers on purpose: it must not matter either.
    runs.start(whole, argv=arguments(whole, 2 - workers)).finish()
    hits = killed_and_resumed(
        lambda: runs.start(killed, argv=arguments(killed, workers)),
        killed / "checkpoints/last.ckpt",
        KILLS,
        seed=workers,
        longest=3.0,
    )
    assert hits >= KILLS // 2
    checkpoints = [torch.load(out / "checkpoints/last.ckpt", weights_only=True) for out in (whole, killed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(checkpoints[0][key], checkpoints[1][key], key)
    position = [checkpoint["OmniDataModule"]["ranks"] for checkpoint in checkpoints]
    assert position[0] == position[1]
    for file in ("metrics.csv", "data.json"):
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), file
