"""One list of media and rows that cannot be used, with the reason that each must be counted under.

Used by the tests of the decoders, of `omnitrain data verify` and of the stream (skip and count).
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnitrain.data.media import encode_audio, encode_image, encode_video
from omnitrain.data.sample import Message, Sample, Segment, SegmentType
from omnitrain.data.shards import write_shards


@lru_cache
def good_image(format: str = "png") -> bytes:
    """A noisy picture of 48 x 64 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return encode_image(pixels, format)  # ty: ignore[invalid-argument-type]


@lru_cache
def good_audio(format: str = "wav", seconds: float = 1.0) -> bytes:
    """A rising tone at 16 kHz."""
    time = np.arange(round(16_000 * seconds)) / 16_000
    wave = 0.5 * np.sin(2 * np.pi * (200 + 300 * time) * time)
    return encode_audio(wave.astype(np.float32), 16_000, format)  # ty: ignore[invalid-argument-type]


@lru_cache
def good_video(with_audio: bool = True, seconds: float = 1.5) -> bytes:
    """Eight noisy frames per second of 32 x 48 pixels, with a tone."""
    frames = np.random.default_rng(0).integers(0, 256, (round(8 * seconds), 32, 48, 3), dtype=np.uint8)
    tone = 0.3 * np.sin(np.arange(round(16_000 * seconds)) * 0.2)
    return encode_video(frames, 8, tone.astype(np.float32) if with_audio else None)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def image_bomb(side: int = 50_000) -> bytes:
    """A PNG of a few bytes whose header says `side` x `side` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _damaged(data: bytes, begin: float, end: float) -> bytes:
    """`data` with its bytes between two fractions of its length replaced by noise."""
    first, last = int(len(data) * begin), int(len(data) * end)
    return data[:first] + np.random.default_rng(1).bytes(last - first) + data[last:]


def _cut(data: bytes, fraction: float = 0.6) -> bytes:
    return data[: int(len(data) * fraction)]


@lru_cache
def video_index_first() -> bytes:
    """`good_video` with its index before the frames, as web servers have it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.mp4"
        with (
            av.open(io.BytesIO(good_video())) as source,
            av.open(str(path), "w", options={"movflags": "+faststart"}) as target,
        ):
            streams = {s: target.add_stream_from_template(s) for s in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream]
                    target.mux(packet)
        return path.read_bytes()


