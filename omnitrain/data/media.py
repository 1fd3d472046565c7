"""Encoded media to arrays, within limits, and back.

What a file is decides its content, never its name. Everything that is wrong with it is a :class:`BadSample` with one of
these reasons:

| reason | |
|---|---|
| wrong_type | another kind of medium, or none that is known |
| image_corrupt, audio_corrupt, video_corrupt | damaged or cut off |
| image_too_large, video_too_large | more pixels than allowed (read from the header, before anything is decoded) |
| image_aspect_ratio | sides too different |
| audio_empty, video_no_frames | nothing in it |
| audio_too_long, video_too_long | more seconds (or frames) than allowed |

Pictures are read by Pillow, WAV, FLAC and Ogg by libsndfile, all else by FFmpeg (PyAV). FFmpeg is told the format
that the first bytes show, so that a playlist in disguise can make it open nothing else.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, Literal

import av
import av.error
import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from omnitrain.data.containers import check_whole, ogg_pages
from omnitrain.data.sample import BadSample
from omnitrain.data.settings import MediaLimits

# Pillow warns of large pictures and odd metadata; `MediaLimits` decides instead. Set once: decoders run in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # ty: ignore[invalid-assignment]  # profiles are large

SOUND_TRACK_RATE = 16_000
"""Sample rate of a decoded video's sound track in Hz."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """Sampled frames: frame k is what the video shows k / fps seconds after its first frame.

    Attributes:
        frames: uint8 [T, H, W, 3]
        fps: sampled frames per second (as asked, or less where `MediaLimits.max_video_frames` binds)
        audio: float32 [S] at 16 kHz, mono, sample 0 at the first frame; None without a sound track
    """

    frames: np.ndarray
    fps: float
    audio: np.ndarray | None = None


# --------------------------------------------------------------------------------------------- what kind of file it is

Kind = Literal["image", "audio", "video"]
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_IMAGE: frozenset[Kind] = frozenset({"image"})
_AUDIO: frozenset[Kind] = frozenset({"audio"})
_BOTH: frozenset[Kind] = frozenset({"audio", "video"})
_NONE: frozenset[Kind] = frozenset()
_MAGIC: tuple[tuple[int, tuple[bytes, ...], str, frozenset[Kind]], ...] = (  # where it stands, bytes, format, media
    (4, (b"ftypavif", b"ftypavis"), "avif", _IMAGE),
    (4, (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"), "heic", _NONE),
    (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free"), "mp4", _BOTH),
    (0, (b"\x89PNG\r\n\x1a\n",), "png", _IMAGE),
    (0, (b"\xff\xd8\xff",), "jpeg", _IMAGE),
    (0, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "jpeg2000", _IMAGE),
    (0, (b"GIF8",), "gif", frozenset({"image", "video"})),
    (0, (b"BM",), "bmp", _IMAGE),
    (0, (b"II*\0", b"MM\0*"), "tiff", _IMAGE),
    (0, (b"OggS",), "ogg", _BOTH),
    (0, (b"fLaC",), "flac", _AUDIO),
    (0, (b"ID3",), "mp3", _AUDIO),
    (0, (b"FORM",), "aiff", _AUDIO),
    (0, (b".snd",), "au", _AUDIO),
    (0, (b"caff",), "caf", _AUDIO),
    (0, (b"riff\x2e\x91\xcf\x11",), "w64", _AUDIO),
    (0, (b"\x0b\x77",), "ac3", _AUDIO),
    (0, (b"0&\xb2u\x8ef\xcf\x11",), "asf", _BOTH),
    (0, (b"\x1aE\xdf\xa3",), "matroska", _BOTH),
    (0, (b"FLV",), "flv", _BOTH),
    (0, (b"\0\0\x01\xba",), "mpeg", _BOTH),
    (0, (b"\0\0\x01\xb3",), "mpegvideo", frozenset({"video"})),
)
_RIFF = {b"WAVE": ("wav", _AUDIO), b"WEBP": ("webp", _IMAGE), b"AVI ": ("avi", _BOTH)}


def sniff(data: bytes) -> tuple[str, frozenset[Kind]]:
    """The format that the first bytes of a file show, and the media it may hold (empty for an unknown format).

    >>> sniff(b"\\x89PNG\\r\\n\\x1a\\n")[0]
    'png'
    """
    if data[:3] == b"ID3" and len(data) >= 10:  # a tag before the sound; its length is in digits of seven bits
        end = 10 + sum(digit << 21 - 7 * place for place, digit in enumerate(data[6:10]))
        return sniff(data[end : end + 16]) if data[end : end + 1] == b"\xff" else ("mp3", _AUDIO)
    if data[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(data[8:12], ("unknown", _NONE))
    for at, magics, name, kinds in _MAGIC:
        if any(data[at : at + len(magic)] == magic for magic in magics):
            return name, kinds
    if len(data) > 1 and data[0] == 0xFF:
        if data[1] & 0xF6 == 0xF0:
            return "aac", _AUDIO
        if data[1] & 0xE0 == 0xE0:
            return "mp3", _AUDIO
    if data[:1] == b"G" and data[188:189] in (b"G", b""):
        return "mpegts", _BOTH
    return "unknown", _NONE


def _require(data: bytes, kind: Kind) -> str:
    name, kinds = sniff(data)
    if kind not in kinds:
        if name == "heic":
            raise BadSample("wrong_type", "HEIC pictures cannot be read here; convert them to JPEG, PNG or AVIF")
        what = f"a {name} file" if kinds else ("an empty file" if not data else f"no known format ({name})")
        raise BadSample("wrong_type", f"the {kind} is {what}; it begins with {bytes(data[:12])!r}")
    return name


# What decoders raise about a damaged file.
_DAMAGE = (av.error.FFmpegError, soundfile.SoundFileError, OSError, EOFError, ValueError, SyntaxError, struct.error)
_DAMAGE += (IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError, AttributeError, RuntimeError)


@contextmanager
def _damage_is(reason: str) -> Generator[None]:
    """Whatever a decoder raises about the file becomes `BadSample(reason)`."""
    try:
        yield
    except BadSample:
        raise
    except _DAMAGE as error:
        raise BadSample(reason, f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------------------------ pictures


def decode_image(data: bytes, limits: MediaLimits = MediaLimits()) -> np.ndarray:
    """A picture as uint8 [H, W, 3], upright (EXIF), transparent parts on white; of an animation, the first frame.
    Raises BadSample: ``wrong_type``, ``image_corrupt``, ``image_too_large``, ``image_aspect_ratio``."""
    _require(data, "image")
    with _damage_is("image_corrupt"):
        image = _open_image(data)
        width, height = image.size
        _check_pixels("image", width, height, limits)
        if not width or not height or max(width, height) > limits.max_aspect_ratio * min(width, height):
            raise BadSample(
                "image_aspect_ratio",
                f"{width} x {height} pixels; sides may differ by a factor of {limits.max_aspect_ratio:g}",
            )
        image.load()
        return np.asarray(_upright_rgb(image))


def _check_pixels(kind: Kind, width: int, height: int, limits: MediaLimits) -> None:
    if width * height > limits.max_pixels:
        shown = f"{width} x {height} pixels; at most {limits.max_pixels} are allowed (max_pixels)"
        raise BadSample(f"{kind}_too_large", shown)


def _check_seconds(kind: Kind, seconds: float, limits: MediaLimits, rate: int = 0) -> None:
    """`seconds` at `rate` Hz, before they take memory."""
    name = f"max_{kind}_seconds"
    if seconds > getattr(limits, name):
        most = f"at most {getattr(limits, name):g} s are allowed (data.limits.{name})"
        raise BadSample(f"{kind}_too_long", f"{seconds:.1f} s; {most}: cut it into shorter files")
    if seconds * rate > _MOST_SAMPLES:
        raise BadSample(f"{kind}_too_long", f"{seconds:.1f} s at {rate} Hz; resample it to at most 48,000 Hz")


_MOST_SAMPLES = 2**27
"""Half a gigabyte; 40 minutes of 48,000 Hz are 115 million."""


def _open_image(data: bytes) -> Image.Image:
    """The picture with its header read; Pillow itself refuses more than 179 million pixels."""
    try:
        return Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise BadSample("image_corrupt", "its header cannot be read") from error
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The loaded picture, which is turned in place."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, or of floats (of the range that its largest value shows: 1, 255 or 65535)."""
    x = np.asarray(image)
    if not np.isfinite(x).all():
        raise BadSample("image_corrupt", "pixels are not finite numbers")
    largest = next((n for n in (1, 255) if image.mode == "F" and x.max(initial=0) <= n), 65535)
    grey = (x.clip(0, largest) * (255 / largest)).round().astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[x == transparent] = 255  # the value that stands for nothing: white
    return Image.fromarray(grey)


