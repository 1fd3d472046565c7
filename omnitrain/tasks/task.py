"""A benchmark put together in a YAML file of ``conf/eval``, and its run: answers first, then scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omnitrain.data.batch import EncodedSample
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import BadSample, Message, Segment
from omnitrain.data.shards import MediaReader
from omnitrain.evaluation.answers import answer_samples
from omnitrain.evaluation.heldout import prompt_text
from omnitrain.evaluation.progress import progress_bar
from omnitrain.evaluation.teacher_forced import Writer, sample_losses
from omnitrain.generation.sampling import Decoding
from omnitrain.tasks.benchmark import Answered, Benchmark, Item, Metric, Rule
from omnitrain.tasks.results import Outcome, RunnableTask, TaskFiles
from omnitrain.tasks.settings import RunOptions

_MOST_DETAILS = 20  # skipped items that are named one by one in NAME.json


@dataclass(frozen=True, kw_only=True)
class Task(RunnableTask):
    """A benchmark ready to be run.

    Args:
        metric: one of the rule's.
        path: file, folder or Hub name that `benchmark` reads.
        prompt: what is asked; fields such as ``{question}`` and ``{options}`` are those that the benchmark fills in.
        scoring: ``generate``, or ``likelihood``: the answer is the option that the model finds most probable.

    Raises ValueError where metric or scoring do not fit.
    """

    benchmark: Benchmark
    prompt: str
    rule: Rule
    decoding: Decoding = field(default_factory=Decoding)
    scoring: Literal["generate", "likelihood"] = "generate"

    def __post_init__(self) -> None:
        known = [metric.name for metric in self.rule.metrics]
        if self.metric not in known:
            raise ValueError(f"task {self.name}: metric {self.metric!r} is not one of the rule's: {', '.join(known)}")
        if self.scoring not in ("generate", "likelihood"):
            raise ValueError(f"task {self.name}: scoring is {self.scoring!r}; it is 'generate' or 'likelihood'")

    def check(self) -> None:
        if not self.path:
            raise ValueError(f"eval.tasks.{self.name}.path: name the benchmark's file or folder with eval.path=PATH")

    def decides(self, options: RunOptions) -> list[Any]:
        """The rule does not decide an answer, so that answers can be scored anew."""
        return [{name: value for name, value in self._settings().items() if name != "rule"}]

    def _settings(self) -> dict[str, str]:
        names = ("path", "benchmark", "prompt", "rule", "decoding", "scoring")
        return {name: repr(getattr(self, name)) for name in names}

    def find_out(self, model: Writer, encoder: SampleEncoder, files: TaskFiles, options: RunOptions) -> Outcome:
        assert self.path is not None
        done = files.answers()
        rows = self.benchmark.rows(self.path)
        if not len(rows):
            raise ValueError(f"task {self.name}: {self.path} holds no rows")
        count = len(rows) if options.limit is None else min(options.limit, len(rows))
        path = Path(self.path)
        media = MediaReader(path.parent if path.is_file() else path)
        skipped: Counter[str] = Counter()
        details: list[str] = []
        answers: dict[str, dict[str, str]] = {}
        waiting: dict[str, tuple[Item, dict[str, str]]] = {}

        def bad(error: BadSample, place: str) -> None:
            skipped[error.reason] += 1
            if len(details) < _MOST_DETAILS:
                details.append(f"{place}: {error}")

        def flush() -> None:
            predictions = _predictions(self, model, encoder, [item for item, _ in waiting.values()], media, bad)
            new = [
                {**row, "prediction": prediction}
                for (_, row), prediction in zip(waiting.values(), predictions, strict=True)
                if prediction is not None
            ]
            files.append(new)
            answers.update({row["id"]: row for row in new})
            waiting.clear()

        plain = f"{self.name}: {count} of {len(rows)} items, {len(done)} answered before"
        with progress_bar(options.progress, plain) as bar:
            ticker = bar.add_task(self.name, total=count)
            for number in range(count):
                index = number * len(rows) // count
                try:
                    item = self.benchmark.item(rows[index], self.prompt)
                    row = _row(item)
                    if row["id"] in answers or row["id"] in waiting:
                        raise BadSample("id_twice", f"{row['id']} names two rows")
                except BadSample as error:
                    bad(error, f"row {index}")
                else:
                    if (before := done.get(row["id"])) and before["digest"] == row["digest"]:
                        answers[row["id"]] = before
                    else:
                        waiting[row["id"]] = item, row
                if len(waiting) >= options.batch or number == count - 1:
                    flush()
                bar.update(ticker, completed=number + 1 - len(waiting))
        if not answers:
            raise ValueError(
                f"task {self.name}: none of {count} rows could be used; {dict(skipped)}; first: {details[0]}"
            )
        return replace(
            self._scored(list(answers.values())),
            skipped=skipped,
            more={"rows": len(rows), "skipped_details": details},
            unused=[row for id, row in done.items() if id not in answers],
        )

    def _scored(self, rows: list[dict[str, str]]) -> Outcome:
        # Thoughts are kept in the file, but not scored.
        said = [row["prediction"].rpartition("</think>")[2].strip() for row in rows]
        answered = [
            Answered(id=row["id"], truth=json.loads(row["truth"]), prediction=prediction)
            for row, prediction in zip(rows, said, strict=True)
        ]
        scored = list(zip(rows, self.rule.score(answered), strict=True))
        own = next(metric for metric in self.rule.metrics if metric.name == self.metric)
        of_all: list[tuple[Metric, str | None]] = [(metric, None) for metric in self.rule.metrics]
        by_category = [(own, name) for name in sorted({row["category"] for row in rows} - {""})]
        return Outcome(
            rows=[
                {**row, "answer": found.answer, "score": _alone(own, found.statistics.get(own.name))}
                for row, found in scored
            ],
            told={
                (metric, category): [
                    (found.statistics[metric.name], row["group"])
                    for row, found in scored
                    if metric.name in found.statistics and category in (None, row["category"])
                ]
                for metric, category in (*of_all, *by_category)
            },
            settings=self._settings(),
        )


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
    model: Writer,
    encoder: SampleEncoder,
    items: Sequence[Item],
    media: MediaReader,
    bad: Callable[[BadSample, str], None],
) -> list[str | None]:
    """The answer to each item; None for those that cannot be asked, which `bad` is told about."""
    if task.scoring == "generate":
        asked = [(item.sample, media) for item in items]
        return answer_samples(model, encoder, asked, decoding=task.decoding, on_bad=bad)
    found: list[str | None] = []
    for item in items:
        try:
            found.append(_likeliest(model, encoder, item, media))
        except BadSample as error:
            bad(error, item.sample.id)
            found.append(None)
    return found


def _likeliest(model: Writer, encoder: SampleEncoder, item: Item, media: MediaReader) -> str:
    """The option with the highest log-probability as the answer, its end included."""
    if not item.options:
        raise BadSample("no_options", "scoring=likelihood needs options, and this item has none; use scoring=generate")
    media_bytes = cache(media)  # every option asks for the same media

    def answered(option: str) -> EncodedSample:
        answer = Message(role="assistant", segments=(Segment(type="text", text=option),))
        return encoder(replace(item.sample, messages=(*item.sample.messages[:-1], answer)), media_bytes)

    losses = sample_losses(model, map(answered, item.options))
    return item.options[int(np.argmin([loss.nats for loss in losses]))]


def _alone(metric: Metric, statistics: tuple[float, ...] | None) -> float | None:
    value = math.nan if statistics is None else metric.combine(np.asarray(statistics, dtype=np.float64))
    return None if math.isnan(value) else value
