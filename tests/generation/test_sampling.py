"""Sampling filters against the logits processors of transformers, and the draw itself."""

from __future__ import annotations

import pytest
import torch

from omnitrain.generation.sampling import Sampling, repetition_penalty, top_k, top_p


@pytest.fixture
def logits() -> torch.Tensor:
    logits = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    logits[1, :50] = logits[1, 50:100]  # ties
    return logits


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(0, 200, (5, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(logits, p):
    from transformers import TopPLogitsWarper

    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("k", [1, 7, 199, 500])
def test_top_k(logits, k):
    from transformers import TopKLogitsWarper

    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(logits, prompts, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    occurred = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, prompts, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(prompts, logits.clone())
    torch.testing.assert_close(repetition_penalty(logits, occurred, penalty), expected, atol=0, rtol=1e-6)


def test_all_filters_in_the_reference_order(logits, prompts):
    """The reference's `generate` builds its own list from a generation config: the order is taken from there."""
    from transformers import GenerationConfig, PretrainedConfig
    from transformers.generation.utils import GenerationMixin

    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=40, top_p=0.8, repetition_penalty=1.2)
    config._eos_token_tensor = None
    mixin = GenerationMixin()
    mixin.config = PretrainedConfig()
    processors = mixin._get_logits_processor(config, input_ids_seq_length=prompts.shape[1], device="cpu")
    occurred = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, prompts, True)
    ours = Sampling(temperature=0.6, top_k=40, top_p=0.8, repetition_penalty=1.2).filter(logits, occurred)
    torch.testing.assert_close(ours, processors(prompts, logits.clone()), atol=1e-6, rtol=1e-6)


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]])
    sampling = Sampling(temperature=0.7)
    n = 4000
    drawn = sampling.choose(logits.expand(n, -1), None, generators(n))
    expected = (logits[0] / 0.7).softmax(0)
    assert drawn.bincount(minlength=5)[3] == 0
    torch.testing.assert_close(drawn.bincount(minlength=5) / n, expected, atol=0.03, rtol=0)


def test_draws_depend_on_the_seed_and_not_on_neighbours(logits):
    sampling = Sampling(temperature=1.5)
    together = sampling.choose(logits, None, generators(5))
    alone = [sampling.choose(logits[i : i + 1], None, [g]).item() for i, g in enumerate(generators(5))]
    assert together.tolist() == alone
    assert together.tolist() != sampling.choose(logits, None, generators(5, seed=100)).tolist()


def test_only_kept_tokens_are_drawn(logits):
    row = logits[:1].expand(500, -1)
    drawn = Sampling(temperature=5.0, top_k=3).choose(row, None, generators(500))
    assert set(drawn.tolist()) == set(logits[0].topk(3).indices.tolist())


def test_greedy_takes_the_most_probable_after_the_penalty():
    logits = torch.tensor([[3.0, 2.9, 0.0]])
    occurred = torch.tensor([[True, False, False]])
    assert Sampling().choose(logits, occurred, generators(1)).item() == 0
    assert Sampling(repetition_penalty=1.5).choose(logits, occurred, generators(1)).item() == 1


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}]
)
def test_nonsense_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
