"""Decoders: what is right comes out right, what is wrong has a name, what is too large is never decoded."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import time
import tracemalloc
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from PIL import Image, PngImagePlugin

from omnitrain.data.media import (
    MediaLimits,
    audio_blocks,
    decode_audio,
    decode_image,
    decode_video,
    encode_audio,
    encode_image,
    encode_video,
    probe,
    sniff,
)
from omnitrain.data.sample import BadSample
from tests.data import corrupt

DECODE = {"image": decode_image, "audio": decode_audio, "video": decode_video}


@pytest.mark.parametrize("case", corrupt.CORRUPT_MEDIA, ids=lambda case: case.name)
def test_corrupt_media_have_a_reason(case) -> None:
    data = case.make()
    begin = time.perf_counter()
    with pytest.raises(BadSample) as error:
        DECODE[case.type](data)
    assert error.value.reason == case.reason, error.value
    assert time.perf_counter() - begin < 5
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.reason, again.detail) == (error.value.reason, error.value.detail)


SIZE = {
    "image": lambda data: decode_image(data).shape,
    "audio": lambda data: len(decode_audio(data)),
    "video": lambda data: _frames_and_samples(decode_video(data)),
}


def _frames_and_samples(video: Any) -> tuple[int, int]:
    return len(video.frames), 0 if video.audio is None else len(video.audio)


@pytest.mark.filterwarnings("ignore")  # of decoders
@pytest.mark.parametrize("name", corrupt.FORMATS)
def test_every_format_cut_and_damaged(name) -> None:
    """Refused with a reason, or decoded to as much as the whole file gives where nothing in the format could show the
    damage; in bounded time and memory."""
    format = corrupt.FORMATS[name]
    whole = SIZE[format.type](format.make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in corrupt.broken_files(name):
        begin = time.perf_counter()
        try:
            size = SIZE[case.type](case.make())
        except BadSample as error:
            reasons = (f"{case.type}_corrupt", "video_no_frames", "wrong_type")
            if error.reason not in reasons or "NoneType" in error.detail:
                pytest.fail(f"{case.name}: {error}")
        else:
            assert (case.whole and size == whole) or (case.shorter and size <= whole), (case.name, size, whole)
        assert time.perf_counter() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize("name", corrupt.LYING_HEADERS)
def test_headers_that_lie_are_found_out(name) -> None:
    kind, make = corrupt.LYING_HEADERS[name]
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(BadSample, match=f"{kind}_(corrupt|too_large|too_long|aspect_ratio)"):
        DECODE[kind](make())
    assert time.perf_counter() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


@pytest.mark.parametrize(
    "format", ["WAV/IMA_ADPCM", "AIFF/FLOAT", "AU/ULAW", "CAF/ALAC_16", "W64/FLOAT", "RF64/PCM_24"]
)
def test_uncommon_sound_files_give_all_their_samples(format) -> None:
    container, codec = format.split("/")
    tone, buffer = 0.3 * np.sin(np.arange(48_384) * 0.1), io.BytesIO()
    soundfile.write(buffer, tone, 16_000, format=container, subtype=codec)
    wave = decode_audio(buffer.getvalue())
    assert len(wave) - 48_384 in range(512)  # ADPCM fills its last block
    np.testing.assert_allclose(wave[1000:48_384], tone[1000:], atol=0.03)


def test_windows_media_give_all_whole_frames() -> None:
    """FFmpeg's encoder leaves out what is no whole frame at the end, and its decoder the first, which overlaps none."""
    frame, n = 512, 5 * 16_000
    wave = decode_audio(corrupt.FORMATS["wma"].make())
    assert len(wave) == n // frame * frame
    tone = 0.3 * np.sin(np.arange(n) / 16)
    np.testing.assert_allclose(wave[: n - 2 * frame], tone[frame:-frame], atol=0.02)
    video = decode_video(corrupt.FORMATS["wmv"].make(), fps=8)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 48, 3), dtype=np.uint8)
    assert video.frames.shape == pixels.shape
    grey = [x.mean(-1).reshape(24, -1) for x in (video.frames, pixels)]
    assert [np.corrcoef(frame, grey[1])[0, 1:].argmax() for frame in grey[0]] == list(range(24))  # each in its place
    assert video.audio is not None
    assert len(video.audio) == 1024 + 48_000 // frame * frame  # its time stamps begin behind two frames


