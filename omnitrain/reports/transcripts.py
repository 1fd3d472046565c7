"""Transcripts of several runs side by side: runs that differ in nothing but their seed are one arm, and its scores are
means over seeds, with intervals for new seeds and new sentences. As tables of a page, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnitrain.evaluation.intervals import Estimate
from omnitrain.evaluation.seeds import Answers, Line, compare, read_run
from omnitrain.evaluation.transcripts import CONSTANT, FREQUENT
from omnitrain.files import HEARD, write_text
from omnitrain.reports.run import Run, flat

_NOT_AN_ARM = ("seed", "paths", "ckpt_path", "hydra", "variables.seed")


@dataclass(frozen=True, kw_only=True)
class Arms:
    """Transcripts of runs by arm.

    Attributes:
        names: of the arms, in the order of the runs.
        runs: of each arm, how many.
        window: of the encoder's attention, in seconds: the longest that all runs have.
        lines: with that window.
        by_window: window -> the lines of all languages together.
        constants: (task, languages, measure) -> the scores of those that never listen, by their name.
        swaps: (task, arm) -> of each run the media swap, nats per token.
    """

    names: tuple[str, ...]
    runs: Mapping[str, int]
    window: int
    lines: Sequence[Line]
    by_window: Mapping[int, Sequence[Line]]
    constants: Mapping[tuple[str, str, str], Mapping[str, Mapping[str, float]]]
    swaps: Mapping[tuple[str, str], Sequence[float]]


def read_arms(runs: Sequence[Run], names: Sequence[str]) -> Arms | None:
    """Of the runs that have transcripts; None if there are none, or no window that all have. Raises ValueError if two
    runs of one arm have the same seed."""
    heard = [(run, name) for run, name in zip(runs, names, strict=True) if run.transcripts]
    answers = {name: read_run(run.folder / HEARD) for run, name in heard}
    windows = sorted(set.intersection(*(set(of) for of in answers.values()))) if answers else []
    if not windows:
        return None
    members = runs_by_arm(heard)

    def of(window: int) -> dict[str, dict[int, Answers]]:
        return {
            label: {seed: answers[name][window] for seed, (_, name) in part.items()} for label, part in members.items()
        }

    lines = {window: compare(of(window)) for window in windows}
    return Arms(
        names=tuple(members),
        runs={label: len(part) for label, part in members.items()},
        window=windows[-1],
        lines=lines[windows[-1]],
        by_window={w: [line for line in part if line.languages == "all"] for w, part in lines.items()},
        constants=_constants(heard[0][0].transcripts),
        swaps=_swaps(members),
    )


def runs_by_arm(named: Sequence[tuple[Run, str]]) -> dict[str, dict[int, tuple[Run, str]]]:
    """Runs with their names by arm, whose label is what the names have in common, and seed. Folders called after the
    seed do not tell arms apart: each seed may start from a run of its own. Raises ValueError if two runs of one arm
    have the same seed."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[Run, str]]] = {}
    for run, name in named:
        own = f"seed={run.config.get('seed', 0)}"
        settings = {k: v.replace(own, "seed=") for k, v in flat(run.config).items() if not k.startswith(_NOT_AN_ARM)}
        groups.setdefault(tuple(sorted(settings.items())), []).append((run, name))
    arms: dict[str, dict[int, tuple[Run, str]]] = {}
    for part in groups.values():
        shared = [a for a, *others in zip(*(n.split("/") for _, n in part), strict=False) if {a, *others} == {a}]
        label = part[0][1] if len(part) == 1 else "/".join(shared) or str(part[0][0].config.get("name", "run"))
        label = "/".join(word for word in label.split("/") if not word.startswith("seed=")) or label
        by_seed = arms.setdefault(label if label not in arms else part[0][1], {})
        for run, name in part:
            seed = int(run.config.get("seed", 0))
            if seed in by_seed:
                raise ValueError(f"{name} and {by_seed[seed][1]} are the same run: both have seed {seed}")
            by_seed[seed] = run, name
    return arms


def _constants(scores: Mapping[str, Any]) -> dict[tuple[str, str, str], dict[str, Mapping[str, float]]]:
    found: dict[tuple[str, str, str], dict[str, Mapping[str, float]]] = {}
    for row in scores["scores"]:
        if row["split"] == "all" and row["system"] in (FREQUENT, CONSTANT):
            for measure, interval in row["measures"].items():
                found.setdefault((row["task"], row["languages"], measure), {})[row["system"]] = interval
    return found


