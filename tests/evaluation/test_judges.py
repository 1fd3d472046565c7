"""Judges of speech against known answers: the embedded synthetic pack, whose texts and voices are known, and real
recordings of the embedded pack."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import omnitrain
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.shards import SampleSource
from omnitrain.evaluation import judges, listening, metrics
from omnitrain.evaluation.judges import (
    JUDGES,
    SILENT_PEAK,
    Voices,
    Whisper,
    compared,
    error_rates,
    find_whisper,
    is_silent,
    mel_distance,
    missing_judges,
    missing_judges_notice,
    pesq,
    recognise,
    speaker_embedding,
    spoken_form,
    spoken_seconds,
    stoi,
)
from omnitrain.evaluation.settings import CodecEvaluation
from omnitrain.evaluation.speech_scores import Spoken, failures, score_speech
from omnitrain.reports.run import _speech

RATE = 24_000
ROOT = Path(omnitrain.__file__).parent


def synthetic(voice: str, split: str, count: int) -> list[tuple[str, np.ndarray]]:
    """Texts and recordings of the embedded speech pack."""
    source = SampleSource(ROOT / "pack_speech", split=split, where={"source": f"synthetic_speech/{voice}"})
    rows = [source[i] for i in range(count)]
    return [(r.concept, decode_audio(source.media_bytes(r.messages[1].segments[0]), RATE)) for r in rows]


@pytest.fixture(scope="module")
def slt() -> list[tuple[str, np.ndarray]]:
    return synthetic("slt", "heldout_concept", 12)


@pytest.fixture(scope="module")
def words() -> list[str]:
    source = SampleSource(ROOT / "pack_speech")
    return sorted({word for concept in source.light()["concept"].to_pylist() for word in concept.split()})


@pytest.fixture(scope="module")
def person() -> np.ndarray:
    """A volunteer's recording, two seconds or longer, float32 at `RATE`."""
    source = SampleSource(ROOT / "pack", split="train", where={"task": "asr", "languages": "fr"})
    for i in range(len(source)):
        segments = [s for m in source[i].messages for s in m.segments if s.type == "audio"]
        wave = decode_audio(source.media_bytes(segments[0]), RATE)
        if len(wave) > 2 * RATE:
            return wave
    raise AssertionError("the pack has no French recording of two seconds")


def noisy(wave: np.ndarray, decibels: float) -> np.ndarray:
    """White noise `decibels` below the speech's mean power."""
    noise = np.random.default_rng(0).normal(size=len(wave)).astype(np.float32)
    return wave + noise * np.float32(np.sqrt((wave**2).mean()) * 10 ** (-decibels / 20))


# --------------------------------------------------------------------------------------------------- what was said


def test_the_recogniser_hears_the_words(slt: list[tuple[str, np.ndarray]], words: list[str]) -> None:
    texts = [text for text, _ in slt]
    wide, _ = error_rates([recognise(wave, RATE) for _, wave in slt], texts)
    loop, _ = error_rates([recognise(wave, RATE, words) for _, wave in slt], texts)
    assert wide.mean < 0.25
    assert loop.mean < 0.08
    drowned, _ = error_rates([recognise(noisy(wave, -10), RATE, words) for _, wave in slt], texts)
    assert drowned.mean > 0.5


def test_the_order_and_the_loudness_change_nothing(slt: list[tuple[str, np.ndarray]], words: list[str]) -> None:
    for grammar in (None, words):
        forwards = [recognise(wave, RATE, grammar) for _, wave in slt[:3]]
        recognise(np.random.default_rng(0).normal(size=RATE) * 0.3, RATE, grammar)
        backwards = [recognise(wave, RATE, grammar) for _, wave in reversed(slt[:3])]
        assert forwards == backwards[::-1]
    assert recognise(slt[0][1] * 0.05, RATE, words) == recognise(slt[0][1], RATE, words)