def test_a_live_windows_recording_declares_no_end() -> None:
    data = corrupt.FORMATS["wma"].make()
    header = struct.unpack_from("<Q", data, 16)[0]
    live = data[: header + 16] + struct.pack("<Q", 50) + data[header + 24 :]
    np.testing.assert_array_equal(decode_audio(live), decode_audio(data))


@pytest.mark.parametrize("name", corrupt.FORMATS)
def test_no_file_is_taken_for_another_kind(name) -> None:
    format = corrupt.FORMATS[name]
    data = format.make()
    assert format.type in sniff(data)[1]
    for kind in {"image", "audio", "video"} - sniff(data)[1]:
        with pytest.raises(BadSample, match="wrong_type"):
            DECODE[kind](data)


MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_clips_are_turned_and_mirrored_as_their_matrix_says(matrix) -> None:
    data = bytearray(corrupt.good_video(with_audio=False))
    plain = decode_video(bytes(data)).frames[0]
    a, b, c, d = matrix
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    height, width = plain.shape[:2]
    y, x = np.mgrid[:height, :width]
    to_x, to_y = a * x + c * y, b * x + d * y  # the standard's mapping, pixel by pixel
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    expected = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    expected[to_y, to_x] = plain
    np.testing.assert_array_equal(decode_video(bytes(data)).frames[0], expected)


def test_tags_before_sound_and_large_profiles_of_pictures() -> None:
    tag = b"ID3\4\0\0\0\0\1\x48" + bytes(200)
    for name in ("aac", "mp3"):
        data = corrupt.FORMATS[name].make()
        assert sniff(tag + data)[0] == name
        np.testing.assert_allclose(decode_audio(tag + data), decode_audio(data), atol=1e-6)
    picture, buffer = Image.open(io.BytesIO(corrupt.good_image())), io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile", "x" * 3_000_000, zip=True)
    picture.save(buffer, "PNG", pnginfo=info, icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), decode_image(corrupt.good_image()))
    with pytest.raises(BadSample, match="HEIC pictures cannot be read here"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(100))


def test_a_long_recording_of_a_huge_rate_is_refused() -> None:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 655_350, 1, "PCM_16", format="FLAC") as file:
        for _ in range(300):
            file.write(np.zeros(655_350, np.int16))
    with pytest.raises(BadSample, match=r"audio_too_long.*655350 Hz"):
        decode_audio(buffer.getvalue())


def test_a_clip_cut_without_loss_is_whole() -> None:
    """Of 40 frames the edit list hides the first six, as tools do that cut between key frames."""
    buffer = io.BytesIO()
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}  # what stands before 0 s is hidden
    with av.open(buffer, "w", format="mp4", options=options) as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(np.full((32, 32, 3), 6 * k, np.uint8), format="rgb24") for k in range(40)]
        for index, frame in enumerate([*frames, None]):
            if frame is not None:
                frame.pts, frame.time_base = index, Fraction(1, 10)
            for packet in stream.encode(frame):
                packet.pts, packet.dts = packet.pts - 6, packet.dts - 6
                container.mux(packet)
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        assert container.streams.video[0].frames == 40
    video = decode_video(buffer.getvalue(), fps=10)
    assert len(video.frames) == 34
    assert abs(float(video.frames[0].mean()) - 36) < 6


def test_good_media_decode() -> None:
    assert decode_image(corrupt.good_image()).shape == (48, 64, 3)
    for format in ("wav", "flac", "opus", "vorbis", "mp3"):
        wave = decode_audio(corrupt.good_audio(format))
        reference = decode_audio(corrupt.good_audio("wav"))
        assert wave.dtype == np.float32
        assert abs(len(wave) - 16_000) <= (1200 if format == "mp3" else 0)
        assert np.corrcoef(wave[1000:15_000], reference[1000:15_000])[0, 1] > 0.99
    for data in (corrupt.good_video(), corrupt.video_index_first()):
        video = decode_video(data, fps=2)
        assert video.frames.shape == (3, 32, 48, 3)
        assert video.audio is not None
        assert abs(len(video.audio) - 24_000) < 1100
    assert decode_video(corrupt.good_video(with_audio=False)).audio is None
    assert len(decode_audio(corrupt.good_video())) > 23_000  # the sound track of a video


