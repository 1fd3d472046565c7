"""The whole evaluation with a model whose scores are known beforehand."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.evaluation import answers as evaluation_answers
from omnitrain.evaluation import heldout
from omnitrain.evaluation.heldout import draw, evaluate, print_table, prompt_text, targets, unigram_baselines
from omnitrain.evaluation.intervals import bootstrap_interval
from omnitrain.evaluation.settings import HeldoutEvaluation

from .conftest import WORDS, Reader, Samples, grey_sample, text_sample

SPLITS = ("heldout_cell", "heldout_concept")
HELDOUT = [grey_sample(i, split=SPLITS[i % 2]) for i in range(40)] + [
    text_sample(i, split=SPLITS[i % 2], language=("en", "fr")[i % 3 == 0]) for i in range(30)
]


def answers(model: Reader, batch: Any, *, stop_ids: tuple[int, ...], **_: Any) -> list[list[int]]:
    """Greedy answer of the reader: one word."""
    logits = model(**batch.model_inputs()).hidden[batch.cu_seqlens[1:].long() - 1]
    return [[token, stop_ids[0]] for token in logits.argmax(-1).tolist()]


@pytest.fixture
def scored(
    tokenizer: ChatTokenizer, encoder: SampleEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], Path]:
    monkeypatch.setattr(evaluation_answers, "generate", answers)
    monkeypatch.setattr(heldout, "_KEPT_MEDIA", 3)
    train = Samples([text_sample(i, split="train") for i in range(50)])
    scores = evaluate(
        Reader(tokenizer, reads=True),
        encoder,
        {"memory": Samples(HELDOUT)},
        HeldoutEvaluation(max_samples=16, max_generated=8),
        tmp_path / "eval",
        train_sources={"train": train},
        progress=False,
    )
    return scores, tmp_path / "eval"


def row(scores: dict[str, Any], **wanted: str) -> dict[str, Any]:
    (found,) = [r for r in scores["scores"] if all(r[k] == v for k, v in wanted.items())]
    return found


def test_scores(scored: tuple[dict[str, Any], Path]) -> None:
    scores, folder = scored
    assert json.loads((folder / "scores.json").read_text()) == scores
    picture = row(scores, modality="image", split="all", task="all")
    assert picture["samples"] == 32
    assert picture["generated"] == 16
    assert picture["exact_match"] == 1.0
    assert picture["chrf"] == pytest.approx(100)
    assert picture["loss_low"] <= picture["loss"] <= picture["loss_high"]
    assert {r["split"] for r in scores["scores"]} == {"all", *SPLITS}
    text = row(scores, modality="text", split="all", task="all")
    assert text["generated"] == 0
    assert text["bits_per_byte"] > 0
    assert text["unigram_bits_per_byte"] > 0
    assert picture.get("unigram_loss") is None  # no picture was trained on
    assert {r["language"] for r in scores["languages"]} == {"en", "fr"}
    assert scores["expert_load"]["image"][0][0] > 0
    assert scores["skipped"] == {}


def test_media_swap_is_in_the_scores(scored: tuple[dict[str, Any], Path]) -> None:
    scores, folder = scored
    records = {(r["modality"], r["split"], r["task"]): r for r in scores["media_swap"]}
    assert set(records) == {("image", split, "all") for split in ("all", *SPLITS)}
    assert records["image", "all", "all"]["gain"]["above_zero"]
    full = json.loads((folder / "media_swap.json").read_text())
    assert len(full[0]["samples"]) == records["image", "all", "all"]["pairs"] == 32


def test_long_answers_weigh_more(tokenizer: ChatTokenizer, encoder: SampleEncoder, tmp_path: Path) -> None:
    """Losses of all scores are over targets, not over samples: answers of one to four words, of unequal loss."""
    samples = []
    for i in range(8):
        sample = grey_sample(i)
        answer = Segment(type="text", text=WORDS[i] + f" {WORDS[i + 8]}" * (i % 4))  # the first word alone is seen
        messages = (sample.messages[0], Message(role="assistant", segments=(answer,)))
        samples.append(replace(sample, messages=messages))
    settings = HeldoutEvaluation(max_generated=0)
    model = Reader(tokenizer, reads=True)
    scores = evaluate(model, encoder, {"memory": Samples(samples)}, settings, tmp_path, progress=False)
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    tokens = [r["tokens"] for r in rows]
    means = {key: sum(r[key] * r["tokens"] for r in rows) / sum(tokens) for key in ("loss", "swapped_loss")}
    assert abs(means["loss"] - sum(r["loss"] for r in rows) / 8) > 0.1
    assert abs(means["swapped_loss"] - sum(r["swapped_loss"] for r in rows) / 8) > 0.1
    record, score = scores["media_swap"][0], row(scores, modality="image", split="all", task="all")
    assert record["own"] == pytest.approx(means["loss"])
    assert record["swapped"] == pytest.approx(means["swapped_loss"])
    assert record["gain"]["mean"] == pytest.approx(means["swapped_loss"] - means["loss"])
    assert score["loss"] == pytest.approx(means["loss"])
    interval = bootstrap_interval([r["loss"] * r["tokens"] for r in rows], weights=tokens, groups="abcdefgh")
    assert (score["loss_low"], score["loss_high"]) == pytest.approx((interval.low, interval.high))


def test_predictions(scored: tuple[dict[str, Any], Path]) -> None:
    rows = pq.read_table(scored[1] / "predictions.parquet").to_pylist()
    assert len(rows) == 32 + 30
    pictures = [r for r in rows if r["modality"] == "image"]
    assert sum(r["prediction"] is not None for r in pictures) == 16
    assert all(r["prediction"] == r["reference"] for r in pictures if r["prediction"] is not None)
    assert all(r["swapped_loss"] > r["loss"] for r in pictures)
    kept = [r for r in pictures if r["media"] is not None]
    assert len(kept) == 6
    assert all(r["media"].startswith(b"\x89PNG") and r["media_type"] == "image" for r in kept)
    assert pictures[0]["prompt"] == "[image] Which level is this?"


def test_evaluation_repeats_itself(
    scored: tuple[dict[str, Any], Path], tokenizer: ChatTokenizer, encoder: SampleEncoder, tmp_path: Path
) -> None:
    again = evaluate(
        Reader(tokenizer, reads=True),
        encoder,
        {"memory": Samples(HELDOUT)},
        HeldoutEvaluation(max_samples=16, max_generated=8),
        tmp_path / "again",
        train_sources={"train": Samples([text_sample(i, split="train") for i in range(50)])},
        progress=False,
    )
    first = scored[0]
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_the_table_fits_80_columns(scored: tuple[dict[str, Any], Path]) -> None:
    out = io.StringIO()
    rows = [{**row, "modality": "audio_video", "wer": 1.25, "loss": 10.125} for row in scored[0]["scores"]]
    gain = {"mean": -10.0, "low": -12.5, "high": -0.25}
    swaps = [{"modality": "audio_video", "split": s, "task": "all", "gain": gain} for s in ("all", *SPLITS)]
    print_table({"scores": rows, "media_swap": swaps}, Console(file=out, width=80))
    assert "audio+video" in out.getvalue()
    assert "concept" in out.getvalue()
    assert "…" not in out.getvalue()
    assert "-10.00 [-12.50,-0.25]" in out.getvalue()


def test_draw_is_the_same_from_shards_and_takes_tasks_in_turn(tmp_path: Path) -> None:
    samples = [grey_sample(i, task=("caption" if i % 5 else "sound")) for i in range(40)]
    write_shards(samples, tmp_path, "grey", progress=False)
    lists = [
        [d.sample.id for d in drawn["heldout_concept", "image"]]
        for drawn in (draw({"a": SampleSource(tmp_path)}, 10), draw({"a": Samples(samples)}, 10))
    ]
    assert lists[0] == lists[1]
    tasks = Counter(s.task for s in samples if s.id in lists[0])
    assert tasks == {"caption": 5, "sound": 5}
    assert [d.sample.id for d in draw({"a": Samples(samples)}, 10, seed=1)["heldout_concept", "image"]] != lists[0]


def test_a_bad_row_is_counted() -> None:
    class Torn(Samples):
        def __getitem__(self, index: int) -> Sample:
            if index == 3:
                raise BadSample("row_invalid", "planted")
            return super().__getitem__(index)

    skipped: Counter[str] = Counter()
    drawn = draw({"a": Torn(HELDOUT[:10])}, None, skipped=skipped)
    assert sum(map(len, drawn.values())) == 9
    assert skipped == {"row_invalid": 1}


def test_targets_do_not_need_the_media(tokenizer: ChatTokenizer, encoder: SampleEncoder) -> None:
    sample = HELDOUT[0]
    labels = encoder(sample, Samples([]).media_bytes).labels
    assert targets(sample, tokenizer).tolist() == labels[labels >= 0].tolist()


def test_unigram_baselines_count_answers_by_modality(tokenizer: ChatTokenizer) -> None:
    baselines = unigram_baselines({"train": Samples(HELDOUT)}, tokenizer, max_samples=1000)
    assert set(baselines) == {"image", "text"}
    ids = [tokenizer.encode(word)[0] for word in WORDS]
    assert baselines["image"].counts[ids].sum() == 40


def test_prompt_of_a_document_is_empty() -> None:
    assert prompt_text(text_sample(0)) == ""


def test_nothing_to_score_is_said(tokenizer: ChatTokenizer, encoder: SampleEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample in empty"):
        evaluate(
            Reader(tokenizer, reads=True),
            encoder,
            {"empty": Samples([])},
            HeldoutEvaluation(),
            tmp_path,
            progress=False,
        )
