"""A tiny random model and media of a few bytes, for benchmarks written in their own formats."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import AudioGeometry, VisionGeometry
from omnitrain.data.media import MediaLimits, encode_video
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights

SMALL = {"thinker": {"layers": 2}, "aut": {"layers": 1}, "vision": {"layers": 2}}


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return train_bpe(["the quick brown fox", "which of these is it? A B C D", "0 1 2 3 4 5 6 7 8 9"] * 20, 400)


@pytest.fixture(scope="session")
def model(tokenizer: ChatTokenizer) -> OmniModel:
    model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=tokenizer.special_ids, **SMALL)
    init_weights(model, seed=0)
    return model.eval()


@pytest.fixture(scope="session")
def encoder(tokenizer: ChatTokenizer, model: OmniModel) -> SampleEncoder:
    vision = model.config.vision
    return SampleEncoder(
        tokenizer=tokenizer,
        audio=AudioGeometry(n_mels=model.config.aut.n_mels, chunk_frames=model.config.aut.chunk_frames),
        vision=VisionGeometry(
            patch=vision.patch, temporal_patch=vision.temporal_patch, merge=vision.merge, min_pixels=64 * 64
        ),
        limits=MediaLimits(),
        ids_per_second=model.config.position_id_per_seconds,
    )


def recording(path: Path, seed: int = 0) -> Path:
    """A third of a second of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, 5_000), 16_000)
    return path


def picture(seed: int = 0) -> bytes:
    """PNG, 64 x 64."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def video() -> bytes:
    frames = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    return encode_video(frames, fps=4)
