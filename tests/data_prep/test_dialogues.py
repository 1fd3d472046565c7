"""Dialogues: the picture has the digits that the answer says, the question decides the sentence, one asker is new."""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import dialogues
from data_prep.dialogues import QUESTIONS, digits_of, picture, question_of
from data_prep.splits import document_split
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from tests.data_prep.test_synthetic_speech import HUM

TEXTS = [
    "message from extension six one nine",
    "the person at extension two four zero two is unavailable",
    "the number i have is eight eight three",
    "message from phone number five one",
    "you have twenty new messages",
]


@pytest.fixture
def announcements(tmp_path: Path) -> Path:
    def row(text: str, kind: str) -> Sample:
        wave = 0.3 * np.sin(np.arange(8_000) * len(text) / 60).astype(np.float32)
        said = Segment(type="speech", text=text, media=encode_audio(wave, 16_000, "flac"))
        return Sample(
            id=f"announcements/asterisk_en/{kind}/{text}", source="announcements/asterisk_en",
            split=document_split(text), task="tts", languages=("en",), licence="CC-BY-SA-3.0", concept=text,
            meta={"voice": "asterisk_en", "joined": kind},
            messages=(
                Message(role="user", segments=(Segment(type="text", text=f"Say: {text}"),)),
                Message(role="assistant", segments=(said,)),
            ),
        )  # fmt: skip

    rows = [row(text, "sentence") for text in TEXTS] + [row("message from extension six", "fragment")]
    write_shards(rows, tmp_path / "announcements", "rows", progress=False)
    (tmp_path / "announcements/NOTICE.md").write_text("# By whom the prompts are")
    return tmp_path / "announcements"


def test_rows_are_dialogues(announcements: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin/flite"
    program.parent.mkdir()
    program.write_text(HUM.format(python=sys.executable))
    program.chmod(0o755)
    out = tmp_path / "out"
    line = [
        str(announcements),
        "--voices",
        "slt,rms",
        "--heldout-asker",
        "rms",
        "--flite",
        str(program),
        "--each",
        "12",
        "--written",
        "40",
    ]
    assert dialogues.main([*line, "--out", str(out), "--no-progress"]) == 0
    source = SampleSource(out)
    rows = [source[i] for i in range(len(source))]
    written = [row for row in rows if row.source == "dialogues/written"]
    assert 30 < len(written) <= 40
    for row in written:
        shown, asked = row.messages[0].segments
        [answer] = row.messages[1].segments
        assert (shown.type, asked.type, answer.type, row.split) == ("image", "text", "text", "train")
        assert asked.text in question_of(row.concept)
        assert row.concept == answer.text
        assert row.concept not in TEXTS
        assert source.media_bytes(shown) == picture(digits_of(row.concept), row.id)
    assert {len(digits_of(row.concept)) for row in written} == {1, 2, 3, 4, 5}
    rows = [row for row in rows if row.source != "dialogues/written"]
    assert Counter(row.concept for row in rows) == dict.fromkeys(TEXTS[:4], 12)
    askers = Counter(row.meta["asked_by"] for row in rows)
    assert set(askers) == {"text", "slt", "rms"}
    assert 12 < askers["text"] < 36
    for row in rows:
        shown, asked = row.messages[0].segments
        [said] = row.messages[1].segments
        assert (shown.type, said.type, said.text) == ("image", "speech", row.concept)
        assert asked.text in question_of(row.concept)
        aloud = row.meta["asked_by"] != "text"
        assert (asked.type, row.source) == (("audio", "dialogues/aloud") if aloud else ("text", "dialogues/text"))
        if aloud:
            wave = decode_audio(source.media_bytes(asked), 16_000)
            pitch = np.abs(np.fft.rfft(wave)).argmax() * 16_000 / len(wave)
            assert pitch == pytest.approx({"slt": 200, "rms": 100}[row.meta["asked_by"]], abs=3)
        known = document_split(row.concept)
        assert row.split == ("heldout_cell" if row.meta["asked_by"] == "rms" and known != "heldout_concept" else known)
        assert Image.open(io.BytesIO(source.media_bytes(shown))).size == dialogues.SIZE
    assert len({source.media_bytes(row.messages[0].segments[0]) for row in rows}) == len(rows)
    tokenizer = ChatTokenizer.from_file(out / "tokenizer.json")
    assert len(tokenizer.encode(" extension")) == 1
    notice = (out / "NOTICE.md").read_text()
    assert "By whom" in notice
    assert "synthetic" in notice
    assert dialogues.main([*line[:3], "--heldout-asker", "awb", *line[5:], "--out", str(tmp_path / "no")]) != 0


def test_a_picture_shows_its_digits() -> None:
    """Where a digit stands the picture is another than that of the same draws without it."""
    assert digits_of("the person at extension two four zero two is unavailable") == "2402"
    assert question_of("you have twenty new messages") == ()
    assert not set.intersection(*map(set, QUESTIONS.values()))

    def pixels(digits: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(picture(digits, "seed"))), dtype=int)

    width = dialogues.SIZE[0] // 5
    difference = np.abs(pixels("1888") - pixels("8888")).sum((0, 2)) > 200
    assert difference[:width].any()
    assert not difference[width:].any()
    assert np.array_equal(pixels("619"), pixels("619"))
