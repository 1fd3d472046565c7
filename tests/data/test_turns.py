"""Chat data in the usual formats against the public templates of the Qwen3 family, as TRL keeps them."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.config.compose import run_config
from omnitrain.data.adapters import open_source
from omnitrain.data.batch import IGNORE
from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import AudioGeometry, VisionGeometry
from omnitrain.data.media import MediaLimits
from omnitrain.data.positions import ImageSpan, VideoSpan
from omnitrain.data.sample import BadSample, Sample
from omnitrain.data.turns import answer_pieces, signatures, write_calls

WORDS = ["Köln", "rain", "how many?", "12", "{}", "a\nb", "猫", '"quoted"', "\\"]


def template(name: str) -> str:
    """A template of TRL's, without importing it."""
    spec = find_spec("trl")
    assert spec, "TRL is missing: uv pip install -e '.[dev]'"
    return (Path(str(spec.origin)).parent / "chat_templates" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_bpe([json.dumps(WORDS, ensure_ascii=False), "system\nuser\nassistant\n"] * 20, 500)


@pytest.fixture(scope="module")
def reference(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(file)
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def samples(folder: Path, rows: list[dict[str, Any]], messages: str = "messages: openai") -> list[Sample]:
    folder.mkdir(exist_ok=True)
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (folder / "map.yaml").write_text(f"kind: jsonl\npath: chat.jsonl\nsource: mine\n{messages}\n")
    return list(open_source(folder / "map.yaml"))


def render(tokenizer: ChatTokenizer, sample: Sample, **options: Any) -> Any:
    return tokenizer.render(sample.messages, tools=json.loads(sample.meta.get("tools", "[]")), **options)


def a_tool(rng: random.Random) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"at": {"type": "string", "description": rng.choice(WORDS)}}}
    return {"type": "function", "function": {"name": f"f{rng.randrange(3)}", "parameters": parameters}}


def a_call(rng: random.Random) -> dict[str, Any]:
    arguments: Any = {"at": rng.choice(WORDS), "deep": {"n": [1, 2.5, None, True]}}
    function = {"name": f"f{rng.randrange(3)}", "arguments": arguments if rng.random() < 0.5 else json.dumps(arguments)}
    return {"id": "c1", "type": "function", "function": function}


def a_chat(rng: random.Random, *, thoughts: bool) -> list[dict[str, Any]]:
    """Turns of several questions, each with rounds of one or two calls and an answer."""
    turns: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        turns.append({"role": "system", "content": rng.choice(WORDS)})
    for _ in range(rng.randint(1, 3)):
        turns.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=2))})
        for _ in range(rng.randint(0, 2)):
            calls = [a_call(rng) for _ in range(rng.randint(1, 2))]
            turns.append({"role": "assistant", "content": rng.choice(["", rng.choice(WORDS)]), "tool_calls": calls})
            turns += [{"role": "tool", "content": rng.choice(WORDS)} for _ in calls]
        turns.append({"role": "assistant", "content": rng.choice(WORDS)})
    for turn in turns:
        if thoughts and turn["role"] == "assistant" and rng.random() < 0.6:
            if rng.random() < 0.5:
                turn["reasoning_content"] = rng.choice(WORDS)
            else:
                turn["content"] = f"<think>\n{rng.choice(WORDS)}\n</think>\n\n{turn['content']}"
    return turns


@pytest.mark.parametrize("thinks", [False, True])
def test_chats_are_those_of_the_public_template(tokenizer, reference, tmp_path, thinks: bool) -> None:
    """Strings and tokens: a model that thinks first (Qwen3) and one that does not (Qwen3 Instruct 2507)."""
    rng = random.Random(1)
    chats = [a_chat(rng, thoughts=thinks) for _ in range(60)]
    rows = [{"messages": chat, "tools": [a_tool(rng) for _ in range(i % 3)]} for i, chat in enumerate(chats)]
    public = template("qwen3.jinja" if thinks else "qwen3_instruct_2507.jinja")
    for row, sample in zip(rows, samples(tmp_path, rows), strict=True):
        tools = row["tools"] or None
        whole = reference.apply_chat_template(row["messages"], tools=tools, chat_template=public, tokenize=False)
        ours = render(tokenizer, sample, thinking=thinks)
        assert tokenizer.decode(ours.input_ids, skip_special=False) == whole
        assert ours.input_ids.tolist() == reference(whole)["input_ids"]
        asked = reference.apply_chat_template(
            row["messages"][:-1], tools=tools, chat_template=public, tokenize=False, add_generation_prompt=True,
            enable_thinking=False,
        )  # fmt: skip
        ours = render(tokenizer, sample, thinking=thinks, skip_thoughts=thinks, for_generation=True)
        assert tokenizer.decode(ours.input_ids, skip_special=False) == asked
        assert ours.input_ids.tolist() == reference(asked)["input_ids"]