def _swaps(members: Mapping[str, Mapping[int, tuple[Run, str]]]) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for label, part in members.items():
        for run, _ in part.values():
            for row in run.transcripts["media_swap"]:
                if row["gain"]:
                    found.setdefault((row["task"], label), []).append(row["gain"]["mean"])
    return found


def rows(arms: Arms) -> list[dict[str, Any]]:
    """A row of text cells for each line: of each arm, of each difference to the first, of those that never listen."""
    return [
        {
            "task": line.task, "languages": line.languages, "recordings": line.recordings,
            "measure": line.measure.heading,
            "values": [cell_text(line.values.get(name), line.measure.form) for name in arms.names],
            "differences": [cell_text(line.differences.get(name), line.measure.form, "+") for name in arms.names[1:]],
            "constants": [_constant(arms, line, system) for system in (FREQUENT, CONSTANT)],
        }
        for line in arms.lines
    ]  # fmt: skip


def _constant(arms: Arms, line: Line, system: str) -> str:
    found = arms.constants.get((line.task, line.languages, line.measure.name), {}).get(system)
    return "–" if found is None else format(found["mean"], line.measure.form)


def cell_text(estimate: Estimate | None, form: str, sign: str = "") -> str:
    if estimate is None:
        return "–"
    numbers = [v for v in (estimate.value, estimate.low, estimate.high) if v is not None]
    shown = [f"{v:{sign}{form}}".replace("-", "−") for v in numbers]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def window_rows(arms: Arms) -> list[dict[str, Any]]:
    """A row for each task and window: the first measure of each arm, all languages together."""
    found = []
    for window, lines in sorted(arms.by_window.items()):
        first = {line.task: line for line in reversed(lines)}
        found += [
            {"task": task, "window": window, "measure": line.measure.title,
             "values": [cell_text(line.values.get(name), line.measure.form) for name in arms.names]}
            for task, line in sorted(first.items())
        ]  # fmt: skip
    return sorted(found, key=lambda row: (row["task"], row["window"]))


def swap_rows(arms: Arms) -> list[tuple[str, list[str]]]:
    """Of each task the media swap of each arm: mean over seeds, and of each seed."""
    tasks = sorted({task for task, _ in arms.swaps})

    def cell(values: Sequence[float] | None) -> str:
        if not values:
            return "–"
        each = ", ".join(f"{v:+.2f}" for v in values)
        return f"{sum(values) / len(values):+.2f}" + (f" ({each})" if len(values) > 1 else "")

    return [(task, [cell(arms.swaps.get((task, name))) for name in arms.names]) for task in tasks]


def write_markdown(arms: Arms, path: Path) -> None:
    """The same tables as Markdown."""
    heads, minus = arm_heads(arms.runs)
    text = [
        f"Attention window {arms.window} s. Means over seeds, with 95 % intervals for new seeds and new sentences; "
        "*frequent* and *constant* never listen: always the most frequent training answer, and the best of the "
        "frequent ones.",
        markdown_table(
            ["task", "language", "recordings", "measure", *heads, *minus, "frequent", "constant"],
            [
                [r["task"], r["languages"], str(r["recordings"]), r["measure"], *r["values"], *r["differences"],
                 *r["constants"]]
                for r in rows(arms)
            ],
        ),
        "By attention window, all languages:",
        markdown_table(
            ["task", "window", "measure", *heads],
            [[r["task"], f"{r['window']} s", r["measure"], *r["values"]] for r in window_rows(arms)],
        ),
    ]  # fmt: skip
    if arms.swaps:
        text += [
            "Media swap, rise of the loss with another's recording in nats per token (mean, and each seed):",
            markdown_table(["task", *heads], [[task, *cells] for task, cells in swap_rows(arms)]),
        ]
    write_text(path, "\n\n".join(text) + "\n")


def arm_heads(runs: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """What stands above the columns of arms, of each of which there are so many `runs`, and of their differences."""
    first, *others = runs
    heads = [f"{name} ({count} {'seed' if count == 1 else 'seeds'})" for name, count in runs.items()]
    return heads, [f"{name} − {first}" for name in others]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
