"""The one schema: a sample is messages, a message is a list of segments.

Everything that trains or evaluates a model is a :class:`Sample`: a captioned picture, a recording with its transcript,
a conversation with video, a plain document. Media travel as the *encoded* bytes of their file (PNG, Ogg, MP4, ...) or
as a path relative to the folder of the shard; they are decoded late (`media.py`), so that order, mixing and sharding
never touch pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

SegmentType = Literal["text", "image", "audio", "video", "speech"]
Role = Literal["system", "user", "assistant", "tool", "document"]

SEGMENT_TYPES: tuple[str, ...] = get_args(SegmentType)
ROLES: tuple[str, ...] = get_args(Role)
MEDIA: tuple[str, ...] = ("image", "audio", "video")
"""Segments that always have a file behind them."""
SPLITS: tuple[str, ...] = ("train", "validation", "heldout_cell", "heldout_concept")


class BadSample(Exception):
    """One sample that cannot be used. It is skipped, counted under `reason` and reported, never fatal by itself.

    Args:
        reason: short machine-readable class, e.g. ``"image_corrupt"``, ``"too_long"``. Counters are kept per reason.
        detail: what is wrong with this very sample and how to mend it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:  # crosses worker processes
        return (type(self), (self.reason, self.detail))


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One piece of a message.

    `text`: the text of a text segment; for `speech` (audio that the assistant must say) its transcript.
    `media`: encoded file bytes. `path`: instead of bytes, a path relative to the shard's folder, or
    ``"FILE.parquet#KEY"`` for a blob in a media table (columns `name`, `bytes`) beside the shard.
    `with_audio`: a video whose sound track is to be heard too (audio-in-video).
    """

    type: SegmentType
    text: str | None = None
    media: bytes | None = None
    path: str | None = None
    with_audio: bool = False

    @property
    def stored(self) -> bool:
        """Whether bytes are there, or a path to them."""
        return self.media is not None or self.path is not None


@dataclass(frozen=True, kw_only=True)
class Message:
    """`role` ``"document"`` marks a plain document: no chat markup, every token is a target."""

    role: Role
    segments: tuple[Segment, ...]


MODALITIES = ("text", "image", "audio", "video", "audio_video")
"""Groups that losses are reported and weighted by (`Sample.modality`), in the order of tables."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`task` groups losses and scores (``"caption"``, ``"asr"``, ``"s2tt"``, ``"t2tt"``, ``"sound"``, ``"video"``,
    ``"text"``, ...). `languages` are the languages of the input followed by the language of the output, where both
    exist (BCP 47, e.g. ``("en", "fr")``); `concept` names what a sample is about, so that splits and media swaps can
    group samples. `meta` holds anything else, as strings."""

    id: str
    source: str
    messages: tuple[Message, ...]
    split: str = "train"
    task: str = "text"
    licence: str = ""
    languages: tuple[str, ...] = ()
    concept: str = ""
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those of all messages, in order."""
        return tuple(segment for message in self.messages for segment in message.segments)

    @property
    def modality(self) -> str:
        """One of `MODALITIES`; ``audio_video`` is a video heard with its sound, or pictures beside audio."""
        kinds = {segment.type for segment in self.segments}
        heard = "audio" in kinds or any(segment.type == "video" and segment.with_audio for segment in self.segments)
        if heard and kinds & {"image", "video"}:
            return "audio_video"
        return next((kind for kind in ("video", "image", "audio") if kind in kinds), "text")

    @property
    def reference(self) -> str:
        """The text of the last assistant message (what a model should answer), or of the document."""
        for message in reversed(self.messages):
            if message.role in ("assistant", "document"):
                return "".join(segment.text or "" for segment in message.segments)
        return ""


def has_medium(segment: Segment) -> bool:
    """Whether there is a file behind the segment (the assistant's speech may be a transcript alone)."""
    return segment.type in MEDIA or (segment.type == "speech" and segment.stored)
