"""The layout of one spoken answer, position by position (the public model's: tests/interop/test_speech_parity.py)."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from omnitrain.data.batch import IGNORE
from omnitrain.data.positions import AudioSpan, ImageSpan, TextSpan, tm_rope_positions
from omnitrain.data.sample import BadSample
from omnitrain.data.talker_layout import SpeechTokens, TalkerDocument, UserTurns, talker_layout, user_turns
from omnitrain.vocabulary import AUDIO, IMAGE, TEXT

START, USER, SYSTEM, ASSISTANT, NEWLINE, END = 90, 91, 92, 93, 94, 95
PAD, BOS, EOS = 80, 81, 82
C_PAD, C_BOS, C_EOS, NOTHINK, THINK, UNTHINK, VOICE = 110, 111, 112, 117, 118, 119, 130
SPECIAL = SpeechTokens(
    user_header=(START, USER),
    assistant_header=(START, ASSISTANT, NEWLINE),
    tts_pad=PAD,
    tts_bos=BOS,
    tts_eos=EOS,
    codec_pad=C_PAD,
    codec_bos=C_BOS,
    codec_eos=C_EOS,
    codec_nothink=NOTHINK,
    codec_think_bos=THINK,
    codec_think_eos=UNTHINK,
    codebook_size=100,
)
CODES = np.array([[10 * f + q for q in range(4)] for f in range(5)])  # code of frame f, codebook q
NOBODY = UserTurns(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64), np.zeros((3, 0), np.float32))


def layout(user: UserTurns = NOBODY, answer: tuple[int, ...] = (1, 2, 3), codes: np.ndarray = CODES) -> TalkerDocument:
    return talker_layout(*user, np.array(answer, dtype=np.int64), codes, special=SPECIAL, speaker_code=VOICE)


def test_an_answer_without_a_user() -> None:
    """As a voice that reads a text aloud."""
    doc = layout()
    assert doc.text_ids.tolist() == [START, ASSISTANT, NEWLINE, PAD, PAD, PAD, PAD, BOS, 1, 2, 3, EOS, PAD, PAD]
    assert doc.codec_ids.tolist() == [-1, -1, -1, NOTHINK, THINK, UNTHINK, VOICE, C_PAD, C_BOS, *[-1] * 5]
    assert doc.frame_rows.tolist() == [*[-1] * 9, 0, 1, 2, 3, 4]
    assert doc.labels.tolist() == [*[IGNORE] * 8, 0, 10, 20, 30, 40, C_EOS]
    assert doc.frame_sources.tolist() == [8, 9, 10, 11, 12]
    assert (doc.hidden_rows == -1).all()
    assert doc.position_ids.tolist() == [list(range(14))] * 3
    assert len(doc) == 14


def chat() -> tuple[np.ndarray, np.ndarray, list]:
    """System (4 tokens), user with a picture of 2 x 2 tokens, an answer, user with 3 tokens of sound."""
    parts = [
        ([START, SYSTEM, 5, END], TEXT),
        ([START, USER, NEWLINE], TEXT),
        ([70] * 4, IMAGE),
        ([6, END, NEWLINE], TEXT),
        ([START, ASSISTANT, NEWLINE, 7, 8, END, NEWLINE], TEXT),
        ([START, USER, NEWLINE], TEXT),
        ([71] * 3, AUDIO),
        ([END, NEWLINE], TEXT),
    ]
    ids = np.array([i for part, _ in parts for i in part], dtype=np.int64)
    types = np.array([kind for part, kind in parts for _ in part], dtype=np.uint8)
    return ids, types, [TextSpan(7), ImageSpan((1, 4, 4)), TextSpan(13), AudioSpan(3), TextSpan(2)]


def test_only_the_user_s_turns_are_heard() -> None:
    ids, types, spans = chat()
    user = user_turns(ids, types, spans, special=SPECIAL)
    assert user.rows.tolist() == [*range(4, 14), *range(21, 29)]
    assert user.ids.tolist() == ids[user.rows].tolist()
    assert user.is_media.nonzero()[0].tolist() == [3, 4, 5, 6, 13, 14, 15]
    expected = tm_rope_positions([TextSpan(3), ImageSpan((1, 4, 4)), TextSpan(6), AudioSpan(3), TextSpan(2)])
    assert np.array_equal(user.position_ids, expected)


def test_spans_of_the_whole_chat_serve_an_earlier_answer() -> None:
    ids, types, spans = chat()
    user = user_turns(ids[:14], types[:14], spans, special=SPECIAL)
    assert user.rows.tolist() == list(range(4, 14))
    assert np.array_equal(user.position_ids, tm_rope_positions([TextSpan(3), ImageSpan((1, 4, 4)), TextSpan(3)]))


def test_media_are_read_from_the_thinker() -> None:
    ids, types, spans = chat()
    user = user_turns(ids, types, spans, special=SPECIAL)
    doc, alone, n = layout(user), layout(), len(user.ids)
    assert doc.text_ids[:n].tolist() == np.where(user.is_media, -1, user.ids).tolist()
    assert doc.hidden_rows[:n].tolist() == np.where(user.is_media, user.rows, -1).tolist()
    assert (doc.labels[:n] == IGNORE).all()
    for name in ("text_ids", "hidden_rows", "codec_ids", "frame_rows", "labels"):
        assert np.array_equal(getattr(doc, name)[n:], getattr(alone, name)), name
    assert np.array_equal(doc.frame_sources, alone.frame_sources + n)
    assert np.array_equal(doc.position_ids[:, n:], alone.position_ids + user.position_ids[:, -1].max() + 1)


@pytest.mark.parametrize("words", [1, 5, 6])
def test_text_of_any_length_that_fits(words: int) -> None:
    """One frame takes one word; the end of the text is read if there is a frame left for it."""
    given = layout(answer=tuple(range(1, words + 1))).text_ids[8:].tolist()
    assert given == [*range(1, words + 1), EOS, PAD, PAD, PAD, PAD, PAD][:6]


def test_the_prompt_of_a_generation() -> None:
    doc = layout(codes=np.zeros((0, 4), dtype=np.int64))
    assert doc.text_ids.tolist() == layout().text_ids[:9].tolist()
    assert (doc.labels == IGNORE).all()
    assert doc.frame_sources.shape == (0,)
    assert doc.codes.shape == (0, 4)


def test_types() -> None:
    doc = layout(user_turns(*chat(), special=SPECIAL))
    assert doc.heard is None  # a layout touches no model
    for field in fields(doc):
        if field.name == "heard":
            continue
        assert getattr(doc, field.name).dtype == (np.float32 if field.name == "position_ids" else np.int64), field.name
        assert getattr(doc, field.name).flags.c_contiguous, field.name


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(answer=()), "no_speakable_text"),
        (dict(answer=tuple(range(7))), "speech_shorter_than_text"),
        (dict(codes=CODES + 60), "speech_bad_codes"),
        (dict(codes=CODES - 1), "speech_bad_codes"),
        (dict(codes=CODES[:, 0]), "speech_bad_codes"),
    ],
)
def test_what_cannot_be_spoken(arguments: dict, reason: str) -> None:
    with pytest.raises(BadSample) as error:
        layout(**arguments)
    assert error.value.reason == reason