# ------------------------------------------------------------------------------------------------------------ pictures


def test_transparency_lies_on_white_and_exif_turns() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2, :, 3] = 255
    image = decode_image(encode_image(clear))
    assert (image[:2] == 0).all()
    assert (image[2:] == 255).all()
    buffer = io.BytesIO()
    picture = Image.new("RGB", (30, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).shape == (30, 10, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 7), 65535, np.uint16))
    else:
        image = Image.new("RGB", (7, 5), (255, 255, 255)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    decoded = decode_image(buffer.getvalue())
    assert decoded.shape == (5, 7, 3)
    assert decoded.min() == 255


def test_limits_of_pictures() -> None:
    with pytest.raises(BadSample, match=r"image_too_large: 64 x 48 pixels; at most 3000"):
        decode_image(corrupt.good_image(), MediaLimits(max_pixels=3000))
    with pytest.raises(BadSample, match="image_aspect_ratio"):
        decode_image(encode_image(np.zeros((10, 40, 3), np.uint8)), MediaLimits(max_aspect_ratio=3))


# --------------------------------------------------------------------------------------------------------------- sound


def wav(samples: np.ndarray, rate: int, format: str = "WAV", **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_pitch_and_length(rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    wave = decode_audio(wav(tone, rate), 16_000)
    assert abs(len(wave) - 16_000) <= 1
    assert np.abs(np.fft.rfft(wave[:16_000])).argmax() == 440


@pytest.mark.parametrize("block", [1_000, 70_001])
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 44_101])
def test_pieces_are_resampled_as_the_whole(rate: int, block: int, monkeypatch) -> None:
    """Against torchaudio's function on the whole; where that would take gigabytes, against one piece."""
    sound = np.random.default_rng(rate).uniform(-0.5, 0.5, 150_077).astype(np.float32)
    expected = decode_audio(wav(sound, rate, subtype="FLOAT"))
    if rate != 44_101:
        expected = torchaudio.functional.resample(torch.from_numpy(sound), rate, 16_000).numpy()
    monkeypatch.setattr("omnitrain.data.media._BLOCK", block)
    pieces = list(audio_blocks(wav(sound, rate, subtype="FLOAT")))
    assert len(pieces) > 1
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-6)


