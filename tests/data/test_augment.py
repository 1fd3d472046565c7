"""Recordings that are changed in training: what was drawn can be measured, and is a function of the place."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from omnitrain.data.augment import augment, coloured_noise, room
from omnitrain.data.settings import AugmentConfig

PLAIN = AugmentConfig(speeds=[1.0], noise_share=0, room_share=0)


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(16_000 * seconds)) / 16_000).astype(np.float32) / 2


def peak(wave: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(wave)).argmax() * 16_000 / len(wave))


def test_nothing_chosen_nothing_changed() -> None:
    wave = tone(440)
    assert np.array_equal(augment(wave, 16_000, PLAIN, random.Random(0)), wave)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_moves_length_and_pitch(factor: float) -> None:
    changed = augment(tone(440), 16_000, AugmentConfig(speeds=[factor], noise_share=0, room_share=0), random.Random(0))
    assert len(changed) == pytest.approx(16_000 / factor, abs=2)
    assert peak(changed) == pytest.approx(440 * factor, abs=1.5)


def test_noise_has_the_ratio_that_was_drawn() -> None:
    wave = tone(440, 4)
    config = AugmentConfig(speeds=[1.0], noise_share=1, noise_snr=(12.0, 12.0), room_share=0)
    noise = augment(wave, 16_000, config, random.Random(1)) - wave
    assert 10 * np.log10((wave**2).sum() / (noise**2).sum()) == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_falls_with_frequency(exponent: float) -> None:
    power = torch.fft.rfft(coloured_noise(1 << 16, exponent, torch.Generator().manual_seed(0))).abs().square()
    low, high = power[512:1024].mean(), power[8192:16384].mean()  # four octaves apart
    assert 10 * float((low / high).log10()) == pytest.approx(exponent * 40 * np.log10(2), abs=0.8)


def test_the_echo_dies_away_in_the_time_given() -> None:
    response = room(0.5, 16_000, torch.Generator().manual_seed(0))[1:]
    halves = response[:800].square().mean(), response[-800:].square().mean()
    assert 10 * float((halves[0] / halves[1]).log10()) == pytest.approx(60 * 0.9, abs=2)


def test_a_place_always_sounds_the_same_and_places_differ() -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, 16_000).astype(np.float32)
    all_of_it = AugmentConfig(noise_share=1, room_share=1)
    first, again, other = (augment(wave, 16_000, all_of_it, random.Random(s)) for s in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert len(first) != len(other) or not np.array_equal(first, other)
    assert max(np.abs(first).max(), np.abs(other).max()) <= 1
    assert first.dtype == np.float32


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"speeds": []}, "speeds"),
        ({"speeds": [3.0]}, "between 0.5 and 2"),
        ({"noise_share": 1.5}, "noise_share=1.5"),
        ({"noise_snr": (9.0, 3.0)}, "lower bound first"),
    ],
)
def test_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**wrong)
