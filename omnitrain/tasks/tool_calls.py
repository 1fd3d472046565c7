"""Tool calls as the Berkeley Function-Calling Leaderboard (BFCL) scores them: calls are compared, not executed.

A call is right if it names the function, gives every required argument and none that is unknown, each of the declared
type and with one of the values that the answer allows (``""`` among them: the argument may be left out). Strings are
compared without case, spaces and ``, . / - _ * ^``; a list or a dictionary must be one of those allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omnitrain.data.sample import BadSample, Message, Sample
from omnitrain.data.shards import SampleSource
from omnitrain.tasks.benchmark import Answered, Benchmark, Item, fill, get, text
from omnitrain.tasks.choices import Accuracy
from omnitrain.tasks.tables import read_table

_TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str, "number": float, "object": dict,
}  # fmt: skip
"""By BFCL's names, and by those of JSON schema where they are others."""
_JSON_NAMES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""BFCL's names of types, and what JSON schema calls them."""


def parse_calls(response: str) -> list[dict[str, Any]] | None:
    """The calls in ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. None: one of them is malformed."""
    calls = []
    for body in re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", response, flags=re.DOTALL):
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return None
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            return None
        calls.append({"name": call["name"], "arguments": arguments})
    return calls


def _plain(value: Any) -> Any:
    """Strings as BFCL compares them."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def _usual_type(allowed: Sequence[Any]) -> type | None:
    """The type of the values in the answer; None if they only say that the argument may be left out."""
    return next((type(value) for value in allowed if value != ""), None)


def _well_typed(value: Any, allowed: Sequence[Any], kind: type, inner: type | None) -> bool:
    if type(value) is not kind:
        return type(value) is _usual_type(allowed)
    if inner is None:
        return True
    return any(
        not isinstance(one, list) or all(type(v) is inner or type(v) is _usual_type(one) for v in value)
        for one in allowed
    )


def _dict_matches(value: Mapping[str, Any], allowed: Sequence[Any]) -> bool:
    return any(
        all(key in one and _plain(entry) in map(_plain, one[key]) for key, entry in value.items())
        and all(key in value or "" in options for key, options in one.items())
        for one in allowed
        if isinstance(one, Mapping)
    )


def value_matches(value: Any, allowed: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    """Whether an argument has the type of its schema and one of the allowed values."""
    kind = _TYPES.get(schema["type"], str)
    inner = _TYPES.get((schema.get("items") or {}).get("type", "")) if kind is list else None
    converted = kind is float and type(value) is int  # Python does it by itself
    if not converted and not _well_typed(value, allowed, kind, inner):
        return False
    usual = _usual_type(allowed)
    if usual is not None and usual is not kind:  # the answer is the name of a variable
        return value in allowed
    if kind is dict:
        return _dict_matches(value, allowed)
    if kind is list and inner is dict:
        return any(
            isinstance(one, list)
            and len(one) == len(value)
            and all(_dict_matches(v, [o]) for v, o in zip(value, one, strict=True))
            for one in allowed
        )
    if kind is list:
        plain = [_plain(entry) for entry in value]
        # An argument that may be left out ("") may also be an empty list: BFCL reads "" as a list without entries.
        return any(plain == [_plain(entry) for entry in one] for one in allowed if isinstance(one, list | str))
    return _plain(value) in [_plain(option) for option in allowed if type(option) is not str or kind is str]


def call_matches(call: Mapping[str, Any], answer: Mapping[str, Any], functions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `call` is what `answer` (``{name: {argument: [allowed, ...]}}``) asks for."""
    [(name, allowed)] = answer.items()
    function = next((function for function in functions if function["name"] == name), None)
    if function is None or call["name"] != name:
        return False
    arguments, parameters = call["arguments"], function["parameters"]
    schemas = parameters.get("properties", {})
    return (
        all(required in arguments for required in parameters.get("required", []))
        and all(
            argument in schemas and argument in allowed and value_matches(value, allowed[argument], schemas[argument])
            for argument, value in arguments.items()
        )
        and all(argument in arguments or "" in options for argument, options in allowed.items())
    )


def calls_match(
    calls: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]
) -> bool:
    """As many calls as answers, and for each answer in turn a call that no earlier answer has taken. No answers: no
    function fits the question, and none may be called."""
    if len(calls) != len(answers):
        return False
    left = list(calls)
    for answer in answers:
        match = next((call for call in left if call_matches(call, answer, functions)), None)
        if match is None:
            return False
        left.remove(match)
    return True


