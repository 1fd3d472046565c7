"""What the Talker reads for one spoken answer, as in the public checkpoint.

    user's turns    text: its ids            media: rows of the Thinker's hidden states
    header          <|im_start|> assistant \\n   pad      pad        pad        pad      bos  word 0
    + codec            -         -       -     nothink  think_bos  think_eos  speaker  pad  bos
    frame f         the frame's codes + word f + 1, after the last word end-of-text once, then pad

(With `frames_per_word` = n a word stands with every n-th frame, and pad between: `word_of_frame`.)

The position before a frame predicts its codebook 0; the last frame predicts the end. The system prompt and earlier
answers are left out, and TM-RoPE ids are counted over what is left. Nothing here touches a model: the arrays have the
names of `models.talker.TalkerInputs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from omnitrain.data.batch import IGNORE, TalkerDocument
from omnitrain.data.positions import Span, TextSpan, span_tokens, tm_rope_positions
from omnitrain.data.sample import BadSample
from omnitrain.vocabulary import TEXT, SpecialCodes


@dataclass(frozen=True, kw_only=True)
class SpeechTokens(SpecialCodes):
    """The ids that the layout writes or looks for.

    Attributes:
        user_header: how a user's turn starts, ``<|im_start|>user``; its first id starts every turn
        assistant_header: ``<|im_start|>assistant`` and the newline (three ids in the public tokenizer)
        tts_pad, tts_bos, tts_eos: in the Thinker's vocabulary
        silent: (begin, end) of what is written, but never said: thoughts, calls, and their answers
        blank: tokens of nothing but space and line breaks
        frames_per_word: see `TalkerConfig`
    """

    user_header: tuple[int, ...]
    assistant_header: tuple[int, ...]
    tts_pad: int
    tts_bos: int
    tts_eos: int
    silent: tuple[tuple[int, int], ...] = ()
    blank: frozenset[int] = frozenset()
    frames_per_word: int = 1


def word_of_frame(frame: int, frames_per_word: int) -> int | None:
    """Which word is read with a frame: frame n k has word k + 1, where n = `frames_per_word`, and others have none."""
    k, between = divmod(frame, frames_per_word)
    return None if between else k + 1


class SpokenWords:
    """What the Talker may read of an answer, in training and while it is written: never a thought or a call.

    A stretch from the begin of one of `SpeechTokens.silent` to *its* end is left out with both tokens, also where it
    is never closed, and with the space and line breaks behind it. What begins within it (a thought about calls) does
    not end it. Begins and ends are tokens: characters that spell one are text (`data.chat`), and are said.
    """

    def __init__(self, special: SpeechTokens) -> None:
        self._ends, self._blank = dict(special.silent), special.blank
        self._until: int | None = None  # the token that ends what is being left out
        self._behind = False  # whether the space behind it is

    def take(self, ids: Iterable[int]) -> list[int]:
        """Of the answer's next tokens, those to be said."""
        return [index for index in ids if self._is_said(int(index))]

    def _is_said(self, index: int) -> bool:
        if self._until is not None:
            if index == self._until:
                self._until, self._behind = None, True
            return False
        if index in self._ends:
            self._until = self._ends[index]
            return False
        if index in self._ends.values():  # of nothing that was begun
            self._behind = True
            return False
        self._behind = self._behind and index in self._blank
        return not self._behind


class UserTurns(NamedTuple):
    """ids: int64 [n].  is_media: bool [n].  rows: int64 [n], positions in the Thinker's sequence.  position_ids:
    float32 [3, n], counted anew."""

    ids: np.ndarray
    is_media: np.ndarray
    rows: np.ndarray
    position_ids: np.ndarray


def user_turns(
    input_ids: np.ndarray,
    token_types: np.ndarray,
    spans: Sequence[Span],
    *,
    special: SpeechTokens,
    merge: int = 2,
    ids_per_second: float = 13,
) -> UserTurns:
    """The user's turns before an answer, each from its ``<|im_start|>`` to the position before the next one.

    Args:
        input_ids, token_types: [n], the chat up to the answer (`RenderedChat`); what follows would count too.
        spans: its spans, or those of the whole chat.
        merge, ids_per_second: as for `tm_rope_positions`.
    """
    kept = in_user_turns(input_ids, special.user_header)
    ends = np.cumsum([span_tokens(span, merge) for span in spans])
    left: list[Span] = []
    for span, here in zip(spans, np.split(kept, ends)[:-1], strict=True):
        if here.any():
            left.append(TextSpan(int(here.sum())) if isinstance(span, TextSpan) else span)  # media lie inside one turn
    rows = np.flatnonzero(kept)
    return UserTurns(input_ids[rows], token_types[rows] != TEXT, rows, tm_rope_positions(left, merge, ids_per_second))