def encode_image(image: np.ndarray, format: Literal["png", "jpeg", "webp"] = "png", quality: int = 90) -> bytes:
    """uint8 [H, W, 3] (or [H, W, 4]) to a file's bytes."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if format == "png" else {"quality": quality}
    Image.fromarray(image).save(buffer, format=format.upper(), **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------- sound

# ITU-R BS.775: both fronts whole, the centre at -3 dB into each, a surround at -3 dB into its side; no LFE.
_TO_MONO = {"FL": 0.5, "FR": 0.5, "FC": math.sqrt(0.5), "LFE": 0.0}
_SURROUND = math.sqrt(0.5) / 2
_USUAL_LAYOUT = {3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # where a file does not name its channels


def _mono(samples: np.ndarray, channels: list[str]) -> np.ndarray:
    """float32 [C, T] -> [T]; two channels are averaged, surround sound is mixed by `_TO_MONO`."""
    if len(samples) <= 2:
        with np.errstate(invalid="ignore"):  # infinite and opposite: refused below
            return samples.mean(axis=0, dtype=np.float32)
    if "NONE" in channels and len(channels) in _USUAL_LAYOUT:
        channels = [channel.name for channel in av.AudioLayout(_USUAL_LAYOUT[len(channels)]).channels]
    weights = np.array([_TO_MONO.get(channel, _SURROUND) for channel in channels], dtype=np.float32)
    if not weights.sum():
        weights[:] = 1
    return (weights / weights.sum()) @ samples


Blocks = Iterator[tuple[np.ndarray, int]]
"""A recording in pieces: mono samples float32 [n], n > 0, and their rate in Hz, the same for all."""


def _resampled(blocks: Blocks, target: int) -> Iterator[np.ndarray]:
    """The recording at `target` Hz, in pieces, which are those of the whole to within rounding."""
    resampler = None
    for block, rate in blocks:
        if rate == target:
            yield block
            continue
        resampler = _resampler(rate, target) if resampler is None else resampler
        yield resampler.add(block)
    if resampler is not None:
        yield resampler.finish()


def _resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """A whole waveform, of which pieces are worked on."""
    pieces = ((wave[at : at + _BLOCK], rate) for at in range(0, len(wave), _BLOCK))
    return np.concatenate([np.zeros(0, np.float32), *_resampled(pieces, target)])


def _resampler(rate: int, target: int) -> _SincResampler | _FFmpegResampler:
    common = math.gcd(rate, target)
    if (rate // common) * (target // common) <= _LARGEST_KERNEL:
        return _SincResampler(rate, target)
    return _FFmpegResampler(rate, target)


class _SincResampler:
    """torchaudio's resampling, piece by piece. It makes `outputs` samples of every `period`, and looks at most
    `context` periods beyond them, so what has so many on both sides comes out as in the whole."""

    def __init__(self, rate: int, target: int) -> None:
        self.transform, common = _sinc_filter(rate, target), math.gcd(rate, target)
        self.period, self.outputs = rate // common, target // common
        self.context = -(-self.transform.width // self.period)
        self.waiting = np.zeros(0, np.float32)
        self.left = 0  # periods at the beginning of `waiting` that are done, and only looked at

    def add(self, block: np.ndarray) -> np.ndarray:
        self.waiting = np.concatenate([self.waiting, block])
        done = len(self.waiting) // self.period - self.context
        if done <= self.left or len(self.waiting) <= _BLOCK:
            return self.waiting[:0]
        made = self._resampled(self.waiting[: (done + self.context) * self.period])[: done * self.outputs]
        made, left = made[self.left * self.outputs :], min(self.context, done)
        self.waiting, self.left = self.waiting[(done - left) * self.period :], left
        return made

    def finish(self) -> np.ndarray:
        return self._resampled(self.waiting)[self.left * self.outputs :]

    def _resampled(self, wave: np.ndarray) -> np.ndarray:
        return self.transform(torch.from_numpy(wave)).numpy()


@lru_cache(maxsize=4)
def _sinc_filter(rate: int, target: int) -> torchaudio.transforms.Resample:
    """Its making takes longer than its use on a second of sound."""
    return torchaudio.transforms.Resample(rate, target, dtype=torch.float32)


class _FFmpegResampler:
    """Of rates such as 44,101 Hz, torchaudio's filter has a row for every sample of the output's period: gigabytes."""

    def __init__(self, rate: int, target: int) -> None:
        self.converter, self.rate = av.AudioResampler(format="fltp", layout="mono", rate=target), rate
        self.samples = 0

    def add(self, block: np.ndarray) -> np.ndarray:
        frame = _audio_frame(block, self.rate)
        frame.pts, self.samples = self.samples, self.samples + len(block)
        return self._converted(frame)

    def finish(self) -> np.ndarray:
        return self._converted(None)

    def _converted(self, frame: av.AudioFrame | None) -> np.ndarray:
        made = [piece.to_ndarray()[0] for piece in self.converter.resample(frame)]
        return np.concatenate([np.zeros(0, np.float32), *made])


_BLOCK = 2**20
"""Samples that are read, mixed and resampled at once: 22 s at 48,000 Hz."""
_LARGEST_KERNEL = 2**23
"""Elements of a resampling filter; 44,100 to 16,000 Hz is 441 * 160."""
_LOUDEST = 100.0
"""Largest amplitude of a recording; sound lies within -1 and 1, floats may go somewhat beyond."""


def _check_wave(wave: np.ndarray, reason: str) -> None:
    if not np.isfinite(wave).all():
        raise BadSample(reason, "samples are not finite numbers")
    if (peak := float(np.abs(wave).max(initial=0))) > _LOUDEST:
        raise BadSample(reason, f"samples reach {peak:.3g}; sound lies within -1 and 1")


def decode_audio(data: bytes, sample_rate: int = 16_000, limits: MediaLimits = MediaLimits()) -> np.ndarray:
    """A recording as float32 [T], mono, at `sample_rate` Hz. The sound track of a video file is read too. Raises
    BadSample: ``wrong_type``, ``audio_corrupt``, ``audio_empty``, ``audio_too_long``."""
    return np.concatenate(list(audio_blocks(data, sample_rate, limits)))


def audio_blocks(data: bytes, sample_rate: int = 16_000, limits: MediaLimits = MediaLimits()) -> Generator[np.ndarray]:
    """`decode_audio`'s samples in pieces float32 [n], decoded as they are asked for: of a long recording a few seconds
    are in memory at a time. What is wrong with the file may only show after its last piece."""
    name = _require(data, "audio")
    samples = 0
    with _damage_is("audio_corrupt"):
        check_whole(data, name, "audio")
        blocks = _libsndfile(data, name, limits) or _ffmpeg_audio(data, name, limits)
        for piece in _resampled(_checked(blocks), sample_rate):
            samples += len(piece)
            if len(piece):
                yield piece
        if not samples:
            raise BadSample("audio_empty", "the recording has no samples")


def _checked(blocks: Blocks) -> Blocks:
    for block, rate in blocks:
        _check_wave(block, "audio_corrupt")
        yield block, rate


def _needs_ffmpeg(data: bytes, name: str) -> bool:
    """Whether libsndfile would misread it: it guesses the length of an MP3, and of Ogg files joined end to end (radio
    recordings are) it reads the first."""
    if name == "ogg":
        begins = (data[at + 5] & 2 for at, _ in ogg_pages(data))  # whether a stream begins with the page
        return any(following and not before for before, following in pairwise(begins))
    mp3_in_wav = data[12:16] + data[20:22] == b"fmt U\0"
    return mp3_in_wav or name not in ("wav", "flac", "aiff", "au", "caf", "w64")


_UNKNOWN = 2**48
"""Samples that libsndfile says a FLAC stream of unknown length has, and more."""


def _libsndfile(data: bytes, name: str, limits: MediaLimits) -> Blocks | None:
    """The recording, or None where libsndfile does not know the codec or surround layout."""
    if _needs_ffmpeg(data, name):
        return None
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.SoundFileError:
        return None
    if file.channels > 2 or file.frames >= _UNKNOWN:
        return None
    _check_seconds("audio", file.frames / file.samplerate, limits, file.samplerate)
    return _libsndfile_blocks(file)


def _libsndfile_blocks(file: soundfile.SoundFile) -> Blocks:
    samples = 0
    with file:
        for block in file.blocks(_BLOCK, frames=file.frames, dtype="float32", always_2d=True):
            samples += len(block)
            if len(block):
                yield _mono(block.T, []), file.samplerate
        if samples < file.frames:
            raise BadSample("audio_corrupt", f"{samples} samples, the header says {file.frames}")


def _open(data: bytes, name: str) -> Any:
    return av.open(io.BytesIO(data), format=name)


def _decoder(stream: Any, kind: Kind) -> Any:
    if stream.codec_context is None:
        raise BadSample(f"{kind}_corrupt", "FFmpeg knows no decoder for what it holds")
    stream.codec_context.thread_count = 1
    return stream.codec_context


def _header_seconds(container: Any, stream: Any) -> float:
    """The length by the header, or what FFmpeg guesses from the bit rate; 0 where it knows none."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6


