"""What a benchmark is: where rows come from, what is asked, how it is decoded, by which rule answers are scored.

    row of the benchmark's own files --Benchmark--> Item (a Sample and the truth) --model--> answer --Rule--> Scored

A task is put together in a YAML file of ``conf/eval``; this package only holds the parts.
"""

from __future__ import annotations

import ast
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from omnitrain.data.sample import BadSample, Message, Sample, Segment

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    Attributes:
        sample: what the model is given; a last assistant message is the reference, which it does not see.
        truth: what the rule needs, as JSON values; it is kept beside the answer, so that answers can be scored again.
        category: group that is scored by itself in the table, e.g. a subject; "" for none.
        group: items of one group share a picture, recording or video and are redrawn together by the bootstrap.
        options: possible answers, for ``scoring="likelihood"``.
    """

    sample: Sample
    truth: dict[str, Any] = field(default_factory=dict)
    category: str = ""
    group: str = ""
    options: tuple[str, ...] = ()


class Rows(Protocol):
    """Rows that are read one by one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Benchmark(ABC):
    """Reads a benchmark in its own format."""

    @abstractmethod
    def rows(self, path: str) -> Rows:
        """All rows, light: media are read later. `path` is that of the task. Raises FileNotFoundError or ValueError,
        saying what is expected where, for data that are not there or not in this format."""

    @abstractmethod
    def item(self, row: Any, prompt: str) -> Item:
        """One row as a question. Raises BadSample for a row that cannot be used; it is skipped and counted."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An item with the model's answer."""

    id: str
    truth: Mapping[str, Any]
    prediction: str


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a rule makes of an answer: the answer it read out of the text, and the statistics of each metric, whose sums
    over items give the metric. A metric that an item says nothing about is left out."""

    answer: str | None
    statistics: dict[str, tuple[float, ...]]


def ratio(sums: np.ndarray) -> float:
    """sums[0] / sums[1]; NaN where there is nothing to divide by."""
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`combine` turns sums of statistics, float64 [S], into the score."""

    name: str
    higher_is_better: bool
    percent: bool = True
    combine: Callable[[np.ndarray], float] = ratio


class Rule(ABC):
    """Scores answers as a benchmark does."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics in the order they are shown; the first is the benchmark's own."""

    def score(self, answered: Sequence[Answered]) -> list[Scored]:
        """Score all answers, in their order."""
        return [self.score_one(item) for item in answered]

    def score_one(self, item: Answered) -> Scored:
        """Score one answer (rules that need the others override `score`)."""
        raise NotImplementedError(f"{type(self).__name__} scores answers together")


# --- building items --------------------------------------------------------------------------------------------------


def get(row: Mapping[str, Any], *names: str, default: Any = ...) -> Any:
    """The first of `names` that the row has a value for; a name may be a path such as ``answer.text``. Raises BadSample
    (``row_invalid``) if there is none and no `default`."""
    for name in names:
        value: Any = row
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    if default is ...:
        raise BadSample("row_invalid", f"the row has no {' or '.join(names)}; it has {', '.join(map(str, row))}")
    return default


def medium(type: Literal["image", "audio", "video"], value: Any, *, with_audio: bool = False) -> Segment:
    """A segment of a file's bytes, its path (relative to the media folder), or the struct of both that the Hub uses.
    Raises BadSample (``media_missing``)."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return Segment(type=type, media=value, with_audio=with_audio)
    if isinstance(value, str) and value:
        return Segment(type=type, path=value, with_audio=with_audio)
    raise BadSample("media_missing", f"the {type} is {value!r}; it must be bytes or a path")


def text(value: str) -> Segment:
    return Segment(type="text", text=value)


def fill(prompt: str, **fields: str) -> str:
    """`prompt` with its ``{fields}``. Raises ValueError if it names one that the benchmark does not fill in."""
    try:
        return prompt.format(**fields)
    except (KeyError, IndexError) as error:
        known = ", ".join("{" + name + "}" for name in fields) or "none"
        raise ValueError(f"prompt {prompt!r} names the field {error}; this benchmark fills in: {known}") from error


def question(
    id: str, segments: Sequence[Segment], reference: str, *, source: str, languages: tuple[str, ...] = (), **item: Any
) -> Item:
    """An item whose sample is one user turn and its reference; `item` are the other attributes of `Item`."""
    sample = Sample(
        id=id, source=source, task=source, split="heldout_concept", languages=languages,
        messages=(
            Message(role="user", segments=tuple(segments)),
            Message(role="assistant", segments=(text(reference),)),
        ),
    )  # fmt: skip
    return Item(sample=sample, **item)


def lettered(options: Sequence[str]) -> str:
    """Options below each other: ``(A) ...``. Raises BadSample (``row_invalid``) for none, or more than letters."""
    if not 1 <= len(options) <= len(LETTERS):
        raise BadSample("row_invalid", f"{len(options)} options for {len(LETTERS)} letters")
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def listed(value: Any, what: str) -> list[str]:
    """A list that may come as its JSON or Python spelling. Raises BadSample (``row_invalid``)."""
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError):
                continue
    if not isinstance(value, list | tuple):
        raise BadSample("row_invalid", f"{what} is {value!r}, not a list")
    return [str(entry) for entry in value]
