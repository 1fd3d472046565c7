"""The questions of the non-degradation study and their answers: does mixing modalities cost any of them?

docs/nondegradation.md gives the equations and says how well the intervals cover.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from omnitrain.data.sample import MODALITIES
from omnitrain.evaluation.intervals import Estimate, crossed_interval
from omnitrain.evaluation.scores import (
    BITS_PER_BYTE,
    CHRF,
    EXACT_MATCH,
    NATS_PER_TOKEN,
    SWAP_GAIN,
    WER,
    Measure,
    Scores,
)
from omnitrain.study.results import Study
from omnitrain.study.spec import OMNI, UNIMODAL

FEW_SEEDS = 5
"""Below this many seeds an interval is wide, and the page says so."""

Verdict = Literal["no worse", "worse", "not decided"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A question: a measure on some items, and the unimodal arm that omni is compared with (None: no arm has it)."""

    name: str
    measure: Measure
    baseline: str | None
    select: Mapping[str, tuple[str, ...]]


_NEW = {"sentence": ("new",)}
MAIN_ROWS = (
    Row(name="text", measure=BITS_PER_BYTE, baseline="text", select={**_NEW, "modality": ("text",), "task": ("text",)}),
    Row(name="vision", measure=NATS_PER_TOKEN, baseline="vision", select={**_NEW, "modality": ("image",)}),
    Row(name="audio", measure=NATS_PER_TOKEN, baseline="audio", select={**_NEW, "modality": ("audio",)}),
)
"""The rows of the main table, each with a margin of the same name, on items whose sentence no arm has read. Everything
else explores."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """omni - unimodal, paired by seed and by item.

    Attributes:
        verdict: against the margin; None where the row has none.
        direction: "better" or "worse" where the interval excludes zero, else "".
    """

    baseline: str
    estimate: Estimate
    margin: float | None
    verdict: Verdict | None
    direction: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of a table.

    Attributes:
        arms: scores of the arms that have one, over all their seeds.
        differences: by omni arm.
        items: compared; `dropped` more were scored in some run, but not in every one.
        notes: what a reader has to know.
    """

    row: Row
    arms: Mapping[str, Estimate]
    differences: Mapping[str, Difference]
    items: int
    dropped: int
    notes: tuple[str, ...]


def verdict(estimate: Estimate, margin: float) -> Verdict:
    """Non-inferiority of a score that is better when low: the interval on one side of the margin, or undecided."""
    if not margin > 0:
        raise ValueError(f"a non-inferiority margin must be above 0, got {margin}")
    if estimate.low is None or estimate.high is None:
        return "not decided"
    if estimate.high < margin:
        return "no worse"
    return "worse" if estimate.low > margin else "not decided"


def direction(estimate: Estimate, *, lower_is_better: bool) -> str:
    """ "better" or "worse" where the interval excludes zero, else ""."""
    if not estimate.excludes_zero:
        return ""
    return "better" if (estimate.value < 0) == lower_is_better else "worse"


def compare(
    scores: Scores, row: Row, match: str, *, margin: float | None = None, resamples: int = 0
) -> Comparison | None:
    """Answer one question under one matching from the runs that are there; None if no run has scored such an item. All
    numbers of a row are of the items that every run of the arms concerned has scored; differences, which are paired by
    seed and by item, use the seeds that both arms have."""
    places: dict[str, dict[int, int]] = {}
    for arm in ((row.baseline,) if row.baseline else UNIMODAL) + OMNI:
        if of_arm := sorted((seed, place) for place, (m, a, seed) in enumerate(scores.runs) if (m, a) == (match, arm)):
            places[arm] = dict(of_arm)
    used = [place for found in places.values() for place in found.values()]
    numerator, weight = scores.parts(row.measure)
    scored = np.isfinite(numerator[used]) & scores.where(**row.select) & (weight > 0) if used else np.zeros((0, 0))
    if not scored.any():
        return None
    common = scored.all(axis=0)
    n_items, dropped = int(common.sum()), int((scored.any(axis=0) & ~common).sum())
    left_out = f"{dropped} of {dropped + n_items} items were not scored in every run and are left out"
    notes = [left_out] if dropped else []
    if not n_items:
        return Comparison(row=row, arms={}, differences={}, items=0, dropped=dropped, notes=tuple(notes))
    weights, groups = weight[common], scores.concept[common]

    def estimate(values: np.ndarray) -> Estimate:
        return crossed_interval(values, weights, groups, resamples=resamples)

    values = {arm: numerator[list(found.values())][:, common] for arm, found in places.items()}
    means = {arm: estimate(v) for arm, v in values.items()}
    differences: dict[str, Difference] = {}
    for arm in OMNI:
        base = row.baseline
        if base is None:
            break
        both = sorted(set(places.get(arm, ())) & set(places.get(base, ())))
        if lacking := sorted(set(places.get(arm, ())) ^ set(places.get(base, ()))):
            seeds = ("seeds " if len(lacking) > 1 else "seed ") + ", ".join(map(str, lacking))
            notes.append(f"{arm.replace('_', ' ')} − {base}: {seeds} not finished in both arms, and left out")
        if not both:
            continue
        pairs = numerator[[places[arm][s] for s in both]] - numerator[[places[base][s] for s in both]]
        found = estimate(pairs[:, common])
        if len(both) < FEW_SEEDS:
            hint = "no interval" if len(both) < 2 else "the interval is wide and rests on few"
            notes.append(f"{arm.replace('_', ' ')} − {base}: {len(both)} seed{'s' if len(both) > 1 else ''}, {hint}")
        differences[arm] = Difference(
            baseline=base, estimate=found, margin=margin,
            verdict=None if margin is None else verdict(found, margin),
            direction=direction(found, lower_is_better=row.measure.lower_is_better),
        )  # fmt: skip
    return Comparison(row=row, arms=means, differences=differences, items=n_items, dropped=dropped, notes=tuple(notes))


