"""Edits to pictures and recordings before they are stored: put on white, scaled, cut at silent ends, levelled."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from omnitrain.data.sample import BadSample

SPEECH_RATE = 16_000


def check_heard(wave: np.ndarray, rate: int, file: Path, shortest: float = 0.2) -> None:
    """Raise BadSample for a recording of less than `shortest` seconds (``audio_too_short``) or of silence
    (``audio_silent``)."""
    if len(wave) < shortest * rate:
        raise BadSample("audio_too_short", f"{file} is shorter than {shortest} s")
    if abs(wave).max() < 0.005:
        raise BadSample("audio_silent", f"nothing can be heard in {file}")


def trim_silence(wave: np.ndarray, rate: int = SPEECH_RATE, margin: float = 0.06, floor: float = 0.03) -> np.ndarray:
    """Cut the quiet ends: 10-ms frames below `floor` of the loudest frame's RMS, keeping `margin` seconds around."""
    hop = rate // 100
    frames = wave[: len(wave) // hop * hop].reshape(-1, hop)
    if not len(frames):
        return wave
    rms = np.sqrt((frames**2).mean(axis=1))
    loud = np.flatnonzero(rms > floor * rms.max())
    if not len(loud):
        return wave
    return wave[max(0, int(loud[0] * hop - margin * rate)) : int((loud[-1] + 1) * hop + margin * rate)]


def loudest(wave: np.ndarray, seconds: float, rate: int = SPEECH_RATE) -> np.ndarray:
    """The `seconds` with the most energy (on a 10-ms grid); a shorter wave as it is."""
    hop, length = rate // 100, round(seconds * rate)
    if len(wave) <= length:
        return wave
    energy = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
    starts = np.arange(0, len(wave) - length + 1, hop)
    start = int(starts[np.argmax(energy[starts + length] - energy[starts])])
    return wave[start : start + length]


def normalise_peak(wave: np.ndarray, peak: float = 0.9) -> np.ndarray:
    """Scale so that the loudest sample is `peak`; silence stays silence."""
    loudest = float(np.abs(wave).max(initial=0.0))
    return wave * np.float32(peak / loudest) if loudest > 1e-4 else wave


def on_white(picture: Image.Image, size: int) -> Image.Image:
    """RGB, transparent parts white, the longer side at most `size` pixels (never enlarged)."""
    rgba = picture.convert("RGBA")
    # Shrink with premultiplied alpha ("RGBa"), or the colour hidden under transparent pixels bleeds into the edges.
    scale = min(1.0, size / max(rgba.size))
    if scale < 1:
        small = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
        rgba = rgba.convert("RGBa").resize(small, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, "white")
    canvas.alpha_composite(rgba)
    return canvas.convert("RGB")


def on_square(picture: Image.Image, size: int) -> Image.Image:
    """As `on_white`, enlarged if need be and centred on a white square of `size` pixels."""
    scale = size / max(picture.size)
    if scale > 1:
        larger = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.convert("RGBa").resize(larger, Image.Resampling.BICUBIC).convert("RGBA")
    flat = on_white(picture, size)
    square = Image.new("RGB", (size, size), "white")
    square.paste(flat, ((size - flat.width) // 2, (size - flat.height) // 2))
    return square


def to_webp(picture: Image.Image, quality: int | None = None) -> bytes:
    """WebP bytes; lossless when `quality` is None."""
    buffer = io.BytesIO()
    if quality is None:
        picture.save(buffer, "WEBP", lossless=True, method=4)
    else:
        picture.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()
