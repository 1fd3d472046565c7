"""Samples of our own shards as a task, e.g. the stamps: every answer is compared with the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omnitrain.data.sample import BadSample, Message, Sample
from omnitrain.data.shards import SampleSource
from omnitrain.evaluation.metrics import chrf_statistics, edits, normalise
from omnitrain.tasks.benchmark import Answered, Benchmark, Item, Metric, Rule, Scored, fill, text
from omnitrain.tasks.speech_to_text import CHRF_METRIC


@dataclass(frozen=True, kw_only=True)
class Shards(Benchmark):
    """A folder of shards; `split` and `where` say which samples (see `SampleSource`). Prompt field: question, the text
    of the sample's own last question."""

    split: str = "heldout_cell"
    where: Mapping[str, Any] | None = None

    def rows(self, path: str) -> SampleSource:
        return SampleSource(path, split=self.split, where=self.where)

    def item(self, row: Sample, prompt: str) -> Item:
        if not row.messages or row.messages[-1].role != "assistant":
            raise BadSample("no_answer", "the sample has no answer to compare with")
        return Item(
            sample=row if prompt == "{question}" else _asking(row, prompt),
            truth={"text": row.reference, "spoken": row.task == "asr"},
            category=">".join([row.task, *row.languages]),
            group=row.concept,
        )


def _asking(sample: Sample, prompt: str) -> Sample:
    """`sample` with `prompt` in place of the text of its last question; media stay."""
    turns = list(sample.messages)
    place = max((i for i, message in enumerate(turns) if message.role == "user"), default=None)
    if place is None:
        raise BadSample("no_question", "the sample has no user message")
    own = "".join(segment.text or "" for segment in turns[place].segments if segment.type == "text")
    media = tuple(segment for segment in turns[place].segments if segment.type != "text")
    turns[place] = Message(role="user", segments=(*media, text(fill(prompt, question=own))))
    return replace(sample, messages=tuple(turns))


@dataclass(frozen=True, kw_only=True)
class ReferenceMatch(Rule):
    """Exact match after normalisation (`metrics.normalise`), chrF of the corpus, word error rate of what is spoken."""

    metrics = (
        Metric(name="exact_match", higher_is_better=True),
        CHRF_METRIC,
        Metric(name="wer", higher_is_better=False),
    )

    def score_one(self, item: Answered) -> Scored:
        said, truth = normalise(item.prediction), normalise(str(item.truth["text"]))
        statistics: dict[str, tuple[float, ...]] = {
            "exact_match": (float(said == truth), 1.0),
            "chrf": chrf_statistics(item.prediction, [str(item.truth["text"])]),
        }
        if item.truth["spoken"]:
            statistics["wer"] = edits(truth, said)
        return Scored(answer=said, statistics=statistics)
