"""Several runs side by side on one page: scores with intervals and differences, curves overlaid, differing settings.

Intervals are over the held-out items only. What another seed would have given they do not say; for that there is the
study (`nondegradation`). Transcripts alone are averaged over runs that differ in their seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from omnitrain.data.sample import MODALITIES
from omnitrain.data.view import data_uri
from omnitrain.evaluation.intervals import Interval, bootstrap_interval
from omnitrain.evaluation.scores import MEASURES, SCORE_COLUMNS, Measure, Scores, read_table, scores_of
from omnitrain.files import PREDICTIONS, SCORES, TRANSCRIPTS, write_text
from omnitrain.reports import figures
from omnitrain.reports.run import Run, flat, formatted, read_run, templates
from omnitrain.reports.speech import Clip, arm_tables, read_clips, read_speech_arms, write_speech_markdown
from omnitrain.reports.transcripts import read_arms, rows, swap_rows, window_rows, write_markdown

TABLE = "table.md"
"""Beside the page, where runs have transcripts or speech: the same tables as Markdown."""
SPEECH_TABLE = "speech.md"
"""Where there are both, that of the speech."""
CLIPS = 2
"""Sentences that can be heard as each arm says them."""
FEW_CONCEPTS = 10
"""With fewer, a bootstrap interval is too narrow to call a difference one."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measure on one part of the held-out items.

    Attributes:
        values: for each run its interval; None where it has no such score.
        differences: of each run to the first, or to the one before it that has a score; None where there is none.
        items: that all runs with a score have in common, on which everything here is computed.
        dropped: further items that only some runs have.
    """

    modality: str
    part: str
    measure: Measure
    values: tuple[Interval | None, ...]
    differences: tuple[Interval | None, ...]
    items: int
    dropped: int


def compare_runs(scores: Scores, names: Sequence[str], *, to_previous: bool = False) -> list[Line]:
    """All lines, by modality: everything together, then by split and by task. In `scores` each run has its name as
    `arm`; those of `names`, which are in order, without items are columns without values. Differences are to the first
    run, or `to_previous`."""
    places = {arm: place for place, (_, arm, _) in enumerate(scores.runs)}
    lines = []
    for modality in MODALITIES:
        mine = scores.where(modality=[modality])
        parts = [("all", mine)]
        for cut in ("split", "task"):
            values = scores.values_of(cut, {"modality": [modality]})
            if len(values) > 1:
                parts += [(f"{cut} {figures.title(v)}", mine & scores.where(**{cut: [v]})) for v in values]
        for (part, chosen), measure in product(parts, MEASURES):
            at = [places.get(name) for name in names]
            lines.append(_line(scores, at, (modality, part), chosen, measure, to_previous=to_previous))
    return [line for line in lines if line is not None]


def _line(
    scores: Scores,
    places: Sequence[int | None],
    of: tuple[str, str],
    chosen: np.ndarray,
    measure: Measure,
    *,
    to_previous: bool,
) -> Line | None:
    """The line `of` a modality and a part, which holds the `chosen` items."""
    numerator, weight = scores.parts(measure)
    scored = [p for p in places if p is not None and (np.isfinite(numerator[p]) & chosen & (weight > 0)).any()]
    if not scored:
        return None
    finite = np.isfinite(numerator[scored]) & chosen & (weight > 0)
    common = finite.all(axis=0)
    n, groups = int(common.sum()), scores.concept[common]

    def interval(values: np.ndarray) -> Interval:
        return bootstrap_interval(values[common], weights=weight[common], groups=groups)

    totals = [numerator[p] if p in scored and n > 0 else None for p in places]
    differences: list[Interval | None] = []
    base: np.ndarray | None = None
    for number, x in enumerate(totals):
        differences.append(None if x is None or base is None else interval(x - base))
        if number == 0 or (to_previous and x is not None):
            base = x
    return Line(
        modality=of[0], part=of[1], measure=measure, items=n, dropped=int(finite.any(axis=0).sum()) - n,
        values=tuple(None if x is None else interval(x) for x in totals), differences=tuple(differences),
    )  # fmt: skip


def write_comparison(folders: Sequence[str | Path], out: str | Path) -> tuple[Path, list[str]]:
    """Write the page, and `TABLE` beside it; differences are to the first run. Returns its path, and a line for
    everything that is missing in it. Raises FileNotFoundError for no such folder; ValueError for fewer than two runs,
    one given twice, or a file that cannot be used."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a comparison needs at least two different runs")
    runs = [read_run(path, samples=False) for path in paths]
    names = _names(paths)
    missing = []
    for run, name in zip(runs, names, strict=True):
        missing += [f"{name}: {part}" for part in run.missing]
        has_scores = (run.folder / PREDICTIONS).is_file() or run.transcripts or run.speech
        if not has_scores and not any(m.file in (SCORES, TRANSCRIPTS) for m in run.missing):
            missing.append(f"{name}: scores by item ({PREDICTIONS}): run `python -m omnitrain test {run.folder}`")
    items = held_out_items({name: run.folder for run, name in zip(runs, names, strict=True)})
    lines = compare_runs(scores_of(items), names) if items is not None else []
    arms = read_arms(runs, names)
    if arms is not None:
        write_markdown(arms, Path(out).with_name(TABLE))
    colours = dict(zip(names, cycle(figures.ARM_COLOURS.values()), strict=False))
    speech, clips = read_speech_arms(runs, names), []
    if speech is not None:
        clips = read_clips(runs, names, CLIPS)
        write_speech_markdown(speech, clips, Path(out).with_name(SPEECH_TABLE if arms else TABLE))
    page = templates().get_template("comparison.html.j2").render(
        name=f"{len(runs)} runs side by side",
        names=names,
        colours=colours,
        lines=[shown(line) for line in lines],
        few=FEW_CONCEPTS,
        dropped=max((line.dropped for line in lines), default=0),
        arms=arms,
        speech=arm_tables(speech) if speech else [],
        clips=_players(clips),
        transcripts=rows(arms) if arms else [],
        by_window=window_rows(arms) if arms else [],
        swaps=swap_rows(arms) if arms else [],
        missing=missing,
        validation=_curves("validation", runs, colours),
        training=_curves("train", runs, colours),
        facts=_facts(runs),
        settings=_settings(runs),
    )  # fmt: skip
    write_text(out, page)
    return Path(out), missing


