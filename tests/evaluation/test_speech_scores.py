"""Scores of constructed signals: a judge that hears what it is told, voices that are numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import pytest
import torch

from omnitrain.data.media import encode_audio
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.evaluation import listening
from omnitrain.evaluation.judges import JUDGES, VoiceMatch, Voices
from omnitrain.evaluation.listening import bit_rate, judge_codec, judge_talker, print_speech
from omnitrain.evaluation.settings import CodecEvaluation, SpeechEvaluation
from omnitrain.evaluation.speech_scores import Spoken, failures, lacks_its_end, repeats, score_speech
from omnitrain.evaluation.speech_tables import speech_tables
from omnitrain.generation.speech import Speech
from omnitrain.interop.mimi import MimiCodec
from omnitrain.models.codec import Codec
from omnitrain.models.sizes import CodecConfig
from omnitrain.reports.run import _speech, read_run

RATE = 24_000
ONLY_WORDS = tuple(JUDGES)


def sound(seed: int, seconds: float = 1.0) -> np.ndarray:
    """Noise that is like no other."""
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


class Judge:
    """In place of `judges.Whisper`: knows what is said in each sound by its first sample, and in which language."""

    name = "fake"

    def __init__(self) -> None:
        self.said: dict[float, tuple[str, str]] = {}
        self.calls = 0

    def told(self, wav: np.ndarray, text: str, language: str) -> np.ndarray:
        self.said[float(wav[0])] = (text, language)
        return wav

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str:
        self.calls += 1
        text, spoken = self.said[float(wav[0])]
        assert language == spoken
        return text

    def language(self, wav: np.ndarray, sample_rate: int) -> str:
        return self.said[float(wav[0])][1][:2]


def utterances(judge: Judge, rows: Sequence[tuple[str, str, str, str, str, str]]) -> list[Spoken]:
    """Of (voice, language, text, what is heard of recording, of round trip, of the generated)."""
    return [
        Spoken(
            id=str(i), voice=voice, language=language, text=text, sample_rate=RATE,
            reference=judge.told(sound(3 * i), heard, language),
            round_trip=judge.told(sound(3 * i + 1), trip, language),
            wav=judge.told(sound(3 * i + 2), generated, language),
        )
        for i, (voice, language, text, heard, trip, generated) in enumerate(rows)
    ]  # fmt: skip


ROWS = [
    ("asterisk_en", "en", "please hold the line", "please hold the line", "please hold the pine", "please hold"),
    ("asterisk_en", "en", "press one now", "press won now", "press won now", "press won now now now"),
    ("asterisk_es", "es", "un montacargas rojo", "un montacargas rojo", "un rojo", "un montacargas rojo"),
    ("asterisk_es", "es", "no hay mensajes", "no hay mensajes", "no hay mensajes", "hola"),
]


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("text", "heard", "lacks"),
    [
        ("wait for the tone", "wait for the tone", False),
        ("wait for the tone", "wait for the", True),
        ("wait for the tone", "wait", True),
        ("wait for the tone", "wait four a", True),  # misheard, but understood
        ("wait for the tone", "wait for the stone", False),
        ("wait for the tone", "wait for the to", False),  # no whole word is missing
        ("wait for the tone", "for the tone", False),  # its beginning is missing
        ("wait for the tone", "wait for the tone and then some", False),
        ("wait for the tone", "mmm", False),  # babble: nobody can tell
        ("wait for the tone", "", False),
        ("hello", "", False),
        ("montacargas azul", "monta cargas azul", False),  # words are parted elsewhere
        ("", "anything", False),
    ],
)
def test_a_text_without_its_end(text: str, heard: str, lacks: bool) -> None:
    assert lacks_its_end(text, heard) == lacks


@pytest.mark.parametrize(
    ("text", "heard", "again"),
    [
        ("the red cat", "the red cat", False),
        ("the red cat", "the red red cat", True),
        ("the red cat", "the red cat the red cat", True),
        ("the red cat", "red cat red cat", True),
        ("the red cat", "the cat the red", False),  # twice, but not in a row
        ("no no", "no no", False),
        ("no no", "no no no", True),
        ("no no no", "no no", False),
        ("the red cat", "", False),
    ],
)
def test_words_said_again(text: str, heard: str, again: bool) -> None:
    assert repeats(text, heard) == again


def test_failures_by_words_are_looked_for_in_recordings_too() -> None:
    judge = Judge()
    said = utterances(judge, ROWS)
    said[3] = replace(said[3], hit_limit=True)
    heard = {s: [judge.said[float(u.signals[s][0])][0] for u in said] for s in ("reference", "round_trip", "generated")}
    heard["reference"][2] = "un montacargas montacargas rojo"  # the judge's own false alarm
    found = failures(said, heard)
    assert found["generated"] == [{"cut"}, {"repeated"}, frozenset(), {"endless"}]
    assert found["round_trip"] == [frozenset()] * 4
    assert found["reference"] == [frozenset(), frozenset(), {"repeated"}, frozenset()]
    silent = replace(said[0], wav=np.zeros(RATE, np.float32), hit_limit=True)
    assert failures([silent], {"reference": [""], "round_trip": [""], "generated": ["a a a"]})["generated"] == [
        {"silent", "endless"}
    ]


# -------------------------------------------------------------------------------------------------------- all together


def test_scores_by_voice_are_those_of_its_utterances_alone() -> None:
    judge = Judge()
    said = utterances(judge, ROWS)
    scores = score_speech(said, open_vocabulary=False, whisper=judge, without=ONLY_WORDS)
    for signal, column in (("reference", 3), ("round_trip", 4), ("generated", 5)):
        expected = jiwer.wer([row[2] for row in ROWS], [row[column] for row in ROWS])
        assert scores.wer["whisper"][signal].mean == pytest.approx(expected)
        for voice, part in scores.by_voice.items():
            rows = [row for row in ROWS if row[0] == voice]
            assert part.n == 2
            assert part.wer["whisper"][signal].mean == pytest.approx(
                jiwer.wer([row[2] for row in rows], [row[column] for row in rows])
            )
            assert part.cer["whisper"][signal].mean == pytest.approx(
                jiwer.cer([row[2].replace(" ", "") for row in rows], [row[column].replace(" ", "") for row in rows]),
                abs=0.1,
            )
            alone = score_speech(
                [u for u in said if u.voice == voice], open_vocabulary=False, whisper=judge, without=ONLY_WORDS
            )
            assert replace(alone, heard=(), measured=()) == replace(part, right_language={})  # alone it has but one
    assert set(scores.by_voice) == {"asterisk_en", "asterisk_es"}
    assert scores.by_language == {}  # each voice has its own language: it would be the same
    assert scores.failure_rates["generated"]["cut"].mean == 0.25
    assert scores.by_voice["asterisk_en"].failure_rates["generated"]["repeated"].mean == 0.5
    assert "endless" not in scores.failure_rates["reference"]
    crossed = [replace(u, voice="asterisk_en") for u in said]
    scores = score_speech(crossed, open_vocabulary=False, whisper=judge, without=ONLY_WORDS)
    assert scores.by_voice == {}
    assert set(scores.by_language) == {"en", "es"}


def test_each_voice_in_each_language_has_scores_of_its_own() -> None:
    """Of voices that speak another's language: also whether the judge takes it for that language."""
    judge = Judge()
    said = utterances(judge, ROWS)
    other = {"asterisk_en": "asterisk_es", "asterisk_es": "asterisk_en"}
    said += [replace(u, voice=other[u.voice]) for u in said]
    judge.told(said[2].wav, "un montacargas rojo", "es")
    scores = score_speech(said, open_vocabulary=False, whisper=judge, without=ONLY_WORDS)
    pairs = [f"{voice} in {language}" for voice in other for language in ("en", "es")]
    assert sorted(scores.by_voice_and_language) == pairs
    assert {part.n for part in scores.by_voice_and_language.values()} == {2}
    wer = scores.by_voice_and_language["asterisk_en in es"].wer["whisper"]["generated"]
    assert wer.mean == pytest.approx(jiwer.wer([row[2] for row in ROWS[2:]], [row[5] for row in ROWS[2:]]))
    assert scores.right_language["generated"].mean == 1
    judge.hear = lambda wav, rate, language="": judge.said[float(wav[0])][0]  # type: ignore[method-assign]
    judge.told(said[2].wav, "a red lift", "en-GB")  # a Spanish text, in an English mouth
    scores = score_speech(said, open_vocabulary=False, whisper=judge, without=ONLY_WORDS)
    assert scores.right_language["generated"].mean == 6 / 8  # said twice
    assert scores.by_voice_and_language["asterisk_es in es"].right_language["generated"].mean == 0.5
    assert scores.right_language["reference"].mean == 1
    of_pairs = next(t for t in speech_tables(asdict(scores)) if t.headings[0] == "voice and language")
    assert {row[0] for row in of_pairs.rows} == set(pairs)
    english = score_speech(said[:2], open_vocabulary=False, whisper=judge, without=ONLY_WORDS)
    assert english.right_language == {}  # all texts are in one language


