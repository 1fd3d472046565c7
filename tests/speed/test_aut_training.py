"""The comparison with Whisper compares like with like."""

from __future__ import annotations

import argparse
import pickle
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from speed import aut_training as benchmark


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    out = str(tmp_path_factory.mktemp("out"))
    few = ["--recordings", "12", "--heldout", "4", "--mel-frames", "600", "--speed-batches", "1", "--passes", "1"]
    args = benchmark.arguments(["--out", out, *few, "--steps", "2", "--eval-every", "2", "--warmup", "1"])
    args.threads, args.seed = 1, 0
    return args


@pytest.fixture(scope="module")
def data(args: argparse.Namespace) -> benchmark.Data:
    return pickle.loads(pickle.dumps(benchmark.read_data(args)))


@pytest.mark.parametrize("name", benchmark.VARIANTS)
def test_all_variants_have_the_same_targets(data, name):
    """Made sure of by a model without weights: each target costs log V."""
    variant = benchmark.build(name, data, 0)
    for parameter in variant.model.parameters():
        torch.nn.init.zeros_(parameter)
    for batch in (*data.train, *data.heldout):
        nats = float(variant.loss(variant.prepared(batch)).detach())
        expected = benchmark.targets_of(batch) * torch.tensor(float(data.vocabulary)).log()
        assert nats == pytest.approx(float(expected), rel=1e-5)


def test_whisper_gets_the_same_recordings_and_texts(data):
    batch = data.train[0]
    mels, text = batch.mel.split(batch.mel_lengths.tolist()), benchmark.padded_text(batch)
    plain, stacked = (benchmark.padded_mel(batch, 400, s) for s in (1, 4))
    assert plain.shape == (len(batch), 128, 400)
    assert stacked.shape == (len(batch), 512, 100)
    for i, mel in enumerate(mels):
        assert torch.equal(plain[i, :, : len(mel)].T, mel)
        assert torch.all(plain[i, :, len(mel) :] <= mel.min() + 1e-6)  # silence is as loud as the quietest, or less
        assert torch.equal(stacked[i, :, 3], plain[i, :, 12:16].T.flatten())
        ids = batch.input_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        types = batch.token_types[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        assert text["ids"][i, : text["lengths"][i]].tolist() == ids[types == 0].tolist()


def test_whisper_writes_what_its_own_generate_writes(data):
    from transformers.generation import GenerationMixin

    variant = benchmark.build("whisper sdpa", data, 0)
    prompts = data.heldout[0].prompts()
    found = variant.write(prompts, 6)
    mel, text = variant.prepared(prompts)
    for i, n in enumerate(text["lengths"].tolist()):
        out = GenerationMixin.generate(
            variant.model.eval(), mel[i : i + 1], decoder_input_ids=text["ids"][i : i + 1, :n], do_sample=False,
            max_new_tokens=6, eos_token_id=list(data.stop_ids), suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
        assert found[i] == out[0, n:].tolist()


@pytest.mark.parametrize("name", ["omnitrain", "whisper sdpa, 12.5 a second"])
def test_a_step_of_each_and_its_figures(data, args, name):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:  # this one may have had the memory already
        speed = own.submit(benchmark.measure_speed, name, data, args).result()
    assert speed["recordings_per_s"] > 0
    assert 0 < speed["gib"] < 4
    first, last = benchmark.measure_learning(name, data, args)["points"]
    assert (first["step"], last["step"]) == (0, 2)
    assert last["loss"] < first["loss"]
    assert 0 < last["seconds"] < 60


def test_each_pass_has_all_batches_in_its_own_order():
    taken = list(islice(benchmark.in_order(range(8), seed=1), 24))
    passes = [taken[i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(one) == list(range(8)) for one in passes)
    assert passes[0] != passes[1]
    assert taken == list(islice(benchmark.in_order(range(8), seed=1), 24))


def test_curves_are_drawn(tmp_path: Path):
    points = [{"step": s, "seconds": 2.0 * s, "loss": 8 / s, "cer": 1 / s} for s in (1, 2, 3)]
    benchmark.draw({"omnitrain": [points, points], "whisper": [points]}, tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
