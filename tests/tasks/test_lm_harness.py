"""omnitrain in lm-evaluation-harness: log-likelihoods against a direct computation, and tasks from local files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs omnitrain[lm_eval]")

from omnitrain.data.batch import PackedBatch
from omnitrain.data.packing import Budget
from omnitrain.data.sample import Message, Segment
from omnitrain.tasks.lm_harness import HarnessTask, OmniLM, _text_sample
from omnitrain.tasks.results import StaleAnswers, model_fingerprint
from omnitrain.tasks.settings import RunOptions

MMLU = """\
task: toy_mmlu
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/mmlu.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GSM8K = """\
task: toy_gsm8k
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/gsm8k.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [",", "(?s).*#### "]}
generation_kwargs: {until: ["Question:"], do_sample: false, max_gen_toks: 8}
filter_list:
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
"""
IFEVAL = """\
task: toy_ifeval
include: INCLUDE
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/ifeval.jsonl}}
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 8}
"""


@pytest.fixture
def files(tmp_path) -> Path:
    questions = [{"question": f"What is {i}?", "choices": list("wxyz"), "answer": i % 4} for i in range(5)]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    sums = [{"question": f"{i} + 1?", "answer": f"So #### {i + 1}"} for i in range(3)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    instructions = [
        {
            "key": 1, "prompt": "Write without commas.", "kwargs": [{}, {"num_words": 1, "relation": "at least"}],
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        },
        {"key": 2, "prompt": "In lower case.", "kwargs": [{}],
         "instruction_id_list": ["change_case:english_lowercase"]},
    ]  # fmt: skip
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in instructions))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    import lm_eval.tasks

    include = Path(lm_eval.tasks.__file__).parent / "ifeval" / "ifeval.yaml"
    for name, text in (("mmlu", MMLU), ("gsm8k", GSM8K), ("ifeval", IFEVAL)):
        content = text.replace("FOLDER", str(tmp_path)).replace("INCLUDE", str(include))
        (tasks / f"toy_{name}.yaml").write_text(content)
    return tasks


QUIET = RunOptions(progress=False)


def requests(*arguments: tuple) -> list:
    return [SimpleNamespace(args=args) for args in arguments]


def direct(model, ids: list[int], first: int) -> tuple[float, bool]:
    """log p(ids[first:] | ids[:first]) by one forward pass over all tokens, no packing."""
    sample = _text_sample(np.array(ids), np.full(len(ids), -100))
    with torch.no_grad():
        logits = model.thinker.logits(model(**PackedBatch.pack([sample]).model_inputs()).hidden)
    log_p = torch.log_softmax(logits.double(), -1)
    chosen = [log_p[i - 1, ids[i]].item() for i in range(first, len(ids))]
    return sum(chosen), all(int(log_p[i - 1].argmax()) == ids[i] for i in range(first, len(ids)))


def test_log_likelihoods_equal_a_direct_computation(model, encoder, monkeypatch):
    from omnitrain.tasks import lm_harness

    monkeypatch.setattr(lm_harness, "DEFAULT_BUDGET", Budget(tokens=24))
    encode = encoder.tokenizer.encode
    lm = OmniLM(model, encoder)
    pairs = [("the quick", " brown fox"), ("Which of these is it? A", " B"), ("", "fox"), ("ends in space ", "x")]
    found = lm.loglikelihood(requests(*pairs))
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        head = encode(context.rstrip()) if context else [lm.eot_token_id]
        whole = encode(context + continuation) if context else head + encode(continuation)
        expected, expected_greedy = direct(model, whole, len(head))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    best = encode("the quick")
    for _ in range(2):
        sample = _text_sample(np.array(best), np.full(len(best), -100))
        with torch.no_grad():
            hidden = model(**PackedBatch.pack([sample]).model_inputs()).hidden
        best = [*best, int(model.thinker.logits(hidden[-1:]).argmax())]
    assert lm._loglikelihood_tokens([(None, best[:-2], best[-2:])])[0][1] is True


def test_rolling_log_likelihood_in_windows(model, encoder):
    text = "the quick brown fox " * 4
    ids = encoder.tokenizer.encode(text)
    whole = OmniLM(model, encoder).loglikelihood_rolling(requests((text,)))[0]
    eot = encoder.tokenizer.id_of("<|endoftext|>")
    assert whole == pytest.approx(direct(model, [eot, *ids], 1)[0], abs=1e-4)
    length = 5
    expected = direct(model, [eot, *ids[:length]], 1)[0]
    for start in range(length, len(ids), length):
        context_from = min(start + length, len(ids)) - length - 1  # the last window keeps a full context
        part = ids[context_from : start + length]
        expected += direct(model, part, start - context_from)[0]
    windows = OmniLM(model, encoder, max_length=length).loglikelihood_rolling(requests((text,)))[0]
    assert windows == pytest.approx(expected, abs=1e-4)


def test_generation_is_greedy_and_stops_at_strings(model, encoder):
    lm = OmniLM(model, encoder)
    ids = encoder.tokenizer.encode("which of")
    for _ in range(6):
        sample = _text_sample(np.array(ids), np.full(len(ids), -100))
        with torch.no_grad():
            hidden = model(**PackedBatch.pack([sample]).model_inputs()).hidden
        ids = [*ids, int(model.thinker.logits(hidden[-1:]).argmax())]
    expected = encoder.tokenizer.decode(ids[len(encoder.tokenizer.encode("which of")) :])
    whole, cut = lm.generate_until(
        requests(
            ("which of", {"until": [], "max_gen_toks": 6}), ("which of", {"until": [expected[2]], "max_gen_toks": 6})
        )
    )
    assert whole == expected
    assert cut == expected[: expected.index(expected[2])]