def test_word_errors_are_paired_with_those_of_the_recording() -> None:
    judge = Judge()
    rows = [("v", "en", "see the red cat", "see the red bat", "see the red bat", "see the red cat")] * 12
    scores = score_speech(utterances(judge, rows), open_vocabulary=False, whisper=judge, without=ONLY_WORDS)
    rise = scores.wer_rise["whisper"]
    assert (rise["round_trip"].mean, rise["round_trip"].low, rise["round_trip"].high) == (0, 0, 0)
    assert (rise["generated"].mean, rise["generated"].high) == (-0.25, -0.25)
    assert "reference" not in rise
    assert scores.by_voice == {}


def test_a_sound_that_is_two_signals_is_heard_once() -> None:
    judge = Judge()
    (u,) = utterances(judge, ROWS[:1])
    assert u.round_trip is not None
    scores = score_speech([replace(u, wav=u.round_trip)], open_vocabulary=False, whisper=judge, without=ONLY_WORDS)
    assert judge.calls == 2
    assert scores.heard[0]["whisper/generated"] == scores.heard[0]["whisper/round_trip"] == "please hold the pine"


def test_words_too_short_for_pesq_and_stoi_are_left_out_of_them() -> None:
    short = Spoken(text="sí", wav=sound(0, 0.2), sample_rate=RATE, reference=sound(0, 0.2), round_trip=sound(1, 0.2))
    long = replace(short, wav=sound(2, 2), reference=sound(2, 2), round_trip=sound(2, 2))
    without = ("pocketsphinx", "resemblyzer", "librosa", "pesq")
    scores = score_speech([short, long], without=without)
    assert scores.mel_db is not None
    assert scores.stoi is not None
    assert (scores.mel_db.n, scores.stoi.n) == (2, 1)
    assert scores.stoi.mean == pytest.approx(1, abs=1e-4)
    assert score_speech([short], without=without).stoi is None
    with pytest.raises(ValueError, match="same samples in time"):
        score_speech([replace(long, round_trip=sound(2, 1))], without=without)


