"""Losses per sample do not depend on packing, and add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.packing import Budget
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.evaluation.answers import answer_prompts
from omnitrain.evaluation.teacher_forced import evaluating, packs, sample_losses
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.transcribe import transcribe
from omnitrain.models.presets import build, init_weights
from tests.models.whisper_reference import small_aut, spoken_sample

from .conftest import Samples, grey_sample, text_sample


@pytest.fixture(scope="module")
def model(tokenizer: ChatTokenizer) -> torch.nn.Module:
    small = {"d_model": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "n_experts": 4, "expert_width": 16}
    model = build(
        "tiny",
        vocab_size=tokenizer.vocab_size,
        special_tokens=tokenizer.special_ids,
        thinker={"layers": 2, "mrope_sections": (4, 2, 2), "accept_hidden_layer": 1, **small},
        aut={"out_dim": 32},
        vision={"out_dim": 32},
    )
    init_weights(model, 0)
    return model


def test_losses_do_not_depend_on_the_pack(model: torch.nn.Module, encoder: SampleEncoder) -> None:
    samples = [grey_sample(0), text_sample(1), grey_sample(2), text_sample(3)]
    numbers = [encoder(s, Samples(samples).media_bytes) for s in samples]
    together = sample_losses(model, numbers)
    alone = [sample_losses(model, [n])[0] for n in numbers]
    assert [x.tokens for x in together] == [int((s.labels >= 0).sum()) for s in numbers]
    np.testing.assert_allclose([x.nats for x in together], [x.nats for x in alone], rtol=1e-4)
    assert all(x.target_bytes > 0 for x in together)


def test_a_long_document_is_cut_and_loses_no_target(model: torch.nn.Module, encoder: SampleEncoder) -> None:
    text = "a b c d e f g h " * 30
    sample = Sample(
        id="long",
        source="text",
        messages=(Message(role="document", segments=(Segment(type="text", text=text),)),),
    )
    numbers = encoder(sample, Samples([]).media_bytes)
    budget = Budget(tokens=50)
    assert all(len(piece) <= 50 for pack in packs([numbers], budget) for _, piece in pack)
    (loss,) = sample_losses(model, [numbers], budget=budget)
    pieces = [piece for pack in packs([numbers], budget) for _, piece in pack]
    assert len(pieces) > 2
    assert loss.nats == pytest.approx(sum(sample_losses(model, [piece])[0].nats for piece in pieces), rel=1e-5)
    assert loss.tokens == int((numbers.labels >= 0).sum())
    assert loss.target_bytes == numbers.target_bytes


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model: torch.nn.Module, training: bool) -> None:
    model.train(training)
    with evaluating(model):
        assert not model.training
    assert model.training is training
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training is training


def test_an_aut_is_scored_and_asked_like_a_thinker(tokenizer: ChatTokenizer) -> None:
    model = small_aut()
    numbers = [spoken_sample(i, frames=90 + 40 * i, before=2, after=3, answer=4 + i) for i in range(3)]
    together = sample_losses(model, numbers)
    assert [loss.tokens for loss in together] == [4, 5, 6]
    for loss, sample in zip(together, numbers, strict=True):
        batch = PackedBatch.pack([sample])
        logits = model(**batch.model_inputs()).hidden @ model.output_embedding.T
        expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        assert loss.nats == pytest.approx(float(expected.detach()), rel=1e-4)

    decoding = Decoding(max_new_tokens=6)
    written = transcribe(model, PackedBatch.pack(numbers), decoding, stop_ids=tokenizer.stop_ids)
    answers = answer_prompts(model, tokenizer, numbers, decoding=decoding)
    assert answers == [tokenizer.decode(ids) for ids in written]
    assert len(set(answers)) > 1
