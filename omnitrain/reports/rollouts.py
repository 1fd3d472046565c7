"""What was sampled in training (module=gspo), for the report: curves of rewards, and groups of answers to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from omnitrain.files import ROLLOUTS
from omnitrain.reports import figures

SHOWN = 4
"""Prompts of a step that are shown."""
CURVES = {
    "rollout/reward": ("reward", "length", "entropy", "kl", "mismatch", "clipped"),
    "preference/accuracy": ("accuracy", "margin", "chosen", "rejected"),
}
"""By a column that such a run has, the curves under the same prefix, each a figure. Rewards by name share one."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The answers to one prompt, best first; `rows` of the rollouts' table."""

    prompt: str
    reference: str
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    number: int
    rewards: tuple[str, ...]
    groups: tuple[Group, ...]


def read_steps(run_dir: Path) -> list[Step]:
    """The first step that has rollouts, the middle one and the last. Raises ValueError if a file cannot be read."""
    files: dict[int, list[Path]] = {}
    for path in sorted((run_dir / ROLLOUTS).glob("step=*.parquet")):
        files.setdefault(int(path.name.removeprefix("step=").split(".")[0]), []).append(path)
    numbers = sorted(files)
    chosen = dict.fromkeys([numbers[0], numbers[len(numbers) // 2], numbers[-1]]) if numbers else {}
    return [_step(number, files[number]) for number in chosen]


def _step(number: int, paths: Sequence[Path]) -> Step:
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sample"], row["prompt"]), []).append(row)
    shown = [
        Group(
            prompt=prompt, reference=of[0]["reference"] or "",
            rows=tuple(sorted(of, key=lambda row: -row["reward"])),
        )
        for (_, prompt), of in list(groups.items())[:SHOWN]
    ]  # fmt: skip
    names = tuple(sorted({name for row in rows for name in row if name.startswith("reward/")}))
    return Step(number=number, rewards=names, groups=tuple(shown))


def curves(metrics: figures.Columns) -> list[Markup]:
    """Figures of what rewards and preferences do over the steps; none for a run without them."""
    found = []
    for column, names in CURVES.items():
        prefix = column.split("/")[0]
        for name in names if column in metrics else ():
            key = f"{prefix}/{name}"
            series = {"all" if k == key else k.removeprefix(f"{key}/"): metrics[k]
                      for k in metrics if k == key or k.startswith(f"{key}/")}  # fmt: skip
            found.append(figures.lines(series, name) if series else None)
    return [figure for figure in found if figure is not None]