def tone(hertz: float) -> np.ndarray:
    """A second with ten harmonics."""
    time = np.arange(RATE) / RATE
    return sum(0.1 / k * np.sin(2 * np.pi * k * hertz * time) for k in range(1, 11)).astype(np.float32)


class KnownVoices(Voices):
    """Recordings without Resemblyzer: nobody is asked whose voice it is."""

    def __init__(self, recordings: dict[str, list[tuple[np.ndarray, int]]]) -> None:
        self.recordings, self.means = recordings, dict.fromkeys(recordings, np.ones(1))

    def match(self, wav: np.ndarray, sample_rate: int, voice: str) -> VoiceMatch:
        other = next(name for name in self.recordings if name != voice)
        return VoiceMatch(nearest=voice, own=0.9, other=0.5, other_name=other)


def test_generated_speech_is_compared_with_the_pitch_of_its_voice() -> None:
    voices = KnownVoices({"low": [(tone(110), RATE)], "high": [(tone(220), RATE)]})
    said = [
        Spoken(text="a", voice=name, sample_rate=RATE, wav=tone(heard), reference=tone(own), round_trip=tone(own))
        for name, own, heard in (("low", 110, 220), ("high", 220, 220 * 2 ** (1 / 12)))
    ]
    scores = score_speech(said, voices=voices, without=("pocketsphinx", "pesq", "pystoi"))
    assert scores.by_voice["low"].pitch_rise["generated"].mean == pytest.approx(12, abs=0.2)
    assert scores.by_voice["high"].pitch_rise["generated"].mean == pytest.approx(1, abs=0.2)
    assert scores.by_voice["high"].pitch_rise["reference"].mean == pytest.approx(0, abs=0.1)
    assert scores.by_voice["high"].other_name["generated"] == "low"
    assert scores.voicing_error is not None
    assert scores.voicing_error.mean == 0
    assert scores.pitch_spread["reference"].mean < 0.3


