"""Scores against known values and against the libraries called directly."""

from __future__ import annotations

import math

import jiwer
import numpy as np
import pytest
import sacrebleu
import torchmetrics.text

from omnitrain.evaluation.intervals import bootstrap_interval
from omnitrain.evaluation.metrics import (
    UnigramBaseline,
    bits_per_byte,
    cer,
    chrf,
    edits,
    exact_match,
    normalise,
    wer,
)

PREDICTIONS = ["a red fire engine", "un chat noir", "the moon"]
REFERENCES = ["a red fire truck", "un chat noir", "a full moon at night"]


def test_chrf_equals_sacrebleu_and_torchmetrics() -> None:
    assert chrf(PREDICTIONS, REFERENCES) == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score)
    other = torchmetrics.text.CHRFScore(n_word_order=0)  # smooths orders without a match, so it is close, not equal
    score = 100 * float(other(PREDICTIONS, [[r] for r in REFERENCES]))
    assert chrf(PREDICTIONS, REFERENCES) == pytest.approx(score, abs=0.1)
    assert chrf(REFERENCES, REFERENCES) == pytest.approx(100)
    for prediction, reference in zip(["", *PREDICTIONS], ["a cat", *REFERENCES], strict=True):
        of_sentence = sacrebleu.sentence_chrf(prediction, [reference]).score
        assert chrf([prediction], [reference]) == pytest.approx(of_sentence, abs=1e-9)


def test_error_rates_equal_jiwer() -> None:
    assert wer(PREDICTIONS, REFERENCES) == pytest.approx(jiwer.wer(REFERENCES, PREDICTIONS))
    assert cer(PREDICTIONS, REFERENCES) == pytest.approx(jiwer.cer(REFERENCES, PREDICTIONS))
    assert wer(["a b x d"], ["a b c d"]) == pytest.approx(0.25)
    assert wer([""], ["a b"]) == 1.0
    assert wer(["a b c d"], ["a b"]) == 1.0  # two insertions over two words
    assert wer(["A cat."], ["a cat"]) == 0.0
    assert (edits("", "a b"), edits("", "a b", characters=True)) == ((2, 0), (3, 0))  # all that is there is wrong
    with pytest.raises(ValueError, match="reference"):
        wer(["something"], [""])


def test_exact_match_ignores_case_spaces_and_the_last_stop() -> None:
    assert normalise("  A   Cat. ") == "a cat"
    assert normalise("\uff21 \ufb01sh") == "a fish"  # a wide letter and a ligature: NFKC
    assert exact_match(["A cat.", "a dog"], ["a  cat", "a cat"]) == 0.5
    with pytest.raises(ValueError, match="1 predictions against 2 references"):
        exact_match(["a"], ["a", "b"])


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)


def test_unigram_baseline_is_add_one_smoothed() -> None:
    baseline = UnigramBaseline(4)
    baseline.update(np.array([0, 0, 1, -100]))
    assert baseline.nats(np.array([0, 3, -100])) == pytest.approx(-math.log(3 / 7) - math.log(1 / 7))


def test_interval_is_deterministic_and_contains_the_mean() -> None:
    values = np.random.default_rng(1).normal(2, 1, 50)
    first, second = bootstrap_interval(values, seed=3), bootstrap_interval(values, seed=3)
    assert first == second
    assert first.low < first.mean < first.high
    assert first.above_zero
    assert first.mean == pytest.approx(values.mean())


def test_interval_of_a_constant_has_no_width() -> None:
    """Groups of one, two and three values: numerator and denominator are redrawn together."""
    names = [str(i) for i in range(30) for _ in range(i % 3 + 1)]
    interval = bootstrap_interval([0.3] * len(names), groups=names)
    assert (interval.low, interval.high) == pytest.approx((0.3, 0.3))


def test_every_value_is_redrawn_as_often_as_the_others() -> None:
    values = np.arange(101.0)
    interval = bootstrap_interval(values, resamples=20_000)
    half = 1.96 * values.std() / math.sqrt(101)
    assert (interval.low, interval.high) == pytest.approx((50 - half, 50 + half), abs=0.3)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = sum(
        interval.low <= 0.5 <= interval.high
        for seed in range(400)
        for interval in [bootstrap_interval(rng.exponential(0.5, 60), resamples=400, seed=seed)]
    )
    assert 0.89 <= hits / 400 <= 0.98


def test_grouped_interval_covers_where_the_plain_one_is_too_narrow() -> None:
    rng = np.random.default_rng(0)
    plain = grouped = 0
    for seed in range(200):
        concept = rng.normal(0, 1, 40)
        values = np.repeat(concept, 8) + rng.normal(0, 0.1, 320)
        names = [str(i // 8) for i in range(320)]
        grouped += (i := bootstrap_interval(values, groups=names, resamples=400, seed=seed)).low <= 0 <= i.high
        plain += (i := bootstrap_interval(values, resamples=400, seed=seed)).low <= 0 <= i.high
    assert grouped / 200 >= 0.89
    assert plain / 200 < 0.7


def test_interval_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="one group per value"):
        bootstrap_interval([1.0, 2.0], groups=["a"])
