"""How long ranks wait for the slowest, found out without a message between them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Runs

from omnitrain.training.own_time import waiting


@pytest.mark.parametrize(
    ("mesh", "hearing", "bounds"),
    [
        # Both compute c beside their rests. By DDP 1 - (0.1 + c) / (0.5 + c): 0.8 for none, and 0.57 for 0.2 s.
        (None, (), [(0.57, 0.805), (0, 0.1)]),
        # On a mesh they meet between encoder and Thinker, so that 0.2 + 0.5 s pass: 1 - (0.3 + c) / (0.7 + c) and
        # 1 - (0.5 + c) / (0.7 + c).
        ({"shard": 2, "expert": 2}, (0.2, 0.0), [(0.44, 0.58), (0.2, 0.3)]),
    ],
)
def test_a_slow_rank_is_found_out(
    runs: Runs, tmp_path: Path, mesh: dict[str, int] | None, hearing: tuple[float, ...], bounds: list[Any]
) -> None:
    """Of two processes one is slower, in a layer: by DDP the other waits behind the forward pass; on a mesh in it,
    where weights are gathered and tokens come back from experts, so that both take equally long."""
    toy = {"out": str(tmp_path), "devices": 2, "mesh": mesh, "steps": 4, "log_every": 3}
    runs.start(tmp_path, 2, toy=toy | {"rests": (0.1, 0.5), "rests_hearing": hearing}).finish()
    with (tmp_path / "throughput.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [3, 4]
    for row in rows:
        for rank, (low, high) in enumerate(bounds):
            assert low <= row[f"waiting/{rank}"] < high
        assert row["waiting"] == pytest.approx((row["waiting/0"] + row["waiting/1"]) / 2)
        assert row["seconds_per_step"] > 0.5
        assert 0 <= row["waiting_counted"] < 0.5
        assert (row["text_tokens_per_second"] < row["tokens_per_second"]) == (row["step"] == 3)  # the last is all text
        assert row["mfu"] == pytest.approx(10 * row["tflops"])  # of the peak that the toy is told


def test_waiting() -> None:
    """In the first pass one rank has sound, in the second the other has; by parts, each waits in each of them."""
    ranks = [
        [{"aut": 1.0, "thinker": 2.0}, {"thinker": 3.0}],
        [{"thinker": 3.0}, {"aut": 2.0, "thinker": 2.0}],
    ]
    assert waiting(ranks, by_part=False) == pytest.approx([1 - 6 / 7, 0])
    assert waiting(ranks, by_part=True) == pytest.approx([1 - 6 / 9, 1 - 7 / 9])
    assert waiting([[{}], [{}]], by_part=False) == [0.0, 0.0]
