"""The page and the table of a non-degradation study, at any time, from the runs that are finished.

    write_study_report(Path("runs/nondegradation"))   ->   report.html   table.md

Both say the same; what is undecided, worse or missing stands where the rest stands.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from omnitrain.evaluation.scores import CHRF, EXACT_MATCH, NATS_PER_TOKEN, Measure, Scores, scores_of
from omnitrain.files import REPORT, write_text
from omnitrain.reports import figures
from omnitrain.reports.run import templates
from omnitrain.study.results import Study, StudyRun, collect_study, read_study
from omnitrain.study.spec import ARMS, MATCHES, OMNI
from omnitrain.study.verdicts import FEW_SEEDS, MAIN_ROWS, Comparison, Detail, Difference, cells, details, main_table

MATCH_TITLES = {"data": "Matched by data", "compute": "Matched by compute"}
MATCH_MEANINGS = {
    "data": "All arms see the same samples of what they share, in the same order; omni sees the other modalities "
    "besides, and costs more operations.",
    "compute": "All arms have the same number of training operations; omni sees less of each modality for that.",
}
_SEEN = {"text": ARMS, "image": ("vision", *OMNI), "audio": ("audio", *OMNI)}
"""Which arms train on a modality: the others' curves would only show what nobody taught them."""


def write_study_report(
    folder: str | Path, out: str | Path | None = None, *, collect: str | Path | None = None
) -> tuple[Path, Study]:
    """Write the page (`out`, by default ``report.html`` in `collect`, or else in `folder`, which is that of a study or
    of a collected one), and ``table.md`` beside it; with `collect`, also the collected study into that folder. Returns
    the path of the page, and the study. Raises as `read_study` does."""
    study = read_study(folder)
    if collect is not None:
        collect_study(study, collect)
    path = Path(out) if out is not None else Path(folder if collect is None else collect) / REPORT
    page, table = render(study)
    write_text(path, page)
    write_text(path.with_name("table.md"), table)
    return path, study


def render(study: Study) -> tuple[str, str]:
    """The page, and the same tables in Markdown."""
    scores = scores_of(study.items)
    tables = {match: main_table(study, scores, match) for match in study.matches}
    missing = missing_runs(study)
    page = (
        templates()
        .get_template("study.html.j2")
        .render(
            name="Non-degradation study",
            folder=study.folder.resolve().name,
            facts=_facts(study, scores),
            matches=[
                {
                    "name": match,
                    "title": MATCH_TITLES[match],
                    "meaning": MATCH_MEANINGS[match],
                    "rows": [_row(c) for c in table],
                    "notes": _notes(table),
                    "cells": _cells(scores, match),
                    "details": _details(details(scores, match)),
                }
                for match, table in tables.items()
            ],
            forest=_forest(tables),
            curves={x: _curves(study, x, label) for x, label in (("tokens", "tokens"), ("flops", "training FLOP"))},
            costs=_costs(study),
            sources=_sources(study),
            missing=missing,
            few_seeds=FEW_SEEDS,
            repeat=_repeat(study),
        )
    )
    return page, _markdown(study, tables, missing)


# --- numbers as text -------------------------------------------------------------------------------------------------


def _text(value: float, form: str, *, signed: bool = False) -> str:
    zero = float(f"{value:{form}}") == 0  # and not -0.000
    return f"{0.0 if zero else value:{'+' if signed else ''}{form}}".replace("-", "−")


def _range(low: float | None, high: float | None, form: str, *, signed: bool = False) -> str:
    if low is None or high is None:
        return "[no interval]"
    return f"[{_text(low, form, signed=signed)}, {_text(high, form, signed=signed)}]"


def _score(comparison: Comparison, arm: str | None) -> dict[str, Any] | None:
    form, e = comparison.row.measure.form, comparison.arms.get(arm or "")
    return None if e is None else {"value": _text(e.value, form), "range": _range(e.low, e.high, form)}


