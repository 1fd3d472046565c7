"""Calls on the catalogue: what is written is right by the checker, fits its schema, and held-out functions stay out."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from data_prep import tool_data
from data_prep.tool_data import HELDOUT, PURPOSES
from omnitrain.config.locations import PACK
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.shards import SampleSource
from omnitrain.generation.tool_loop import read_calls
from omnitrain.tasks.benchmark import Answered
from omnitrain.tasks.tool_calls import ToolCallRule, ToolShards


def test_rows_of_the_pack_and_their_scores(tmp_path: Path) -> None:
    given = [
        str(PACK),
        "--languages",
        "es",
        "--each",
        "2",
        "--thoughts",
        "0.4",
        "--out",
        str(tmp_path),
        "--no-progress",
    ]
    assert tool_data.main(given) == 0
    rows = list(SampleSource(tmp_path))
    assert {row.meta["asked"] for row in rows} == {"text", "spoken", "picture"}
    names = {name for purpose in HELDOUT for name in PURPOSES[purpose].names}
    trained = [row for row in rows if row.split == "train"]
    assert {row.meta["purpose"] for row in trained} == set(PURPOSES) - set(HELDOUT)
    assert not any(tool["function"]["name"] in names for row in trained for tool in json.loads(row.meta["tools"]))
    assert {row.meta["purpose"] for row in rows if row.split == "heldout_cell"} == set(HELDOUT)
    assert any(len(json.loads(row.meta["answers"])) == 2 for row in trained)  # parallel
    assert any([m.role for m in row.messages] == ["user", "assistant", "tool", "assistant"] for row in trained)
    thoughts = sum((row.messages[1].segments[0].text or "").startswith("<think>\n") for row in rows) / len(rows)
    assert 0.3 < thoughts < 0.5
    tokenizer, rule = ChatTokenizer.from_file(PACK / "tokenizer.json"), ToolCallRule()
    for split in ("heldout_cell", "heldout_concept"):
        benchmark = ToolShards(split=split)
        source = benchmark.rows(str(tmp_path))
        for i in range(0, len(source), 5):
            item = benchmark.item(source[i], "{question}")
            (_, answer) = item.sample.messages
            said = answer.segments[0].text or ""
            assert rule.score_one(Answered(id="", truth=item.truth, prediction=said)).statistics["accuracy"][0] == 1
            for wrong in ("", "no", said.replace('": {"', '": {"x": 1, "', 1), said + said):
                scored = rule.score_one(Answered(id="", truth=item.truth, prediction=wrong))
                assert scored.statistics["accuracy"][0] == 0
            chat = tokenizer.render([answer])
            ((first, end),) = chat.answers
            schemas = {f["name"]: f["parameters"] for f in item.truth["functions"]}
            for call in read_calls(chat.input_ids[first + 1 : end + 1].tolist(), tokenizer):
                assert call.problem is None
                jsonschema.validate(call.arguments, schemas[call.name])
