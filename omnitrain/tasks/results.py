"""What a task leaves behind, whoever runs it, and the run itself as far as it is the same for all:

    eval/tasks/NAME.parts/     answers so far
    eval/tasks/NAME.parquet    every item: prompt, reference, prediction, the answer read out of it, score
    eval/tasks/NAME.json       metrics with intervals, by category, skipped items by reason, settings

The same command goes on where it was. Answers of another model, or of a task that is set up differently, are never
mixed in: the fingerprint of both stands in every file, or in its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from omnitrain.data.encode import SampleEncoder
from omnitrain.evaluation.intervals import bootstrap_interval
from omnitrain.evaluation.teacher_forced import Writer
from omnitrain.files import read_json, write_json, write_parquet
from omnitrain.models.omni import sampled_weights
from omnitrain.tasks.benchmark import Metric
from omnitrain.tasks.settings import RunOptions

_ANSWER_COLUMNS = ("id", "digest", "category", "group", "prompt", "reference", "truth", "prediction")
ANSWERS_SCHEMA = pa.schema([(name, pa.string()) for name in _ANSWER_COLUMNS])
ITEMS_SCHEMA = pa.schema([*ANSWERS_SCHEMA, ("answer", pa.string()), ("score", pa.float64())])
"""One row per item of a task. `truth` is JSON; `answer` is what the rule read out of `prediction`; `score` is the
task's metric on this item alone; `digest` changes when question or truth do."""


Told = tuple[Sequence[float], str]
"""What one item says about a metric: statistics [S], and its group (see `bootstrap_interval`)."""


class StaleAnswers(ValueError):
    """The folder holds answers of another model or of other settings."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What was found out about one task, as in ``NAME.json``."""

    name: str
    metric: str
    items: int
    skipped: dict[str, int]
    metrics: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    path: Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a kind of task finds out.

    Attributes:
        rows: the items, as `ITEMS_SCHEMA` says.
        told: by metric and category (None: all items), in the order of the table, what items say about it.
        settings: of the task, for people to read.
        skipped: items that could not be asked, by reason.
        more: further entries of ``NAME.json``.
        unused: stored answers that are no part of this run (`RunOptions.limit`); they wait for a larger one.
    """

    rows: Sequence[Mapping[str, Any]]
    told: Mapping[tuple[Metric, str | None], Sequence[Told]]
    settings: dict[str, Any]
    skipped: Mapping[str, int] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    unused: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class RunnableTask(ABC):
    """A task that can be run on a model.

    Args:
        name: of the files in ``eval/tasks`` and in the table.
        metric: the number that the task is known by, reported first.
        path: where its data are.
    """

    name: str
    metric: str
    path: str | None = None

    def check(self) -> None:  # noqa: B027  (most tasks have nothing to check)
        """Raises ValueError for what can be seen to be missing before a model is loaded."""

    @abstractmethod
    def decides(self, options: RunOptions) -> list[Any]:
        """All that decides an answer beside the model, as JSON values."""

    def is_done(self, summary: Mapping[str, Any]) -> bool:
        """Whether nothing is left to do where this ``NAME.json``, of the same fingerprint, lies."""
        return False

    @abstractmethod
    def find_out(self, model: Writer, encoder: SampleEncoder, files: TaskFiles, options: RunOptions) -> Outcome:
        """Ask and score what `files` have no answer to."""

    def run(
        self, model: Writer, encoder: SampleEncoder, out_dir: str | Path, options: RunOptions | None = None
    ) -> TaskResult:
        """Answer and score the task, and write ``out_dir/NAME.parquet`` and ``NAME.json``. Raises StaleAnswers where
        the folder holds answers of another model or setting and `options.restart` is off; FileNotFoundError or
        ValueError where the data are not there, or nothing in them can be used."""
        self.check()
        started, options = time.perf_counter(), options or RunOptions()
        decides = [options.fingerprint or model_fingerprint(model, encoder), *self.decides(options)]
        fingerprint = hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).hexdigest()
        files = TaskFiles(Path(out_dir), self.name, fingerprint, restart=options.restart)
        summary: dict[str, Any] | None = files.done
        if summary is None or not self.is_done(summary):
            found = self.find_out(model, encoder, files, options)
            records = [
                record if category is None else {"category": category, **record}
                for (metric, category), told in found.told.items()
                if (record := measured(metric, told))
            ]
            summary = {
                "task": self.name, "metric": self.metric, "fingerprint": fingerprint,
                "items": len({row["id"] for row in found.rows}), "limit": options.limit,
                "metrics": [record for record in records if "category" not in record],
                "categories": [record for record in records if "category" in record],
                "skipped": dict(sorted(found.skipped.items())), "settings": found.settings, **found.more,
                "seconds": round(time.perf_counter() - started, 1),
            }  # fmt: skip
            files.finish(found.rows, summary, found.unused)
        told_of = ("metric", "items", "skipped", "metrics", "categories")
        return TaskResult(name=self.name, path=files.items, **{name: summary[name] for name in told_of})


def model_fingerprint(model: Writer, encoder: SampleEncoder) -> str:
    """Hex digest of the weights (256 numbers of each tensor), of the tokenizer, and of how media become numbers."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor, numbers in sampled_weights(model, 256):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + numbers)
    found.update(encoder.tokenizer.to_json().encode())
    found.update(repr(replace(encoder, tokenizer=None)).encode())
    return found.hexdigest()


