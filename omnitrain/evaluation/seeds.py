"""Transcripts of several runs on the same recordings: what another seed and other sentences would have given.

eval/transcripts.parquet of each run  --read_run-->  Answers  --compare-->  one Line per task, language and measure
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnitrain.evaluation.intervals import Estimate, bootstrap, crossed_interval
from omnitrain.evaluation.scores import read_table
from omnitrain.evaluation.transcripts import Answer, Measure, measures_of

COLUMNS = ("id", "task", "languages", "language", "split", "group", "window", "references", "events", "prediction")
_RESAMPLES = 1000

Answers = Mapping[str, Answer]
"""By the ids of the recordings, all with one window."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measure on one language ("all": together) of a task.

    Attributes:
        values: of each arm that has such a score, over its seeds.
        differences: of each arm but the first to the first, paired by seed and sentence, over the seeds that both have.
    """

    task: str
    languages: str
    measure: Measure
    recordings: int
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


def read_run(path: Path) -> dict[int, Answers]:
    """By window what a run has answered. Raises ValueError, naming the file, if it cannot be read."""
    found: dict[int, dict[str, Answer]] = {}
    for row in read_table(path, COLUMNS).to_pylist():
        references, events = tuple(row.pop("references")), tuple(row.pop("events") or ())
        found.setdefault(row["window"], {})[row["id"]] = Answer(**row, references=references, events=events)
    return dict(found)


def compare(arms: Mapping[str, Mapping[int, Answers]]) -> list[Line]:
    """Lines of arms, each with its runs by seed, on the recordings that all runs have answered. An arm with one seed
    has an interval over nothing, that is, none."""
    runs = [run for arm in arms.values() for run in arm.values()]
    common = [id for id in runs[0] if all(id in run for run in runs[1:])]
    parts: dict[tuple[str, str], list[str]] = {}
    for id in common:
        for languages in ("all", runs[0][id].languages):
            parts.setdefault((runs[0][id].task, languages), []).append(id)
    order = sorted(parts, key=lambda part: (part[0], part[1] != "all", part[1]))
    lines = [_line(arms, part, parts[part], measure) for part in order for measure in measures_of(part[0])]
    return [line for line in lines if line is not None]


def _line(
    arms: Mapping[str, Mapping[int, Answers]], part: tuple[str, str], ids: Sequence[str], measure: Measure
) -> Line | None:
    sums = {
        name: {seed: measure.statistics([run[id] for id in ids]) for seed, run in sorted(arm.items())}
        for name, arm in arms.items()
    }
    if measure.combine is None:  # an arm whose captions name nothing has no share of what is named
        sums = {name: of for name, of in sums.items() if all(x[:, 1].any() for x in of.values())}
    if not sums:
        return None
    answers = next(iter(next(iter(arms.values())).values()))
    groups = [answers[id].group for id in ids]
    first = next(iter(arms))
    differences = {}
    for name in [name for name in sums if name != first and first in sums]:
        seeds = sorted(sums[name].keys() & sums[first].keys())
        if seeds:
            mine, theirs = (np.stack([sums[arm][seed] for seed in seeds]) for arm in (name, first))
            differences[name] = estimate(mine, groups, measure, minus=theirs)
    values = {name: estimate(np.stack(list(of.values())), groups, measure) for name, of in sums.items()}
    return Line(
        task=part[0], languages=part[1], measure=measure, recordings=len(ids), values=values, differences=differences
    )


def estimate(sums: np.ndarray, groups: Sequence[str], measure: Measure, *, minus: np.ndarray | None = None) -> Estimate:
    """The mean over seeds of a measure of a corpus, with a 95 % interval for new seeds and new sentences.

    A ratio over the same lengths has `crossed_interval`; BLEU, chrF and rates against the best of several references
    the percentile bootstrap that redraws seeds and groups (pigeonhole: Owen 2007), which is too narrow with few seeds.

    Args:
        sums: float [S, I, K], the statistics of each seed's answers.  groups: of the I items.
        minus: those of other runs with the same seeds, whose score is subtracted.
    """
    both = [sums] if minus is None else [sums, minus]
    weights = np.concatenate(both)[:, :, 1]
    if measure.combine is None and (weights == weights[0]).all():
        counts = weights[0] > 0
        wrong = sums[:, :, 0] - (0 if minus is None else minus[:, :, 0])
        return crossed_interval(wrong[:, counts], weights[0, counts], np.asarray(groups)[counts])
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    by_group = [np.stack([_by_group(x, member, len(names)) for x in part]) for part in both]  # [S, G, K] each

    def score(seeds: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        return np.array([_score(by_group, measure, s, g) for s, g in zip(seeds, drawn, strict=True)])

    n_seeds, everyone = len(sums), np.ones(len(names))
    per_seed = tuple(_score(by_group, measure, one, everyone) for one in np.eye(n_seeds))
    low, high = None, None
    if n_seeds > 1 and len(names) > 1:
        low, high = bootstrap(score, n_seeds, len(names), resamples=_RESAMPLES)
    return Estimate(
        value=float(np.mean(per_seed)), low=low, high=high, se=None, se_seeds=None, se_items=None, df=None,
        seeds=n_seeds, items=sums.shape[1], groups=len(names), per_seed=per_seed,
    )  # fmt: skip


def _by_group(sums: np.ndarray, member: np.ndarray, groups: int) -> np.ndarray:
    """float [I, K] summed by group: [G, K]"""
    return np.stack([np.bincount(member, weights=column, minlength=groups) for column in sums.T], axis=1)


def _score(by_group: Sequence[np.ndarray], measure: Measure, seeds: np.ndarray, groups: np.ndarray) -> float:
    """Mean over seeds, weighted by `seeds` [S], of the score of the groups, weighted by `groups` [G]; of two parts the
    difference."""
    combine = measure.combine or (lambda total: total[0] / max(1.0, total[1]))
    values = [
        np.average([combine(groups @ part[s]) if seeds[s] else 0.0 for s in range(len(seeds))], weights=seeds)
        for part in by_group
    ]
    return float(values[0] - (values[1] if len(values) > 1 else 0.0))