def _declared_seconds(data: bytes, name: str, container: Any, stream: Any) -> float:
    """The length that the file declares, 0 where it declares none and FFmpeg would guess."""
    tagged = any(tag in data[:65536] for tag in (b"Xing", b"Info", b"VBRI"))
    guessed = name in ("aac", "ac3") or (name == "mp3" and not tagged)
    return 0.0 if guessed else _header_seconds(container, stream)


def _check_end(kind: Kind, seconds: float, declared: float) -> None:
    if seconds < declared - max(0.2, 0.005 * declared):
        raise BadSample(f"{kind}_corrupt", f"cut off: {seconds:.2f} s, the header says {declared:.2f} s")


class _Track:
    """Decoded frames of a sound track, mixed to mono as they come."""

    def __init__(self, limits: MediaLimits) -> None:
        self.limits = limits
        # Keeps rate and layout. Interleaved: of planes PyAV reads eight, and beyond them whatever lies there.
        self.resampler = av.AudioResampler(format="flt")
        self.form: tuple[str, str, int] | None = None  # sample format, layout and rate: of the first frame, and of all
        self.names: list[str] = []
        self.waiting: list[np.ndarray] = []  # a frame has too few samples to mix it by itself: that takes as long
        self.pieces: list[np.ndarray] = []
        self.rate = 0
        self.samples = 0
        self.start: float | None = None

    def add(self, frame: Any) -> None:
        if self.start is None:
            if frame.layout.nb_channels > 64:
                raise BadSample("audio_corrupt", f"{frame.layout.nb_channels} channels; at most 64 are mixed")
            self.start = float(frame.time) if frame.time is not None else 0.0
            self.rate = frame.sample_rate
            self.form = (frame.format.name, frame.layout.name, self.rate)
        if self.form != (frame.format.name, frame.layout.name, frame.sample_rate):
            raise BadSample("audio_corrupt", f"the sound changes its form at {frame.time} s")
        if frame.time is not None:
            missing = round((float(frame.time) - self.start) * self.rate) - self.samples
            if missing > self.rate // 10:  # a gap in the track is silence
                self._check(self.samples + missing)
                self._mix()
                self.pieces.append(np.zeros(missing, np.float32))
                self.samples += missing
        direct = self.form[0] == "fltp" and frame.layout.nb_channels <= 8  # what most decoders give
        for plain in [frame] if direct else self.resampler.resample(frame):
            self.names = self.names or [channel.name for channel in plain.layout.channels]
            samples = plain.to_ndarray()
            self.waiting.append(samples if direct else samples.reshape(-1, len(self.names)).T)
            self.samples += plain.samples
        if len(self.waiting) >= 128:
            self._mix()
        self._check(self.samples)

    def _mix(self) -> None:
        if self.waiting:
            self.pieces.append(_mono(np.concatenate(self.waiting, axis=1), self.names))
            self.waiting.clear()

    def _check(self, samples: int) -> None:
        _check_seconds("audio", samples / self.rate, self.limits, self.rate)

    def wave_from(self, start: float) -> np.ndarray:
        """What is heard from `start` on, in seconds of the time stamps."""
        late = round(((self.start or 0.0) - start) * self.rate)
        self._check(self.samples + late)
        wave = self.wave()
        return np.concatenate([np.zeros(late, np.float32), wave]) if late > 0 else wave[-late:]

    def wave(self) -> np.ndarray:
        self._mix()
        return self.take()

    def take(self) -> np.ndarray:
        """What is mixed by now; it is forgotten here."""
        pieces, self.pieces = self.pieces, []
        return np.concatenate([np.zeros(0, np.float32), *pieces])