def main_table(study: Study, scores: Scores, match: str) -> list[Comparison]:
    """The rows text, vision and audio under one matching, as far as they can be answered, and beside each, without a
    verdict, the items whose sentence an arm has read. Raises ValueError where the study gives no margin for a row."""
    found = []
    for row in MAIN_ROWS:
        if row.name not in study.margins:
            raise ValueError(f"{study.folder}: no margin for '{row.name}' in the runs; set study.margins.{row.name}")
        read = replace(row, name=f"{row.name}, sentence read", select={**row.select, "sentence": ("read",)})
        found.append(compare(scores, row, match, margin=float(study.margins[row.name]), resamples=4000))
        found.append(compare(scores, read, match, resamples=4000))
    return [compared for compared in found if compared is not None]


@dataclass(frozen=True, kw_only=True)
class Detail:
    """A further comparison: of a kind of input (`documents`, `translations`, or a modality), cut in some way."""

    input: str
    cut: str
    value: str
    comparison: Comparison


def inputs(scores: Scores) -> dict[str, dict[str, tuple[str, ...]]]:
    """Kinds of input that were scored, with the items they mean: text as documents and as the rest, then modalities."""
    tasks = scores.values_of("task", {"modality": ("text",)})
    others = tuple(task for task in tasks if task != "text")
    kinds: dict[str, dict[str, tuple[str, ...]]] = {
        "documents": {"modality": ("text",), "task": ("text",)},
        "translations": {"modality": ("text",), "task": others},
        **{modality: {"modality": (modality,)} for modality in MODALITIES if modality != "text"},
    }
    return {kind: select for kind, select in kinds.items() if scores.where(**select).any()}


def details(scores: Scores, match: str) -> list[Detail]:
    """Losses by split, task, language and novelty of answers; scores of generated ones; what a swap of media costs."""
    found: list[Detail | None] = []
    for kind, select in inputs(scores).items():
        values = {cut: scores.values_of(cut, select) for cut in ("split", "task", "language", "sentence")}
        loss = BITS_PER_BYTE if kind == "documents" else NATS_PER_TOKEN
        questions = [(loss, "all", "")]
        questions += [(loss, cut, value) for cut in values if len(values[cut]) > 1 for value in values[cut]]
        for measure in (EXACT_MATCH, CHRF, WER, SWAP_GAIN):
            questions.append((measure, "all", ""))
            if measure in (EXACT_MATCH, CHRF):
                questions += [(measure, "split", split) for split in values["split"]]
        found += [_detail(scores, match, measure, kind, select, cut, value) for measure, cut, value in questions]
    return [detail for detail in found if detail]


def cells(scores: Scores, match: str, measure: Measure, *, split: str | None = None) -> list[Detail]:
    """One comparison per kind of input and language of the answer, in one split or all."""
    limits = {"split": (split,)} if split else {}
    found = [
        _detail(scores, match, measure, kind, select | limits, "language", language)
        for kind, select in inputs(scores).items()
        for language in scores.values_of("language", select | limits)
    ]
    return [detail for detail in found if detail and detail.comparison.items]


def _detail(
    scores: Scores, match: str, measure: Measure, kind: str, select: Mapping[str, tuple[str, ...]], cut: str, value: str
) -> Detail | None:
    baseline = {"text": "text", "image": "vision", "video": "vision", "audio": "audio"}.get(select["modality"][0])
    select = select if cut == "all" else {**select, cut: (value,)}
    compared = compare(scores, Row(name=kind, measure=measure, baseline=baseline, select=select), match)
    return None if compared is None else Detail(input=kind, cut=cut, value=value, comparison=compared)