@pytest.mark.parametrize("format", ["wav", "flac", "opus", "mp3"])
def test_long_sound_is_read_in_little_memory(format: str, monkeypatch) -> None:
    """A minute in less than a third of its waveform."""
    monkeypatch.setattr("omnitrain.data.media._BLOCK", 2**14)
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (2_880_000, 2)).astype(np.float32)
    plain = format in ("wav", "flac")
    data = wav(sound, 48_000, format.upper()) if plain else encode_audio(sound[:, 0], 48_000, format)
    tracemalloc.start()
    samples = sum(map(len, audio_blocks(data)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples == 960_000
    assert peak < sound[:, 0].nbytes / 3


def test_a_long_recording_is_refused_where_its_damage_shows() -> None:
    """Its first pieces have been handed out by then."""
    sound = np.zeros(2**21, np.float32)
    sound[-1] = np.nan
    pieces = audio_blocks(wav(sound, 16_000, subtype="FLOAT"))
    assert len(next(pieces)) == 2**20
    with pytest.raises(BadSample, match=r"audio_corrupt.*not finite"):
        list(pieces)


def test_downmix() -> None:
    time = np.arange(16_000) / 16_000
    left, right = np.sin(2 * np.pi * 300 * time) * 0.4, np.sin(2 * np.pi * 700 * time) * 0.4
    stereo = decode_audio(wav(np.stack([left, right], axis=1), 16_000))
    np.testing.assert_allclose(stereo, (left + right) / 2, atol=1e-4)
    # 5.1: speech in the centre stays louder than a surround; the LFE is silent
    channels = np.zeros((16_000, 6))
    for channel, frequency in enumerate((200, 300, 400, 500, 600, 700)):
        channels[:, channel] = 0.3 * np.sin(2 * np.pi * frequency * time)
    spectrum = np.abs(np.fft.rfft(decode_audio(wav(channels, 16_000))))
    assert spectrum[400] > spectrum[200] > spectrum[600] > 100
    assert spectrum[500] < 1
    with pytest.raises(BadSample, match="not finite"):
        decode_audio(wav(np.array([0.0, np.nan]), 16_000, subtype="FLOAT"))


@pytest.mark.parametrize("format", ["WAV", "AIFF", "AU"])
@pytest.mark.parametrize("channels", [7, 8, 9, 10, 24, 64, 65, 1000])
def test_channels_without_number(format: str, channels: int) -> None:
    """More channels than any layout has a name for are averaged, and never end the process."""
    samples = np.random.default_rng(channels).uniform(-0.5, 0.5, (4_000, channels))
    data = wav(samples, 16_000, format)
    if channels > 64:
        with pytest.raises(BadSample, match="audio_corrupt"):
            decode_audio(data)
    elif channels > 8:
        np.testing.assert_allclose(decode_audio(data), samples.mean(axis=1), atol=1e-4)
    else:
        assert len(decode_audio(data)) == 4_000


def test_sound_is_read_to_its_true_end() -> None:
    """MP3s without a length, or joined; Ogg streams joined; a FLAC stream that does not say how long it is."""
    tones = [(0.3 * np.sin(np.arange(round(16_000 * s)) * 0.2)).astype(np.float32) for s in (2.5, 1.5)]
    first, second = (encode_audio(wave, 16_000, "mp3") for wave in tones)
    with av.open(io.BytesIO(first)) as container:
        bare = b"".join(bytes(packet) for packet in container.demux() if packet.size)  # without its header
    assert len(decode_audio(first)) == 40_000
    assert len(decode_audio(bare)) / 16_000 == pytest.approx(2.5, abs=0.1)
    assert len(decode_audio(first + second)) / 16_000 == pytest.approx(4.0, abs=0.15)
    for fraction in (0.3, 0.6, 0.9):
        with pytest.raises(BadSample, match="audio_corrupt"):
            decode_audio(first[: int(len(first) * fraction)])
    for format in ("opus", "vorbis"):
        joined = b"".join(encode_audio(wave, 16_000, format) for wave in tones)
        assert len(decode_audio(joined)) / 16_000 == pytest.approx(4.0, abs=0.06), format  # a link may keep its padding
    flac = bytearray(encode_audio(tones[0], 16_000, "flac"))
    flac[21] &= 0xF0  # the number of samples: 36 bits
    flac[22:26] = bytes(4)
    assert len(decode_audio(bytes(flac))) == 40_000
    assert probe(bytes(flac), "audio").seconds < 10


def test_sound_that_changes_its_rate_is_refused() -> None:
    wave = np.zeros(16_000, np.float32)
    joined = encode_audio(wave, 16_000, "mp3") + encode_audio(wave, 44_100, "mp3", 128_000)
    with pytest.raises(BadSample, match=r"audio_corrupt.*changes its form"):
        decode_audio(joined)


@pytest.mark.parametrize("rate", [7_999, 15_999, 44_101, 655_350, 999_983])
def test_any_rate_is_resampled_in_little_memory(rate: int) -> None:
    tone = [0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * r) / r) for r in (rate, 16_000)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wave = decode_audio(wav(tone[0], rate, subtype="FLOAT"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert abs(len(wave) - 32_000) <= 1
    np.testing.assert_allclose(wave[500:31_000], tone[1][500:31_000], atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20, 3e38, 32_768.0])
def test_absurd_amplitudes_are_refused(value: float) -> None:
    wave = np.full(4_000, 0.1, np.float32)
    wave[1_000] = value
    with pytest.raises(BadSample, match="audio_corrupt: samples"):
        decode_audio(wav(wave, 16_000, subtype="FLOAT"))


def video_file(format: str, pictures: list[float], sounds: list[tuple[float, float]], **options: Any) -> bytes:
    """Pictures shown at these seconds; tones as (first second, seconds). In a stream that nobody can seek in."""
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=options) as container:
        stream = container.add_stream("libvpx" if format == "webm" else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("libopus", rate=48_000, layout="mono") if sounds else None
        for number, second in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 + 2 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * second), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for begin, seconds in sounds:
            tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(round(48_000 * seconds)) / 48_000)
            for i in range(0, len(tone) - 959, 960):
                frame = av.AudioFrame.from_ndarray(tone[None, i : i + 960].astype(np.float32), "fltp", "mono")
                frame.sample_rate, frame.time_base = 48_000, Fraction(1, 48_000)
                frame.pts = round(48_000 * begin) + i
                container.mux(sound.encode(frame))
        if sound is not None:
            container.mux(sound.encode(None))
    return file.getvalue()


