"""An audio encoder from a folder that has one: Qwen3-ASR in both of its layouts, Qwen3-Omni, runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnitrain.files import LAST_CHECKPOINT
from omnitrain.interop.audio_tower import ASR_AUDIO, TowerTensors, read_tower
from omnitrain.interop.public_config import CheckpointError
from omnitrain.interop.start_from import start_from
from omnitrain.models.aut import AuTEncoder
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights
from omnitrain.models.sizes import AuTConfig
from tests.interop.public_models import save_public_model

WIDTH = 192  # of the Thinker `tiny`
SIZES = {"d_model": 32, "layers": 3, "heads": 4, "ffn": 40, "conv_hidden": 6}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """A random Qwen3-ASR of `transformers`, and its folder."""
    from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

    text = dict(vocab_size=64, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16)  # fmt: skip
    audio = dict(d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=40, output_dim=WIDTH,
                 downsample_hidden_size=6)  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ASRForConditionalGeneration(Qwen3ASRConfig(audio_config=audio, text_config=text, audio_token_id=60))
    with torch.no_grad():
        for p in model.model.audio_tower.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    folder = tmp_path_factory.mktemp("asr")
    model.save_pretrained(folder)
    return model.eval(), folder


@pytest.fixture
def published(reference, tmp_path: Path) -> Path:
    """The same weights as Qwen3-ASR is published: everything below `thinker`."""
    folder = tmp_path / "published"
    folder.mkdir()
    names = {
        "model.multi_modal_projector.linear_": "thinker.audio_tower.proj",
        "model.audio_tower.": "thinker.audio_tower.",
        "model.language_model.": "thinker.model.",
    }
    renamed = {}
    for key, x in load_file(reference[1] / "model.safetensors").items():
        start = next((start for start in names if key.startswith(start)), "")
        renamed[names.get(start, "thinker.") + key.removeprefix(start)] = x
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((reference[1] / "config.json").read_text())
    parts = {key: config.pop(key) for key in ("audio_config", "text_config")}
    (folder / "config.json").write_text(json.dumps({**config, "thinker_config": parts}))
    return folder


def model_with(**aut) -> OmniModel:
    model = build("tiny", vocab_size=64, special_tokens={}, aut={**SIZES, **aut})
    init_weights(model, seed=0)
    return model.eval()


@torch.no_grad()
def test_features_are_those_of_transformers(reference, published: Path) -> None:
    """From either layout: 2.3 s of sound, the same features at the Thinker's door within 1e-4."""
    theirs, folder = reference
    mel = torch.randn(1, 128, 300)
    mel[..., 230:] = 0
    expected = theirs.model.get_audio_features(mel, (torch.arange(300) < 230).long()[None]).pooler_output
    for place in (folder, published):
        model = model_with()
        before = model.thinker.embed_tokens.weight.clone()
        assert start_from(model, {"aut": place}) == []
        torch.testing.assert_close(model.aut(mel[0, :, :230].T, torch.tensor([230])), expected, rtol=0, atol=1e-4)
        assert model.thinker.embed_tokens.weight.equal(before)


def test_another_width_leaves_the_projection(reference, published: Path) -> None:
    model = build("tiny", vocab_size=64, special_tokens={}, aut=SIZES, thinker={"d_model": 96}, vision={"layers": 3})
    init_weights(model, seed=0)
    before = {name: x.clone() for name, x in model.aut.state_dict().items()}
    (notice,) = start_from(model, {"aut": published})
    assert "aut.proj1, aut.proj2) stays as it was drawn: this Thinker has width 96" in notice
    same = {name for name, x in model.aut.state_dict().items() if x.equal(before[name])}
    assert same == {"proj1.weight", "proj1.bias", "proj2.weight", "proj2.bias"}


def test_other_sizes_are_refused_with_the_cure(published: Path) -> None:
    said = r"d_model 32 \(model: 64\), ffn 40 \(model: 80\)\. Write '\+model\.aut=\{d_model:32,ffn:40\}'"
    with pytest.raises(CheckpointError, match=said):
        start_from(model_with(d_model=64, ffn=80), {"aut": published})


@pytest.mark.parametrize(("variant", "kind"), [(0, "full"), (1, "thinker")])
def test_of_qwen3_omni_only_the_encoder_is_read(tmp_path: Path, variant: int, kind: str) -> None:
    save_public_model(tmp_path, variant, kind)
    weights = load_file(tmp_path / "model.safetensors")
    config, prefix = read_tower(tmp_path)
    kept = {key: x for key, x in weights.items() if ".audio_tower." in f".{key}"}
    save_file(kept, tmp_path / "model.safetensors")  # nothing else is there to be read
    found = TowerTensors(tmp_path, replace(config, window_frames=400))
    assert {f"{prefix}{name}" for name in found} == kept.keys()
    assert all(found[key.removeprefix(prefix)].equal(x) for key, x in kept.items())


def test_from_runs(tmp_path: Path) -> None:
    """Of a Thinker's run, and of a run of AuT alone, which has no projection."""
    source = model_with(layers=2)
    for name in ("thinker", "aut"):
        (tmp_path / name / LAST_CHECKPOINT).parent.mkdir(parents=True)
        state = {f"model.aut.{key}": x + 1 for key, x in source.aut.state_dict().items()}
        state = {key: x for key, x in state.items() if name == "thinker" or ".proj" not in key}
        torch.save({"state_dict": {**state, "model.decoder.x": torch.ones(2)}}, tmp_path / name / LAST_CHECKPOINT)
        model = model_with(layers=2)
        notices = start_from(model, {"aut": tmp_path / name})
        changed = {key for key, x in model.aut.state_dict().items() if not x.equal(source.aut.state_dict()[key])}
        projection = {key for key in source.aut.state_dict() if key.startswith("proj")}
        assert changed == source.aut.state_dict().keys() - (projection if name == "aut" else set())
        assert len(notices) == (name == "aut")


def test_a_missing_tensor_and_another_architecture_are_named(published: Path) -> None:
    weights = load_file(published / "model.safetensors")
    del weights["thinker.audio_tower.layers.1.fc1.bias"]
    save_file(weights, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"key 'thinker\.audio_tower\.layers\.1\.fc1\.bias' is missing"):
        start_from(model_with(), {"aut": published})
    (published / "config.json").write_text('{"architectures": ["WhisperForConditionalGeneration"]}')
    with pytest.raises(CheckpointError, match="'WhisperForConditionalGeneration'; an audio encoder is read from"):
        start_from(model_with(), {"aut": published})


def test_every_default_is_that_of_transformers_and_the_published_sizes_fit() -> None:
    from transformers import Qwen3ASRConfig

    theirs = Qwen3ASRConfig().audio_config
    assert {key: getattr(theirs, key) for key in ASR_AUDIO.defaults} == ASR_AUDIO.defaults
    for sizes, millions in ((dict(d_model=896, layers=18, heads=14, ffn=3584, out_dim=1024), 186),
                            (dict(d_model=1024, layers=24, heads=16, ffn=4096, out_dim=2048), 317)):  # fmt: skip
        with torch.device("meta"):
            encoder = AuTEncoder(AuTConfig(**sizes))
        assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == millions