# -------------------------------------------------------------------------------------------------- files and tables


class Halved:
    """A codec that makes everything half as loud."""

    def encode(self, wav: Any) -> Any:
        return wav

    def decode(self, codes: Any) -> Any:
        return codes / 2


def spoken_row(voice: str, language: str, text: str, wave: np.ndarray) -> Sample:
    recording = Segment(type="speech", text=text, media=encode_audio(wave, RATE, "flac"))
    return Sample(
        id=f"{voice}/{text}", source=f"voices/{voice}", split="heldout_concept", task="tts", languages=(language,),
        concept=text, licence="", meta={"voice": voice},
        messages=(
            Message(role="user", segments=(Segment(type="text", text=f"Say: {text}"),)),
            Message(role="assistant", segments=(recording,)),
        ),
    )  # fmt: skip


class HearsTheLanguage:
    """Hears one sentence in English, another in Spanish."""

    def __init__(self, name: str) -> None:
        self.name = name

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str:
        return {"en": "hello everybody", "es": "hola a todos"}[language]

    def language(self, wav: np.ndarray, sample_rate: int) -> str:
        return "es"


def test_voices_of_several_languages_in_one_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listening, "missing_judges", lambda: tuple(JUDGES))
    monkeypatch.setattr(listening, "Whisper", HearsTheLanguage)
    texts = [("asterisk_en", "en", "hello everybody"), ("asterisk_es", "es", "hola a todos")]
    rows = [spoken_row(*text, sound(i)) for i, text in enumerate(texts)]
    write_shards(rows, tmp_path / "shards", "voices", progress=False)
    source = SampleSource(tmp_path / "shards")
    summary = judge_codec(Halved(), {"voices": source}, {}, CodecEvaluation(judge="fake"), tmp_path / "eval")
    stored = json.loads((tmp_path / "eval/speech.json").read_text())
    assert set(stored["by_voice"]) == {"asterisk_en", "asterisk_es"}
    assert stored["wer"]["whisper"]["round_trip"]["mean"] == 0
    assert stored["right_language"]["round_trip"]["mean"] == 0.5
    assert stored["by_voice"]["asterisk_es"]["wer_rise"]["whisper"]["round_trip"]["mean"] == 0
    assert "heard" not in stored["by_voice"]["asterisk_es"]
    assert stored["bit_rate"] is None
    printed = capsys.readouterr().out
    for part in ("by voice", "asterisk_es", "failures per 100 sentences", "mel distance, dB"):
        assert part in printed
    tables = {table.title: table for table in _speech(stored)["tables"]}
    assert [row[:3] for row in tables["by voice"].rows] == [
        (voice, "1", signal) for voice in ("asterisk_en", "asterisk_es") for signal in ("recording", "codec round trip")
    ]
    assert all(len(row) == len(table.headings) for table in tables.values() for row in table.rows)
    assert tables["failures per 100 sentences"].rows[0] == (
        "all", "2", "recording", "–", "0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]"
    )  # fmt: skip
    assert [table.title for table in speech_tables({**summary, "bit_rate": 800.0})] == list(tables)
    print_speech({**summary, "bit_rate": 800.0})
    assert "0.80" in capsys.readouterr().out


