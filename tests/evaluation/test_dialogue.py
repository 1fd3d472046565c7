"""Whole dialogues are scored by what is written, what is heard of it, and when."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omnitrain.data.media import encode_audio
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.evaluation import dialogue, listening
from omnitrain.evaluation.dialogue import judge_dialogues, read_questions
from omnitrain.evaluation.judges import JUDGES
from omnitrain.evaluation.settings import DialogueEvaluation
from omnitrain.generation.speech import AudioPiece, Done, Event, TextPiece
from omnitrain.reports.run import _speech

RATE = 24_000
WRITTEN = ["Message from six.", "message from nine", "", "message from one"]
"""What the model writes, in the order of the rows, which say: six, two, four, one."""


def tone(i: int) -> np.ndarray:
    return 0.3 * np.sin(np.arange(RATE) * (i + 1) / 20).astype(np.float32)


def row(i: int, number: str) -> Sample:
    asked = Segment(type="audio", text="Whose is it?", media=encode_audio(tone(20 + i), 16_000, "flac"))
    if i % 2:
        asked = Segment(type="text", text="Whose is it?")
    said = Segment(type="speech", text=f"message from {number}", media=encode_audio(tone(i), RATE, "flac"))
    return Sample(
        id=f"{i}", source=f"dialogues/{'text' if i % 2 else 'aloud'}", task="dialogue", languages=("en",),
        meta={"voice": "ann"},
        messages=(Message(role="user", segments=(asked,)), Message(role="assistant", segments=(said,))),
    )  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> SampleSource:
    write_shards(
        [row(i, n) for i, n in enumerate(("six", "two", "four", "one"))], tmp_path / "shards", "d", progress=False
    )
    return SampleSource(tmp_path / "shards")


class Judge:
    def __init__(self, name: str) -> None:
        self.name = name

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str:
        return "message from six" if len(wav) else ""


def test_it_is_right_if_it_is_what_the_data_say(
    source: SampleSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    order = [source[i].id for i in range(4)]

    def speak(sessions: Sequence[Any], messages: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Event]]:
        for i, (session, turns) in enumerate(zip(sessions, messages, strict=True)):
            number = int(order[len(asked)])
            asked.append((session.options, turns))
            words = WRITTEN[number].split()
            for n, word in enumerate(words):
                yield i, TextPiece(text=" " * bool(n) + word, ids=(n,), seconds=0.1 * (n + 1))
                if number != 3 and n == 1:  # the last one speaks when all is written
                    yield i, AudioPiece(wav=tone(number), codes=np.zeros(2), frame=0, seconds=0.25)
            if number == 3:
                yield i, AudioPiece(wav=tone(number), codes=np.zeros(2), frame=0, seconds=0.5)
            yield i, Done(reason="end" if words else "silent", seconds=1.0)

    monkeypatch.setattr(dialogue, "speak_batch", speak)
    monkeypatch.setattr(dialogue, "SpeechSession", lambda model, encoder, **options: SimpleNamespace(**options))
    monkeypatch.setattr(listening, "missing_judges", lambda: tuple(JUDGES))
    monkeypatch.setattr(listening, "Whisper", Judge)
    speaker: Any = SimpleNamespace(model=None, samples_per_frame=1920, talker=None)
    settings = DialogueEvaluation(judge="fake", batch=3)
    summary = judge_dialogues(speaker, None, {"d": source}, {}, settings, tmp_path / "eval")  # type: ignore[arg-type]

    assert len({options.seed for options, _ in asked}) == 4
    assert {options.voice for options, _ in asked} == {"ann"}
    media = [segment.media for _, turns in asked for m in turns for segment in m.segments if segment.type == "audio"]
    assert [bool(m) for m in media] == [True, True]
    found = summary["dialogue"]
    assert (found["n"], found["right"]["mean"], found["sound_first"]["mean"]) == (4, 0.5, 0.5)
    assert {name: of["mean"] for name, of in found["right_by_source"].items()} == {
        "dialogues/aloud": 0.5, "dialogues/text": 0.5
    }  # fmt: skip
    assert found["first_sound"]["mean"] == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    # Of the words that were written, "nine" and "one" are heard as another; of the mute answer, those of the data.
    assert summary["wer"]["whisper"]["generated"]["mean"] == pytest.approx((0 + 1 + 3 + 1) / 12)
    assert summary["wer"]["whisper"]["reference"]["n"] == 2  # only a right answer has a recording of its text
    assert json.loads((tmp_path / "eval/speech.json").read_text())["dialogue"]["n"] == 4
    table = _speech(summary)["tables"][0]
    assert table.title == "4 dialogues"
    assert ("answered as in the data", "50% [0%, 100%]") in table.rows


def test_only_recorded_answers_are_asked_for(tmp_path: Path) -> None:
    silent = row(0, "six")
    silent = Sample(id="s", source="d", task="qa", messages=(silent.messages[0], Message(
        role="assistant", segments=(Segment(type="text", text="six"),))))  # fmt: skip
    write_shards([silent], tmp_path / "shards", "d", progress=False)
    with pytest.raises(ValueError, match="no recorded answer with a text in d"):
        read_questions({"d": SampleSource(tmp_path / "shards")}, 4)
    with pytest.raises(ValueError, match=r"other_voices is for given texts"):
        DialogueEvaluation(other_voices=True)