def video_without_frames() -> bytes:
    """An MP4 whose picture track holds no frame (its sound track holds one)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*sound.encode(frame), *sound.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


@dataclass(frozen=True)
class CorruptMedium:
    """`make()` gives the bytes of a `type` segment; decoding them must raise `BadSample(reason)`."""

    name: str
    type: SegmentType
    reason: str
    make: Callable[[], bytes]


CORRUPT_MEDIA: tuple[CorruptMedium, ...] = (
    CorruptMedium("png_cut_off", "image", "image_corrupt", lambda: _cut(good_image())),
    CorruptMedium("jpeg_cut_off", "image", "image_corrupt", lambda: _cut(good_image("jpeg"))),
    CorruptMedium("png_damaged", "image", "image_corrupt", lambda: _damaged(good_image(), 0.4, 0.6)),
    CorruptMedium("png_header_only", "image", "image_corrupt", lambda: good_image()[:20]),
    CorruptMedium("png_bomb", "image", "image_too_large", image_bomb),
    CorruptMedium("image_ribbon", "image", "image_aspect_ratio", lambda: encode_image(np.zeros((2, 900, 3), np.uint8))),
    CorruptMedium("ogg_as_image", "image", "wrong_type", lambda: good_audio("opus")),
    CorruptMedium("nothing_as_image", "image", "wrong_type", lambda: b""),
    CorruptMedium("wav_cut_off", "audio", "audio_corrupt", lambda: _cut(good_audio("wav"))),
    CorruptMedium("opus_cut_off", "audio", "audio_corrupt", lambda: _cut(good_audio("opus", 3.0))),
    CorruptMedium("vorbis_cut_off", "audio", "audio_corrupt", lambda: _cut(good_audio("vorbis", 3.0))),
    CorruptMedium("flac_cut_off", "audio", "audio_corrupt", lambda: _cut(good_audio("flac"))),
    CorruptMedium("flac_damaged", "audio", "audio_corrupt", lambda: _damaged(good_audio("flac"), 0.3, 0.7)),
    CorruptMedium("mp4_sound_cut_off", "audio", "audio_corrupt", lambda: _cut(good_video())),
    CorruptMedium("wav_empty", "audio", "audio_empty", lambda: encode_audio(np.zeros(0, np.float32), 16_000, "wav")),
    CorruptMedium("png_as_audio", "audio", "wrong_type", good_image),
    CorruptMedium("silent_video_as_audio", "audio", "audio_empty", lambda: good_video(with_audio=False)),
    CorruptMedium("text_as_audio", "audio", "wrong_type", lambda: b"<html>404 Not Found</html>"),
    CorruptMedium("mp4_index_lost", "video", "video_corrupt", lambda: _cut(good_video())),
    CorruptMedium("mp4_cut_off", "video", "video_corrupt", lambda: _cut(video_index_first(), 0.7)),
    CorruptMedium("mp4_damaged", "video", "video_corrupt", lambda: _damaged(video_index_first(), 0.3, 0.8)),
    CorruptMedium("mp4_no_frames", "video", "video_no_frames", video_without_frames),
    CorruptMedium("wav_as_video", "video", "wrong_type", good_audio),
    CorruptMedium("png_as_video", "video", "wrong_type", good_image),
    CorruptMedium("playlist_as_video", "video", "wrong_type", lambda: b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n"),
)


def media_sample(name: str, type: SegmentType, media: bytes | None, path: str | None = None) -> Sample:
    """A question about one medium, with an answer."""
    return Sample(
        id=name,
        source="corrupt",
        task="caption",
        languages=("en",),
        messages=(
            Message(
                role="user",
                segments=(Segment(type=type, media=media, path=path), Segment(type="text", text="What is this?")),
            ),
            Message(role="assistant", segments=(Segment(type="text", text="A thing."),)),
        ),
    )


def corrupt_shard(folder: Path, good: int = 8) -> tuple[Path, dict[str, str]]:
    """A shard with `good` sound samples between all the bad ones: corrupt media, paths that lead nowhere or out of the
    folder, broken rows and text that is not UTF-8.

    Returns:
        the shard, and the expected reason by sample id (ids of sound samples begin with ``"good"``).
    """
    media = [
        ("image", good_image()),
        ("audio", good_audio("opus")),
        ("video", good_video()),
        ("image", good_image("jpeg")),
    ]
    samples, reasons = [], {}
    for case in CORRUPT_MEDIA:
        samples.append(media_sample(case.name, case.type, case.make()))
        reasons[case.name] = case.reason
    for name, path, reason in [
        ("path_missing", "pictures/none.png", "media_missing"),
        ("path_outside", "../secret.png", "media_outside"),
        ("path_absolute", "/etc/passwd", "media_outside"),
    ]:
        samples.append(media_sample(name, "image", None, path))
        reasons[name] = reason
    for i in range(good):
        kind, data = media[i % len(media)]
        samples.insert(i * 4, media_sample(f"good{i}", kind, data))  # ty: ignore[invalid-argument-type]
    samples += [media_sample(name, "image", good_image()) for name in ("role_unknown", "meta_broken", "not_utf8")]
    reasons |= {"role_unknown": "row_invalid", "meta_broken": "row_invalid", "not_utf8": "text_not_utf8"}
    [file] = write_shards(samples, folder, "corrupt", progress=False)
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[-3]["messages"][1]["role"] = "robot"
    rows[-2]["meta"] = json.dumps({"a": "b"})[:-1]
    concepts = [b""] * (len(rows) - 1) + [b"caf\xe9"]  # Latin-1
    table = pa.Table.from_pylist(rows, schema=table.schema)
    table = table.set_column(6, "concept", pa.array(concepts, pa.binary()).view(pa.string()))
    pq.write_table(table, file, row_group_size=4)
    return file, reasons