def test_silence_and_unknown_words() -> None:
    assert recognise(np.zeros(RATE), RATE) == ""
    assert recognise(np.zeros(0), RATE) == ""
    assert recognise(np.zeros(10) + 0.1, RATE) == ""
    with pytest.raises(ValueError, match="xyzzy"):
        recognise(np.zeros(RATE), RATE, ["red", "xyzzy"])
    with pytest.raises(ValueError, match="at least one word"):
        recognise(np.zeros(RATE), RATE, [])
    with pytest.raises(ValueError, match=r"\(24000, 2\)"):
        recognise(np.zeros((RATE, 2)), RATE)


def test_error_rates_are_those_of_the_corpus() -> None:
    heard, texts = ["the red cat", "", "a b c d e"], ["The red bat.", "one two", "a, b - c"]
    wer, cer = error_rates(heard, texts)
    plain = [spoken_form(text) for text in texts]
    assert plain == ["the red bat", "one two", "a b c"]
    assert wer.mean == pytest.approx(metrics.wer(heard, plain)) == pytest.approx(5 / 8)
    assert cer.mean == pytest.approx(metrics.cer(heard, plain))
    assert (wer.n, wer.groups) == (3, 3)
    assert wer.low < wer.mean < wer.high
    assert spoken_form("Don't -- 'stop' it, she said!") == "don't stop it she said"
    with pytest.raises(ValueError, match="at least one word"):
        error_rates(["a"], ["..."])
    with pytest.raises(ValueError, match="1 recognised utterances against 2 texts"):
        error_rates(["a"], ["a", "b"])


# ------------------------------------------------------------------------------------------------------ whose voice


def test_a_voice_is_nearest_to_itself(slt: list[tuple[str, np.ndarray]]) -> None:
    known = {name: [(wave, RATE) for _, wave in synthetic(name, "train", 8)] for name in ("slt", "rms")}
    state = torch.random.get_rng_state()
    voices = Voices(known)
    assert torch.equal(state, torch.random.get_rng_state())
    for _, wave in slt[:4]:  # sentences that neither mean has heard
        match = voices.match(wave, RATE, "slt")
        assert match.nearest == "slt"
        assert match.own > 0.75 > 0.7 > match.other
        wrong = voices.match(wave, RATE, "rms")
        assert (wrong.nearest, wrong.own, wrong.other) == ("slt", match.other, match.own)
    assert voices.match(np.zeros(RATE), RATE, "slt").nearest == ""
    assert speaker_embedding(np.zeros(RATE), RATE) is None
    with pytest.raises(KeyError, match="nobody"):
        voices.match(slt[0][1], RATE, "nobody")
    with pytest.raises(ValueError, match="at least two"):
        Voices({"slt": known["slt"]})


# ------------------------------------------------------------------------------------------------- what a codec loses


def test_identical_recordings_are_perfect_and_noise_lowers_them(
    person: np.ndarray, slt: list[tuple[str, np.ndarray]]
) -> None:
    for wave in (person, slt[0][1]):
        assert mel_distance(wave, wave, RATE) == 0
        assert pesq(wave, wave, RATE) == pytest.approx(4.64, abs=0.02)
        assert stoi(wave, wave, RATE) == pytest.approx(1, abs=1e-4)
        scores = [[f(wave, noisy(wave, db), RATE) for db in (30, 10, -5)] for f in (mel_distance, pesq, stoi)]
        assert 0 < scores[0][0] < scores[0][1] < scores[0][2]
        assert 4.64 > scores[1][0] > scores[1][1] > scores[1][2] >= 1
        assert 1 > scores[2][0] > scores[2][1] > scores[2][2] > 0
        opus = decode_audio(encode_audio(wave, RATE, "opus", 24_000), RATE)
        assert pesq(wave, opus, RATE) > 3
        assert stoi(wave, opus, RATE) > 0.9


