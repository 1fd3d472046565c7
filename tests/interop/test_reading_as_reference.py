"""Where omnitrain reads media otherwise than `transformers`, it can do as the reference does, and is then equal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2VLVideoProcessor, WhisperFeatureExtractor
from transformers.video_utils import VideoMetadata

import omnitrain
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.media import decode_audio, decode_video, encode_audio, encode_video
from omnitrain.data.positions import audio_tokens
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.settings import AudioGeometry, MediaLimits, VisionGeometry
from omnitrain.interop.public_format import load_pretrained
from tests.interop.public_models import save_public_model
from tests.training.test_talker_module import TOKENIZER

CLIPS = [
    # frames, a second, fps asked for
    (2, 25, 2.0), (3, 25, 2.0), (5, 10, 2.0), (25, 25, 2.0), (26, 25, 2.0), (49, 25, 2.0), (63, 25, 2.0),
    (132, 25, 2.0), (133, 25, 1.0), (150, 30, 2.0), (151, 30, 3.0), (60, 12, 1.0), (61, 12, 5.0), (40, 10, 10.0),
    (77, 24, 2.0), (90, 24, 7.0), (100, 50, 2.0), (33, 8, 0.5), (64, 16, 4.0), (119, 15, 2.5),
]  # fmt: skip


def clip(frames: int, rate: int) -> bytes:
    """Each frame is of another grey."""
    grey = (np.arange(frames) * 97 % 240).astype(np.uint8)
    return encode_video(np.broadcast_to(grey[:, None, None, None], (frames, 32, 32, 3)).copy(), rate, crf=4)


@pytest.mark.parametrize(("frames", "rate", "fps"), CLIPS)
def test_frames_of_a_clip(frames: int, rate: int, fps: float) -> None:
    processor = Qwen2VLVideoProcessor()
    metadata = VideoMetadata(total_num_frames=frames, fps=rate, duration=frames / rate)
    expected = processor.sample_frames(metadata, fps=fps).tolist()
    data = clip(frames, rate)
    whole = decode_video(data, rate).frames
    assert len(whole) == frames
    video = decode_video(data, fps, sampling="reference")
    assert np.array_equal(video.frames, whole[expected])
    assert video.fps == fps  # as the reference's processor counts time
    if (frames, rate, fps) == (132, 25, 2.0):  # 5.28 s: five grids there, six here
        assert (len(video.frames), len(decode_video(data, fps).frames)) == (10, 11)


def test_a_clip_whose_header_counts_no_frames(tmp_path: Path) -> None:
    import av

    data, buffer = clip(30, 10), io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        assert container.streams.video[0].frames == 0
    frames = [decode_video(each, 2, sampling="reference").frames for each in (data, buffer.getvalue())]
    assert len(frames[0]) == 6
    assert np.array_equal(*frames)


def test_another_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="vision: sampling is 'linspace'; it must be 'times' or 'reference'"):
        VisionGeometry(sampling="linspace")


def test_a_clip_of_one_frame_is_one_frame() -> None:
    assert len(decode_video(clip(1, 10), 2, sampling="reference").frames) == 1


def wave(samples: int) -> np.ndarray:
    rng = np.random.default_rng(samples)
    time = np.arange(samples) / 16_000
    return (0.4 * np.sin(2 * np.pi * (200 + 300 * time) * time) + 0.02 * rng.standard_normal(samples)).astype("f4")


@pytest.mark.parametrize(
    "lengths", [(16_050, 50_000), (50_000, 16_050), (9_000, 50_000), (5_000, 9_010), (16_000, 32_000, 480), (20_001,)]
)
def test_recordings_of_one_prompt(lengths: tuple[int, ...], tmp_path: Path) -> None:
    reference = save_public_model(tmp_path).model.audio_tower
    n_mels = reference.config.num_mel_bins
    files = [encode_audio(wave(n), 16_000, "wav") for n in lengths]
    waves = [decode_audio(file) for file in files]
    extractor = WhisperFeatureExtractor(feature_size=n_mels, sampling_rate=16_000)
    theirs = extractor(
        waves, sampling_rate=16_000, padding=True, truncation=False, return_attention_mask=True, return_tensors="pt"
    )
    mask = theirs["attention_mask"].bool()
    packed = theirs["input_features"].transpose(1, 2)[mask]  # [F, n_mels]
    with torch.no_grad():
        expected = reference(packed.T, feature_lens=mask.sum(1)).last_hidden_state

    encoder = SampleEncoder(
        tokenizer=TOKENIZER, audio=AudioGeometry(n_mels=n_mels, reference_padding=True), vision=VisionGeometry(),
        limits=MediaLimits(),
    )  # fmt: skip
    recordings = tuple(Segment(type="audio", media=file) for file in files)
    sample = Sample(id="a", source="t", messages=(Message(role="user", segments=recordings),))
    mel = encoder.encode_prompt(sample, lambda segment: segment.media or b"").mel
    assert [len(m) for m in mel] == mask.sum(1).tolist()
    np.testing.assert_allclose(np.concatenate(mel), packed.numpy(), atol=1e-4)
    aut = load_pretrained(tmp_path).aut
    aut.reference_padding = True
    with torch.no_grad():
        ours = aut(packed, mask.sum(1))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    if lengths == (16_050, 50_000):
        assert sum(audio_tokens(len(m), 100) for m in mel) == len(ours) == 55
        alone = [m.shape[0] for m in _alone(encoder, sample)]
        assert sum(audio_tokens(n, 100) for n in alone) == 54


def _alone(encoder: SampleEncoder, sample: Sample) -> tuple[np.ndarray, ...]:
    plain = replace(encoder, audio=replace(encoder.audio, reference_padding=False))
    return plain.encode_prompt(sample, lambda segment: segment.media or b"").mel


def test_load_as_reference(tmp_path: Path) -> None:
    from omnitrain.interop import save_pretrained
    from omnitrain.models.presets import build, init_weights

    model = build("tiny", vocab_size=TOKENIZER.vocab_size, special_tokens=TOKENIZER.special_ids)
    init_weights(model, 0)
    save_pretrained(model, tmp_path)
    for asked in (False, True):
        loaded, encoder = omnitrain.load(tmp_path, as_reference=asked)
        assert loaded.aut.reference_padding == encoder.audio.reference_padding == asked
        assert encoder.vision.sampling == ("reference" if asked else "times")
