"""The layout of one spoken answer, position by position (the public model's: tests/interop/test_speech_parity.py)."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from omnitrain.data.batch import IGNORE
from omnitrain.data.chat import train_bpe
from omnitrain.data.codec_frames import SpeechCodes, encode_codes
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import AudioGeometry, VisionGeometry
from omnitrain.data.media import MediaLimits
from omnitrain.data.positions import AudioSpan, ImageSpan, TextSpan, tm_rope_positions
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.talker_layout import SpeechTokens, SpokenWords, TalkerDocument, UserTurns, talker_layout, user_turns
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


def test_a_text_that_keeps_step_with_the_voice() -> None:
    paced = replace(SPECIAL, frames_per_word=2)
    given = lambda answer: talker_layout(*NOBODY, np.array(answer), CODES, special=paced, speaker_code=VOICE)  # noqa: E731
    assert given([1]).text_ids[8:].tolist() == [1, EOS, PAD, PAD, PAD, PAD]
    assert given([1, 2, 3]).text_ids[8:].tolist() == [1, 2, PAD, 3, PAD, EOS]
    assert given([1, 2, 3, 4]).text_ids[8:].tolist() == [1, 2, PAD, 3, PAD, 4]
    for name in ("codec_ids", "frame_rows", "labels", "position_ids", "frame_sources"):
        assert np.array_equal(getattr(given([1, 2, 3]), name), getattr(layout(), name)), name
    with pytest.raises(BadSample, match=r"5 text tokens for 5 frames; 2 frames \(model\.talker\.frames_per_word\)"):
        given([1, 2, 3, 4, 5])


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


def test_an_answer_in_training_is_read_without_its_thoughts_and_calls() -> None:
    """The layout of the whole message is that of its spoken words alone."""
    tokenizer = train_bpe(["the red cat", "user\nassistant\n"] * 20, 320)
    speech = SpeechCodes(codebooks=4, speakers={"slt": VOICE}, default_voice="slt", **SPECIAL.special_codes())
    encoder = SampleEncoder(
        tokenizer=tokenizer, audio=AudioGeometry(), vision=VisionGeometry(), limits=MediaLimits(), speech=speech
    )

    def spoken(*around: str) -> TalkerDocument:
        recording = Segment(type="speech", text="the red cat", media=encode_codes(np.tile(CODES, (4, 1)), ""))
        texts = [Segment(type="text", text=text) for text in around]
        question = Message(role="user", segments=(Segment(type="text", text="what?"),))
        answer = Message(role="assistant", segments=(*texts[:1], recording, *texts[1:]))
        encoded = encoder(Sample(id="a", source="a", messages=(question, answer)), lambda s: s.media or b"")
        assert (encoded.labels >= 0).sum() >= len(tokenizer.encode("the red cat"))
        return encoded.spoken[0]

    plain = spoken()
    whole = spoken("<think>\nthe cat\n</think>\n\n", '<tool_call>\n{"name": "the red cat"}\n</tool_call>')
    for name in (f.name for f in fields(TalkerDocument)):
        np.testing.assert_array_equal(getattr(whole, name), getattr(plain, name))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_what_may_be_said_does_not_depend_on_how_it_comes(size: int) -> None:
    special = replace(SPECIAL, silent=((1, 2), (3, 4)), blank=frozenset({9}))
    written = [7, 1, 5, 3, 9, 2, 9, 9, 6, 9, 3, 1, 2, 4, 9, 8, 2, 4, 9, 7, 3, 6]
    words = SpokenWords(special)
    said = [i for at in range(0, len(written), size) for i in words.take(written[at : at + size])]
    assert said == [7, 6, 9, 8, 7]