def test_the_mel_distance_is_in_decibels(person: np.ndarray) -> None:
    loud = np.random.default_rng(0).normal(size=RATE).astype(np.float32) * 0.1
    assert mel_distance(loud, loud / 10, RATE) == pytest.approx(20, abs=0.1)
    silence = np.zeros(RATE, dtype=np.float32)
    assert mel_distance(silence, silence + 1e-7, RATE) == 0  # both below the floor
    with pytest.raises(ValueError, match="same samples in time"):
        mel_distance(person, person[: len(person) // 2], RATE)
    with pytest.raises(ValueError, match="one window"):
        mel_distance(person[:100], person[:100], RATE)


def test_measures_of_speech_need_speech(person: np.ndarray) -> None:
    silence = np.zeros(RATE, dtype=np.float32)
    with pytest.raises(ValueError, match="silence"):
        pesq(silence, silence, RATE)
    with pytest.raises(ValueError, match="STOI needs"):
        stoi(person[:2000], person[:2000], RATE)
    with pytest.raises(ValueError, match="PESQ finds no speech"):
        pesq(person[:1000], person[:1000], RATE)


# -------------------------------------------------------------------------------------------------------- all together


def test_failures_are_counted(slt: list[tuple[str, np.ndarray]]) -> None:
    text, wave = slt[0]
    silence = np.zeros(RATE, dtype=np.float32)
    good = Spoken(text=text, wav=wave, sample_rate=RATE, reference=wave)
    cut = Spoken(text=text, wav=np.concatenate([wave[: len(wave) // 3], silence]), sample_rate=RATE, reference=wave)
    endless = Spoken(text=text, wav=np.tile(wave, 4), sample_rate=RATE, hit_limit=True)
    nothing = frozenset[str]()
    assert failures([good, good]) == {"reference": [nothing] * 2, "generated": [nothing] * 2}
    silent = Spoken(text=text, wav=silence + SILENT_PEAK / 2, sample_rate=RATE, reference=wave)
    found = failures([good, cut, endless, silent])
    assert found["generated"] == [nothing, {"cut"}, {"endless"}, {"silent"}]
    assert found["reference"] == [nothing] * 3  # endless has none
    # Without a reference the pace of the others tells how long it should last.
    alone = Spoken(text=text, wav=cut.wav, sample_rate=RATE)
    assert failures([good, alone])["generated"] == [nothing, {"cut"}]
    assert failures([alone])["generated"] == [nothing]
    assert spoken_seconds(np.concatenate([silence, wave, silence]), RATE) == pytest.approx(
        spoken_seconds(wave, RATE), abs=0.011
    )
    assert spoken_seconds(silence, RATE) == 0
    assert is_silent(silence)


def test_all_scores(slt: list[tuple[str, np.ndarray]], words: list[str]) -> None:
    known = {name: [(wave, RATE) for _, wave in synthetic(name, "train", 4)] for name in ("slt", "rms")}

    def said(waves: Sequence[np.ndarray]) -> list[Spoken]:
        return [
            Spoken(
                text=text,
                wav=generated,
                sample_rate=RATE,
                reference=wave,
                round_trip=noisy(wave, 20),
                voice="slt",
                id=str(i),
            )
            for i, ((text, wave), generated) in enumerate(zip(slt, waves, strict=False))
        ]

    good = score_speech(
        said([wave for _, wave in slt[:4]]), voices=Voices(known), grammar_words=words, open_vocabulary=False
    )
    wrong = score_speech(said([wave for _, wave in slt[4:8]]), grammar_words=words, open_vocabulary=False)
    assert good.n == 4
    assert set(good.wer) == {"word_loop"}
    assert good.wer["word_loop"]["generated"] == good.wer["word_loop"]["reference"]
    assert wrong.wer["word_loop"]["generated"].mean > 0.3 > good.wer["word_loop"]["generated"].mean
    assert set(wrong.cer["word_loop"]) == {"generated", "reference", "round_trip"}
    assert good.right_voice["generated"].mean == 1
    assert good.own_voice["generated"].low > good.other_voice["generated"].high
    assert wrong.own_voice == {}
    assert good.pace is not None
    assert good.pace.mean == 1
    assert good.pesq is not None
    assert 1 < good.pesq.mean < 4
    assert good.stoi is not None
    assert good.mel_db is not None
    assert good.heard[0]["word_loop/generated"] == good.heard[0]["word_loop/reference"]
    assert asdict(good)["wer"]["word_loop"]["reference"]["n"] == 4
    with pytest.raises(ValueError, match="no utterances"):
        score_speech([])


def test_speech_is_scored_without_judges_that_are_missing(
    slt: list[tuple[str, np.ndarray]], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing_judges() == ()
    for module in JUDGES:
        monkeypatch.setitem(sys.modules, module, None)
    assert missing_judges() == tuple(JUDGES)
    assert "PESQ" in missing_judges_notice(missing_judges())
    text, wave = slt[0]
    said = Spoken(text=text, wav=wave, sample_rate=RATE, reference=wave, round_trip=noisy(wave, 20), voice="slt")
    scores = score_speech([said], grammar_words=words, without=missing_judges())
    assert (scores.wer, scores.pesq, scores.stoi) == ({}, None, None)
    assert scores.mel_db is not None
    assert scores.mel_db.mean > 0
    assert {kind: rate.mean for kind, rate in scores.failure_rates["generated"].items()} == {
        "endless": 0, "cut": 0, "silent": 0
    }  # fmt: skip
    with pytest.raises(ImportError, match="eval"):
        score_speech([said], grammar_words=words, without=("pocketsphinx", "pystoi"))


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    judges._decoder.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "omnitrain\[eval\]"'):
        recognise(np.zeros(RATE), RATE)
    judges._decoder.cache_clear()


# ------------------------------------------------------------------------------------------------- Whisper as a judge


class FakeWhisper:
    """In place of `faster_whisper.WhisperModel`: "hears" the loudest frequency, in Hz."""

    supported_languages = ("en", "fr")

    def __init__(self, path: str, **options: object) -> None:
        self.path, self.calls = path, []

    def transcribe(self, wav: np.ndarray, **options: object) -> tuple[list[SimpleNamespace], None]:
        self.calls.append((wav.dtype, options["language"]))
        hertz = np.abs(np.fft.rfft(wav)).argmax() * 16_000 / len(wav)
        said = f" {round(hertz, -1):.0f}."
        if hertz > 3_000 and "no_repeat_ngram_size" not in options:
            return [SimpleNamespace(text=40 * said, compression_ratio=9.0)], None
        return [SimpleNamespace(text=text, compression_ratio=0.8) for text in (" I hear", said)], None

    def detect_language(self, wav: np.ndarray) -> tuple[str, float, list[tuple[str, float]]]:
        language = "fr" if np.abs(np.fft.rfft(wav)).argmax() * 16_000 / len(wav) > 600 else "en"
        return language, 0.9, [(language, 0.9)]


def sine(hertz: float, rate: int = RATE) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Whisper:
    (tmp_path / "model.bin").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=FakeWhisper))
    return Whisper(str(tmp_path))


def test_whisper_hears_at_its_own_rate_in_the_language_of_the_sample(fake: Whisper) -> None:
    assert fake.hear(sine(400), RATE, "en") == "I hear 400."
    assert fake.hear(sine(700, 16_000), 16_000, "fr-CA") == "I hear 700."
    assert fake.hear(sine(700), RATE) == "I hear 700."
    assert fake._model.calls == [(np.float32, "en"), (np.float32, "fr"), (np.float32, None)]
    assert fake.hear(np.zeros(RATE, np.float32), RATE, "en") == ""
    assert fake.hear(sine(400), RATE, "en") == "I hear 400."
    assert len(fake._model.calls) == 3  # the same is not heard again
    assert fake.hear(sine(4_000), RATE, "en") == "I hear 4000."  # and not forty times
    assert [fake.language(sine(hertz), RATE) for hertz in (400, 700)] == ["en", "fr"]
    assert fake.language(np.zeros(RATE, np.float32), RATE) == ""
    with pytest.raises(ValueError, match="2 languages, but not 'cs'"):
        fake.hear(sine(400), RATE, "cs")


def test_speech_in_any_language_is_scored_by_whisper(fake: Whisper) -> None:
    said = [
        Spoken(text="I hear four hundred", wav=sine(400), sample_rate=RATE, reference=sine(400), language="en"),
        Spoken(text="I hear 700!", wav=sine(500), sample_rate=RATE, reference=sine(700), language="fr"),
    ]
    scores = score_speech(said, open_vocabulary=False, whisper=fake)
    assert set(scores.wer) == {"whisper"}
    assert scores.wer["whisper"]["reference"].mean == 0  # "four hundred" is "400" to the English normaliser
    assert scores.wer["whisper"]["generated"].mean == pytest.approx(1 / 9)  # "I hear 4 0 0", "I hear cinq cents"
    assert scores.heard[1]["whisper/generated"] == "I hear 500."


def test_error_rates_with_and_without_whispers_normalisation() -> None:
    heard, texts = ["don't press 7 [noise]"], ["Do not press seven."]
    assert error_rates(heard, texts, ["en"])[0].mean == 0
    assert error_rates(heard, texts)[0].mean == 1.0
    assert error_rates(["ano"], ["Ano!"], ["cs"])[1].mean == 0
    with pytest.raises(ValueError, match="nothing is left of"):
        error_rates(["hm"], ["Hmm"], ["en"])


def test_a_judge_that_cannot_be_loaded_is_named_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nowhere is no folder; evaluation\.judge"):
        find_whisper(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"a folder without model\.bin"):
        find_whisper(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"no weights")
    find_whisper(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        Whisper(str(tmp_path))
    find_whisper("base")
    find_whisper("somebody/whisper")
    with pytest.raises(ValueError, match=r"'largev3' is unknown \(did you mean large-v3\?\)"):
        find_whisper("largev3")
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ImportError, match=r'pip install "omnitrain\[eval\]"'):
        find_whisper("base")


@pytest.mark.skipif("OMNITRAIN_TEST_WHISPER" not in os.environ, reason="OMNITRAIN_TEST_WHISPER names no model")
def test_a_real_whisper_hears_the_words(slt: list[tuple[str, np.ndarray]]) -> None:
    judge = Whisper(os.environ["OMNITRAIN_TEST_WHISPER"])
    heard = [judge.hear(wave, RATE, "en") for _, wave in slt[:4]]
    word_errors, _ = error_rates(heard, [text for text, _ in slt[:4]], ["en"] * 4)
    assert word_errors.mean < 0.3


class Identity:
    """A codec that loses nothing."""

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        return wav

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes


def test_the_judge_of_the_settings_hears_what_the_evaluation_made(
    fake: Whisper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(listening, "missing_judges", lambda: tuple(JUDGES))  # the others take their time
    source = SampleSource(ROOT / "pack_speech", split="heldout_concept")
    settings = CodecEvaluation(max_samples=2, judge=fake.name)
    summary = listening.judge_codec(Identity(), {"speech": source}, {}, settings, tmp_path / "eval")
    assert summary["recogniser"] == "Whisper"
    assert set(summary["wer"]["whisper"]) == {"reference", "round_trip", "generated"}
    assert json.loads((tmp_path / "eval/speech.json").read_text())["judge"] == fake.name
    rows = [label for label, *_ in _speech(summary)["tables"][0].rows]
    assert f"WER, Whisper {Path(fake.name).name}" in rows


@pytest.mark.parametrize(
    ("text", "heard", "language"),
    [
        ("message from extension zero nine three six", "Message from extension 0, 9, 3, 6.", "en"),
        ("you have seven hundred sixty six messages", "You have 766 messages.", "en-US"),
        ("Wednesday at four fifty", "Wednesday at 4.50.", "en"),
        ("vous avez dix-sept messages", "Vous avez 17 messages.", "fr"),
        ("appuyez sur deux zéro trois", "Appuyez sur 203.", "fr"),
        ("понедельник седьмой сентября", "Понедельник, 7 сентября.", "ru"),
        ("у вас десять новых сообщений", "У вас 10 новых сообщений.", "ru"),
        ("marque seis tres", "Marque 6-3.", "es"),
        ("premere 1", "Premere uno.", "it"),
    ],
)
def test_numbers_are_compared_as_they_are_said(text: str, heard: str, language: str) -> None:
    pytest.importorskip("num2words")
    said, found = compared(text, heard, language)
    assert said == found
    assert int(error_rates([heard], [text], [language])[0].mean) == 0
    another = heard.replace("7", "8").replace("6", "5").replace("0", "9").replace("uno", "due")
    said, found = compared(text, another, language)
    assert said != found


def test_numbers_of_an_unknown_language_stay() -> None:
    assert compared("седем", "7", "bg") == ("седем", "7")
    assert compared("vingt et un", "21 ans", "fr") == ("vingt et un", "vingt et un ans")
