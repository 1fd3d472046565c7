"""Answer, run the functions that were called, and answer again with what they gave.

    question -> answer with calls -> results -> answer with calls -> ... -> answer

Calls are read from tokens: ``<tool_call>`` that is spelled in characters is text, and calls nothing. Only functions
that were offered run. What they give is data: it stands in ``<tool_response>`` as plain text, whatever it spells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.sample import Message, Segment


class CallError(Exception):
    """A call that gave nothing. The message is for the model, as the call's result."""


class Functions(Protocol):
    """What can be called, by name."""

    signatures: list[dict[str, Any]]

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> str:
        """The result as text. Raises CallError: no such function, other arguments than it takes, an exception in it, or
        no result after `seconds`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ToolLimits:
    """rounds: answers with calls that are followed.  calls: that are run of one answer.  seconds: for each call.
    characters: of a result; the rest is cut off."""

    rounds: int = 5
    calls: int = 8
    seconds: float = 30.0
    characters: int = 4000

    def __post_init__(self) -> None:
        for name in ("rounds", "calls", "characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be positive")


@dataclass(frozen=True)
class Call:
    """One call of an answer. problem: why it cannot be run; None if it can."""

    name: str
    arguments: dict[str, Any]
    problem: str | None = None


def read_calls(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[Call]:
    """The calls of an answer's tokens, in order; those within thoughts are none."""
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    think, thought, begin, end = (tokenizer.id_of(name) for name in names)
    calls: list[Call] = []
    body: list[int] | None = None  # of the call that is being read
    thinking = False
    for index in ids:
        if thinking:
            thinking = index != thought
        elif body is None:
            thinking = index == think
            body = [] if index == begin else None
        elif index == end:
            calls.append(_parsed(tokenizer.decode(body)))
            body = None
        else:
            body.append(index)
    if body is not None:
        calls.append(Call("", {}, "the call was cut off before its end"))
    return calls


def _parsed(body: str) -> Call:
    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        call = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"the call is no JSON: {str(error)[:200]}")
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return Call("", {}, 'a call is {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return Call(call["name"], {}, "the arguments are no object")
    return Call(call["name"], arguments)


@dataclass(frozen=True)
class Conversation:
    """messages: the question, and all that came after it.  ended: "end", or "rounds" where the last answer calls
    functions that are not run any more."""

    messages: tuple[Message, ...]
    ended: str


def answer_with_tools(
    write: Callable[[Sequence[Message]], Sequence[int]],
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    functions: Functions,
    limits: ToolLimits = ToolLimits(),
    on_result: Callable[[Call, str], None] | None = None,
) -> Conversation:
    """Answer `messages`, running what is called.

    Args:
        write: the tokens of the next answer to a conversation.
        on_result: called with each call and what the model is told.
    """
    chat = list(messages)
    for done in range(limits.rounds + 1):
        ids = [index for index in write(chat) if index not in tokenizer.stop_ids]
        chat.append(_message("assistant", tokenizer.decode(ids)))
        calls = read_calls(ids, tokenizer)
        if not calls or done == limits.rounds:
            break
        for number, call in enumerate(calls):
            result = _result(call, number, functions, limits)
            if on_result is not None:
                on_result(call, result)
            chat.append(_message("tool", result))
    return Conversation(tuple(chat), "rounds" if calls else "end")


def _result(call: Call, number: int, functions: Functions, limits: ToolLimits) -> str:
    problem = call.problem
    if number >= limits.calls:
        problem = f"not run: at most {limits.calls} calls of one answer are"
    if problem is None:
        try:
            result = functions.call(call.name, call.arguments, limits.seconds)
        except CallError as error:
            problem = str(error)
        else:
            # What is no UTF-8 (half a surrogate pair) cannot be shown to a model.
            result = result.encode("utf-8", "replace").decode("utf-8")
            left = len(result) - limits.characters
            return result if left <= 0 else f"{result[: limits.characters]} [{left} more characters were cut off]"
    return json.dumps({"error": problem[: limits.characters]}, ensure_ascii=True)


def _message(role: Any, text: str) -> Message:
    return Message(role=role, segments=(Segment(type="text", text=text),))