def _difference(comparison: Comparison, arm: str) -> dict[str, Any] | None:
    found = comparison.differences.get(arm)
    if found is None:
        return None
    form, e = comparison.row.measure.form, found.estimate
    return {
        "value": _text(e.value, form, signed=True), "range": _range(e.low, e.high, form, signed=True),
        "bootstrap": _range(*e.bootstrap, form, signed=True) if e.bootstrap and e.low is not None else None,
        "verdict": found.verdict, "direction": found.direction, "zero": _zero(found), "seeds": e.seeds, "df": e.df,
        "se_seeds": e.se_seeds, "se_items": e.se_items,
    }  # fmt: skip


def _zero(difference: Difference) -> str:
    if difference.estimate.low is None:
        return "no interval with one seed or one concept"
    if not difference.direction:
        return "zero lies inside the interval"
    return f"measurably {difference.direction} than the {difference.baseline} arm"


def _row(comparison: Comparison) -> dict[str, Any]:
    row = comparison.row
    margins = {d.margin for d in comparison.differences.values() if d.margin is not None}
    return {
        "name": row.name, "unit": row.measure.unit, "lower_is_better": row.measure.lower_is_better,
        "unimodal": _score(comparison, row.baseline), "omni": {arm: _score(comparison, arm) for arm in OMNI},
        "differences": {arm: _difference(comparison, arm) for arm in OMNI}, "margin": min(margins, default=None),
        "items": comparison.items, "concepts": max((e.groups for e in comparison.arms.values()), default=0),
    }  # fmt: skip


def _notes(table: Sequence[Comparison]) -> list[str]:
    return [f"{comparison.row.name}: {note}" for comparison in table for note in comparison.notes]


def _facts(study: Study, scores: Scores) -> list[tuple[str, str]]:
    finished = study.finished
    facts = [("finished runs", f"{len(finished)} of {len(finished) + len(study.missing())}")]
    for match in study.matches:
        counts = [sum((r.match, r.arm) == (match, arm) for r in finished) for arm in ARMS]
        seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        facts.append((f"seeds per arm, match={match}", seeds))
    facts.append(("held-out items", f"{len(scores.tokens):,}"))
    facts.append(("parameters", " or ".join(f"{n:,}" for n in sorted({r.parameters for r in study.runs}))))
    if times := [r.seconds for r in finished if r.seconds is not None]:
        facts.append(("time of all runs", f"{sum(times) / 3600:.1f} h"))
    return facts


# --- figures ---------------------------------------------------------------------------------------------------------


def _forest(tables: Mapping[str, Sequence[Comparison]]) -> Markup | None:
    panels = []
    for row in MAIN_ROWS:
        lines, margin = [], None
        for match, table in tables.items():
            for comparison in (c for c in table if c.row.name == row.name):
                for arm, difference in comparison.differences.items():
                    e, margin = difference.estimate, difference.margin
                    label = f"{figures.title(arm).removeprefix('omni ')}, {match}"
                    lines.append({"label": label, "arm": arm, "value": e.value, "low": e.low, "high": e.high})
        if lines:
            title = f"{row.name}: omni − {row.baseline}"
            panels.append({"title": title, "unit": row.measure.unit, "margin": margin, "lines": lines})
    return Markup(figures.forest(panels)) if panels else None  # SVG of our own making


