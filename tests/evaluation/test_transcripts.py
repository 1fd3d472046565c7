"""Error rates, translations and names against the libraries' own scores of the corpus, and the whole evaluation with
answers that are known beforehand."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from sacrebleu.metrics import BLEU, CHRF
from whisper_normalizer.basic import BasicTextNormalizer

from omnitrain.data.batch import PackedBatch
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.media import encode_audio
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.evaluation import transcripts
from omnitrain.evaluation.captions import cider_d
from omnitrain.evaluation.media_swap import Drawn
from omnitrain.evaluation.settings import TranscriptEvaluation
from omnitrain.evaluation.transcripts import (
    CONSTANT,
    FREQUENT,
    MODEL,
    Answer,
    constant_answers,
    cross_attention,
    evaluate_transcripts,
    print_transcripts,
    score,
    training_answers,
)
from omnitrain.generation.rescore import Rescoring, rescored
from omnitrain.generation.transcribe import ctc_transcribe
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.sizes import AuTConfig, AuTDecoderConfig, AuTModelConfig

from .conftest import Samples

SAID = ["Un gato negro.", "¡El perro duerme!", "Una casa (grande)", "Tres árboles verdes junto al río", "La luna."]
HEARD = ["un gato", "el perro duerme", "una cosa roja", "tres arboles verdes al rio", "el sol y la luna"]
GROUPS = ["cat", "dog", "house", "tree", "moon"]


def answer(i: int, **values: Any) -> Answer:
    said = {
        "id": str(i), "task": "asr", "languages": "es", "language": "es", "split": "heldout_cell", "group": GROUPS[i],
        "references": (SAID[i],), "prediction": HEARD[i], "window": 8,
    }  # fmt: skip
    return Answer(**{**said, **values})


def record(records: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    return found


def test_error_rates_are_those_of_the_corpus() -> None:
    normal = BasicTextNormalizer()
    said, heard = [normal(t).strip() for t in SAID], [normal(t).strip() for t in HEARD]
    found = record(score(map(answer, range(5))), languages="all")
    assert found["measures"]["wer"]["mean"] == pytest.approx(jiwer.wer(said, heard))
    assert found["measures"]["cer"]["mean"] == pytest.approx(jiwer.cer(said, heard))
    assert found["measures"]["cer"]["low"] < found["measures"]["cer"]["mean"] < found["measures"]["cer"]["high"]
    assert (found["samples"], found["sentences"]) == (5, 5)


def test_translations_are_scored_as_sacrebleu_does() -> None:
    found = record(score(answer(i, task="s2tt", languages="ca>es") for i in range(5)), languages="ca>es")
    # Of a corpus of five words in a row there is a 4-gram; the interval's corpora may have none.
    assert found["measures"]["bleu"]["mean"] == pytest.approx(BLEU().corpus_score(HEARD, [SAID]).score)
    assert found["measures"]["chrf"]["mean"] == pytest.approx(CHRF().corpus_score(HEARD, [SAID]).score)


def test_a_name_may_be_any_of_several() -> None:
    names = [("A dog.", "a dog"), ("Hound!", "a dog"), ("cat", "a dog"), ("", "a dog")]
    answers = [
        answer(i, task="sound", languages="en", language="en", prediction=p, references=(r, "hound"))
        for i, (p, r) in enumerate(names)
    ]
    assert record(score(answers), languages="en")["measures"]["accuracy"]["mean"] == 0.5


def test_whole_sentences_are_redrawn() -> None:
    """Ten recordings of two sentences are two observations."""
    many = [answer(i % 2, id=str(i)) for i in range(10)]
    few = record(score(many), languages="all")["measures"]["cer"]
    own = record(score(answer(int(a.id) % 2, id=a.id, group=a.id) for a in many), languages="all")["measures"]["cer"]
    assert few["groups"] == 2
    assert few["mean"] == own["mean"]
    assert few["high"] - few["low"] > own["high"] - own["low"]


def test_splits_stand_apart_where_there_are_several() -> None:
    assert {r["split"] for r in score(map(answer, range(5)))} == {"all"}
    two = score(answer(i, split=("heldout_cell", "heldout_concept")[i % 2]) for i in range(5))
    assert record(two, split="heldout_concept")["samples"] == 2


def test_the_best_constant_is_that_of_the_training_data() -> None:
    counts = Counter({"El gato duerme.": 5, "Un gato.": 4, "Un pato.": 3, "Rinoceronte": 1})
    said = constant_answers({("asr", "es"): counts})["asr", "es"]
    assert said[FREQUENT] == "El gato duerme."
    normal = BasicTextNormalizer()
    truth = [normal(text).strip() for text in counts.elements()]
    rates = {text: jiwer.cer(truth, [normal(text).strip()] * len(truth)) for text in counts}
    assert said[CONSTANT] == min(rates, key=rates.__getitem__) != said[FREQUENT]


def recording(i: int, split: str = "heldout_concept", language: str = "es", task: str = "asr") -> Sample:
    sound = encode_audio(np.sin(np.arange(4000) * 0.01 * (i + 1)).astype(np.float32), 16_000, "flac")
    question = (Segment(type="audio", media=sound), Segment(type="text", text="Transcribe."))
    said = Message(role="assistant", segments=(Segment(type="text", text=SAID[i % 5]),))
    return Sample(
        id=f"{task}/{split}/{language}/{i}", source="memory", split=split, task=task, languages=(language, language),
        concept=GROUPS[i % 5], messages=(Message(role="user", segments=question), said),
    )  # fmt: skip


def test_answers_of_the_training_data_are_counted() -> None:
    written = Sample(id="t", source="memory", messages=(Message(role="document", segments=()),))
    source = Samples([*(recording(i) for i in (0, 5, 1)), recording(2, language="ca"), written])
    spanish, catalan = {("asr", "es"): Counter({SAID[0]: 2, SAID[1]: 1})}, {("asr", "ca"): Counter({SAID[2]: 1})}
    assert training_answers({"a": source}, [("asr", "es"), ("s2tt", "es")]) == spanish
    assert training_answers({"a": source}, [("asr", "es"), ("asr", "pt")]) == spanish | catalan  # pt was never trained


def heard_by(
    model: Any, encoder: Any, asked: Any, *, on_bad: Any, aut_window_frames: int, **rest: Any
) -> list[str | None]:
    """With a window of 1 s nothing is understood; with 8 s all is. One recording cannot be read."""
    found: list[str | None] = []
    for sample, media_bytes in asked:
        assert media_bytes(sample.segments[0])
        if sample.id.endswith("/3"):
            on_bad(BadSample("audio_corrupt", "planted"), sample.id)
            found.append(None)
        else:
            found.append(sample.reference if aut_window_frames == 800 else "nada")
    return found


@pytest.fixture
def evaluated(encoder: SampleEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path]:
    monkeypatch.setattr(transcripts, "answer_samples", heard_by)
    model: Any = None
    held = [recording(i, language=lang) for lang in ("es", "ca") for i in range(10)]
    settings = TranscriptEvaluation(max_samples=6, max_swapped=0, window_seconds=[1, 8], players=3)
    train = {"train": Samples([recording(0, "train")] * 3 + [recording(1, "train")])}
    scores = evaluate_transcripts(
        model, encoder, {"m": Samples(held)}, settings, tmp_path, train_sources=train, progress=False
    )
    return scores, tmp_path


def test_the_whole_evaluation(evaluated: tuple[dict[str, Any], Path]) -> None:
    scores, folder = evaluated
    assert json.loads((folder / "transcripts.json").read_text()) == json.loads(json.dumps(scores))
    everyone = {"languages": "all", "system": MODEL}
    assert record(scores["scores"], window=8, **everyone)["measures"]["cer"]["mean"] == 0
    assert record(scores["scores"], window=1, **everyone)["measures"]["wer"]["mean"] >= 1
    same = record(scores["scores"], languages="es", system=FREQUENT)
    assert same["samples"] == record(scores["scores"], languages="es", system=MODEL, window=8)["samples"]
    # Catalan was never trained: the baseline says there what is most frequent in any language.
    assert record(scores["scores"], languages="ca", system=FREQUENT)["measures"]["cer"]["mean"] > 0
    rows = pq.read_table(folder / "transcripts.parquet").to_pylist()
    bad = scores["skipped"].get("audio_corrupt", 0)
    assert len(rows) + bad == 2 * 2 * 6
    assert {row["window"] for row in rows if row["media"]} == {8}
    assert len([row for row in rows if row["media"]]) <= 3
    assert {row["cer"] for row in rows if row["window"] == 8} == {0.0}


def test_what_ctc_hears_and_both_write_stands_beside_what_the_decoder_writes(
    encoder: SampleEncoder, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = AuTModelConfig(
        encoder=AuTConfig(d_model=16, layers=1, heads=2, ffn=16, out_dim=16, conv_hidden=4),
        decoder=AuTDecoderConfig(d_model=16, layers=1, heads=2, ffn=16, vocab_size=encoder.tokenizer.vocab_size),
        ctc_slots=2,
    )
    model = AuT(config)
    held = {"m": Samples([*(recording(i) for i in range(3)), recording(0, task="s2tt")])}
    settings = TranscriptEvaluation(max_swapped=0, window_seconds=[1, 2], max_new_tokens=3)
    train = {"train": Samples([recording(0, "train")])}
    scores = evaluate_transcripts(model, encoder, held, settings, tmp_path, train_sources=train, progress=False)
    rows = pq.read_table(tmp_path / "transcripts.parquet").to_pylist()
    said = {row["id"]: row["prediction"] for row in rows if row["window"] == 2}
    tasks = Counter(row["task"] for row in rows)
    assert tasks == {"asr": 6, "asr_ctc": 6, "asr_ctc_decoder": 6, "s2tt": 2}
    for i in range(3):
        prompt = encoder.encode_prompt(recording(i), lambda segment: segment.media)
        [heard] = ctc_transcribe(model, PackedBatch.pack([prompt]), aut_window_frames=200)
        assert said[f"{recording(i).id}/asr_ctc"] == heard.strip() != ""
        [both] = rescored(
            model, PackedBatch.pack([prompt]), encoder.tokenizer.encode, encoder.tokenizer.stop_ids[0],
            Rescoring(), aut_window_frames=200,
        )  # fmt: skip
        assert said[f"{recording(i).id}/asr_ctc_decoder"] == both.strip()
    assert record(scores["scores"], task="asr_ctc", languages="all", window=2)["measures"]["cer"]["mean"] > 0
    constants = [record(scores["scores"], task=t, languages="all", system=FREQUENT) for t in ("asr", "asr_ctc")]
    assert constants[0]["measures"] == constants[1]["measures"]


def test_a_list_that_is_none_is_skipped_and_counted(encoder: SampleEncoder, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transcripts, "answer_samples", heard_by)
    model: Any = None
    torn = [replace(recording(i), meta={"references": text}) for i, text in ((0, "[1]"), (1, "{"))]
    held = {"m": Samples([*torn, replace(recording(2), meta={"references": '["nada"]'})])}
    settings = TranscriptEvaluation(max_swapped=0, window_seconds=[1])
    scores = evaluate_transcripts(model, encoder, held, settings, tmp_path, progress=False)
    assert scores["skipped"] == {"references_invalid": 2}
    assert scores["scores"][0]["measures"]["cer"]["mean"] == 0


def test_the_table_fits_a_terminal(evaluated: tuple[dict[str, Any], Path]) -> None:
    shown = io.StringIO()
    print_transcripts(evaluated[0], Console(file=shown, width=80))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("asr") and "CER 0.0%" in line for line in lines)
    assert any(line.startswith("asr, CER by window: 1 s ") for line in lines)


def test_nothing_to_score_is_said(encoder: SampleEncoder, tmp_path: Path) -> None:
    model: Any = None
    with pytest.raises(ValueError, match="no recording with an answer in m; check"):
        evaluate_transcripts(model, encoder, {"m": Samples([])}, TranscriptEvaluation(), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"evaluation.window_seconds=\[0\]: name whole seconds"):
        TranscriptEvaluation(window_seconds=[0])


def test_cross_attention_of_an_answer(encoder: SampleEncoder) -> None:
    """A row for each token that is written, the one that ends the answer included; each row is a distribution."""
    torch.manual_seed(0)
    config = AuTModelConfig(
        encoder=AuTConfig(d_model=16, layers=1, heads=2, ffn=16, out_dim=16, conv_hidden=4),
        decoder=AuTDecoderConfig(d_model=16, layers=2, heads=2, ffn=16, vocab_size=encoder.tokenizer.vocab_size),
    )
    sample = recording(0)
    found = cross_attention(AuT(config).eval(), encoder, Drawn(sample, Samples([sample])), "a b c", 1)
    written = encoder.tokenizer.encode("a b c")
    assert "".join(found["tokens"]).startswith("a b c")
    assert len(found["tokens"]) == len(written) + 1
    weights = np.array(found["attention"])
    assert weights.shape == (len(written) + 1, 4)  # 0.25 s
    assert weights.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_captions_are_scored_by_what_they_name() -> None:
    """Two of three sounds are named, and one that is not there; the last caption names what its reference names."""
    said = [
        ("A dog can be heard.", "A dog barks.", ("dog",)),
        ("A cat can be heard.", "A cow moos.", ("cow",)),
        ("A cow and a dog.", "A cow moos at a dog.", ("cow",)),
        ("Nothing.", "A cat.", ("cat",)),
    ]
    answers = [
        answer(0, id=str(i), group=str(i), task="audio_caption", languages="en", language="en", prediction=p,
               references=(r,), events=e)
        for i, (p, r, e) in enumerate(said)
    ]  # fmt: skip
    measures = record(score(answers), languages="all")["measures"]
    assert measures["named_events"]["mean"] == 2 / 4
    assert measures["hallucinated_events"]["mean"] == 1 / 4
    assert measures["hallucinating_captions"]["mean"] == 1 / 4
    assert measures["cider_d"]["mean"] == pytest.approx(
        np.mean(cider_d([p for p, *_ in said], [[r] for _, r, _ in said]))
    )