def _ffmpeg_audio(data: bytes, name: str, limits: MediaLimits) -> Blocks:
    with _open(data, name) as container:
        if not container.streams.audio:
            kind = "video" if container.streams.video else "file"
            raise BadSample("audio_empty", f"the {name} {kind} has no sound track")
        stream = container.streams.audio[0]
        _decoder(stream, "audio")
        declared = _declared_seconds(data, name, container, stream)
        _check_seconds("audio", declared, limits)
        track = _Track(limits)
        for packet in container.demux(stream):
            if name == "mp3" and bytes(packet).startswith(b"ID3"):  # the tag of a second file, joined to the first
                continue
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise BadSample("audio_corrupt", f"a damaged frame at {frame.time} s")
                track.add(frame)
            if track.pieces:
                yield track.take(), track.rate
        if track.rate:
            _check_end("audio", track.samples / track.rate, declared)
        if len(rest := track.wave()):
            yield rest, track.rate


def encode_audio(
    wave: np.ndarray,
    sample_rate: int,
    format: Literal["wav", "flac", "opus", "vorbis", "mp3"] = "opus",
    bit_rate: int = 32_000,
) -> bytes:
    """float32 [T] in [-1, 1] to a file's bytes: 16-bit WAV, FLAC, Ogg/Opus (8, 12, 16, 24, 48 kHz), Ogg/Vorbis or MP3.

    `bit_rate` (bits/s) holds for Opus and MP3. The same samples give the same bytes (but for Vorbis, whose stream
    number is random)."""
    if wave.ndim != 1:
        raise ValueError(f"encode_audio needs samples [T], not {wave.shape}")
    buffer = io.BytesIO()
    if format in ("wav", "flac", "vorbis"):
        subtype = "VORBIS" if format == "vorbis" else "PCM_16"
        container = "OGG" if format == "vorbis" else format.upper()
        soundfile.write(buffer, wave, sample_rate, format=container, subtype=subtype)
        return buffer.getvalue()
    codec, container_name = {"opus": ("libopus", "ogg"), "mp3": ("libmp3lame", "mp3")}[format]
    with av.open(buffer, "w", format=container_name, options={"fflags": "+bitexact"}) as container:
        _mux(container, _audio_stream(container, sample_rate, codec, bit_rate), [_audio_frame(wave, sample_rate)])
    return buffer.getvalue()


