"""Rewards by rule, and by a judge (docs/post_training.md): small classes that a recipe puts together.

Each says what an answer is worth, from 0 to 1; None where a sample does not have what it looks at, so that tasks can be
mixed. What a rule needs beside the data's answer stands in the sample's `meta`, as JSON.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from omnitrain.evaluation.captions import mentioned
from omnitrain.evaluation.metrics import edits, normalise
from omnitrain.evaluation.rollouts import Rollout
from omnitrain.tasks.tool_calls import calls_match, parse_calls


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One answer after the other.

    Attributes:
        weight: in the sum of rewards.
        tasks: only samples of these tasks; none: all.
    """

    weight: float = 1.0
    tasks: Sequence[str] = ()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [self.of(rollout) if self.applies(rollout) else None for rollout in rollouts]

    def applies(self, rollout: Rollout) -> bool:
        return not self.tasks or rollout.task in self.tasks

    @abstractmethod
    def of(self, rollout: Rollout) -> float | None:
        """What one answer is worth."""


def _meta(rollout: Rollout, key: str) -> Any:
    """`meta[key]`, read as JSON; None if it is not there. Raises ValueError, which names the sample: no JSON."""
    if key not in rollout.meta:
        return None
    try:
        return json.loads(rollout.meta[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"sample {rollout.sample!r}: meta {key!r} is no JSON ({error})") from error


@dataclass(frozen=True, kw_only=True)
class ExactMatch(Rule):
    """1 for the data's answer, after `evaluation.metrics.normalise`."""

    def of(self, rollout: Rollout) -> float:
        return float(normalise(rollout.text) == normalise(rollout.reference))


@dataclass(frozen=True, kw_only=True)
class ErrorRate(Rule):
    """1 - error rate of a transcript, at least 0. `measure`: wer, of words; cer, of characters."""

    measure: Literal["wer", "cer"] = "wer"

    def __post_init__(self) -> None:
        if self.measure not in ("wer", "cer"):
            raise ValueError(f"measure {self.measure!r}: must be wer or cer")

    def of(self, rollout: Rollout) -> float | None:
        reference = normalise(rollout.reference)
        wrong, length = edits(reference, normalise(rollout.text), characters=self.measure == "cer")
        return max(0.0, 1 - wrong / length) if length else None


@dataclass(frozen=True, kw_only=True)
class JSONSchema(Rule):
    """1 for JSON that fits a schema: `schema`, or the sample's ``meta["schema"]``. A reference in a schema is looked
    for in itself alone, never fetched."""

    schema: dict[str, Any] | None = None

    def of(self, rollout: Rollout) -> float | None:
        from jsonschema import SchemaError, validators
        from jsonschema.exceptions import ValidationError
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        schema = self.schema if self.schema is not None else _meta(rollout, "schema")
        if schema is None:
            return None
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        try:
            kind.check_schema(schema)
            kind(schema, registry=Registry()).validate(json.loads(rollout.text))
        except (SchemaError, Unresolvable) as error:
            raise ValueError(f"sample {rollout.sample!r}: its schema is none: {error}") from error
        except (ValueError, RecursionError, ValidationError):
            return 0.0
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ToolCalls(Rule):
    """1 for the calls that BFCL would count as right (`tasks.tool_calls`): against ``meta["functions"]`` and
    ``meta["answers"]`` as BFCL has them, or else the calls in the data's answer and ``meta["tools"]``."""

    def of(self, rollout: Rollout) -> float | None:
        functions, answers = _meta(rollout, "functions"), _meta(rollout, "answers")
        if functions is None or answers is None:
            tools, expected = _meta(rollout, "tools"), parse_calls(rollout.reference)
            if tools is None or expected is None:
                return None
            functions = [tool.get("function", tool) for tool in tools]
            answers = [{c["name"]: {k: [v] for k, v in c["arguments"].items()}} for c in expected]
        calls = parse_calls(rollout.text)
        return float(calls is not None and calls_match(calls, answers, functions))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


CONSTRAINTS: dict[str, Any] = {
    "min_words": lambda text, n: len(_words(text)) >= n,
    "max_words": lambda text, n: len(_words(text)) <= n,
    "sentences": lambda text, n: len(re.findall(r"[^.!?。！？]+(?:[.!?。！？]+|$)", text.strip())) == n,
    "paragraphs": lambda text, n: len([p for p in re.split(r"\n\s*\n", text.strip()) if p]) == n,
    "bullets": lambda text, n: len(re.findall(r"^\s*[-*] \S", text, re.MULTILINE)) == n,
    "contains": lambda text, words: all(word.casefold() in text.casefold() for word in words),
    "avoids": lambda text, words: not any(word.casefold() in text.casefold() for word in words),
    "starts_with": lambda text, start: text.lstrip().startswith(start),
    "ends_with": lambda text, end: text.rstrip().endswith(end),
    "case": lambda text, case: text == (text.lower() if case == "lower" else text.upper()) and text != "",
    "without": lambda text, letter: letter.casefold() not in text.casefold(),
}
"""Name -> whether a text keeps it, given its value."""


@dataclass(frozen=True, kw_only=True)
class Constraints(Rule):
    """Share of the constraints kept (in the manner of IFEval, arXiv 2311.07911), ``meta["constraints"]``, such as
    ``{"max_words": 10, "avoids": ["cat"]}``. `all_or_nothing`: 1 for all of them, else 0."""

    all_or_nothing: bool = False

    def of(self, rollout: Rollout) -> float | None:
        wanted = _meta(rollout, "constraints")
        if not wanted:
            return None
        for name in wanted:
            if name not in CONSTRAINTS:
                raise ValueError(
                    f"sample {rollout.sample!r}: no constraint {name!r}; there are {', '.join(CONSTRAINTS)}"
                )
        kept = [bool(CONSTRAINTS[name](rollout.text, value)) for name, value in wanted.items()]
        return float(all(kept)) if self.all_or_nothing else sum(kept) / len(kept)


@dataclass(frozen=True, kw_only=True)
class ItemOrder(Rule):
    """Share of the pairs of items, ``meta["order"]`` (a list, as seen one after the other in a video), that the answer
    names in that order; by where each is named first. A pair of which one is not named counts as wrong."""

    def of(self, rollout: Rollout) -> float | None:
        items = _meta(rollout, "order")
        if not items or len(items) < 2:
            return None
        text = rollout.text.casefold()
        found = [re.search(rf"\b{re.escape(item.casefold())}\b", text) for item in items]
        places = [None if match is None else match.start() for match in found]
        pairs = [(places[i], places[j]) for j in range(len(items)) for i in range(j)]
        return sum(a is not None and b is not None and a < b for a, b in pairs) / len(pairs)


@dataclass(frozen=True, kw_only=True)
class SoundEvents(Rule):
    """F1 of the events that a caption names, of all known `events`, against those that are there, ``meta["events"]`` (a
    list). What is made up costs as much as what is missed."""

    events: Sequence[str] = field(default_factory=tuple)

    def of(self, rollout: Rollout) -> float | None:
        there = _meta(rollout, "events")
        if there is None:
            return None
        named = mentioned(rollout.text, sorted({*self.events, *there}))
        right = len(named & set(there))
        return 2 * right / (len(named) + len(there)) if named or there else 1.0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What a model behind a server of the OpenAI protocol says, as the first number of its answer over `best`.

    Attributes:
        server, name: URL, and what it calls the model.
        template: the question, in which {prompt}, {answer} and {reference} are filled in.
        best: the number of the best answer; what is above it, or no number, is 0.
        weight, tasks: as of the rules.
        parallel: questions at once.
    """

    server: str
    name: str
    template: str = (
        "Question:\n{prompt}\n\nReference answer:\n{reference}\n\nAnswer to be judged:\n{answer}\n\n"
        "How good is the answer, from 0 (wrong) to 10 (as good as the reference)? Begin with the number."
    )
    best: float = 10.0
    weight: float = 1.0
    tasks: Sequence[str] = ()
    parallel: int = 8

    @cached_property
    def _server(self) -> Any:
        from omnitrain.interop.openai_server import OpenAIServer

        return OpenAIServer(self.server, self.name)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        server = self._server
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda r: self._of(server, r), rollouts))

    def _of(self, server: Any, rollout: Rollout) -> float | None:
        if self.tasks and rollout.task not in self.tasks:
            return None
        parts = {"prompt": rollout.prompt, "answer": rollout.text, "reference": rollout.reference}
        # In one pass: an answer that spells {reference} stays as it is.
        question = re.sub(r"\{(prompt|answer|reference)\}", lambda m: parts[m[1]], self.template)
        number = re.search(r"\d+(\.\d+)?", server.chat(question))
        value = float(number[0]) / self.best if number else 0.0
        return value if value <= 1 else 0.0
