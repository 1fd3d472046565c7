"""Scores by position: bins, lengths, intervals and what no listening gives."""

from __future__ import annotations

import json

import pytest

from omnitrain.reports import figures
from omnitrain.reports.positions import MEASURES, by_position


def row(share: float, seconds: float, right: bool, task: str = "needle_count", **more) -> dict:
    meta = {"needle_share": f"{share:.4f}", "seconds": f"{seconds:.2f}"}
    answer = {"reference": "2.", "prediction": "2." if right else "1.", "exact_match": right, "chrf": 100.0 * right}
    about = {"id": f"{share}/{seconds}", "concept": "", "split": "train", "task": task, "meta": json.dumps(meta)}
    return about | answer | {"loss": 1.0 + share, "tokens": 4, "unigram_loss": 3.0} | more


def test_curves_by_length_and_place() -> None:
    rows = [row(0.05, 15.8, True), row(0.1, 14.2, False), row(0.99, 16, True), row(1.0, 1811, False)]
    rows += [{**row(0.5, 15, True), "meta": json.dumps({"seconds": "1"})}, {**row(0.5, 15, True), "meta": None}]
    rows.append(row(0.5, 61, True, split="heldout_cell", prediction=None))
    found = by_position(rows)
    assert list(found) == ["15 s", "1 min, held-out cell", "30 min"]
    short = found["15 s"]
    assert short["right"].places == pytest.approx([0.1, 0.9])
    assert [s.mean for s in short["right"].scores] == [0.5, 1.0]
    assert [s.n for s in short["loss"].scores] == [2, 1]
    assert short["loss"].scores[0].mean == pytest.approx(1.075)
    assert short["loss"].chance == 3.0
    assert found["30 min"]["right"].places == pytest.approx([0.9])
    assert found["1 min, held-out cell"]["right"].scores == []  # nothing was generated there
    assert found["1 min, held-out cell"]["right"].chance is None


def test_chance_is_the_most_frequent_answer_of_the_kind() -> None:
    counts = [row(0.1, 15, True, reference=answer) for answer in ("1.", "2.", "2.", "3.")]
    names = [row(0.1, 16, True, "needle_which", reference=answer) for answer in ("A dog.", "A cat.")]
    curves = by_position([*counts, *names])["15 s"]
    assert curves["right"].chance == pytest.approx(3 / 6)


def test_the_figure_has_a_panel_for_each_length_and_measure() -> None:
    rows = [row(0.05, 15, True), row(0.7, 15, False), row(0.5, 1800, False)]
    drawn = figures.position_curves(by_position(rows), MEASURES)
    assert drawn is not None
    assert all(text in drawn for text in ("15 s", "30 min", *MEASURES.values()))
    assert figures.position_curves({}, MEASURES) is None
