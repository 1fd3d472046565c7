"""Pitch of sounds whose pitch is known."""

from __future__ import annotations

import numpy as np
import pytest

from omnitrain.evaluation.pitch import compare_pitch, mean_semitones, pitch, spread_semitones

RATE = 24_000


def voice(hertz: np.ndarray) -> np.ndarray:
    """A pulse train with ten harmonics, of that pitch at each sample; quiet where it is 0."""
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 11))
    return (0.2 * wave * (hertz > 0)).astype(np.float32)


def gliding(low: float, high: float, seconds: float = 1.0) -> np.ndarray:
    return np.geomspace(low, high, round(seconds * RATE))


def test_the_pitch_is_what_was_sung() -> None:
    found = pitch(voice(gliding(220, 220)), RATE)
    assert len(found) == 101
    assert np.nanmedian(found) == pytest.approx(220, rel=0.01)
    octave = mean_semitones(pitch(voice(gliding(110, 110)), RATE))
    high = mean_semitones(found)
    assert octave is not None
    assert high is not None
    assert high - octave == pytest.approx(12, abs=0.15)
    flat, glide = spread_semitones(found), spread_semitones(pitch(voice(gliding(110, 220)), RATE))
    assert flat is not None
    assert glide is not None
    assert flat < 0.2
    assert glide == pytest.approx(12 / np.sqrt(12), abs=0.4)  # uniform over an octave


def test_silence_and_noise_have_none() -> None:
    for wave in (np.zeros(RATE, np.float32), np.zeros(10, np.float32), np.zeros(0, np.float32)):
        found = pitch(wave, RATE)
        assert np.isnan(found).all()
        assert mean_semitones(found) is None
        assert spread_semitones(found) is None
    assert np.isnan(pitch(np.random.default_rng(0).normal(0, 0.1, RATE), RATE)).mean() > 0.5
    with pytest.raises(ValueError, match=r"\(24000, 2\)"):
        pitch(np.zeros((RATE, 2)), RATE)


def test_two_recordings_are_compared_frame_by_frame() -> None:
    melody = 200 * 2 ** (0.4 * np.sin(np.linspace(0, 9, RATE)))
    sung, whole_tone_up = pitch(voice(melody), RATE), pitch(voice(melody * 2 ** (2 / 12)), RATE)
    same = compare_pitch(sung, sung)
    assert (same.correlation, same.voicing_error) == (pytest.approx(1), 0)
    assert compare_pitch(sung, whole_tone_up).correlation == pytest.approx(1, abs=0.05)
    mirrored = compare_pitch(sung, pitch(voice(200**2 / melody), RATE)).correlation
    assert mirrored is not None
    assert mirrored < -0.8
    half = melody.copy()
    half[RATE // 2 :] = 0
    assert compare_pitch(sung, pitch(voice(half), RATE)).voicing_error == pytest.approx(0.5, abs=0.06)
    nothing = compare_pitch(sung, np.full_like(sung, np.nan))
    assert nothing.correlation is None
    assert nothing.voicing_error > 0.9
    with pytest.raises(ValueError, match="not the same samples in time"):
        compare_pitch(sung, sung[:50])
