"""Mel frames and patches against the public processors of `transformers`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnitrain.data.chat import train_bpe
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import (
    AudioGeometry,
    VisionGeometry,
    fit_size,
    image_patches,
    log_mel,
    log_mel_of_blocks,
    video_patches,
)
from omnitrain.data.sample import BadSample
from omnitrain.data.settings import MediaLimits
from tests.data import corrupt


@pytest.mark.parametrize("samples", [400, 1601, 16_000, 35_777, 16_000 * 65])
def test_log_mel_equals_whisper(samples: int) -> None:
    from transformers import WhisperFeatureExtractor

    rng = np.random.default_rng(samples)
    time = np.arange(samples) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * (200 + 900 * time) * time) + 0.02 * rng.standard_normal(samples)
    wave = (wave * (time < 60)).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=128, sampling_rate=16_000)
    expected = extractor(
        wave, sampling_rate=16_000, padding=False, truncation=False, return_tensors="np"
    ).input_features[0]
    ours = log_mel(wave)
    assert ours.shape == (samples // 160, 128)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.T, atol=1e-4)


@pytest.mark.parametrize("samples", [399, 16_000, 32_000, 32_160, 32_399, 32_400, 32_559, 32_560, 80_003])
def test_log_mel_of_pieces_equals_whisper(samples: int, monkeypatch) -> None:
    """With blocks of a second: at their borders the last frame, which is left out, must not count for the maximum."""
    from transformers import WhisperFeatureExtractor

    monkeypatch.setattr("omnitrain.data.features._BLOCK_FRAMES", 100)
    rng = np.random.default_rng(samples)
    wave = (rng.uniform(-1, 1, samples) * np.linspace(0.001, 0.9, samples)).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=128, sampling_rate=16_000)
    filled = np.pad(wave, (0, max(0, 400 - samples)))
    reference = extractor(filled, sampling_rate=16_000, padding=False, truncation=False)
    expected = np.asarray(reference["input_features"][0]).T
    whole = log_mel(wave)
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    cuts = np.sort(rng.integers(0, samples, 12))
    np.testing.assert_array_equal(log_mel_of_blocks(np.split(wave, cuts)), whole)


def test_log_mel_edges() -> None:
    assert log_mel(np.zeros(7, np.float32)).shape == (2, 128)
    assert np.isfinite(log_mel(np.zeros(1600, np.float32))).all()
    assert log_mel(np.zeros(800, np.float32), AudioGeometry(n_mels=80)).shape == (5, 80)
    with pytest.raises(ValueError, match="T > 0"):
        log_mel(np.zeros(0, np.float32))


GEOMETRY = VisionGeometry(min_pixels=64 * 64, max_pixels=256 * 256)


@pytest.mark.parametrize(
    ("height", "width", "resized"), [(96, 160, False), (100, 150, True), (40, 30, True), (700, 333, True)]
)
def test_image_patches_equal_the_reference(height: int, width: int, resized: bool) -> None:
    from transformers import Qwen2VLImageProcessor

    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessor(
        patch_size=16, min_pixels=64 * 64, max_pixels=256 * 256, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = processor(torch.from_numpy(image).permute(2, 0, 1), return_tensors="np")
    patches, grid = image_patches(image, GEOMETRY)
    assert grid.tolist() == expected["image_grid_thw"][0].tolist()
    assert patches.shape == (grid.prod(), GEOMETRY.patch_dim)
    np.testing.assert_allclose(patches, expected["pixel_values"], atol=1.01 / 127.5 if resized else 1e-6)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 64, 96), (4, 96, 64), (5, 90, 130), (3, 480, 640)])
def test_video_patches_equal_the_reference(frames: int, height: int, width: int) -> None:
    from transformers import Qwen2VLVideoProcessor

    video = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    processor = Qwen2VLVideoProcessor(
        patch_size=16,
        min_pixels=64 * 64,
        max_pixels=256 * 256,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        cap_pixels_per_frame=True,
        max_video_tokens=100,
    )
    expected = processor(torch.from_numpy(video).permute(0, 3, 1, 2), return_tensors="np", do_sample_frames=False)
    geometry = VisionGeometry(video_min_pixels=64 * 64, video_max_pixels=256 * 256, video_total_pixels=90 * 32 * 32)
    patches, grid = video_patches(video, geometry)
    assert grid.tolist() == expected["video_grid_thw"][0].tolist()
    np.testing.assert_allclose(patches, expected["pixel_values_videos"], atol=1.01 / 127.5)


def test_layout_equals_qwen3_vl() -> None:
    """Same layout as the Qwen3-VL video processor (whose budget counts all frames together) where none is resized."""
    from transformers import Qwen3VLVideoProcessor

    video = np.random.default_rng(1).integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    processor = Qwen3VLVideoProcessor(size={"shortest_edge": 1024, "longest_edge": 1 << 24}, cap_pixels_per_frame=False)
    expected = processor(torch.from_numpy(video).permute(0, 3, 1, 2), return_tensors="np", do_sample_frames=False)
    patches, grid = video_patches(video, VisionGeometry(video_min_pixels=1024))
    assert grid.tolist() == expected["video_grid_thw"][0].tolist() == [3, 4, 6]
    np.testing.assert_allclose(patches, expected["pixel_values_videos"], atol=1e-6)


def test_fit_size_bounds() -> None:
    for height, width in [(1, 1), (16, 2000), (5000, 40), (333, 777)]:
        rows, columns = fit_size(height, width, 32, 4096, 65536)
        assert rows % 32 == columns % 32 == 0
        assert rows >= 32
        assert columns >= 32
    with pytest.raises(BadSample, match="image_aspect_ratio"):
        image_patches(np.zeros((1, 300, 3), np.uint8))
    with pytest.raises(BadSample, match="video_no_frames"):
        video_patches(np.zeros((0, 32, 32, 3), np.uint8))


def test_media_are_read_in_full_precision_under_autocast() -> None:
    """As where a run with bf16-mixed scores its model."""
    encoder = SampleEncoder(
        tokenizer=train_bpe(["what is this? a thing."] * 3, 400), audio=AudioGeometry(), vision=VisionGeometry(),
        limits=MediaLimits(),
    )  # fmt: skip
    for sample in (
        corrupt.media_sample("a", "audio", corrupt.good_audio("wav")),
        corrupt.media_sample("b", "image", corrupt.good_image()),
        corrupt.media_sample("c", "video", corrupt.good_video()),
    ):
        plain = encoder(sample, lambda segment: segment.media)
        with torch.autocast("cpu", torch.bfloat16):
            under = encoder(sample, lambda segment: segment.media)
        for a, b in zip((*plain.mel, *plain.patches), (*under.mel, *under.patches), strict=True):
            np.testing.assert_array_equal(a, b)
