"""Long recordings: what is asked is in the sound, at the place that the row names, and splits stay apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data_prep import long_recordings
from data_prep.edit import SPEECH_RATE
from data_prep.long_recordings import MOST_TIMES, Piece, questions, stitch, waveform
from omnitrain.config.locations import PACK
from omnitrain.data.adapters import open_source
from omnitrain.data.media import decode_audio, encode_audio


def tone(hertz: float, text: str, seconds: float = 0.5) -> Piece:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * SPEECH_RATE)) / SPEECH_RATE)
    return Piece(text, "en", encode_audio(wave.astype(np.float32), SPEECH_RATE, "wav"))


SENTENCES = [tone(300 + 40 * i, f"Sentence {i}.") for i in range(12)]
BELL = tone(2000, "A bell.")


def heard_at(wave: np.ndarray, second: float) -> int:
    """The pitch of 0.2 s of it, in Hz."""
    part = wave[round(second * SPEECH_RATE) :][: SPEECH_RATE // 5]
    return int(np.abs(np.fft.rfft(part)).argmax()) * 5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("minutes", [0.1, 0.5])
def test_questions_have_the_answer_that_is_heard(minutes: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    placed = stitch(SENTENCES, BELL, minutes, rng)
    wave = waveform(placed)
    assert minutes * 60 - 1 < len(wave) / SPEECH_RATE < minutes * 60 + 5
    starts = [part.start / SPEECH_RATE for part in placed]
    bells = [s for s in starts if heard_at(wave, s + 0.1) == 2000]
    assert 1 <= len(bells) <= MOST_TIMES
    pitch = {f"Sentence {i}.": 300 + 40 * i for i in range(12)}
    kinds = set()
    for question in questions(placed, rng):
        kinds.add(question.kind)
        if question.kind == "count":
            assert question.answer == f"{len(bells)}."
        elif question.answer != "A bell." and question.sample is not None:
            assert abs(heard_at(wave, question.sample / SPEECH_RATE + 0.1) - pitch[question.answer]) <= 5
        if question.kind == "after":
            assert question.sample is not None
            assert min(s for s in starts if s > bells[0]) == question.sample / SPEECH_RATE
        if question.kind == "first":
            assert question.sample == placed[0].start
        if question.kind == "moment":
            time = next(word for word in question.text.split() if ":" in word).strip("?.")
            minute, second = map(int, time.split(":"))
            assert question.answer == next(p.piece.text for p in placed if p.end > (60 * minute + second) * SPEECH_RATE)
    assert {"which", "count", "first"} <= kinds
    assert ("after" in kinds) == (len(bells) == 1)


def test_rows_are_the_same_each_time_and_of_one_split(tmp_path: Path) -> None:
    common = ["--shards", str(PACK), "--split", "heldout_cell", "--no-progress"]
    common += ["--minutes", "0.1", "0.2", "--recordings", "4", "--format", "flac"]
    for out, more in (("a", []), ("b", ["--single"]), ("c", ["--single"])):
        assert long_recordings.main([*common, *more, "--out", str(tmp_path / out)]) == 0
    b, c = (sorted(p for p in (tmp_path / x).iterdir() if p.suffix == ".parquet") for x in "bc")
    assert [hashlib.sha256(p.read_bytes()).digest() for p in b] == [hashlib.sha256(p.read_bytes()).digest() for p in c]

    talks = open_source(tmp_path / "a", name="a")
    assert len(talks) == 4
    assert all(len(talks[i].messages) >= 6 and len(talks[i].messages) % 2 == 0 for i in range(4))
    held = open_source(tmp_path / "c", split="heldout_cell", name="c")
    sources = open_source(PACK, split="heldout_cell", where={"task": ["asr"], "languages": ["es"]}, name="pack")
    sentences = {sources[i].reference for i in range(len(sources))}
    for i in range(len(held)):
        row = held[i]
        seconds, at = float(row.meta["seconds"]), float(row.meta["needle_seconds"])
        assert float(row.meta["needle_share"]) == pytest.approx(at / seconds, abs=1e-3)
        assert len(decode_audio(held.media_bytes(row.segments[0]))) == pytest.approx(seconds * SPEECH_RATE, abs=400)
        assert row.licence == "GPL-2.0-only"
        if row.task in ("needle_first", "needle_after", "needle_moment"):
            assert row.reference in sentences


def test_too_few_pieces_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--shards", str(PACK), "--out", str(tmp_path), "--speech", "eo", "--no-progress"]
    assert long_recordings.main(line) == 1
    assert "0 sentences in eo" in capsys.readouterr().out
