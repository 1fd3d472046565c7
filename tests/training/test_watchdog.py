"""A rank that does not come is named, with its place, and all ranks end."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Kill, Runs

from omnitrain.training.callbacks.watchdog import STATUS, missing_ranks

STEP = "omnitrain.training.thinker:ThinkerModule.training_step"
TIMEOUT = 3.0


def test_a_rank_that_hangs_is_named(runs: Runs, tmp_path: Path) -> None:
    """Two runs side by side. In one, rank 1 does not come back from reading a pack: it is named, shows its stacks, and
    both ranks end. In the other its process is stopped in a step, so that it says nothing more: rank 0 ends."""
    toy: dict[str, Any] = {"devices": 2, "steps": 1000, "delay": 0.2, "timeout": TIMEOUT}
    hangs, stops = tmp_path / "hangs", tmp_path / "stops"
    hanging = runs.start(hangs, 2, toy={**toy, "out": str(hangs), "mesh": {"shard": 2}, "hang": (1, 8)})
    stopping = runs.start(stops, 2, Kill(STEP, 8, signal.SIGSTOP, rank=1), toy={**toy, "out": str(stops)})

    assert hanging.wait() == [STATUS, STATUS]
    said, shown = ((hangs / f"printed.{rank}.txt").read_text() for rank in (0, 1))
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    there = r"step 8, reading a pack \(.*toy_training.py:\d+ in batches\), (\d+) s there"
    found = re.search(
        rf"rank 1 has not arrived: it last reported {there}; rank 0 has waited for (\d+) s in step 8", line
    )
    assert found, line
    assert all(TIMEOUT <= float(seconds) < TIMEOUT + 10 for seconds in found.groups()), line
    assert "rank 1, for which the others wait, is here" in shown
    assert re.search(r"File .*toy_training.py., line \d+ in batches", shown), shown

    assert stopping.wait(0) == [STATUS]
    stopping.signal(signal.SIGKILL)  # what a launcher does
    stopping.wait(1)
    said = (stops / "printed.0.txt").read_text()
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    there = r"step [4-8], .*, and has not been heard of since"
    assert re.search(
        rf"rank 1 has not arrived: it last reported {there}; rank 0 has waited for \d+ s in step 8", line
    ), line


@pytest.mark.parametrize(
    ("counts", "missing"),
    [
        ([{"all": 5}, {"all": 4}, {"all": 5}], [1]),
        ([{"all": 4}, {"all": 4}], []),  # a message that does not end
        ([{"all": 4}, None, {"all": 4}], [1]),
        # Rank 2 waits for rank 1, which waits for rank 0.
        ([{"all": 7, "a": 3}, {"all": 7, "a": 4, "b": 8}, {"all": 7, "b": 9}], [0]),
        # In a circle: two in one group, two in the other.
        ([{"a": 4, "b": 8}, {"a": 3, "b": 9}], [0, 1]),
    ],
)
def test_who_is_missing(counts: list[dict[str, int] | None], missing: list[int]) -> None:
    assert missing_ranks({r: c for r, c in enumerate(counts) if c is not None}, len(counts)) == missing