class Speaks:
    """In place of `Speaker`, and of `speak_texts`: noise of one second, and a list of who was asked for what."""

    samples_per_frame = 1920

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def speak_texts(self, _: Any, __: Any, texts: Sequence[str], voices: Sequence[str], **___: Any) -> list[Speech]:
        self.asked += zip(voices, texts, strict=True)
        return [Speech(sound(50 + len(self.asked) + i), np.zeros((1, 1)), False) for i in range(len(texts))]


def test_texts_in_the_voices_of_others_are_scored_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speaks, texts = Speaks(), [("asterisk_en", "en", "hello everybody"), ("asterisk_es", "es", "hola a todos")]
    monkeypatch.setattr(listening, "missing_judges", lambda: tuple(JUDGES))
    monkeypatch.setattr(listening, "Whisper", HearsTheLanguage)
    monkeypatch.setattr(listening, "Speaker", Speaks)
    monkeypatch.setattr(listening, "speak_texts", speaks.speak_texts)
    rows = [spoken_row(*text, sound(i)) for i, text in enumerate(texts)]
    write_shards(rows, tmp_path / "shards", "voices", progress=False)
    source = {"voices": SampleSource(tmp_path / "shards")}
    settings = SpeechEvaluation(judge="fake", other_voices=True, players=1)
    summary = judge_talker(speaks, SimpleNamespace(), Halved(), source, {}, settings, tmp_path / "run/eval")  # type: ignore[arg-type]
    crossed = [("asterisk_es", "hello everybody"), ("asterisk_en", "hola a todos")]
    assert speaks.asked == [(voice, text) for voice, _, text in texts] + crossed
    assert summary["n"] == summary["other_voices"]["n"] == 2
    assert set(summary["by_voice"]) == {"asterisk_en", "asterisk_es"}
    assert summary["other_voices"]["by_voice"]["asterisk_en"]["right_language"]["generated"]["mean"] == 1
    assert summary["other_voices"]["by_voice"]["asterisk_es"]["right_language"]["generated"]["mean"] == 0
    (tmp_path / "run/config.yaml").write_text("evaluation: {scores: speech}")
    run = read_run(tmp_path / "run")
    assert [(row["id"], row["voice"], row["generated"] is None) for row in run.spoken] == [
        ("asterisk_en/hello everybody", "asterisk_en", False),
        ("asterisk_es/hola a todos", "asterisk_es", True),
        ("asterisk_en/hello everybody by asterisk_es", "asterisk_es", False),
        ("asterisk_es/hola a todos by asterisk_en", "asterisk_en", True),
    ]
    tables = {table.title: table for table in _speech(run.speech)["tables"]}
    assert [row[:3] for row in tables["in other voices, by voice and language"].rows] == [
        ("asterisk_en", "1", "generated"), ("asterisk_es", "1", "generated")
    ]  # fmt: skip
    assert [row[0] for row in tables["in other voices, failures per 100 sentences"].rows] == [
        "all", "asterisk_en", "asterisk_es"
    ]  # fmt: skip
    assert len(tables["failures per 100 sentences"].rows) == 9
    with pytest.raises(ValueError, match=r"evaluation\.other_voices=true: choose one"):
        SpeechEvaluation(other_voices=True, voice="asterisk_en")


def test_the_bit_rate_is_that_of_the_papers() -> None:
    with torch.device("meta"):
        codec = Codec(CodecConfig())  # 16 codebooks of 2,048 at 12.5 frames a second
    assert bit_rate(codec) == 2200
    model = torch.nn.Module()
    model.config = SimpleNamespace(frame_rate=12.5, codebook_size=2048)
    assert bit_rate(MimiCodec(model, quantizers=8)) == 1100  # Mimi's 1.1 kbit/s
    assert bit_rate(Halved()) is None
