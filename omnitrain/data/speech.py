"""Codec frames: how they are kept, and how a spoken answer becomes what the Talker learns.

Codes are kept where the recording was: a `speech` segment's medium is then a small safetensors file with one tensor
`codes` [F, Q] and, in its metadata, the codec's fingerprint. So everything that moves media moves codes too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from omnitrain.data.batch import IGNORE, TalkerDocument
from omnitrain.data.chat import ChatTokenizer, RenderedChat
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.talker_layout import SpeechTokens, talker_layout, user_turns

_METADATA = "omnitrain.codec"


def encode_codes(codes: np.ndarray, codec: str) -> bytes:
    """The file for codes [F, Q] of the codec with this fingerprint."""
    return save({"codes": np.ascontiguousarray(codes, dtype=np.uint16)}, metadata={_METADATA: codec})


def holds_codes(data: bytes) -> bool:
    """Whether a medium is such a file, by its first bytes (no recording begins like it)."""
    return _header(data).startswith(b"{")


def _header(data: bytes) -> bytes:
    """The JSON text of a safetensors file, whose length stands before it; empty for another file."""
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    return data[8 : 8 + size] if 0 < size <= len(data) - 8 else b""


def decode_codes(data: bytes, codec: str | None = None) -> np.ndarray:
    """Codes int64 [F, Q] from such a file.

    Args:
        codec: the fingerprint that they must have; None accepts any.

    Raises:
        BadSample: ``no_codes`` (a recording, or nothing that can be read), ``other_codec``.
    """
    if not holds_codes(data):
        raise BadSample(
            "no_codes",
            "the speech segment holds a recording, not codec frames; write them with "
            "`omnitrain data encode CODEC_RUN SHARDS --out FOLDER`",
        )
    try:
        codes = load(data)["codes"].astype(np.int64)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadSample("no_codes", f"the codec frames cannot be read: {error}") from error
    if codec is not None and f'"{codec}"'.encode() not in _header(data):
        raise BadSample(
            "other_codec",
            f"the codec frames are not those of codec {codec}; encode the recordings again with the codec that the "
            "Talker speaks through",
        )
    return codes


@dataclass(frozen=True, kw_only=True)
class SpeechCodes:
    """What the layout of spoken answers needs to know of the Talker.

    Attributes:
        codec_*: special codes.  codebook_size: codes are below it.  codebooks: codes of a frame.
        speakers: code of each voice; a sample's voice is its ``meta["voice"]``.
        codec: fingerprint of the codec whose frames are learnt; None: any.
        default_voice: of samples that name none.
    """

    codec_pad: int
    codec_bos: int
    codec_eos: int
    codec_nothink: int
    codec_think_bos: int
    codec_think_eos: int
    codebook_size: int
    codebooks: int
    speakers: Mapping[str, int] = field(default_factory=dict)
    codec: str | None = None
    default_voice: str | None = None

    def tokens(self, tokenizer: ChatTokenizer) -> SpeechTokens:
        """With the ids of `tokenizer`."""
        special = tokenizer.special_ids
        start = special["<|im_start|>"]
        return SpeechTokens(
            user_header=(start, *_word(tokenizer, "user")),
            assistant_header=(start, *tokenizer.encode("assistant\n")),
            tts_pad=special["<tts_pad>"],
            tts_bos=special["<tts_text_bos>"],
            tts_eos=special["<tts_text_eod>"],
            codec_pad=self.codec_pad,
            codec_bos=self.codec_bos,
            codec_eos=self.codec_eos,
            codec_nothink=self.codec_nothink,
            codec_think_bos=self.codec_think_bos,
            codec_think_eos=self.codec_think_eos,
            codebook_size=self.codebook_size,
        )

    def speaker(self, voice: str) -> int:
        """Code of a voice.

        Raises:
            BadSample: ``unknown_voice``.
        """
        name = voice or self.default_voice or ""
        if name not in self.speakers:
            raise BadSample(
                "unknown_voice",
                f"voice {name!r} is none of {', '.join(self.speakers) or '(no voice is configured)'}; name the "
                "recording's voice in meta 'voice', and add it to model.talker.speakers",
            )
        return self.speakers[name]


def spoken_answers(
    sample: Sample,
    chat: RenderedChat,
    media_bytes: Callable[[Segment], bytes],
    codes: SpeechCodes,
    tokenizer: ChatTokenizer,
    *,
    merge: int,
    ids_per_second: float,
) -> tuple[TalkerDocument, ...]:
    """One document for every assistant message of `sample` with a recording.

    Raises:
        BadSample: see `decode_codes`, `SpeechCodes.speaker` and `talker_layout`.
    """
    answers = [m for m in sample.messages if m.role == "assistant"]
    if not any(_recorded(message) for message in answers):
        return ()
    special = codes.tokens(tokenizer)
    documents = []
    for message, (first, end) in zip(answers, target_runs(chat.labels), strict=True):
        segment = _recorded(message)
        if segment is None:
            continue
        frames = decode_codes(media_bytes(segment), codes.codec)
        if frames.shape[1] < codes.codebooks:
            raise BadSample(
                "speech_bad_codes",
                f"frames have {frames.shape[1]} codes, the Talker says {codes.codebooks} (model.talker.codebooks)",
            )
        header = first + 1 - len(special.assistant_header)  # the last id of the header predicts the first word
        before = user_turns(
            chat.input_ids[:header],
            chat.token_types[:header],
            chat.spans,
            special=special,
            merge=merge,
            ids_per_second=ids_per_second,
        )
        documents.append(
            talker_layout(
                *before,
                chat.labels[first : end - 1],  # without <|im_end|>
                frames[:, : codes.codebooks],
                special=special,
                speaker_code=codes.speaker(sample.meta.get("voice", "")),
            )
        )
    return tuple(documents)


def _recorded(message: Message) -> Segment | None:
    """The recording of an assistant message, or None."""
    segments = [s for s in message.segments if s.type == "speech" and (s.media is not None or s.path is not None)]
    if len(segments) > 1:
        raise BadSample("several_recordings", "an assistant message has several recordings; join them into one")
    return segments[0] if segments else None


def target_runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of every stretch of targets, one per assistant message."""
    is_target = np.concatenate([[False], labels != IGNORE, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(is_target))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _word(tokenizer: ChatTokenizer, role: str) -> Sequence[int]:
    """Ids of a role name where a newline follows. A vocabulary that joins the two gives the joint ids."""
    whole, alone = tokenizer.encode(f"{role}\n"), tokenizer.encode(role)
    return alone if whole[: len(alone)] == alone else whole
