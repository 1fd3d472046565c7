"""Lists of media and rows that cannot be used, with the reason that each must be counted under.

Used by the tests of the decoders, of `omnitrain data verify` and of the stream (skip and count).
`corrupt_shard` has one of each kind; `broken_files` has every format, cut and damaged at many places.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

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


# ------------------------------------------------------------------------------------------- every format, broken


def _picture(format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(good_image())).save(buffer, format, **options)
    return buffer.getvalue()


def _encoded(format: str, picture: str | None, sound: str | None, rate: int = 16_000, fps: int = 8) -> bytes:
    """Three seconds of noisy frames of 32 x 48 pixels with a tone, or five of a tone, as FFmpeg writes them."""
    seconds = 3 if picture else 5
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        video = container.add_stream(picture, rate=fps) if picture else None
        audio = container.add_stream(sound, rate=rate, layout="mono") if sound else None
        if sound == "wmav2":
            audio.bit_rate = 64_000  # it refuses less than 24,000, and what it is given by default
        if video is not None:
            video.width, video.height, video.pix_fmt = 48, 32, "rgb8" if picture == "gif" else "yuv420p"
            pixels = np.random.default_rng(0).integers(0, 256, (seconds * fps, 32, 48, 3), dtype=np.uint8)
            for index, image in enumerate(pixels):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = index
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None:
            tone = 0.3 * np.sin(np.arange(seconds * rate) * 1000 / rate)
            frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate = rate
            codec = audio.codec_context
            pieces = av.AudioResampler(codec.format, "mono", rate, frame_size=codec.frame_size)
            for piece in (*pieces.resample(frame), *pieces.resample(None)):
                container.mux(audio.encode(piece))
            container.mux(audio.encode(None))
    return buffer.getvalue()


@dataclass(frozen=True)
class Format:
    """`checked`: damage is found (checksums, or a code that not every sequence of bits is of). `ends`: the container
    says where it ends, so that a cut is found wherever it falls."""

    type: SegmentType
    make: Callable[[], bytes]
    checked: bool = False
    ends: bool = True


def _pcm(container: str, codec: str, subtype: str | None = None) -> Callable[[], bytes]:
    def make() -> bytes:
        buffer = io.BytesIO()
        tone = 0.3 * np.sin(np.arange(48_000) * 1000 / 16_000)
        soundfile.write(buffer, tone, 16_000, format=container, subtype=codec)
        return buffer.getvalue()

    return make


FORMATS: dict[str, Format] = {
    "png": Format("image", good_image, checked=True),
    "jpeg": Format("image", lambda: good_image("jpeg")),
    "jpeg_progressive": Format("image", lambda: _picture("JPEG", progressive=True)),
    "webp": Format("image", lambda: _picture("WEBP")),
    "webp_lossless": Format("image", lambda: _picture("WEBP", lossless=True)),
    "gif": Format("image", lambda: _picture("GIF")),
    "bmp": Format("image", lambda: _picture("BMP")),
    "tiff": Format("image", lambda: _picture("TIFF")),
    "tiff_lzw": Format("image", lambda: _picture("TIFF", compression="tiff_lzw")),
    "tiff_jpeg": Format("image", lambda: _picture("TIFF", compression="jpeg")),
    "avif": Format("image", lambda: _picture("AVIF")),
    "jpeg2000": Format("image", lambda: _picture("JPEG2000")),
    "wav": Format("audio", _pcm("WAV", "PCM_16")),
    "wav_float": Format("audio", _pcm("WAV", "FLOAT")),
    "wav_gsm": Format("audio", _pcm("WAV", "GSM610")),
    "wav_mp3": Format("audio", lambda: _encoded("wav", None, "libmp3lame")),
    "rf64": Format("audio", _pcm("RF64", "PCM_16")),
    "w64": Format("audio", _pcm("W64", "PCM_16")),
    "caf": Format("audio", _pcm("CAF", "PCM_16")),
    "aiff": Format("audio", _pcm("AIFF", "PCM_16")),
    "au": Format("audio", _pcm("AU", "PCM_16")),
    "flac": Format("audio", _pcm("FLAC", "PCM_16")),
    "mp3": Format("audio", lambda: _encoded("mp3", None, "libmp3lame"), checked=True),
    "opus": Format("audio", lambda: _encoded("ogg", None, "libopus", 48_000), checked=True),
    "vorbis": Format("audio", _pcm("OGG", "VORBIS"), checked=True),
    "aac": Format("audio", lambda: _encoded("adts", None, "aac"), checked=True),
    "m4a": Format("audio", lambda: _encoded("ipod", None, "aac"), checked=True),
    "ac3": Format("audio", lambda: _encoded("ac3", None, "ac3", 48_000), checked=True),
    "wma": Format("audio", lambda: _encoded("asf", None, "wmav2")),
    "webm_sound": Format("audio", lambda: _encoded("webm", None, "libopus", 48_000), checked=True),
    "mp4": Format("video", good_video, checked=True),
    "mp4_index_first": Format("video", video_index_first, checked=True),
    "mov": Format("video", lambda: _encoded("mov", "libx264", "aac"), checked=True),
    "matroska": Format("video", lambda: _encoded("matroska", "libx264", "aac"), checked=True),
    "webm": Format("video", lambda: _encoded("webm", "libvpx", "libopus", 48_000)),
    "avi": Format("video", lambda: _encoded("avi", "mpeg4", "libmp3lame")),
    "wmv": Format("video", lambda: _encoded("asf", "wmv2", "wmav2")),
    "flv": Format("video", lambda: _encoded("flv", "flv1", "libmp3lame", 44_100)),
    "mpegts": Format("video", lambda: _encoded("mpegts", "libx264", "aac"), ends=False),
    "mpeg": Format("video", lambda: _encoded("mpeg", "mpeg2video", "mp2", 44_100, 25), checked=True, ends=False),
    "mpegvideo": Format("video", lambda: _encoded("mpeg2video", "mpeg2video", None, fps=25), checked=True, ends=False),
    "gif_video": Format("video", lambda: _encoded("gif", "gif", None), checked=True),
}


@dataclass(frozen=True)
class BrokenFile:
    """`whole`: decoded as if nothing had happened is right too (nothing in the format shows the damage).
    `shorter`: so is less of it (nothing in the format says where it ends)."""

    name: str
    type: SegmentType
    make: Callable[[], bytes]
    whole: bool = False
    shorter: bool = False


def broken_files(name: str) -> Iterator[BrokenFile]:
    """One of `FORMATS` cut at ten places and damaged at five."""
    format = FORMATS[name]
    good = format.make()
    for tenth in range(10):
        cut = partial(_cut, good, tenth / 10 + 0.05)
        yield BrokenFile(f"{name}-cut{tenth}", format.type, cut, shorter=not format.ends)
    for fifth in range(5):
        begin = (fifth + 0.3) / 5
        noise = partial(_damaged, good, begin, begin + 0.05)
        yield BrokenFile(f"{name}-noise{fifth}", format.type, noise, not format.checked, not format.checked)


def _patched(data: bytes, at: int | bytes, new: bytes) -> bytes:
    """`data` with other bytes at a place, or behind the first `at` in it."""
    place = at if isinstance(at, int) else data.index(at) + len(at)
    return data[:place] + new + data[place + len(new) :]


def _riff(format: bytes, sound: bytes, size: int | None = None) -> bytes:
    size = len(sound) if size is None else size
    head = b"WAVEfmt " + struct.pack("<I", len(format)) + format + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", len(head) + len(sound)) + head + sound


def _pcm_header(channels: int = 1, rate: int = 16_000, bits: int = 16, code: int = 1) -> bytes:
    frame = channels * bits // 8
    return struct.pack("<HHIIHH", code, channels, rate, rate * frame % 2**32, frame % 2**16, bits)


_BIG16, _BIG32 = b"\xff\xff", b"\x7f\xff\xff\xff"
LYING_HEADERS: dict[str, tuple[SegmentType, Callable[[], bytes]]] = {
    "png_width_zero": ("image", lambda: image_bomb(0)),
    "png_larger": ("image", lambda: _patched(good_image(), b"IHDR", struct.pack(">II", 4000, 4000))),
    "jpeg_huge": ("image", lambda: _patched(good_image("jpeg"), b"\xff\xc0\0\x11\x08", _BIG16 * 2)),
    "gif_huge": ("image", lambda: _patched(_picture("GIF"), 6, _BIG16 * 2)),
    "bmp_huge": ("image", lambda: _patched(_picture("BMP"), 18, struct.pack("<ii", 60_000, 60_000))),
    "bmp_taller": ("image", lambda: _patched(_picture("BMP"), 22, struct.pack("<i", 4000))),
    "wav_rate_zero": ("audio", lambda: _riff(_pcm_header(rate=0), bytes(32_000))),
    "wav_rate_huge": ("audio", lambda: _riff(_pcm_header(rate=2**32 - 1), bytes(32_000))),
    "wav_no_channels": ("audio", lambda: _riff(_pcm_header(channels=0), bytes(32_000))),
    "wav_65535_channels": ("audio", lambda: _riff(_pcm_header(channels=65_535), bytes(131_070))),
    "wav_longer": ("audio", lambda: _riff(_pcm_header(), bytes(32_000), size=2_000_000_000)),
    "wav_no_bits": ("audio", lambda: _riff(_pcm_header(bits=0), bytes(32_000))),
    "wav_unknown_codec": ("audio", lambda: _riff(_pcm_header(code=0x7777), bytes(32_000))),
    "wav_no_format": ("audio", lambda: b"RIFF" + struct.pack("<I", 12) + b"WAVEdata" + bytes(4)),
    "aiff_longer": ("audio", lambda: _patched(_pcm("AIFF", "PCM_16")(), b"SSND", _BIG32)),
    "au_longer": ("audio", lambda: _patched(_pcm("AU", "PCM_16")(), 8, _BIG32)),
    "au_rate_zero": ("audio", lambda: _patched(_pcm("AU", "PCM_16")(), 16, bytes(4))),
    "caf_longer": ("audio", lambda: _patched(_pcm("CAF", "PCM_16")(), b"data", bytes(4) + _BIG32)),
    "w64_longer": ("audio", lambda: _patched(_pcm("W64", "PCM_16")(), 16, struct.pack("<Q", 2**40))),
    "flac_longer": ("audio", lambda: _patched(_pcm("FLAC", "PCM_16")(), 22, _BIG32)),
    "matroska_longer": (
        "video",
        lambda: _patched(_encoded("webm", "libvpx", None), b"\x18S\x80g\x01", bytes(3) + _BIG32),
    ),
    "mp4_box_longer": ("video", lambda: _patched(good_video(), good_video().index(b"mdat") - 4, _BIG32)),
    "mp4_box_of_two_bytes": (
        "video",
        lambda: _patched(good_video(), good_video().index(b"mdat") - 4, bytes(3) + b"\2"),
    ),
    "avi_longer": ("video", lambda: _patched(_encoded("avi", "mpeg4", None), 4, b"\xff\xff\xff\x7f")),
    "flv_tag_longer": ("video", lambda: _patched(_encoded("flv", "flv1", None), 14, b"\x7f\xff\xff")),
    "gif_video_huge": ("video", lambda: _patched(_encoded("gif", "gif", None), 6, _BIG16 * 2)),
}


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