def test_a_gap_in_the_sound_is_silence() -> None:
    data = video_file("webm", [i / 5 for i in range(25)], [(0.0, 0.5), (3.0, 0.5)])
    sound = decode_video(data).audio
    assert sound is not None
    loud = np.abs(sound[:56_000]).reshape(-1, 160).max(1) > 0.1  # every 10 ms
    assert loud[5:45].all()
    assert not loud[60:295].any()
    assert loud[305:340].all()


def test_sound_that_begins_hours_late_takes_no_memory() -> None:
    data = video_file("webm", [0.0, 0.2], [(40_000.0, 0.2)])
    with pytest.raises(BadSample, match="too_long"):
        decode_video(data)


def test_a_clip_that_does_not_say_how_long_it_is() -> None:
    data = video_file("webm", [i / 5 for i in range(40)], [], live="1")
    with av.open(io.BytesIO(data)) as container:
        assert not container.duration
    assert probe(data, "video").seconds == pytest.approx(8.0, abs=0.3)
    video = decode_video(data, fps=2.0, limits=MediaLimits(max_video_frames=4))
    shown = [(frame.mean() - 10) / 2 / 5 for frame in video.frames]  # the second that each frame is from
    assert np.allclose(np.diff(shown), 2.0, atol=0.5)


def test_frames_far_apart_take_no_memory() -> None:
    data = video_file("webm", [0.0, 380.0], [], live="1")
    with pytest.raises(BadSample, match="video_too_large"):
        decode_video(data, limits=MediaLimits(max_video_pixels=100_000))


def test_grey_pictures_of_many_bits() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)

    def file(array: np.ndarray, format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format, **options)
        return buffer.getvalue()

    expected = (ramp * 255).round().astype(np.uint8)
    for array in (ramp, ramp * 255, ramp * 65_535):
        assert np.abs(decode_image(file(array, "TIFF"))[..., 0].astype(int) - expected).max() <= 1
    for bad in (np.nan, np.inf):
        broken = ramp.copy()
        broken[3, 3] = bad
        with pytest.raises(BadSample, match="image_corrupt: pixels"):
            decode_image(file(broken, "TIFF"))
    sixteen = (ramp * 65_535).astype(np.uint16)
    picture = decode_image(file(sixteen, "PNG", transparency=int(sixteen[2, 2])))[..., 0].copy()
    assert picture[2, 2] == 255
    picture[2, 2] = expected[2, 2]
    assert np.abs(picture.astype(int) - expected).max() <= 1


def test_limits_of_sound() -> None:
    with pytest.raises(BadSample, match=r"audio_too_long: 1\.0 s; at most 0\.5 s"):
        decode_audio(corrupt.good_audio(), limits=MediaLimits(max_audio_seconds=0.5))
    with pytest.raises(BadSample, match="audio_too_long"):
        decode_video(corrupt.good_video(), limits=MediaLimits(max_audio_seconds=0.5))
    with pytest.raises(BadSample, match=r"audio_too_long.*max_audio_seconds.*cut it"):  # 41 minutes, by the header
        decode_audio(encode_audio(np.zeros(8_000 * 60 * 41, np.float32), 8_000, "flac"))
    long = next(audio_blocks(encode_audio(np.zeros(8_000 * 2400 + 960, np.float32), 8_000, "flac")))
    assert len(long) > 2**20  # what a codec adds to 40 minutes is not too much


