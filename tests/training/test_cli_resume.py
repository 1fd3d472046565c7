"""The command line killed at random moments, on real data: a resumed run equals an uninterrupted one. (At named places:
`tests/reliability/test_kills.py`.)"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Run, Runs
from test_processes import wait_for

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


def killed_and_resumed(start: Callable[[], Run], checkpoint: Path, kills: int, seed: int, longest: float) -> int:
    """Run to the end although `kills` processes are killed, each at a random moment within `longest` seconds after it
    began to train. Returns how many of them were hit alive."""
    rng, hits = random.Random(seed), 0

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    for _ in range(kills):
        before = written()
        run = start()
        wait_for(lambda before=before: written() > before, run)
        time.sleep(rng.uniform(0, longest))
        hits += run.alive()
        run.signal(signal.SIGKILL)
        run.wait()
    start().finish()
    return hits


@pytest.mark.slow
def test_kill_and_resume_is_exact(runs: Runs, tmp_path: Path) -> None:
    workers, whole, killed = 2, tmp_path / "whole", tmp_path / "killed"
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