def _players(clips: Sequence[Clip]) -> dict[str, dict[str, str]]:
    """Of each sentence the sound of each arm, as a data URI."""
    players: dict[str, dict[str, str]] = {}
    for clip in clips:
        players.setdefault(clip.text, {})[clip.arm] = data_uri(clip.sound, "audio/ogg")
    return players


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("two runs have the same folder")


def held_out_items(folders: Mapping[str, Path]) -> pa.Table | None:
    """What runs have answered to held-out samples, with each run's name as its `arm`; None where none has. Raises
    ValueError, naming it, for a file that cannot be read."""
    paths = {name: folder / PREDICTIONS for name, folder in folders.items()}
    tables = [_items(path, name) for name, path in paths.items() if path.is_file()]
    return pa.concat_tables(tables) if tables else None


def _items(path: Path, name: str) -> pa.Table:
    table = read_table(path, SCORE_COLUMNS)
    for column, value in (("match", ""), ("arm", name), ("seed", 0), ("sentence", "")):
        table = table.append_column(column, pa.array([value] * len(table)))
    return table


def _curves(kind: str, runs: Sequence[Run], colours: Mapping[str, str]) -> Markup | None:
    """Losses by modality and run; `colours`: of each run, by its name."""
    panels = {}
    for modality in MODALITIES:
        column = f"{kind}/loss/{modality}"
        lines = {n: [run.metrics[column]] for run, n in zip(runs, colours, strict=True) if column in run.metrics}
        if lines:
            panels[figures.title(modality)] = lines
    return figures.arm_curves(panels, "step", "nats per target token", colours)


def shown(line: Line) -> dict[str, Any]:
    """A line as a page shows it."""
    form = line.measure.form

    def text(interval: Interval | None, sign: str = "") -> dict[str, str] | None:
        if interval is None:
            return None
        value, low, high = (f"{v:{sign}{form}}".replace("-", "−") for v in (interval.mean, interval.low, interval.high))
        better = (interval.mean < 0) == line.measure.lower_is_better
        outside = sign and (interval.low > 0 or interval.high < 0) and interval.groups >= FEW_CONCEPTS
        shown = f"[{low}, {high}]" if interval.groups > 1 else "[no interval]"
        return {"value": value, "range": shown, "mark": ("good" if better else "warn") if outside else ""}

    return {
        "modality": line.modality, "part": line.part, "measure": line.measure.unit, "items": line.items,
        "arrow": "↓" if line.measure.lower_is_better else "↑",
        "values": [text(v) for v in line.values], "differences": [text(d, "+") for d in line.differences[1:]],
    }  # fmt: skip


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    amounts = [run.amounts for run in runs]
    return [
        ("name", [str(run.config.get("name") or "–") for run in runs]),
        *((what, [formatted(of.get(what), ",.0f") for of in amounts]) for what in ("steps", "tokens", "samples")),
        ("device", [str(run.environment.get("device") or "–") for run in runs]),
    ]


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the configuration in which the runs differ, without folders."""
    configs = [flat(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config})
    rows = [(key, [config.get(key, "–") for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and not key.startswith("paths.run_dir")]