# --------------------------------------------------------------------------------------------------------------- video


def shades(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame k is grey of level 10 + 6 k."""
    return np.broadcast_to((10 + 6 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def level(frame: np.ndarray) -> int:
    return round((float(frame.mean()) - 10) / 6)


@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [(8, 2, [0, 4, 8, 12]), (8, 8, list(range(16))), (4, 8, [i // 2 for i in range(32)]), (10, 3, [0, 3, 6, 10, 13])],
)
def test_sampling_follows_time(source_fps: float, fps: float, expected: list[int]) -> None:
    video = decode_video(encode_video(shades(16), source_fps, crf=4), fps)
    assert [level(frame) for frame in video.frames] == expected
    assert video.fps == fps


def test_variable_frame_rate_is_sampled_by_time_stamps() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for picture, tenth in zip(shades(4), (0, 1, 12, 20), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = tenth, Fraction(1, 10)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    video = decode_video(buffer.getvalue(), 2)
    assert [level(frame) for frame in video.frames] == [0, 1, 1, 2, 3]  # at 0, 0.5, 1, 1.5 and 2 s


def test_sound_is_aligned_with_the_first_frame() -> None:
    """Sound that begins half a second after the pictures, or before them, keeps its distance to them."""
    tone = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)).astype(np.float32)
    for picture_start, sound_start, expected in [(0.0, 0.5, 8_000), (0.5, 0.0, -8_000)]:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="matroska") as container:
            video = container.add_stream("libx264", rate=10)
            video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
            sound = container.add_stream("flac", rate=16_000, layout="mono")
            packets = []
            for index, picture in enumerate(shades(10)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = round(picture_start * 10) + index, Fraction(1, 10)
                packets += video.encode(frame)
            packets += video.encode(None)
            samples = (tone * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.time_base = 16_000, Fraction(1, 16_000)
            frame.pts = round(sound_start * 16_000)
            packets += [*sound.encode(frame), *sound.encode(None)]
            for packet in packets:
                container.mux(packet)
        audio = decode_video(buffer.getvalue(), 2).audio
        assert audio is not None
        assert abs(len(audio) - (16_000 + expected)) < 40
        if expected > 0:
            assert np.abs(audio[: expected - 40]).max() < 1e-4
            assert np.abs(audio[expected + 40 :]).max() > 0.4


def test_limits_of_video() -> None:
    data = encode_video(shades(16), 4)
    video = decode_video(data, 4, MediaLimits(max_video_frames=8))  # 4 s: sparser, and it says so
    assert video.fps == 2
    assert [level(frame) for frame in video.frames] == [0, 2, 4, 6, 8, 10, 12, 14]
    for limits, reason in [
        (MediaLimits(max_video_seconds=3), "video_too_long"),
        (MediaLimits(max_pixels=1000), "video_too_large"),
        (MediaLimits(max_video_pixels=10_000), "video_too_large"),
    ]:
        with pytest.raises(BadSample) as error:
            decode_video(data, 4, limits)
        assert error.value.reason == reason


def test_encoders_repeat_and_refuse() -> None:
    assert encode_video(shades(4), 4) == encode_video(shades(4), 4)
    tone = np.zeros(16_000, np.float32)
    assert encode_audio(tone, 16_000, "opus") == encode_audio(tone, 16_000, "opus")
    with pytest.raises(ValueError, match="even sides"):
        encode_video(shades(4, height=31), 4)
    with pytest.raises(ValueError, match=r"samples \[T\]"):
        encode_audio(np.zeros((2, 5), np.float32), 16_000)


def test_sniff() -> None:
    for data, name in [
        (corrupt.good_image("webp"), "webp"),
        (corrupt.good_audio("mp3"), "mp3"),
        (corrupt.good_video(), "mp4"),
        (b"RIFF\0\0\0\0AVI LIST", "avi"),
        (b"plain text", "unknown"),
        (b"", "unknown"),
    ]:
        assert sniff(data)[0] == name
