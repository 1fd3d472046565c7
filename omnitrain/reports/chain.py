"""One page over all stages of a run: what each trained, on what, for how long, how the losses went end to end, and what
was known after each: held-out scores beside those of the stage before, so that nothing is lost unseen, and answers side
by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from omnitrain.data.sample import MODALITIES
from omnitrain.evaluation.scores import scores_of
from omnitrain.files import CONFIG, REPORT, SPOKEN, write_text
from omnitrain.reports import figures
from omnitrain.reports.comparison import Line, compare_runs, held_out_items, shown
from omnitrain.reports.mixture import mixture
from omnitrain.reports.run import Run, read_run, templates
from omnitrain.reports.speech import SpeechArms, arm_tables, compare_speech, read_sentences

EXAMPLES = 2
"""Held-out samples of each task whose answers stand side by side."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A stage's command line, the folder of its run (None if it does not say), and whether it has ended well."""

    name: str
    command: str
    folder: Path | None
    finished: bool


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A stage as the page shows it; `run` holds nothing as long as the stage has no run folder (or makes none)."""

    record: StageRecord
    run: Run
    begun: bool
    report: str | None
    trained: list[str]
    length: int | None
    steps: int | None
    planned_steps: int | None
    tokens: float | None
    seconds: float | None
    losses: dict[str, float]
    """Of the last validation, nats per target token, by modality."""
    mixture: dict[str, Any] | None

    @property
    def state(self) -> str:
        return "finished" if self.record.finished else "begun" if self.begun else "not begun"


def write_stages_report(
    run_dir: Path, stages: Sequence[StageRecord], out: Path | None = None
) -> tuple[Path, list[str]]:
    """Write the page, by default to ``run_dir/report.html``; `run_dir` is the folder of the run of stages. Returns its
    path, and a line for everything that is missing in it. Raises ValueError, naming it, for a file of a stage that
    cannot be read."""
    path = out or run_dir / REPORT
    rows = [_row(stage, path.parent) for stage in stages]
    missing = [line for row in rows for line in _missing(row)]
    folder = run_dir.resolve().name
    scored = {row.record.name: row.run.folder for row in rows if row.begun}
    items = held_out_items(scored)
    names = [] if items is None else list(dict.fromkeys(items["arm"].to_pylist()))
    lines: list[Line] = []
    if items is not None:
        try:
            lines = compare_runs(scores_of(items), names, to_previous=True)
        except ValueError as error:  # such as test sources that overlap: the rest of the page is of use all the same
            missing.append(f"scores side by side: {error}")
    text = templates().get_template("chain.html.j2").render(
        name=read_run(run_dir, samples=False).config.get("name") or folder,
        folder=folder,
        rows=rows,
        finished=sum(row.record.finished for row in rows),
        tokens=sum(row.tokens or 0 for row in rows),
        seconds=sum(row.seconds or 0 for row in rows),
        modalities=[m for m in MODALITIES if any(m in row.losses for row in rows)],
        curves=figures.stage_curves(*_curves(rows)),
        missing=missing,
        names=names,
        lines=[shown(line) for line in lines],
        examples=[] if items is None else _examples(items, names),
        speech=_speech_tables(rows),
    )  # fmt: skip
    write_text(path, text)
    return path, missing


def _speech_tables(rows: Sequence[_Row]) -> list[Any]:
    """Tables of the stages whose speech was judged, of those side by side that were judged in the same way."""
    spoken: dict[str, dict[str, dict[int, Any]]] = {}
    for row in rows:
        if row.run.speech:
            way = str((row.run.config.get("evaluation") or {}).get("scores"))
            spoken.setdefault(way, {})[row.record.name] = {0: read_sentences(row.run.folder / SPOKEN)}
    arms = [SpeechArms(runs=dict.fromkeys(x, 1), lines=tuple(compare_speech(x))) for x in spoken.values()]
    return [table for each in arms for table in arm_tables(each)]


@dataclass(frozen=True, kw_only=True)
class _Example:
    task: str
    reference: str
    answers: tuple[str | None, ...]
    """Of each stage; None where it was not asked."""


def _examples(items: pa.Table, names: Sequence[str]) -> list[_Example]:
    """Answers of the stages `names` to the same held-out samples: of each task those that most stages were asked,
    evenly."""
    asked: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in items.select(["id", "source", "task", "arm", "reference", "prediction"]).to_pylist():
        if row["prediction"] is not None:
            asked.setdefault((row["task"], row["source"], row["id"]), {})[row["arm"]] = row
    found = []
    for task in sorted({task for task, _, _ in asked}):
        mine = [by_stage for key, by_stage in asked.items() if key[0] == task]
        mine = [by_stage for by_stage in mine if len(by_stage) == max(map(len, mine))]
        for i in range(min(EXAMPLES, len(mine))):
            chosen = mine[i * len(mine) // EXAMPLES]
            answers = tuple(chosen[name]["prediction"] if name in chosen else None for name in names)
            found.append(_Example(task=task, reference=next(iter(chosen.values()))["reference"], answers=answers))
    return found


def _row(stage: StageRecord, beside: Path) -> _Row:
    folder = stage.folder
    begun = folder is not None and (folder / CONFIG).is_file()
    run = read_run(folder, samples=False) if folder and begun else Run(beside)
    config, steps = run.config, run.metrics.get("seen/tokens")
    return _Row(
        record=stage,
        run=run,
        begun=begun,
        report=os.path.relpath(folder / REPORT, beside) if folder and (folder / REPORT).is_file() else None,
        trained=list((config.get("module") or {}).get("train") or []),
        length=(config.get("data") or {}).get("max_tokens"),
        steps=int(steps[0][-1]) if steps else None,
        planned_steps=(config.get("trainer") or {}).get("max_steps"),
        tokens=run.last("seen/tokens"),
        seconds=run.training_seconds,
        losses={modality: float(losses[-1]) for modality, (_, losses) in run.below("validation/loss/").items()},
        mixture=mixture(run.data, config.get("mix"), MODALITIES) if run.data else None,
    )


def _curves(rows: Sequence[_Row]) -> tuple[dict[str, list[dict[str, Any]]], list[tuple[str, float]]]:
    """Losses of each modality and stage over the tokens of the whole run, and where each stage begins."""
    curves: dict[str, list[dict[str, Any]]] = {}
    borders: list[tuple[str, float]] = []
    start = 0.0
    for row in rows:
        metrics = row.run.metrics
        if "seen/tokens" not in metrics:
            continue
        steps, tokens = metrics["seen/tokens"]
        borders.append((row.record.name, start))
        for modality in MODALITIES:
            part = {
                kind: (start + np.interp(metrics[column][0], steps, tokens), metrics[column][1])
                for kind in ("train", "validation")
                if (column := f"{kind}/loss/{modality}") in metrics
            }
            if part:
                curves.setdefault(modality, []).append(part)
        start += float(tokens[-1])
    return {m: curves[m] for m in MODALITIES if m in curves}, borders


def _missing(row: _Row) -> list[str]:
    stage, lines = row.record, [str(part) for part in row.run.missing]  # its own report says the same of itself
    if not stage.finished:
        lines.insert(0, f"not {'finished' if row.begun else 'begun'}; the same `fit` line goes on with it")
    elif row.begun and row.report is None:
        lines.append(f"its own report: run `python -m omnitrain report {stage.folder}`")
    return [f"stage {stage.name}: {line}" for line in lines]
