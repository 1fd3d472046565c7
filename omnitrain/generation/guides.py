"""What an answer may say next, where that is not the model's choice alone: its thoughts end, its calls are JSON."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from omnitrain.data.chat import ChatTokenizer


class Guide(Protocol):
    """Stands beside one text while it is written."""

    def limit(self, logits: Tensor) -> Tensor:
        """Logits [V] of the next token, -inf for those that it cannot be."""
        ...

    def wrote(self, token: int) -> None:
        """The next token was chosen."""
        ...


class CallGrammar:
    """The text between ``<tool_call>`` and ``</tool_call>`` that calls one of `tools` with arguments of its schema, as
    the template writes it, token by token (llguidance).

    Args:
        tools: signatures, ``{"type": "function", "function": {"name", "parameters"}}`` or what stands in it.
        vocab_size: of the model's logits.

    Raises ImportError: without the extra `tools`.  ValueError: a schema that llguidance does not know.
    """

    def __init__(self, tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]], vocab_size: int) -> None:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise ImportError("constrained calls need llguidance: pip install 'omnitrain[tools]'") from error
        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        calls = {"anyOf": [_call_schema(tool.get("function", tool)) for tool in tools], "x-guidance": style}
        lark = f'start: "\\n" call "\\n"\ncall: %json {json.dumps(calls)}'
        self.vocab_size, self._matcher = vocab_size, LLMatcher
        self._grammar = LLMatcher.grammar_from_lark(lark)
        end = tokenizer.id_of("</tool_call>")
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=end)
        if problem := LLMatcher.validate_grammar(self._grammar, self._tokenizer):
            raise ValueError(f"calls of these functions cannot be constrained: {problem}")

    def begin(self) -> CallMatcher:
        """For the next call."""
        return CallMatcher(self._matcher(self._tokenizer, self._grammar), self.vocab_size)


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {
        "type": "object",
        "properties": {},
        **(function.get("parameters") or {}),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class CallMatcher:
    """One call while it is written."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """bool [V]"""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self._vocab_size].astype(bool))

    def wrote(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar of calls did not allow token {token}: {self._matcher.get_error()}")


class AnswerGuide:
    """At most `thinking_budget` tokens of thoughts, then their end; calls as `calls` has them. None: no limit.

    The thoughts' last token is a line break, as in what was learnt, and an empty line follows their end.

    Raises ValueError: a negative budget.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, *, thinking_budget: int | None = None, calls: CallGrammar | None = None
    ) -> None:
        if thinking_budget is not None and thinking_budget < 0:
            raise ValueError(f"the thinking budget is {thinking_budget}; it is a number of tokens, at least 0")
        self.budget, self.calls = thinking_budget, calls
        names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        self._think, self._thought, self._call, self._called = (tokenizer.id_of(name) for name in names)
        self._break, self._behind = tokenizer.encode("\n"), tokenizer.encode("\n\n")
        self._thinking = False
        self._left = 0  # tokens of thoughts
        self._matcher: CallMatcher | None = None
        self._in_call = False
        self._forced: deque[int] = deque()

    def limit(self, logits: Tensor) -> Tensor:
        if self._forced:
            allowed = torch.zeros_like(logits, dtype=torch.bool)
            allowed[self._forced[0]] = True
        elif self._matcher is not None:
            allowed = self._matcher.allowed().to(logits.device)
        else:
            return logits
        return logits.masked_fill(~allowed, -torch.inf)

    def wrote(self, token: int) -> None:
        if self._forced:
            self._forced.popleft()
        if self._thinking:
            self._thinking = token != self._thought
            self._left -= 1
        elif self._in_call:
            self._in_call = token != self._called
            if not self._in_call:
                self._matcher = None
            elif self._matcher is not None:
                self._matcher.wrote(token)
        elif token == self._think:
            self._thinking, self._left = True, self.budget or 0
        elif token == self._call:
            self._in_call = True
            self._matcher = None if self.calls is None else self.calls.begin()
        if self._thinking and self.budget is not None and not self._forced and self._left <= len(self._break):
            self._forced.extend([*self._break[: self._left], self._thought, *self._behind])


def guided(logits: Tensor, guides: Sequence[Guide | None]) -> Tensor:
    """Logits [B, V], each row limited by its guide."""
    rows = zip(logits, guides, strict=True)
    return torch.stack([row if guide is None else guide.limit(row) for row, guide in rows])
