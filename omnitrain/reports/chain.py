"""One page over all stages of a run: what each trained, on what, for how long, and how the losses went end to end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omnitrain.data.sample import MODALITIES
from omnitrain.files import CONFIG, REPORT, write_text
from omnitrain.reports import figures
from omnitrain.reports.mixture import mixture
from omnitrain.reports.run import Run, read_run, templates


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
    )  # fmt: skip
    write_text(path, text)
    return path, missing


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