def _audio_stream(container: Any, sample_rate: int, codec: str, bit_rate: int) -> Any:
    stream = container.add_stream(codec, rate=sample_rate, layout="mono")
    stream.bit_rate = bit_rate
    return stream


def _audio_frame(wave: np.ndarray, sample_rate: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None], dtype=np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), 0
    return frame


def _mux(container: Any, stream: Any, frames: Iterable[Any]) -> None:
    for frame in chain(frames, [None]):  # None: no more
        for packet in stream.encode(frame):
            container.mux(packet)


# --------------------------------------------------------------------------------------------------------------- video


def decode_video(data: bytes, fps: float = 2.0, limits: MediaLimits = MediaLimits(), sampling: str = "times") -> Video:
    """Frames sampled every 1 / fps seconds by their time stamps (a variable frame rate is read rightly), or as the
    reference does (`VisionGeometry.sampling`), and the sound track from the moment of the first frame on. Raises
    BadSample: ``wrong_type``, ``video_corrupt``, ``video_no_frames``, ``video_too_large``, ``video_too_long``,
    ``audio_too_long``."""
    name = _require(data, "video")
    with _damage_is("video_corrupt"):
        check_whole(data, name, "video")
    with _damage_is("video_corrupt"), _open(data, name) as container:
        streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition)]
        if not streams:
            raise BadSample("video_no_frames", f"the {name} file has no picture track with frames in it")
        seconds = _seconds(data, name, container, streams[0])
        spread = None
        if sampling == "reference":
            total = streams[0].frames or _count_frames(data, name, streams[0].index)
            rate = float(streams[0].average_rate or total / max(seconds, 1e-3))
            spread = reference_frames(total, rate, fps, most=limits.max_video_frames)
        return _decode_video(container, streams[0], seconds, fps, spread, limits)


