"""What other programs write into an assistant's turn, as its text in the public template: calls, thoughts, signatures.

{"content": "Let me look.", "tool_calls": [{"function": {"name": "find", "arguments": {"what": "cats"}}}]}

Let me look.
<tool_call>
{"name": "find", "arguments": {"what": "cats"}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from omnitrain.data.chat import MARKUP_TOKENS
from omnitrain.data.sample import BadSample
from omnitrain.data.shards import parse_json

_ROLES = {"developer": "system", "function": "tool"}
_OPENAI = {"column": "messages", "role": "role", "text": "content", "roles": _ROLES}
FORMATS: dict[str, dict[str, Any]] = {
    "openai": _OPENAI,
    "qwen": _OPENAI,
    "sharegpt": {
        "column": "conversations",
        "role": "from",
        "text": "value",
        "roles": {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"},
    },
}
"""Fields of a mapping's `messages` (`adapters.ColumnMapping`) in the usual formats; what a mapping says goes before."""

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What the thoughts of a turn are called: by Qwen and DeepSeek, by vLLM and OpenRouter, by TRL."""


def answer_pieces(turn: Mapping[str, Any], content: str, *, sparse: bool = False) -> tuple[str, str, str]:
    """Thoughts, words and calls of an assistant's turn, which make its text when they are joined.

    Args:
        turn: its other fields: `tool_calls`, `function_call`, and the thoughts in one of `_THOUGHTS`.
        content: what it says, with thoughts in ``<think>`` if no field has them.
        sparse: see `without_nulls`.

    Raises BadSample: ``row_invalid`` for calls and thoughts that are none.
    """
    thoughts = next((found for name in _THOUGHTS if (found := turn.get(name)) is not None), None)
    if thoughts is None and "</think>" in content:
        before, _, content = content.rpartition("</think>")
        thoughts = before.partition("</think>")[0].rpartition("<think>")[2]
    if thoughts is not None and not isinstance(thoughts, str):
        raise BadSample("row_invalid", f"a turn's thoughts are {type(thoughts).__name__}, not text")
    shown = f"<think>\n{thoughts.strip(chr(10))}\n</think>\n\n" if thoughts and thoughts.strip() else ""
    given = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    calls = write_calls(given, sparse=sparse) if given else ""
    content = content.lstrip("\n") if shown else content
    return shown, content, f"\n{calls}" if content and calls else calls


def write_calls(calls: Any, *, sparse: bool = False) -> str:
    """Calls as the template writes them, one ``<tool_call>`` each: ``{"function": {"name": ..., "arguments": ...}}`` or
    what stands in it, one or a list, as objects or as JSON. Arguments that are JSON already stay as they are.
    Raises BadSample: ``row_invalid``."""
    if isinstance(calls, str):
        calls = parse_json(calls, "a turn's calls", of=object)
    return "\n".join(_call(call, sparse) for call in ([calls] if isinstance(calls, Mapping) else calls))


def _call(call: Any, sparse: bool) -> str:
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise BadSample("row_invalid", f"a call is {call!r:.80}; it needs a name and arguments")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        parse_json(arguments, f"the arguments of a call of {name!r}", of=dict)
    elif isinstance(arguments, Mapping):
        arguments = json.dumps(without_nulls(arguments) if sparse else arguments, ensure_ascii=False)
    else:
        raise BadSample("row_invalid", f"the arguments of a call of {name!r} are {type(arguments).__name__}, no object")
    written = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'
    return f"<tool_call>\n{_unmarked(written)}\n</tool_call>"


def _unmarked(written: str) -> str:
    """The same JSON without the spelling of a markup token, which in an assistant's turn would become the token: an
    argument can never end its call."""
    for token in MARKUP_TOKENS:
        written = written.replace(token, "\\u003c" + token[1:])
    return written


def signatures(tools: Any, *, sparse: bool = False) -> str:
    """Function signatures as `Sample.meta` keeps them, a JSON list of objects, from a list or its JSON. Raises
    BadSample: ``tools_invalid``."""
    if isinstance(tools, str):
        try:
            tools = parse_json(tools, "the tools", of=list)
        except BadSample as error:
            raise BadSample("tools_invalid", error.detail) from error
    if not isinstance(tools, Sequence):
        raise BadSample("tools_invalid", f"the tools are {type(tools).__name__}, not a list")
    known = [parse_json(tool, "a tool", of=dict) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in known):
        raise BadSample("tools_invalid", "a tool is no object")
    return json.dumps([without_nulls(tool) if sparse else tool for tool in known], ensure_ascii=False)


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null: a table gives each of its objects all the keys that any of them has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value