def in_user_turns(input_ids: np.ndarray, user_header: tuple[int, ...]) -> np.ndarray:
    """bool [n]: which positions of a chat [n] belong to a user's turn. `user_header`: see `SpeechTokens`."""
    kept = np.zeros(len(input_ids), dtype=bool)
    starts = np.flatnonzero(input_ids == user_header[0])
    for start, end in zip(starts, [*starts[1:], len(input_ids)], strict=True):
        kept[start:end] = tuple(input_ids[start : start + len(user_header)]) == user_header
    return kept


def talker_layout(
    user_ids: np.ndarray,
    user_is_media: np.ndarray,
    user_rows: np.ndarray,
    user_position_ids: np.ndarray,
    answer_ids: np.ndarray,
    codes: np.ndarray,
    *,
    special: SpeechTokens,
    speaker_code: int,
    may_end_early: bool = False,
) -> TalkerDocument:
    """One document: ``talker_layout(*user_turns(...), answer_ids, codes, special=..., speaker_code=...)``.

    Args:
        user_ids, user_is_media, user_rows: [n].  user_position_ids: [3, n].  See `UserTurns`; n may be 0.
        answer_ids: int64 [m], what is said of the answer's text (`SpokenWords`), without ``<|im_end|>``.
        codes: int64 [F, Q], the recording. F = 0 lays out the prompt of a generation: nothing is predicted in it.
        speaker_code: the voice's code.
        may_end_early: a take of which it is known that it may be cut off, before its last word was given.

    Raises BadSample: "no_speakable_text" for an empty answer, "speech_shorter_than_text" if the recording ends before
    its last word was given, "speech_bad_codes" for codes outside the codebook.
    """
    answer, codes = np.asarray(answer_ids, dtype=np.int64), np.asarray(codes, dtype=np.int64)
    frames, words, users = len(codes), len(answer), len(user_ids)
    if not words:
        raise BadSample("no_speakable_text", "the spoken answer has no text tokens; give its segment a transcript")
    if codes.ndim != 2:
        raise BadSample("speech_bad_codes", f"codes must be [frames, codebooks], found {list(codes.shape)}")
    if codes.size and not (codes.min() >= 0 and codes.max() < special.codebook_size):
        detail = f"codes {codes.min()} to {codes.max()} do not lie in 0..{special.codebook_size - 1}"
        raise BadSample("speech_bad_codes", detail)
    pace = special.frames_per_word
    if frames and not may_end_early and (words - 2) * pace >= frames:
        takes = "one frame takes" if pace == 1 else f"{pace} frames (model.talker.frames_per_word) take"
        detail = f"{words} text tokens for {frames} frames; {takes} one text token"
        raise BadSample("speech_shorter_than_text", detail)

    header = [*special.assistant_header, *[special.tts_pad] * 4, special.tts_bos, answer[0]]
    codec = [special.codec_nothink, special.codec_think_bos, special.codec_think_eos, speaker_code, special.codec_pad]
    header_codec = [*[-1] * len(special.assistant_header), *codec, special.codec_bos]
    before = users + len(header)  # positions before the first frame
    trailing = np.full(max(frames, words * pace), special.tts_pad, dtype=np.int64)  # from the second word on
    trailing[: words * pace : pace] = [*answer[1:], special.tts_eos]
    text_ids = np.concatenate([np.where(user_is_media, -1, user_ids), header, trailing[:frames]]).astype(np.int64)
    hidden_rows, codec_ids, frame_rows = np.full((3, before + frames), -1, dtype=np.int64)
    hidden_rows[:users] = np.where(user_is_media, user_rows, -1)
    codec_ids[users:before] = header_codec
    frame_rows[before:] = np.arange(frames)
    labels = np.full(before + frames, IGNORE, dtype=np.int64)
    if frames:
        labels[before - 1 : -1] = codes[:, 0]
        labels[-1] = special.codec_eos
    # The user's turns end in text, whose three ids are equal; what follows counts on.
    start = user_position_ids[:, -1].max() + 1 if users else 0
    spoken = np.arange(len(header) + frames, dtype=np.float32) + np.float32(start)
    position_ids = np.concatenate([user_position_ids, np.broadcast_to(spoken, (3, len(spoken)))], axis=1)
    return TalkerDocument(
        text_ids=text_ids,
        hidden_rows=hidden_rows,
        codec_ids=codec_ids,
        frame_rows=frame_rows,
        labels=labels,
        position_ids=position_ids.astype(np.float32),
        codes=codes,
        frame_sources=np.arange(before - 1, before - 1 + frames, dtype=np.int64),
    )