def reference_frames(total: int, rate: float, fps: float, *, least: int = 4, most: int = 768) -> list[int]:
    """Which of a clip's `total` frames, `rate` a second, the reference's video processor takes at `fps`: an even number
    between `least` and `most`, spread evenly from the first on. It takes none of a single frame; here that is one."""
    count = min(max(total / rate * fps, least), most // 2 * 2, total // 2 * 2)
    count = int(count) // 2 * 2
    if not count:
        return [0]
    return torch.arange(0, total, total / count).int().tolist()  # its rounding, in fp32


def _count_frames(data: bytes, name: str, index: int) -> int:
    """Of a file whose header does not count them, as Matroska's."""
    with _open(data, name) as again:
        return sum(packet.size > 0 for packet in again.demux(again.streams[index]))


def _decode_video(
    container: Any, stream: Any, declared: float, fps: float, spread: list[int] | None, limits: MediaLimits
) -> Video:
    codec = _decoder(stream, "video")
    _check_pixels("video", codec.width, codec.height, limits)
    pixels = codec.width * codec.height
    _check_seconds("video", declared, limits)
    if spread is None and declared * fps > limits.max_video_frames:
        fps = limits.max_video_frames / declared
    expected = min(max(declared * fps, 1), limits.max_video_frames) if spread is None else len(spread)
    if expected * pixels > limits.max_video_pixels:
        raise BadSample(
            "video_too_large",
            f"{expected:.0f} frames of {pixels} pixels; at most {limits.max_video_pixels} are allowed in all "
            "(max_video_pixels): lower fps or scale the video down",
        )
    sound = container.streams.audio[0] if container.streams.audio else None
    track = _Track(limits)
    frame_seconds = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    sampler = _FrameSampler(fps, frame_seconds, limits, spread)
    for packet in container.demux([s for s in (stream, sound) if s is not None]):
        if packet.is_corrupt:
            raise BadSample("video_corrupt", f"a damaged packet at byte {packet.pos}")
        for frame in packet.decode():
            if packet.stream is sound:
                track.add(frame)
            else:
                sampler.add(frame)
    frames = sampler.finish()
    if stream.frames and sampler.seen < stream.frames - 1 and sampler.end < declared - 1.5 * sampler.frame_seconds:
        # An edit list shows fewer of the frames, and declares fewer seconds.
        raise BadSample("video_corrupt", f"cut off: {sampler.seen} frames, the header says {stream.frames}")
    heard = 0.0 if track.start is None else track.start + track.samples / track.rate
    _check_end("video", max(sampler.start + sampler.end, heard), declared)
    if not len(frames):
        raise BadSample("video_no_frames", "the video has no frame")
    audio = None
    if sound is not None and track.samples:
        wave = track.wave_from(sampler.start)
        _check_wave(wave, "video_corrupt")
        audio = _resample(wave, track.rate, SOUND_TRACK_RATE) if len(wave) else None
    return Video(frames=frames, fps=fps, audio=audio)


def _seconds(data: bytes, name: str, container: Any, stream: Any) -> float:
    """The length that the header declares; where it declares none, as in a live recording, that of the packets."""
    if seconds := _header_seconds(container, stream):
        return seconds
    with _open(data, name) as again:
        packets = [p for p in again.demux(again.streams[stream.index]) if p.pts is not None]
        ends = [p.pts + (p.duration or 0) for p in packets]
        return float((max(ends) - min(p.pts for p in packets)) * stream.time_base) if ends else 0.0


def _as_displayed(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned and mirrored as the track's display matrix says (ISO 14496-12, section 6.2.2)."""
    # One thread: by default each frame starts as many as there are cores, and waits for them longer than it takes.
    picture = frame.to_ndarray(format="rgb24", threads=1)
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is None:
        return picture
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


class _FrameSampler:
    """Keeps, for each time k / fps, the frame that is on screen then; or the frames numbered in `spread`, the last one
    for those that the clip lacks."""

    def __init__(self, fps: float, frame_seconds: float, limits: MediaLimits, spread: list[int] | None = None) -> None:
        self.fps, self.frame_seconds, self.limits, self.spread = fps, frame_seconds, limits, spread
        self.kept: list[np.ndarray] = []
        self.current: Any = None
        self.start = self.time = self.end = 0.0
        self.seen = 0

    def add(self, frame: Any) -> None:
        if frame.is_corrupt:
            raise BadSample("video_corrupt", f"a damaged frame at {frame.time} s")
        time = float(frame.time) if frame.time is not None else self.seen * self.frame_seconds
        if self.current is None:
            self.start = time
        self._show_until(time - self.start)
        self.seen += 1
        self.current, self.time = frame, time - self.start
        if self.time > self.limits.max_video_seconds:
            raise BadSample("video_too_long", f"more than {self.limits.max_video_seconds:g} s (max_video_seconds)")

    def finish(self) -> np.ndarray:
        if self.current is not None:
            last = self.current
            seconds = float(last.duration * last.time_base) if last.duration else self.frame_seconds
            self.end = self.time + seconds
            self._show_until(self.end, last=True)
        return np.stack(self.kept) if self.kept else np.zeros((0, 0, 0, 3), np.uint8)

    def _is_due(self, time: float, last: bool) -> bool:
        """Whether the frame that was on screen until `time`, number `seen` - 1, is the next to be kept."""
        k = len(self.kept)
        if self.spread is None:
            return k / self.fps < time - 1e-4
        return k < len(self.spread) and (self.spread[k] <= self.seen - 1 or last)

    def _show_until(self, time: float, last: bool = False) -> None:
        picture: np.ndarray | None = None
        while self.current is not None and self._is_due(time, last):
            if len(self.kept) >= self.limits.max_video_frames:
                return
            if picture is None:
                picture = _as_displayed(self.current)
                if self.kept and picture.shape != self.kept[0].shape:
                    raise BadSample("video_corrupt", f"frames change size to {picture.shape[1]} x {picture.shape[0]}")
            if (len(self.kept) + 1) * picture.shape[0] * picture.shape[1] > self.limits.max_video_pixels:
                raise BadSample(
                    "video_too_large",
                    f"{len(self.kept) + 1} frames of {picture.shape[1]} x {picture.shape[0]} pixels; at most "
                    f"{self.limits.max_video_pixels} pixels are allowed in all (max_video_pixels)",
                )
            self.kept.append(picture)


def encode_video(
    frames: np.ndarray,
    fps: float,
    audio: np.ndarray | None = None,
    sample_rate: int = 16_000,
    crf: int = 23,
    preset: str = "medium",
    audio_bit_rate: int = 48_000,
) -> bytes:
    """uint8 [T, H, W, 3] (even sides) and float32 [S] to an MP4 file's bytes: H.264 with AAC.

    The same frames and samples give the same bytes."""
    count, height, width = frames.shape[:3]
    if not count or height % 2 or width % 2:
        raise ValueError(f"encode_video needs frames with even sides, not {frames.shape}")
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # mbtree: its AVX-512 code gives other bits from run to run.
        options = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0"}
        stream: Any = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        sound = None if audio is None else _audio_stream(container, sample_rate, "aac", audio_bit_rate)
        _mux(container, stream, (_video_frame(picture, index, rate) for index, picture in enumerate(frames)))
        if audio is not None:
            _mux(container, sound, [_audio_frame(audio, sample_rate)])
    return buffer.getvalue()


def _video_frame(picture: np.ndarray, index: int, rate: Fraction) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame.pts, frame.time_base = index, 1 / rate
    return frame


@dataclass(frozen=True, kw_only=True)
class MediaFacts:
    """What a file's header says. `seconds` of a picture is 0; `pixels` is height x width (0 for sound)."""

    format: str
    width: int = 0
    height: int = 0
    seconds: float = 0.0

    @property
    def pixels(self) -> int:
        return self.width * self.height


def probe(data: bytes, kind: Kind) -> MediaFacts:
    """Size and length of a medium from its header, without decoding it. Raises BadSample: ``wrong_type``,
    ``image_corrupt``, ``image_too_large``, ``audio_corrupt`` or ``video_corrupt``."""
    name = _require(data, kind)
    with _damage_is(f"{kind}_corrupt"):
        if kind == "image":
            width, height = _open_image(data).size
            return MediaFacts(format=name, width=width, height=height)
        if kind == "audio" and not _needs_ffmpeg(data, name):
            with suppress(soundfile.SoundFileError):  # a codec that FFmpeg may know
                facts = soundfile.info(io.BytesIO(data))
                if facts.frames < _UNKNOWN:
                    return MediaFacts(format=name, seconds=facts.frames / facts.samplerate)
        with _open(data, name) as container:
            streams = container.streams.video if kind == "video" else container.streams.audio
            if not streams:
                return MediaFacts(format=name)
            stream = streams[0]
            codec, seconds = stream.codec_context, _seconds(data, name, container, stream)
            if kind == "audio":
                return MediaFacts(format=name, seconds=seconds)
            return MediaFacts(format=name, width=codec.width, height=codec.height, seconds=seconds)
