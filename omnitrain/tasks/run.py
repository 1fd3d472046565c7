"""Runs tasks on a model: answers first, in parts that survive a kill, then scores.

    eval/tasks/NAME.parts/*.parquet   answers so far
    eval/tasks/NAME.parquet           every item: prompt, reference, prediction, the answer read out of it, score
    eval/tasks/NAME.json              metrics with intervals, by category, skipped items by reason, settings

The same command goes on where it was. Answers of another model, or of a task that is set up differently, are never
mixed in: the fingerprint of both stands in every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from omnitrain.data.batch import EncodedSample
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.packing import Budget
from omnitrain.data.sample import BadSample, Message, Segment
from omnitrain.data.shards import MediaReader
from omnitrain.evaluation.answers import answer_prompts
from omnitrain.evaluation.heldout import prompt_text
from omnitrain.evaluation.teacher_forced import DEFAULT_BUDGET, sample_losses
from omnitrain.models.omni import OmniModel, sampled_weights
from omnitrain.tasks.benchmark import Answered, Item, Metric, Task, score_interval

_ANSWERS = pa.schema(
    [
        (name, pa.string())
        for name in ("id", "digest", "category", "group", "prompt", "reference", "truth", "prediction")
    ]
)
ITEMS_SCHEMA = pa.schema([*_ANSWERS, ("answer", pa.string()), ("score", pa.float64())])
"""One row per item of a task. `truth` is JSON; `answer` is what the rule read out of `prediction`; `score` is the
task's metric on this item alone; `digest` changes when question or truth do."""


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


