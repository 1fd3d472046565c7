"""The measurement of waiting: what its columns mean, and that packs of the embedded mixture are balanced by it."""

from __future__ import annotations

import pytest

from speed import balance


def test_the_columns() -> None:
    ranks = [[{"thinker": n} for n in costs] for costs in ([1.0, 3.0, 2.0, 4.0], [3.0, 1.0, 4.0, 2.0])]
    row = balance.summary(ranks, accumulate=2, tokens=7, filling=0.9)
    assert row.waiting == pytest.approx(1 - 20 / 2 / 14)  # the slower of each pass takes 3, 3, 4 and 4
    assert row.by_layer == row.waiting
    assert row.dealt == 0  # 1 with 1, 3 with 3
    assert row.heaviest == 4 / 2.5


def test_ranks_wait_less_for_balanced_packs() -> None:
    simulation = balance.Simulation(["data.window=16", "data.max_tokens=1024"], samples=60)
    without, balanced = (simulation.row(4, 12, 4, most) for most in (None, 1.0))
    assert balanced.waiting < 0.75 * without.waiting
    assert balanced.by_layer < 0.75 * without.by_layer
    assert balanced.tokens > 0.9 * without.tokens
