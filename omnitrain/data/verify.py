"""To check every row of a data set, and to count it: `omnitrain data verify` and `stats`."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from omnitrain.data.codec_frames import decode_codes, holds_codes
from omnitrain.data.media import MediaLimits, decode_audio, decode_image, decode_video, probe
from omnitrain.data.sample import BadSample, Sample, Segment, has_medium
from omnitrain.data.shards import Source


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and where it lies."""

    file: str
    row: int
    id: str
    reason: str
    detail: str


def check_sample(sample: Sample, media_bytes: Callable[[Segment], bytes], limits: MediaLimits, fps: float) -> int:
    """Decode every medium of `sample`. Returns the number of its codec frames (which are read, not made sound of).
    Raises BadSample: the first thing that is wrong with it."""
    codec_frames = 0
    for segment in filter(has_medium, sample.segments):
        data = media_bytes(segment)
        if segment.type == "image":
            decode_image(data, limits)
        elif segment.type == "video":
            decode_video(data, fps, limits)
        elif segment.type == "speech" and holds_codes(data):
            codec_frames += len(decode_codes(data))
        else:
            decode_audio(data, limits=limits)
    return codec_frames


def verify(
    source: Source,
    limits: MediaLimits | None = None,
    fps: float = 2.0,
    threads: int | None = None,
    codec_frames: Callable[[int], None] = lambda frames: None,
) -> Iterator[BadRow | None]:
    """Check every row in order: it can be read, its id is its own, all its media decode within `limits`.

    Args:
        fps: frames per second that videos are sampled at.
        threads: decoders at work; default: one per core.
        codec_frames: called with the number of codec frames of each good row.

    Yields:
        for each row None, or what is wrong with it.
    """
    limits = limits or MediaLimits()
    seen: dict[str, int] = {}

    def check(index: int) -> tuple[int, str, int, BadSample | None]:
        id, frames = "", 0
        try:
            sample = source[index]
            id = sample.id
            frames = check_sample(sample, source.media_bytes, limits, fps)
        except BadSample as error:
            return index, id, 0, error
        except (ValueError, OSError) as error:  # a damaged row group or media table
            return index, id, 0, BadSample("shard_damaged", str(error))
        return index, id, frames, None

    workers = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        indices = iter(range(len(source)))
        while window := list(islice(indices, 64 * workers)):
            for index, id, frames, error in pool.map(check, window):
                codec_frames(frames)
                if error is None and seen.setdefault(id, index) != index:
                    file, row = source.locate(seen[id])
                    error = BadSample("id_twice", f"the id stands in {file}, row {row} too; ids are unique in a source")
                file, row = source.locate(index)
                yield None if error is None else BadRow(file, row, id, error.reason, error.detail)


@dataclass
class Totals:
    """Sums over a group of samples. `tokens` counts text alone (None without a tokenizer), `target_characters` what the
    assistant says or a document holds."""

    samples: int = 0
    characters: int = 0
    target_characters: int = 0
    tokens: int | None = None
    images: int = 0
    image_pixels: int = 0
    audio_seconds: float = 0.0
    codec_frames: int = 0
    video_seconds: float = 0.0
    stored_bytes: int = 0
    bad: int = 0
    languages: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample, media_bytes: Callable[[Segment], bytes], count: Callable[[str], int] | None) -> None:
        self.samples += 1
        self.languages.update(dict.fromkeys(sample.languages or ("",), 1))
        for message in sample.messages:
            for segment in message.segments:
                if segment.text:
                    self.characters += len(segment.text)
                    if message.role in ("assistant", "document"):
                        self.target_characters += len(segment.text)
                    if count is not None:
                        self.tokens = (self.tokens or 0) + count(segment.text)
                if has_medium(segment):
                    self._add_medium(segment, media_bytes(segment))

    def _add_medium(self, segment: Segment, data: bytes) -> None:
        self.stored_bytes += len(data)
        if segment.type == "image":
            self.images += 1
            self.image_pixels += probe(data, "image").pixels
        elif segment.type == "video":
            self.video_seconds += probe(data, "video").seconds
        elif segment.type == "speech" and holds_codes(data):
            self.codec_frames += len(decode_codes(data))
        else:
            self.audio_seconds += probe(data, "audio").seconds

    def merge(self, other: Totals) -> None:
        for name, value in vars(other).items():
            if name == "languages":
                self.languages.update(value)
            elif value is not None:
                setattr(self, name, (getattr(self, name) or 0) + value)


def stats(
    source: Source, count_tokens: Callable[[str], int] | None = None, progress: Callable[[], None] = lambda: None
) -> dict[tuple[str, str, str], Totals]:
    """Totals by (modality, task, split), read from the media's headers alone. A row that cannot be read counts as bad
    under ("?", "?", "?"), a sample with a broken medium under its own group.

    Args:
        count_tokens: tokens of a text.
        progress: called after each row.
    """
    groups: dict[tuple[str, str, str], Totals] = defaultdict(Totals)
    for index in range(len(source)):
        key = ("?", "?", "?")
        try:
            sample = source[index]
            key = (sample.modality, sample.task, sample.split)
            groups[key].add(sample, source.media_bytes, count_tokens)
        except BadSample:
            groups[key].bad += 1
        progress()
    return dict(sorted(groups.items()))