def test_chat_template_is_the_tokenizers_own(model, encoder):
    lm = OmniLM(model, encoder)
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a <|im_end|> \0<|im_start|>\0 b"},
    ]
    ids = lm.tok_encode(lm.apply_chat_template(history))
    messages = [
        Message(role=turn["role"], segments=(Segment(type="text", text=turn["content"].replace("\0", "")),))
        for turn in history
    ]
    assert ids == encoder.tokenizer.render(messages, for_generation=True).input_ids.tolist()


def test_registered_by_name(model, encoder, files):
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="omnitrain", model_args={"model": model, "encoder": encoder}, tasks=["toy_mmlu"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(files), include_defaults=False),
    )  # fmt: skip
    ours = OmniLM(model, encoder)
    right = 0
    for i in range(5):
        context = f"What is {i}?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
        scores = [value for value, _ in ours.loglikelihood(requests(*((context, f" {c}") for c in "ABCD")))]
        right += scores.index(max(scores)) == i % 4
    assert results["results"]["toy_mmlu"]["acc,none"] == pytest.approx(right / 5)


def test_tasks_of_the_harness_write_what_ours_do(model, encoder, files, tmp_path):
    out = tmp_path / "out"
    task = HarnessTask(name="mmlu", tasks=["toy_mmlu"], metric="acc", path=str(files))
    result = task.run(model, encoder, out, QUIET)
    rows = pq.read_table(out / "mmlu.parquet").to_pylist()
    assert len(rows) == result.items == 5
    assert result.metrics[0]["name"] == "acc"
    assert result.metrics[0]["value"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert all((row["prediction"] == "ABCD"[int(row["reference"])]) == bool(row["score"]) for row in rows)
    assert not (out / "mmlu.parts").exists()
    assert (
        task.run(None, None, out, RunOptions(fingerprint=model_fingerprint(model, encoder), progress=False)) == result
    )  # not again
    with pytest.raises(StaleAnswers, match="restart"):
        task.run(model, encoder, out, RunOptions(limit=2, progress=False))
    assert task.run(model, encoder, out, RunOptions(limit=2, restart=True, progress=False)).items == 2


def test_generation_tasks_and_interruption(model, encoder, files, tmp_path, monkeypatch):
    from omnitrain.tasks import lm_harness

    task = HarnessTask(name="gsm8k", tasks=["toy_gsm8k"], metric="exact_match,flexible-extract", path=str(files))
    real, calls = lm_harness.answer_prompts, []

    def dies(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(lm_harness, "answer_prompts", dies)
    with pytest.raises(KeyboardInterrupt):
        task.run(model, encoder, tmp_path / "out", RunOptions(batch=1, progress=False))
    result = task.run(model, encoder, tmp_path / "out", RunOptions(batch=1, progress=False))
    assert calls == [1, 1, 1, 1]  # the first two came from the cache
    assert (result.items, result.metrics[0]["name"]) == (3, "exact_match,flexible-extract")
    rows = pq.read_table(tmp_path / "out" / "gsm8k.parquet").to_pylist()
    assert rows[0]["prompt"] == "Question: 0 + 1?\nAnswer:"


def test_ifeval_strict_and_loose(model, encoder, files, tmp_path, monkeypatch):
    from omnitrain.tasks import lm_harness

    replies = {"Write without commas.": "no comma here", "In lower case.": "*Title*\nall of this is lower case"}
    decode = encoder.tokenizer.decode

    def said(model, tokenizer, prompts, **_):
        asked = [decode(prompt.input_ids.tolist()) for prompt in prompts]
        return [next(reply for question, reply in replies.items() if question in text) for text in asked]

    monkeypatch.setattr(lm_harness, "answer_prompts", said)
    task = HarnessTask(
        name="ifeval", tasks=["toy_ifeval"], metric="prompt_level_strict_acc", path=str(files), num_fewshot=0, chat=True
    )
    result = task.run(model, encoder, tmp_path / "out", QUIET)
    values = {found["name"]: found["value"] for found in result.metrics}
    assert values["prompt_level_strict_acc"] == 0.5
    assert values["inst_level_strict_acc"] == pytest.approx(2 / 3)  # of three instructions, not the mean of means
    assert values["prompt_level_loose_acc"] == 1.0  # the first line may be left out
    assert not math.isnan(result.metrics[0]["low"])


def test_unknown_tasks_and_metrics_are_named(model, encoder, files, tmp_path):
    with pytest.raises(ValueError, match="no_such_task"):
        HarnessTask(name="x", tasks=["no_such_task"], metric="acc").run(model, encoder, tmp_path, QUIET)
    assert not (tmp_path / "x.parts").exists()
    wrong = HarnessTask(name="x", tasks=["toy_mmlu"], metric="accuracy", path=str(files))
    with pytest.raises(ValueError, match=r"eval\.tasks\.x\.metric=accuracy: these tasks have acc"):
        wrong.run(model, encoder, tmp_path, QUIET)