class TaskFiles:
    """The files of one task. `fingerprint` is that of what decides the answers; files of another one are deleted by
    `restart`, and StaleAnswers is raised without it. `done` is the ``NAME.json`` of this one, if there is one."""

    def __init__(self, out: Path, name: str, fingerprint: str, *, restart: bool) -> None:
        self.items, self.summary, self.parts = (out / f"{name}.{kind}" for kind in ("parquet", "json", "parts"))
        self.fingerprint = fingerprint
        noted = read_json(self.summary) if self.summary.is_file() else {}
        stored: str | None = noted.get("fingerprint")
        if self.items.is_file():
            metadata = pq.read_schema(self.items).metadata or {}
            stored = metadata.get(b"fingerprint", b"").decode() or stored or ""
        self.done: dict[str, Any] | None = noted if noted.get("fingerprint") == stored == fingerprint else None
        stale = [file for file in self.parts.glob("*") if not file.name.startswith(fingerprint)]
        if stored not in (None, fingerprint):
            stale += [self.items, self.summary]
        if stale and not restart:
            raise StaleAnswers(
                f"{stale[0]} holds answers of another model or of other settings of task {name}; "
                "+eval.restart=true throws them away"
            )
        for file in stale:
            file.unlink(missing_ok=True)

    def answers(self) -> dict[str, dict[str, str]]:
        """The answers there are, by item id, as `ANSWERS_SCHEMA` says."""
        files = [*([self.items] if self.items.is_file() else []), *self._answered()]
        return {
            row["id"]: row for file in files for row in pq.read_table(file, columns=ANSWERS_SCHEMA.names).to_pylist()
        }

    def _answered(self) -> list[Path]:
        return sorted(self.parts.glob(f"{self.fingerprint}.*.parquet"))

    def append(self, rows: Sequence[Mapping[str, str]]) -> Path | None:
        """Add answers as a part; None where there are no rows."""
        if not rows:
            return None
        number = 1 + max((int(file.suffixes[-2][1:]) for file in self._answered()), default=-1)
        path = self.parts / f"{self.fingerprint}.{number:06d}.parquet"
        write_parquet(path, pa.Table.from_pylist(list(rows), schema=ANSWERS_SCHEMA))
        return path

    def finish(
        self, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], unused: Sequence[Mapping[str, str]]
    ) -> None:
        """Write the items that were scored and the summary; of the parts only the `unused` answers stay."""
        schema = ITEMS_SCHEMA.with_metadata({"fingerprint": self.fingerprint})
        write_parquet(self.items, pa.Table.from_pylist(list(rows), schema=schema))
        kept = self.append(unused)
        write_json(self.summary, summary)
        for file in self.parts.glob("*"):
            if file != kept:
                file.unlink()
        if kept is None:
            shutil.rmtree(self.parts, ignore_errors=True)


def measured(metric: Metric, told: Sequence[Told]) -> dict[str, Any] | None:
    """A metric over items with its interval, as in ``NAME.json``; None where no item says anything about it."""
    statistics, groups = [values for values, _ in told], [group for _, group in told]
    interval = bootstrap_interval(statistics, groups=groups, combine=metric.combine) if told else None
    if interval is None or math.isnan(interval.mean):
        return None
    return {
        "name": metric.name, "higher_is_better": metric.higher_is_better, "percent": metric.percent,
        "value": interval.mean, "low": interval.low, "high": interval.high, "items": interval.n,
        "groups": interval.groups,
    }  # fmt: skip


def print_result(result: TaskResult) -> None:
    """Print the table of a task (fits 80 columns)."""
    console = Console()
    table = Table(title=result.name, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("")
    for column in ("items", "score", "95 % interval", "better"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in (*result.metrics, *result.categories):
        shown = [f"{found[key]:.1%}" if found["percent"] else f"{found[key]:.2f}" for key in ("value", "low", "high")]
        table.add_row(
            f"  {found['name']}, {found['category']}" if "category" in found else found["name"],
            f"{found['items']:,}", shown[0], f"[{shown[1]}, {shown[2]}]".replace("[", r"\["),
            "higher" if found["higher_is_better"] else "lower",
        )  # fmt: skip
    console.print(table)
    if result.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result.skipped.items()))
        console.print(f"skipped: {reasons}", style="dim", highlight=False)
    console.print(f"every item: {result.path}", style="dim", highlight=False, soft_wrap=True)