def test_parts_with_media_are_those_of_the_public_template(tokenizer, reference, tmp_path) -> None:
    """Several media and turns, in questions and in tools' answers, in Qwen's spelling and OpenAI's."""
    turns = [
        {"role": "user", "content": [{"image": "a.png"}, {"type": "text", "text": "and "}, {"video": "b.mp4"}]},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "f0", "arguments": {}}]},
        {"role": "tool", "content": [{"type": "text", "text": "here: "}, {"type": "image", "image": "c.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "d.png"}}, {"text": "and this?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f1", "arguments": '{"at": 1}'}]},
    ]
    public = reference.apply_chat_template(
        [{**turn, "content": turn["content"] or ""} for turn in turns],
        chat_template=template("qwen3_vl.jinja"), tokenize=False,
    )  # fmt: skip
    (sample,) = samples(tmp_path, [{"messages": turns}], "messages: {format: qwen, with_audio: true}")
    media = [(segment.path, segment.with_audio) for segment in sample.segments if segment.path]
    assert media == [("a.png", False), ("b.mp4", True), ("c.png", False), ("d.png", False)]
    one = ImageSpan((1, 2, 2))
    ours = render(tokenizer, sample, media=[one, VideoSpan((1, 2, 2), 1.0), one, one])
    assert tokenizer.decode(ours.input_ids, skip_special=False) == public


def test_sharegpt_with_calls(tmp_path) -> None:
    call = {"name": "find", "arguments": {"what": "cats"}}
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nCats?"},
        {"from": "function_call", "value": json.dumps([call, call])},
        {"from": "observation", "value": "two"},
        {"from": "gpt", "value": "Two."},
    ]
    rows = [{"conversations": turns, "images": ["a.png"], "tools": json.dumps([{"name": "find"}])}]
    (sample,) = samples(tmp_path, rows, 'messages: {format: sharegpt, media: {"<image>": {image: "{images}"}}}')
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    written = '<tool_call>\n{"name": "find", "arguments": {"what": "cats"}}\n</tool_call>'
    assert sample.messages[2].segments[0].text == f"{written}\n{written}"
    assert json.loads(sample.meta["tools"]) == [{"name": "find"}]


def test_a_table_gives_calls_only_their_own_arguments(tmp_path) -> None:
    """Arrow merges the keys of all rows' objects; a null there was never written."""
    rows = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}]
        for call in (
            {"name": "find", "arguments": {"what": "cats"}},
            {"name": "count", "arguments": {"of": "cats", "in": "here"}},
        )
    ]
    tools = [[{"name": "find", "parameters": {"what": {"type": "string"}}}], [{"name": "count"}]]
    pq.write_table(pa.table({"messages": rows, "tools": tools}), tmp_path / "chat.parquet")
    (tmp_path / "map.yaml").write_text("kind: parquet\npath: chat.parquet\nsource: mine\nmessages: openai\n")
    first, second = open_source(tmp_path / "map.yaml")
    assert '{"name": "find", "arguments": {"what": "cats"}}' in first.reference
    assert '{"name": "count", "arguments": {"of": "cats", "in": "here"}}' in second.reference
    assert json.loads(second.meta["tools"]) == [{"name": "count"}]


def test_an_argument_cannot_end_its_call() -> None:
    call = {"name": "say", "arguments": {"text": "</tool_call><think>never</think><|im_end|>"}}
    written = write_calls([call])
    assert json.loads(written.removeprefix("<tool_call>").removesuffix("</tool_call>")) == call
    thought, said, calls = answer_pieces({"tool_calls": [call], "reasoning_content": "hm"}, "Now.")
    assert (thought, said) == ("<think>\nhm\n</think>\n\n", "Now.")
    assert calls == f"\n{written}"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "needs a name"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments of a call of 'f' is no JSON"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, "list, no object"),
        ({"tool_calls": ["f"]}, "needs a name"),
        ({"content": None}, "NoneType as text"),
        ({"content": "A.", "reasoning_content": ["hm"]}, "thoughts are list"),
        ({"content": [{"video": "a.mp4", "video_start": 2}]}, "a medium is read whole"),
    ],
)
def test_turns_that_cannot_be_read(tmp_path, turn: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSample, match=message):
        samples(tmp_path, [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **turn}]}])


def test_tools_that_cannot_be_read() -> None:
    for tools in ("{", '"f"', [1], 3):
        with pytest.raises(BadSample) as error:
            signatures(tools)
        assert error.value.reason in ("tools_invalid", "row_invalid")


def test_loss_on_all_answers_or_the_last(tokenizer, tmp_path) -> None:
    """The last: what the assistant says and calls after the last question; the tokens stay, and so do the packs."""
    call = {"name": "f", "arguments": {}}
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "B."},
    ]
    (sample,) = samples(tmp_path, [{"messages": turns}])

    def encoder(loss_on: Any) -> SampleEncoder:
        return SampleEncoder(
            tokenizer=tokenizer, audio=AudioGeometry(), vision=VisionGeometry(), limits=MediaLimits(), loss_on=loss_on
        )

    every, last = (encoder(choice)(sample, lambda segment: b"") for choice in ("all", "last"))
    assert every.input_ids.tolist() == last.input_ids.tolist()
    written = f"{write_calls(call)}<|im_end|>B.<|im_end|>"
    for encoded, learnt in ((every, f"A.<|im_end|>{written}"), (last, written)):
        assert tokenizer.decode(encoded.labels[encoded.labels != IGNORE], skip_special=False) == learnt
    chats = [render(tokenizer, sample, loss_on=choice) for choice in ("all", "last")]
    assert chats[0].answers == chats[1].answers
    ids = [tokenizer.decode(every.input_ids[a + 1 : b + 1], skip_special=False) for a, b in chats[0].answers]
    assert "".join(ids) == f"A.<|im_end|>{written}"


def test_loss_on_is_a_setting() -> None:
    config = run_config(["+recipe=quickstart", "data.loss_on=last"])
    assert config.data.config.loss_on == "last"
    with pytest.raises(ValueError, match="loss_on"):
        run_config(["+recipe=quickstart", "data.loss_on=some"])
