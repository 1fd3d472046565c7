"""The encoders and generation on a CUDA GPU against the same on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.cache import PackedKVCache
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import generate, read_prompts
from omnitrain.generation.transcribe import BeamSearch, transcribe
from omnitrain.interop.public_format import load_pretrained
from tests.interop import public_models
from tests.models.whisper_reference import small_aut, spoken_sample

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

PROMPTS = [
    [("text", 9)],
    [("text", 3), ("image", (1, 4, 6)), ("audio", 163), ("text", 5)],
    [("audio", 57), ("video", (3, 4, 4), 0.5), ("text", 4)],
    [("text", 2), ("audio_video", (2, 4, 4), 1.0, 250), ("text", 3)],
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    reference = public_models.save_public_model(folder)
    samples = [public_models.public_sample(reference.config, p, seed=i) for i, p in enumerate(PROMPTS)]
    return load_pretrained(folder).eval(), PackedBatch.pack([s.encoded for s in samples])


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
def test_encoders(setting, dtype, tolerance):
    model, batch = setting
    expected = [model.aut(batch.mel, batch.mel_lengths), *_flat(model.visual(batch.patches, batch.grid_thw))]
    on_gpu, there = copy.deepcopy(model).to("cuda", dtype), batch.to("cuda")
    found = [on_gpu.aut(there.mel, there.mel_lengths), *_flat(on_gpu.visual(there.patches, there.grid_thw))]
    for a, b in zip(found, expected, strict=True):
        error = (a.float().cpu() - b).norm() / b.norm()
        assert error < tolerance


def _flat(output: tuple[torch.Tensor, list[torch.Tensor]]) -> list[torch.Tensor]:
    return [output[0], *output[1]]


@pytest.mark.parametrize("chunk", [None, 7])
def test_greedy_tokens_equal_those_of_the_cpu(setting, chunk):
    model, batch = setting
    expected = generate(model, batch, Decoding(max_new_tokens=10))
    assert generate(copy.deepcopy(model).cuda(), batch, Decoding(max_new_tokens=10), prefill_chunk=chunk) == expected


def test_sampled_tokens_equal_those_of_the_cpu(setting):
    model, batch = setting
    decoding = Decoding(max_new_tokens=10, temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=5)
    assert generate(copy.deepcopy(model).cuda(), batch, decoding) == generate(model, batch, decoding)


@torch.no_grad()
def test_prefill_in_chunks_in_bfloat16(setting):
    model, batch = copy.deepcopy(setting[0]).to("cuda", torch.bfloat16), setting[1].to("cuda")
    whole = read_prompts(model, batch, PackedKVCache())[0].float()
    pieces = read_prompts(model, batch, PackedKVCache(), chunk=7)[0].float()
    assert (whole - pieces).norm() / whole.norm() < 0.1
    assert all(len(tokens) == 5 for tokens in generate(model, batch, Decoding(max_new_tokens=5)))


def test_transcripts_equal_those_of_the_cpu():
    model = small_aut(seed=1)
    batch = PackedBatch.pack([spoken_sample(i, frames=90 + 70 * i, before=2, after=3) for i in range(4)])
    on_gpu = copy.deepcopy(model).to("cuda")
    for decoding in (Decoding(max_new_tokens=8), BeamSearch(width=3, max_new_tokens=8)):
        expected = transcribe(model, batch, decoding, stop_ids=[20, 31])
        assert transcribe(on_gpu, batch, decoding, stop_ids=[20, 31]) == expected