@dataclass(frozen=True, kw_only=True)
class ToolCallRule(Accuracy):
    """``truth``: ``functions`` and ``answers``."""

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        calls = parse_calls(item.prediction)
        if calls is None:
            return None, False
        right = calls_match(calls, item.truth["answers"], item.truth["functions"])
        return json.dumps(calls, ensure_ascii=False), right


@dataclass(frozen=True, kw_only=True)
class BFCL(Benchmark):
    """``BFCL_v3_simple.json`` and its like (JSON lines: id, question, function) with ``possible_answer/`` of the same
    names beside them; one file, or the folder for all. Files without an answer must be about irrelevance: no function
    fits. Prompt field: question (the last user turn)."""

    def rows(self, path: str) -> list[dict[str, Any]]:
        files = sorted(Path(path).glob("*.json*")) if Path(path).is_dir() else [Path(path)]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: no file of questions, such as BFCL_v3_simple.json")
        rows = []
        for file in files:
            answers_file = file.parent / "possible_answer" / file.name
            irrelevant = "irrelevance" in file.stem
            if not irrelevant and not answers_file.is_file():
                raise FileNotFoundError(f"{answers_file} does not exist; BFCL keeps the answers of {file.name} there")
            answers = {} if irrelevant else {row["id"]: row["ground_truth"] for row in read_table(str(answers_file))}
            rows += [
                {**row, "answers": [] if irrelevant else answers.get(row.get("id"))} for row in read_table(str(file))
            ]
        return rows

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        id, functions, answers = str(get(row, "id")), get(row, "function"), get(row, "answers")
        turns = get(row, "question")
        if isinstance(turns, list) and turns and isinstance(turns[0], list):
            if len(turns) != 1:
                raise BadSample("row_invalid", "several rounds of questions need functions that are executed")
            turns = turns[0]
        functions = [functions] if isinstance(functions, dict) else functions
        messages = [_message(turn, prompt, last=turn is turns[-1]) for turn in turns]
        reference = json.dumps(answers, ensure_ascii=False)
        messages.append(Message(role="assistant", segments=(text(reference),)))
        tools = [{"type": "function", "function": _as_json_schema(function)} for function in functions]
        sample = Sample(
            id=id, source="bfcl", task="bfcl", split="heldout_concept", messages=tuple(messages),
            meta={"tools": json.dumps(tools, ensure_ascii=False)},
        )  # fmt: skip
        category = re.sub(r"_\d+(-\d+)*$", "", id)
        return Item(sample=sample, truth={"functions": functions, "answers": answers}, category=category)


@dataclass(frozen=True, kw_only=True)
class ToolShards(Benchmark):
    """Shards of `data_prep.tool_data`: by how it was asked (text, spoken, picture) and what for. Prompt field: none.

    Attributes:
        split: ``heldout_cell``, functions that were never trained; ``heldout_concept``, things that never were.
    """

    split: str = "heldout_cell"

    def rows(self, path: str) -> SampleSource:
        return SampleSource(path, split=self.split, where={"task": ["tool"]})

    def item(self, row: Sample, prompt: str) -> Item:
        try:
            functions = [tool["function"] for tool in json.loads(row.meta["tools"])]
            answers, category = json.loads(row.meta["answers"]), f"{row.meta['asked']}, {row.meta['purpose']}"
        except (KeyError, ValueError) as error:
            raise BadSample("row_invalid", f"the row is none of data_prep.tool_data: {error}") from error
        asked = next((i for i, message in enumerate(row.messages) if message.role == "assistant"), None)
        if asked is None:
            raise BadSample("no_answer", "the sample has no answer to compare with")
        return Item(
            sample=replace(row, messages=row.messages[: asked + 1]),
            truth={"functions": functions, "answers": answers}, category=category, group=row.concept,
        )  # fmt: skip


def _message(turn: Mapping[str, Any], prompt: str, *, last: bool) -> Message:
    role, content = get(turn, "role"), get(turn, "content")
    if role not in ("system", "user", "assistant"):
        raise BadSample("row_invalid", f"a turn of role {role!r}")
    return Message(role=role, segments=(text(fill(prompt, question=content) if last and role == "user" else content),))


def _as_json_schema(value: Any) -> Any:
    """A function's description with JSON schema's names of types."""
    if isinstance(value, list):
        return [_as_json_schema(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _JSON_NAMES.get(entry, entry) if key == "type" and isinstance(entry, str) else _as_json_schema(entry)
        for key, entry in value.items()
    }
