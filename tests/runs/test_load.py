"""What is to be had from Python: `omnitrain.load` and a few names beside it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import omnitrain
from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights

SMALL = {"thinker": {"layers": 2, "accept_hidden_layer": 1}, "aut": {"layers": 1}, "vision": {"layers": 2}}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_bpe(["a red fire engine"] * 20, 400)


@pytest.fixture(scope="module")
def model(tokenizer) -> OmniModel:
    model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=tokenizer.special_ids, **SMALL)
    init_weights(model, seed=0)
    return model


@pytest.fixture(scope="module")
def model_overrides() -> list[str]:
    return [f"model.{part}.{key}={value}" for part, d in SMALL.items() for key, value in d.items()]


def test_a_run_and_a_public_folder_give_the_same(model, run_dir, public_dir):
    question = omnitrain.Message(role="user", segments=(omnitrain.Segment(type="text", text="red?"),))
    sample = omnitrain.Sample(id="mine", source="here", messages=(question,))
    hidden = []
    for folder in (run_dir, str(public_dir)):
        loaded, encoder = omnitrain.load(folder)
        assert not loaded.training
        batch = PackedBatch.pack([encoder.encode_prompt(sample, lambda segment: b"")])
        hidden.append(loaded(**batch.model_inputs()).hidden)
    assert torch.equal(*hidden)
    torch.testing.assert_close(hidden[0], model.eval()(**batch.model_inputs()).hidden)


@pytest.mark.parametrize(("asked", "given"), [(None, torch.float32), ("auto", torch.float32), ("bfloat16",) * 2])
def test_dtypes(run_dir, public_dir, asked, given):
    given = torch.bfloat16 if given == "bfloat16" else given
    for folder in (run_dir, public_dir):
        loaded, _ = omnitrain.load(folder, device="cpu", dtype=asked)
        assert {p.dtype for p in loaded.parameters()} == {given}


def test_public_folders_in_and_out(model, tmp_path):
    omnitrain.interop.save_pretrained(model, tmp_path)
    assert omnitrain.interop.load_pretrained(tmp_path).config.thinker == model.config.thinker


def test_importing_the_package_imports_nothing_heavy():
    heavy = "('torch', 'lightning', 'hydra', 'numpy', 'datasets')"
    code = f"import omnitrain, sys; print([n for n in {heavy} if n in sys.modules]); omnitrain.interop.load_pretrained"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        omnitrain.lod  # noqa: B018
