"""One page over all stages of a run: what each trained, on what, for how long, and how the losses went end to end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from omnitrain.data.sample import MODALITIES
from omnitrain.files import CONFIG, REPORT, write_text
from omnitrain.reports import figures
from omnitrain.reports.mixture import mixture
from omnitrain.reports.run import Run, read_run, templates


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """
    Attributes:
        command: its command line.
        folder: of its run; None if it does not say.
        finished: whether it has ended well.
    """

    name: str
    command: str
    folder: Path | None
    finished: bool


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A stage as the page shows it; `run` is None as long as it has no run folder (or makes none)."""

    record: StageRecord
    run: Run | None
    state: str
    report: str | None
    trained: list[str]
    length: int | None
    steps: int | None
    planned_steps: int | None
    tokens: float | None
    seconds: float | None
    losses: dict[str, float]
    mixture: dict[str, Any] | None


def write_stages_report(
    run_dir: Path, stages: Sequence[StageRecord], out: Path | None = None
) -> tuple[Path, list[str]]:
    """Write the page.

    Args:
        run_dir: folder of the run of stages.
        out: default ``run_dir/report.html``.

    Returns:
        its path, and a line for everything that is missing in it.

    Raises:
        ValueError: a file of a stage cannot be read; the message names it.
    """
    path = out or run_dir / REPORT
    rows = [_row(stage, path.parent) for stage in stages]
    missing = [line for row in rows for line in _missing(row)]
    trained = [row for row in rows if row.run is not None]
    curves, borders = _curves(trained)
    modalities = [m for m in MODALITIES if any(m in row.losses for row in rows)]
    text = templates().get_template("chain.html.j2").render(
        name=_name(run_dir),
        folder=run_dir.resolve().name,
        rows=rows,
        trained=trained,
        finished=sum(row.record.finished for row in rows),
        tokens=sum(row.tokens or 0 for row in rows),
        seconds=sum(row.seconds or 0 for row in rows),
        modalities=modalities,
        curves=Markup(figures.stage_curves(curves, borders)) if curves else None,  # SVG of our own making
        missing=missing,
    )  # fmt: skip
    write_text(path, text)
    return path, missing


def _name(run_dir: Path) -> str:
    return read_run(run_dir, samples=False).config.get("name") or run_dir.resolve().name


def _row(stage: StageRecord, beside: Path) -> _Row:
    folder = stage.folder
    run = read_run(folder, samples=False) if folder is not None and (folder / CONFIG).is_file() else None
    config = run.config if run is not None else {}
    steps = run.metrics.get("seen/tokens") if run is not None else None
    report = folder / REPORT if folder is not None else None
    return _Row(
        record=stage,
        run=run,
        state="finished" if stage.finished else "begun" if run is not None else "not begun",
        report=os.path.relpath(report, beside) if report is not None and report.is_file() else None,
        trained=list((config.get("module") or {}).get("train") or []),
        length=(config.get("data") or {}).get("max_tokens"),
        steps=int(steps[0][-1]) if steps else None,
        planned_steps=(config.get("trainer") or {}).get("max_steps"),
        tokens=float(steps[1][-1]) if steps else None,
        seconds=_training_seconds(run) if run is not None else None,
        losses=_last_losses(run) if run is not None else {},
        mixture=mixture(run.data, config.get("mix"), MODALITIES) if run is not None and run.data else None,
    )


def _training_seconds(run: Run) -> float | None:
    """Time of all steps, from the throughput file; steps that a resumed run took again count once."""
    if "seconds_per_step" not in run.throughput:
        return None
    latest = dict(zip(*run.throughput["seconds_per_step"], strict=True))
    steps = np.array(sorted(latest))
    return float(sum(np.diff(steps, prepend=0) * [latest[step] for step in steps]))


def _last_losses(run: Run) -> dict[str, float]:
    """Modality -> loss of the last validation, nats per target token."""
    prefix = "validation/loss/"
    return {
        name.removeprefix(prefix): float(values[1][-1])
        for name, values in run.metrics.items()
        if name.startswith(prefix)
    }


def _curves(rows: Sequence[_Row]) -> tuple[dict[str, list[dict[str, Any]]], list[tuple[str, float]]]:
    """Losses of each modality and stage over the tokens of the whole run, and where each stage begins."""
    curves: dict[str, list[dict[str, Any]]] = {}
    borders: list[tuple[str, float]] = []
    start = 0.0
    for row in rows:
        assert row.run is not None
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
    name, folder = row.record.name, row.record.folder
    if row.state == "not begun":
        return [f"stage {name}: not begun; the same `fit` line goes on with it"]
    lines = [] if row.state == "finished" else [f"stage {name}: not finished; the same `fit` line goes on with it"]
    if row.run is None:
        return lines
    # Its own report says the same of itself.
    lines += [f"stage {name}: {m.part} ({m.file}): {m.fix}" for m in row.run.missing]
    if row.report is None and row.record.finished:
        lines.append(f"stage {name}: its own report: run `python -m omnitrain report {folder}`")
    return lines