def model_fingerprint(model: OmniModel, encoder: SampleEncoder) -> str:
    """Hex digest of the weights (256 numbers of each tensor), of the tokenizer, and of how media become numbers."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor, numbers in sampled_weights(model, 256):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + numbers)
    found.update(encoder.tokenizer.to_json().encode())
    found.update(repr(replace(encoder, tokenizer=None)).encode())
    return found.hexdigest()


def run_task(
    task: Task,
    model: OmniModel,
    encoder: SampleEncoder,
    out_dir: str | Path,
    *,
    limit: int | None = None,
    batch: int = 16,
    budget: Budget = DEFAULT_BUDGET,
    restart: bool = False,
    fingerprint: str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> TaskResult:
    """Answer and score `task`, write ``out_dir/NAME.parquet`` and ``NAME.json``.

    Args:
        limit: at most so many rows, evenly spaced over the benchmark; None: all.
        batch: items answered between two parts on disk.
        budget: of prompts answered together.
        restart: throw away answers of another model or of other settings.
        fingerprint: of the model (`model_fingerprint`), if it is known already.
        seed: of the bootstrap.

    Raises:
        StaleAnswers: the folder holds answers of another model or setting, and `restart` is off.
        FileNotFoundError, ValueError: the benchmark is not there, or none of its rows can be used.
    """
    if not task.path:
        raise ValueError(f"eval.tasks.{task.name}.path is not set; name the benchmark's file or folder: eval.path=PATH")
    started = time.perf_counter()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    mine = _fingerprint(task, fingerprint or model_fingerprint(model, encoder))
    store = _Store(out, task.name, mine, restart)
    done = store.read()

    rows = task.benchmark.rows(task.path)
    if not len(rows):
        raise ValueError(f"task {task.name}: {task.path} holds no rows")
    count = len(rows) if limit is None else min(limit, len(rows))
    media = MediaReader(task.benchmark.media_folder(task.path))
    skipped: Counter[str] = Counter()
    details: list[str] = []
    answers: dict[str, dict[str, str]] = {}

    def bad(error: BadSample, place: str) -> None:
        skipped[error.reason] += 1
        if len(details) < 20:
            details.append(f"{place}: {error}")

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), disable=not progress,
    )  # fmt: skip
    with bar:
        if progress and not bar.console.is_terminal:
            bar.console.print(f"{task.name}: {count} of {len(rows)} items, {len(done)} answered before")
        ticker = bar.add_task(task.name, total=count)
        waiting: list[tuple[Item, dict[str, str]]] = []

        def flush() -> None:
            predictions = _predictions(task, model, encoder, [item for item, _ in waiting], media, budget, bad)
            new = [
                {**row, "prediction": prediction}
                for (_, row), prediction in zip(waiting, predictions, strict=True)
                if prediction is not None
            ]
            store.append(new)
            answers.update({row["id"]: row for row in new})
            bar.advance(ticker, len(waiting))
            waiting.clear()

        for number in range(count):
            index = number * len(rows) // count
            try:
                item = task.benchmark.item(rows[index], task.prompt)
            except BadSample as error:
                bad(error, f"row {index}")
                bar.advance(ticker)
                continue
            row = _row(item)
            if row["id"] in answers or any(row["id"] == other["id"] for _, other in waiting):
                bad(BadSample("id_twice", f"{row['id']} names two rows"), f"row {index}")
                bar.advance(ticker)
            elif (before := done.get(row["id"])) and before["digest"] == row["digest"]:
                answers[row["id"]] = before
                bar.advance(ticker)
            else:
                waiting.append((item, row))
                if len(waiting) >= batch:
                    flush()
        flush()
    if not answers:
        raise ValueError(f"task {task.name}: none of {count} rows could be used; {dict(skipped)}; first: {details[0]}")
    result = _scored(task, list(answers.values()), out, skipped, seed)
    store.finish(result[1], [row for id, row in done.items() if id not in answers])
    write_json(
        out / f"{task.name}.json",
        {
            "task": task.name, "metric": task.metric, "fingerprint": mine, "items": result[0].items,
            "rows": len(rows), "limit": limit, "metrics": result[0].metrics, "categories": result[0].categories,
            "skipped": dict(sorted(skipped.items())), "skipped_details": details,
            "settings": _settings(task), "seconds": round(time.perf_counter() - started, 1),
        },
    )  # fmt: skip
    return result[0]


# --- answers ---------------------------------------------------------------------------------------------------------


def _row(item: Item) -> dict[str, str]:
    sample = item.sample
    row = {
        "id": sample.id, "category": item.category, "group": item.group or sample.id, "prompt": prompt_text(sample),
        "reference": sample.reference, "truth": json.dumps(item.truth, ensure_ascii=False, sort_keys=True),
    }  # fmt: skip
    content = [row["prompt"], row["truth"], *item.options, *sorted(sample.meta.values())]
    return {**row, "digest": hashlib.blake2b("\0".join(content).encode(), digest_size=8).hexdigest()}


def _predictions(
    task: Task,
    model: OmniModel,
    encoder: SampleEncoder,
    items: Sequence[Item],
    media: MediaReader,
    budget: Budget,
    bad: Callable[[BadSample, str], None],
) -> list[str | None]:
    """The answer to each item; None for those that cannot be asked, which `bad` is told about."""
    found: list[str | None] = [None] * len(items)
    prompts: list[tuple[int, EncodedSample]] = []
    for index, item in enumerate(items):
        try:
            if task.scoring == "likelihood":
                found[index] = _likeliest(model, encoder, item, media, budget)
            else:
                prompts.append((index, encoder.encode_prompt(item.sample, media)))
        except BadSample as error:
            bad(error, item.sample.id)
    answers = answer_prompts(
        model, encoder.tokenizer, [prompt for _, prompt in prompts], decoding=task.decoding, budget=budget
    )
    for (index, _), answer in zip(prompts, answers, strict=True):
        found[index] = answer
    return found


def _likeliest(model: OmniModel, encoder: SampleEncoder, item: Item, media: MediaReader, budget: Budget) -> str:
    """The option with the highest log-probability as the answer, its end included."""
    if not item.options:
        raise BadSample("no_options", "scoring=likelihood needs options, and this item has none; use scoring=generate")
    held: dict[int, bytes] = {}

    def media_bytes(segment: Segment) -> bytes:  # every option asks for the same media
        if id(segment) not in held:
            held[id(segment)] = media(segment)
        return held[id(segment)]

    samples = (
        encoder(
            replace(
                item.sample,
                messages=(
                    *item.sample.messages[:-1],
                    Message(role="assistant", segments=(Segment(type="text", text=option),)),
                ),
            ),
            media_bytes,
        )
        for option in item.options
    )
    losses = sample_losses(model, samples, budget=budget)
    return item.options[int(np.argmin([loss.nats for loss in losses]))]


# --- files -----------------------------------------------------------------------------------------------------------


class _Store:
    """Answers of one task on disk."""

    def __init__(self, out: Path, name: str, fingerprint: str, restart: bool) -> None:
        self.parts, self.whole, self.fingerprint = out / f"{name}.parts", out / f"{name}.parquet", fingerprint
        self.schema = _ANSWERS.with_metadata({"fingerprint": fingerprint})
        self.number = 0
        files = [*sorted(self.parts.glob("*.parquet")), *([self.whole] if self.whole.is_file() else [])]
        stale = [file for file in files if _stored_fingerprint(file) != fingerprint]
        if stale and not restart:
            raise StaleAnswers(
                f"{stale[0]} holds answers of another model or of other settings of task {name}; "
                "+eval.restart=true throws them away"
            )
        for file in stale:
            file.unlink()

    def read(self) -> dict[str, dict[str, str]]:
        """Answers by item id."""
        files = [*([self.whole] if self.whole.is_file() else []), *sorted(self.parts.glob("*.parquet"))]
        self.number = 1 + max((int(file.stem) for file in self.parts.glob("*.parquet")), default=-1)
        return {row["id"]: row for file in files for row in pq.read_table(file, columns=_ANSWERS.names).to_pylist()}

    def append(self, rows: Sequence[Mapping[str, str]]) -> None:
        if not rows:
            return
        self.parts.mkdir(exist_ok=True)
        write_whole(pa.Table.from_pylist(list(rows), schema=self.schema), self.parts / f"{self.number:06d}.parquet")
        self.number += 1

    def finish(self, rows: Sequence[Mapping[str, Any]], unused: Sequence[Mapping[str, str]]) -> None:
        """Write the items that were scored; answers that are not part of this run (`limit`) wait for a larger one."""
        schema = ITEMS_SCHEMA.with_metadata({"fingerprint": self.fingerprint})
        write_whole(pa.Table.from_pylist(list(rows), schema=schema), self.whole)
        if unused:
            self.append(unused)
        for file in self.parts.glob("*.parquet"):
            if not unused or int(file.stem) != self.number - 1:
                file.unlink()
        if not unused:
            shutil.rmtree(self.parts, ignore_errors=True)


def write_whole(table: pa.Table, path: Path) -> None:
    """All or nothing: beside its place, then renamed."""
    beside = path.with_suffix(".tmp")
    pq.write_table(table, beside, compression="zstd")
    os.replace(beside, path)


def _stored_fingerprint(file: Path) -> str:
    return (pq.read_schema(file).metadata or {}).get(b"fingerprint", b"").decode()


def _settings(task: Task) -> dict[str, str]:
    return {name: repr(getattr(task, name)) for name in ("path", "benchmark", "prompt", "rule", "decoding", "scoring")}


def _fingerprint(task: Task, model: str) -> str:
    """Of what decides an answer; the rule does not, so that answers can be scored anew."""
    decides = {name: value for name, value in _settings(task).items() if name != "rule"}
    return hashlib.blake2b(json.dumps([model, decides]).encode(), digest_size=16).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, all or nothing."""
    beside = path.with_suffix(".json.tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


# --- scores ----------------------------------------------------------------------------------------------------------


def _scored(
    task: Task, rows: list[dict[str, str]], out: Path, skipped: Mapping[str, int], seed: int
) -> tuple[TaskResult, list[dict[str, Any]]]:
    answered = [
        Answered(id=row["id"], truth=json.loads(row["truth"]), prediction=_after_thinking(row["prediction"]))
        for row in rows
    ]
    scored = task.rule.score(answered)
    own = next(metric for metric in task.rule.metrics if metric.name == task.metric)
    table = [
        {**row, "answer": found.answer, "score": _alone(own, found.statistics.get(own.name))}
        for row, found in zip(rows, scored, strict=True)
    ]

    def record(metric: Metric, which: Sequence[int]) -> dict[str, Any] | None:
        told = [i for i in which if metric.name in scored[i].statistics]
        if not told:
            return None
        interval = score_interval(
            metric, [scored[i].statistics[metric.name] for i in told], [rows[i]["group"] for i in told], seed=seed
        )
        if math.isnan(interval.mean):
            return None
        return {
            "name": metric.name, "higher_is_better": metric.higher_is_better, "percent": metric.percent,
            "value": interval.mean, "low": interval.low, "high": interval.high, "items": interval.n,
            "groups": interval.groups,
        }  # fmt: skip

    everything = range(len(rows))
    metrics = [found for metric in task.rule.metrics if (found := record(metric, everything))]
    categories = [
        {"category": name, **found}
        for name in sorted({row["category"] for row in rows} - {""})
        if (found := record(own, [i for i in everything if rows[i]["category"] == name]))
    ]
    result = TaskResult(
        name=task.name, metric=task.metric, items=len(rows), skipped=dict(skipped), metrics=metrics,
        categories=categories, path=out / f"{task.name}.parquet",
    )  # fmt: skip
    return result, table


def _after_thinking(prediction: str) -> str:
    """What a model answers once it has thought; thoughts are kept in the file, but not scored."""
    return prediction.rpartition("</think>")[2].strip()


def _alone(metric: Metric, statistics: tuple[float, ...] | None) -> float | None:
    if statistics is None:
        return None
    value = metric.combine(np.asarray(statistics, dtype=np.float64))
    return None if math.isnan(value) else value


def print_result(result: TaskResult, console: Console | None = None) -> None:
    """Print the table of a task (fits 80 columns)."""
    console = console or Console()
    table = Table(title=result.name, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("")
    for column in ("items", "score", "95 % interval", "better"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, found in _lines(result):
        shown = [f"{found[key]:.1%}" if found["percent"] else f"{found[key]:.2f}" for key in ("value", "low", "high")]
        table.add_row(
            label, f"{found['items']:,}", shown[0], f"[{shown[1]}, {shown[2]}]".replace("[", r"\["),
            "higher" if found["higher_is_better"] else "lower",
        )  # fmt: skip
    console.print(table)
    if result.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result.skipped.items()))
        console.print(f"skipped: {reasons}", style="dim", highlight=False)
    console.print(f"every item: {result.path}", style="dim", highlight=False, soft_wrap=True)


def _lines(result: TaskResult) -> Iterator[tuple[str, dict[str, Any]]]:
    for found in result.metrics:
        yield found["name"], found
    for found in result.categories:
        yield f"  {found['name']}, {found['category']}", found
