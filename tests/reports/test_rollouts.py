"""Rollouts in a run's report: three steps, groups by prompt, best answers first, curves of rewards."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.reports.rollouts import SHOWN, curves, read_steps
from omnitrain.reports.run import read_run, write_report


def write_step(folder: Path, step: int, rank: str = "", prompts: int = 6) -> None:
    rows = [
        {
            "step": step, "sample": f"s{p}{rank}", "source": "x", "task": "asr", "answer": f"<b>answer {i}</b>",
            "prompt": f"<|im_start|>user\nwhat {p}{rank}?", "reference": f"right {p}", "reward": i / 4,
            "reward/wer": None if i == 1 else i / 4, "advantage": i - 1.5, "tokens": 3, "ended": i != 2, "ratio": 1.0,
        }
        for i in range(4)
        for p in range(prompts)
    ]  # fmt: skip
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"rollouts/step={step:07d}{rank}.parquet")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3, 4, 9):
        write_step(tmp_path / "run", step)
    for rank in (".rank=0", ".rank=1"):
        write_step(tmp_path / "run", 12, rank, prompts=1)
    (tmp_path / "run/config.yaml").write_text("name: gspo\nevaluation: {scores: heldout}\n")
    (tmp_path / "run/metrics.csv").write_text(
        "step,train/loss,rollout/reward,rollout/reward/wer,rollout/length\n1,0,0.2,0.1,9\n2,0,0.4,0.3,8\n"
    )
    return tmp_path / "run"


def test_first_middle_and_last_step_by_prompt(run: Path) -> None:
    steps = read_steps(run)
    assert [step.number for step in steps] == [1, 4, 12]
    first, _, last = steps
    assert len(first.groups) == SHOWN
    assert [len(group.rows) for group in last.groups] == [4, 4]  # of both ranks
    assert [row["reward"] for row in first.groups[0].rows] == [0.75, 0.5, 0.25, 0.0]
    assert first.rewards == ("reward/wer",)
    assert read_steps(run.parent) == []
    (run / "rollouts/step=0000012.rank=0.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"step=0000012\.rank=0\.parquet cannot be read"):
        read_steps(run)


def test_the_report_shows_them(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("what 0?") == 2
    assert "&lt;b&gt;answer 3&lt;/b&gt;" in page
    assert "<b>answer" not in page
    assert '<a href="#rollouts">' in page
    metrics = read_run(run).metrics
    assert len(curves(metrics)) == 2  # rewards together, and length
    assert curves({"train/loss": metrics["train/loss"]}) == []
