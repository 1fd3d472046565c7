"""Rewards by rule, and by a judge behind a server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from omnitrain.evaluation.rollouts import Rollout, worth
from omnitrain.tasks.rewards import (
    Constraints,
    ErrorRate,
    ExactMatch,
    ItemOrder,
    JSONSchema,
    Judge,
    SoundEvents,
    ToolCalls,
)


def rollout(text: str, reference: str = "", task: str = "", **meta: Any) -> Rollout:
    encoded = {key: json.dumps(value) for key, value in meta.items()}
    return Rollout(sample="s", prompt="p", text=text, reference=reference, task=task, meta=encoded)


def test_texts() -> None:
    assert ExactMatch()([rollout("The  cat.", "the cat"), rollout("a cat", "the cat")]) == [1.0, 0.0]
    said = [rollout("the cat sat", "the cat sat down"), rollout("x " * 9, "the cat"), rollout("a", "")]
    assert ErrorRate()(said) == [0.75, 0.0, None]
    assert ErrorRate(measure="cer")([rollout("abce", "abcd")]) == [0.75]
    assert ErrorRate(tasks=["asr"])([rollout("a", "a", "asr"), rollout("a", "a", "caption")]) == [1.0, None]
    with pytest.raises(ValueError, match="wer or cer"):
        ErrorRate(measure="per")  # type: ignore[arg-type]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def test_json_against_a_schema() -> None:
    texts = ('{"n": 1}', '{"n": "1"}', "{", "[" * 100_000, '{"n": 1} and more')
    assert JSONSchema(schema=SCHEMA)([rollout(text) for text in texts]) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert JSONSchema()([rollout('{"n": 1}', schema=SCHEMA), rollout('{"n": 1}')]) == [1.0, None]
    for wrong in ({"type": "thing"}, {"$ref": "http://127.0.0.1:1/never.json"}):  # the second is not fetched
        with pytest.raises(ValueError, match="sample 's': its schema is none"):
            JSONSchema(schema=wrong)([rollout("{}")])


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_tool_calls() -> None:
    parameters = {
        "type": "object",
        "properties": {"x": {"type": "number"}, "to": {"type": "string"}},
        "required": ["x"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    reference = call("f", x=2.5, to="the moon")
    texts = (call("f", to="The Moon!", x=2.5), reference, call("f", x=2.5), call("g", x=2.5), "no call", "<tool_call>{")
    found = ToolCalls()([rollout(text, reference, tools=tools) for text in texts])
    assert found == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert ToolCalls()([rollout("no call needed", "nor here", tools=tools), rollout("a", "b")]) == [1.0, None]
    functions = [
        {"name": "f", "parameters": {"type": "dict", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}
    ]
    bfcl = {"functions": functions, "answers": [{"f": {"x": [1, 2]}}]}
    assert ToolCalls()([rollout(call("f", x=x), **bfcl) for x in (2, 3)]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("constraint", "kept", "broken"),
    [
        ({"min_words": 2}, "a cat", "cat"), ({"max_words": 1}, "cat", "a cat"),
        ({"sentences": 2}, "One. Two!", "One."), ({"paragraphs": 2}, "a\n\nb", "a\nb"),
        ({"bullets": 2}, "- a\n- b", "- a"), ({"contains": ["Cat"]}, "a cat", "a dog"),
        ({"avoids": ["cat"]}, "a dog", "Cats"), ({"starts_with": "Oh"}, " Oh no", "no"),
        ({"ends_with": "."}, "no. ", "no"), ({"case": "upper"}, "ABC!", "Abc"), ({"without": "e"}, "cat", "thE"),
    ],
)  # fmt: skip
def test_constraints(constraint: dict[str, Any], kept: str, broken: str) -> None:
    assert Constraints()([rollout(text, constraints=constraint) for text in (kept, broken)]) == [1.0, 0.0]


def test_several_constraints() -> None:
    both = rollout("one two three", constraints={"max_words": 2, "contains": ["two"]})
    assert Constraints()([both, rollout("a")]) == [0.5, None]
    assert Constraints(all_or_nothing=True)([both]) == [0.0]
    with pytest.raises(ValueError, match=r"sample 's': no constraint 'rhymes'; there are min_words"):
        Constraints()([rollout("a", constraints={"rhymes": True})])
    with pytest.raises(ValueError, match="sample 's': meta 'constraints' is no JSON"):
        Constraints()([Rollout(sample="s", prompt="", text="", reference="", meta={"constraints": "{"})])


def test_order_of_items() -> None:
    order = ["sun", "cat", "boat"]
    texts = ("Sun, cat and boat.", "boat, cat, sun", "cat, then the sun, then a boat", "the sun alone", "sunny catboat")
    assert ItemOrder()([rollout(t, order=order) for t in texts]) == [1.0, 0.0, pytest.approx(2 / 3), 0.0, 0.0]
    assert ItemOrder()([rollout("sun"), rollout("sun", order=["sun"])]) == [None, None]


def test_sound_events() -> None:
    reward = SoundEvents(events=["dog, bark", "rain", "horn"])
    texts = ("A dog and rain.", "Barks.", "rain and a horn", "")
    found = reward([rollout(text, events=["dog, bark", "rain"]) for text in texts])
    assert found[0] == 1.0
    assert found[1:] == pytest.approx([2 / 3, 0.5, 0.0])
    assert reward([rollout("silence", events=[]), rollout("rain")]) == [1.0, None]


def test_a_judge() -> None:
    """The number that the answer begins with; what stands in an answer is not filled in again."""
    questions = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            questions.append(question["messages"][0]["content"])
            text = (
                "7.5, since it is good" if "cat" in questions[-1] else "no number" if "dog" in questions[-1] else "99"
            )
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            body = {"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [choice]}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        judge = Judge(server=f"http://127.0.0.1:{http.server_port}/v1", name="judge", tasks=["open"])
        asked = [rollout(t, "the answer", "open") for t in ("cat", "dog", "{reference}")]
        assert judge([*asked, rollout("cat", task="asr")]) == [0.75, 0.0, 0.0, None]
        http.shutdown()
    assert any("judged:\n{reference}\n" in question for question in questions)


def test_rewards_are_added_up() -> None:
    rewards = {"exact": ExactMatch(weight=2.0), "words": Constraints(weight=0.5)}
    total, by_name = worth([rollout("a", "a", constraints={"max_words": 1}), rollout("a", "b")], rewards)
    assert total == [2.5, 0.0]
    assert by_name == {"exact": [1.0, 0.0], "words": [1.0, None]}