def _curves(study: Study, x: str, label: str) -> dict[str, Markup]:
    """One figure per matching."""
    by_curve: dict[tuple[str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in study.curves.to_pylist():
        by_curve[row["match"], row["modality"], row["arm"], row["seed"]].append((row[x], row["loss"]))
    found = {}
    for match in study.matches:
        panels: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        for modality, arms in _SEEN.items():
            for arm in arms:
                for key, points in sorted(by_curve.items()):
                    if key[:3] == (match, modality, arm) and len(points) > 1:
                        panels[figures.title(modality)][arm].append(np.array(sorted(points), dtype=float).T)
        if panels:
            found[match] = Markup(figures.arm_curves(panels, label, "nats per target token"))
    return found


def _cells(scores: Scores, match: str) -> list[dict[str, Any]]:
    """For losses and the scores of answers: heat maps of values and differences."""
    shown = []
    splits = sorted(set(scores.split.tolist()))
    for measure, split in ((NATS_PER_TOKEN, None), *((m, s) for m in (EXACT_MATCH, CHRF) for s in splits)):
        # Without a baseline there are no differences.
        if found := [cell for cell in cells(scores, match, measure, split=split) if cell.comparison.differences]:
            where = figures.title(split) if split else "all splits"
            shown.append({"title": f"{measure.unit}, {where}", "figure": _cell_figure(found, measure)})
    return shown


def _cell_figure(found: Sequence[Detail], measure: Measure) -> Markup:
    rows = list(dict.fromkeys(cell.input for cell in found))
    columns = sorted({cell.value for cell in found})
    shape = len(rows), len(columns)
    names = {"omni_early": "omni early − unimodal", "omni_late": "omni late − unimodal"}
    maps = {name: np.full(shape, np.nan) for name in ("unimodal", *names.values())}
    marks = {name: np.zeros(shape, dtype=bool) for name in names.values()}
    for cell in found:
        place = rows.index(cell.input), columns.index(cell.value)
        base = cell.comparison.arms.get(cell.comparison.row.baseline or "")
        if base is not None:
            maps["unimodal"][place] = base.value
        for arm, difference in cell.comparison.differences.items():
            maps[names[arm]][place] = difference.estimate.value
            marks[names[arm]][place] = bool(difference.direction)
    maps = {name: values for name, values in maps.items() if np.isfinite(values).any()}
    form, reach = (".1f", 5.0) if measure is CHRF else (".2f", 0.1)
    lower = measure.lower_is_better
    return Markup(figures.cell_maps(maps, rows, columns, form=form, marks=marks, lower_is_better=lower, reach=reach))


# --- tables ----------------------------------------------------------------------------------------------------------


_KINDS = {"bits_per_byte": "Losses", "nats_per_token": "Losses", "swap_gain": "Media swap"}


def _details(found: Sequence[Detail]) -> list[dict[str, Any]]:
    """Tables by measure: losses by all cuts, then answers, then swaps."""
    groups: dict[str, list[dict[str, Any]]] = {"Losses": [], "Answers": [], "Media swap": []}
    for detail in found:
        kind = _KINDS.get(detail.comparison.row.measure.name, "Answers")
        value = figures.title(detail.value) if detail.cut == "split" else detail.value
        groups[kind].append({**_row(detail.comparison), "cut": f"{detail.cut}: {value}" if detail.value else "all"})
    return [{"title": title, "rows": rows} for title, rows in groups.items() if rows]


def _runs_by_arm(study: Study) -> dict[tuple[str, str], list[StudyRun]]:
    found: dict[tuple[str, str], list[StudyRun]] = defaultdict(list)
    for run in study.runs:
        found[run.match, run.arm].append(run)
    return found


def _costs(study: Study) -> list[dict[str, Any]]:
    """What each arm costs: means over its seeds."""
    rows = []
    for (match, arm), runs in _runs_by_arm(study).items():
        seconds = [run.seconds for run in runs if run.seconds is not None]
        steps, tokens, flops = (fmean(run.planned[name] for run in runs) for name in ("steps", "tokens", "flops"))
        rows.append({
            "match": match, "arm": arm, "finished": sum(run.finished for run in runs), "steps": steps,
            "tokens": tokens, "tflop": flops / 1e12, "seconds": fmean(seconds) if seconds else None,
            "lr": ", ".join(f"{lr:g}" for lr in sorted({run.lr for run in runs})),
        })  # fmt: skip
    return rows


def _sources(study: Study) -> dict[str, Any]:
    """Samples of each source that an arm is trained on, and what share of its samples under match=data that is."""
    names = list(dict.fromkeys(name for run in study.runs for name in run.planned["samples"]))
    counts = {
        key: {name: fmean(run.planned["samples"].get(name, 0) for run in runs) for name in names}
        for key, runs in _runs_by_arm(study).items()
    }
    rows = []
    for (match, arm), mine in counts.items():
        full = {} if match == "data" else counts.get(("data", arm), {})
        shown = [{"count": n or None, "share": n / full[name] if full.get(name) else None} for name, n in mine.items()]
        rows.append({"match": match, "arm": arm, "cells": shown})
    return {"names": names, "rows": rows}


def missing_runs(study: Study) -> list[str]:
    """A line for every arm and state of what a full study would have besides."""
    seeds: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (match, arm, seed), state in study.missing().items():
        seeds[match, arm, state].append(str(seed))
    lines = [f"match={match} arm={arm}: seed {', '.join(of)} {state}" for (match, arm, state), of in seeds.items()]
    return lines + [f"match={match}: no run has begun" for match in MATCHES if match not in study.matches]


def _repeat(study: Study) -> dict[str, Any]:
    keys = [run.key for run in study.runs]
    commands = []
    for match in study.matches:
        arms = [arm for arm in ARMS if any(m == match and a == arm for m, a, _ in keys)]
        seeds = sorted({seed for m, _, seed in keys if m == match})
        commands.append(
            f"python -m omnitrain fit -m +recipe=nondegradation arm={','.join(arms)} match={match} "
            f"seed={','.join(map(str, seeds))}"
        )
    packages = sorted({package for run in study.runs for package in run.versions})
    versions = {p: list(dict.fromkeys(run.versions[p] for run in study.runs if p in run.versions)) for p in packages}
    return {
        "commands": [*commands, f"python -m omnitrain report --study {study.folder.name}"],
        "config_hash": study.runs[0].config_hash,
        "data_hash": study.runs[0].data_hash,
        "margins": {name: f"{value:g}" for name, value in study.margins.items()},
        "versions": {package: ", ".join(found) for package, found in versions.items()},
        "mixed_versions": [package for package, found in versions.items() if len(found) > 1],
        "configuration": json.dumps(study.configuration, indent=1, ensure_ascii=False) if study.configuration else None,
    }


def _markdown(study: Study, tables: Mapping[str, Sequence[Comparison]], missing: Sequence[str]) -> str:
    lines = [
        "# Non-degradation study",
        "",
        "Losses on held-out items (lower is better) with 95 % intervals over seeds and items; differences are omni − "
        "unimodal, paired by seed and item. *no worse*: the whole interval lies below the margin; *worse*: above it; "
        "else *not decided*. Items whose sentence some arm has read in training, with whatever medium, stand apart "
        "and get no verdict.",
        "",
    ]
    for match, table in tables.items():
        lines += [f"## {MATCH_TITLES[match]}", "", MATCH_MEANINGS[match], ""]
        if not table:
            lines += ["No run is finished yet.", ""]
            continue
        lines += [
            "| | unimodal | omni early | omni late | early − unimodal | verdict | late − unimodal | verdict | margin |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for comparison in table:
            row = _row(comparison)
            scores_text = [_cell(row["unimodal"]), *(_cell(row["omni"][arm]) for arm in OMNI)]
            for arm in OMNI:
                shown = row["differences"][arm]
                judged = [shown[key] for key in ("verdict", "zero") if shown[key]] if shown else ["–"]
                scores_text += [_cell(shown), "; ".join(judged)]
            margin = f"{row['margin']:g}" if row["margin"] is not None else "–"
            lines.append("| " + " | ".join([f"{row['name']} ({row['unit']})", *scores_text, margin]) + " |")
        counts = "; ".join(f"{c.row.name} {c.items:,}" for c in table)
        lines += ["", f"Items: {counts}.", ""]
        lines += [f"- {note}" for note in _notes(table)] + ([""] if _notes(table) else [])
    if missing:
        lines += ["## Missing", "", *(f"- {line}" for line in missing), ""]
    run = study.runs[0]
    lines += [f"Configuration `{run.config_hash[:16]}`, data `{run.data_hash[:16]}`.", ""]
    return "\n".join(lines)


def _cell(shown: Mapping[str, Any] | None) -> str:
    return f"{shown['value']} {shown['range']}" if shown else "–"
