"""A small random Mimi, saved and read back, against transformers."""

from __future__ import annotations

import pytest
import torch

from omnitrain.interop.mimi import MimiCodec
from omnitrain.interop.public_format import CheckpointError

SIZES = dict(
    hidden_size=32,
    num_filters=4,
    upsampling_ratios=[8, 6, 5, 4],
    codebook_size=64,
    codebook_dim=16,
    vector_quantization_hidden_dimension=16,
    num_quantizers=18,
    upsample_groups=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=4,
    sliding_window=20,
)


def save_mimi(folder, **changes):
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**{**SIZES, **changes})).eval()
    for name, buffer in model.named_buffers():  # untrained codebooks are all zeros
        if name.endswith("embed_sum"):
            buffer.normal_()
        elif name.endswith(("cluster_usage", "initialized")):
            buffer.fill_(1)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_codes_and_waveforms_are_those_of_transformers(tmp_path) -> None:
    reference = save_mimi(tmp_path)
    codec = MimiCodec.from_folder(tmp_path)
    wav = torch.randn(2, 5 * 1920 + 300)
    codes = codec.encode(wav)
    expected = reference.encode(wav[:, None]).audio_codes[:, :16]
    assert codes.shape == (2, 6, 16)
    assert torch.equal(codes, expected.transpose(1, 2))
    assert len(codes.unique()) > 10
    for n in (16, 3, 1):
        sound = codec.decode(codes[..., :n])
        assert sound.shape == (2, 6 * 1920)
        torch.testing.assert_close(sound, reference.decode(expected[:, :n]).audio_values[:, 0], atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in codec.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(upsampling_ratios=[8, 6, 5, 2]), "frame rate is 25 a second; expected 12.5"),
        (dict(num_quantizers=8), "num_quantizers is 8; 16 codebooks"),
        (dict(sampling_rate=16000), "sampling_rate is 16000 Hz; expected 24000"),
    ],
    ids=["frame rate", "codebooks", "sample rate"],
)
def test_another_mimi_is_refused(tmp_path, changes, message) -> None:
    save_mimi(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        MimiCodec.from_folder(tmp_path)


def test_errors_name_what_is_wrong(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        MimiCodec.from_folder(tmp_path)
    save_mimi(tmp_path)
    codec = MimiCodec.from_folder(tmp_path)
    with pytest.raises(ValueError, match="1 to 16"):
        codec.decode(torch.zeros(1, 2, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0\.\.63"):
        codec.decode(torch.full((1, 2, 16), 64))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected 'mimi'"):
        MimiCodec.from_folder(tmp_path)
