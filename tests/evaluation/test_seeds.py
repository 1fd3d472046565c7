"""Several seeds' transcripts: values against the libraries, intervals against the formula that studies use."""

from __future__ import annotations

from dataclasses import replace

import jiwer
import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from omnitrain.evaluation.intervals import crossed_interval
from omnitrain.evaluation.seeds import compare, estimate
from omnitrain.evaluation.transcripts import WER, Answer

SAID = ["un gato negro", "el perro duerme", "una casa grande", "tres arboles verdes", "la luna", "el sol rojo"]


def run(seed: int, wrong: float, task: str = "asr") -> dict[str, Answer]:
    """Answers in which `wrong` of the words are another one."""
    rng = np.random.default_rng(seed)
    answers = {}
    for i, text in enumerate(SAID * 4):
        said = " ".join("nada" if rng.random() < wrong else word for word in text.split())
        answers[str(i)] = Answer(
            id=str(i), task=task, languages=("es", "ca")[i % 2], language="es", split="heldout_concept",
            group=text, references=(text,), prediction=said, window=8,
        )  # fmt: skip
    return answers


def test_values_are_means_over_seeds_of_the_corpus() -> None:
    arms = {"good": {s: run(s, 0.2) for s in range(3)}, "bad": {s: run(s + 9, 0.6) for s in range(3)}}
    [cer, *_] = compare(arms)
    assert (cer.task, cer.languages, cer.measure.name, cer.recordings) == ("asr", "all", "cer", 24)
    by_seed = [
        jiwer.cer([a.references[0] for a in of.values()], [a.prediction for a in of.values()])
        for of in arms["bad"].values()
    ]
    assert cer.values["bad"].per_seed == pytest.approx(by_seed)
    assert cer.differences["bad"].value == pytest.approx(cer.values["bad"].value - cer.values["good"].value)
    assert cer.differences["bad"].excludes_zero
    assert not set(cer.differences) - {"bad"}


def test_a_rate_has_the_interval_of_studies() -> None:
    runs = [run(s, 0.3) for s in range(3)]
    sums = np.stack([WER.statistics(list(of.values())) for of in runs])
    groups = [a.group for a in runs[0].values()]
    assert estimate(sums, groups, WER) == crossed_interval(sums[:, :, 0], sums[0, :, 1], groups)


def test_translations_redraw_seeds_and_sentences() -> None:
    arms = {"a": {s: run(s, 0.5, "s2tt") for s in range(3)}, "b": {s: run(s, 0.5, "s2tt") for s in range(3)}}
    chrf = compare(arms)[0]
    assert chrf.measure.name == "chrf"
    first = arms["a"][0].values()
    expected = CHRF().corpus_score([a.prediction for a in first], [[a.references[0] for a in first]]).score
    assert chrf.values["a"].per_seed[0] == pytest.approx(expected)
    low, high = chrf.values["a"].low, chrf.values["a"].high
    assert low is not None
    assert high is not None
    assert low < chrf.values["a"].value < high
    same = chrf.differences["b"]  # the same answers: nothing is left, whatever is redrawn
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_one_seed_has_no_interval_and_only_common_recordings_count() -> None:
    short = run(1, 0.2)
    short.pop("0")
    lines = compare({"a": {0: run(0, 0.2)}, "b": {1: short}})
    assert lines[0].recordings == 23
    assert lines[0].values["a"].low is None
    assert lines[0].differences == {}  # no seed in common


def test_an_arm_without_a_score_has_none() -> None:
    """Captions that name nothing have no share of what is named."""
    said = {"silent": "nothing", "loud": "a dog and a cat"}
    arms = {
        name: {0: {"1": replace(run(0, 0.0)["1"], task="audio_caption", prediction=text, events=("dog", "cow"))}}
        for name, text in said.items()
    }
    other = {
        name: {0: {**of[0], "2": replace(of[0]["1"], id="2", events=("cat",), prediction="")}}
        for name, of in arms.items()
    }
    lines = {line.measure.name: line for line in compare(other)}
    assert lines["named_events"].values["silent"].value == 0
    assert set(lines["hallucinated_events"].values) == {"loud"}
    assert lines["hallucinated_events"].values["loud"].value == 0.5
    assert lines["hallucinated_events"].differences == {}
