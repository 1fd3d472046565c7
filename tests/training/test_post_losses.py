"""The losses of post-training against those of TRL, on the same logits and log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer
from trl.experimental.gkd import GKDTrainer

from omnitrain.training.post_losses import (
    dpo_loss,
    forward_kl,
    generalized_jsd,
    group_advantages,
    grpo_loss,
    gspo_loss,
    kl_to_reference,
    reverse_kl,
    sequence_means,
    top_k_and_rest,
    truncated_importance_weights,
    with_rest,
)

LENGTHS = (5, 1, 7, 3)
CLIP = (0.2, 0.28)
ALONE = SimpleNamespace(
    device="cpu", num_processes=1, is_main_process=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)  # fmt: skip
"""What TRL's trainers know of other processes, of which there are none."""


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_generalized_jsd_is_trls(beta: float, temperature: float) -> None:
    student, teacher = logits(0, 2, 6, 40).requires_grad_(), logits(1, 2, 6, 40)
    labels = torch.ones(2, 6, dtype=torch.int64)
    labels[0, :4] = -100
    kept = labels != -100
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
    ours = generalized_jsd(
        (student[kept] / temperature).log_softmax(-1), (teacher[kept] / temperature).log_softmax(-1), beta
    ).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_beta_lies_between_the_two_kls() -> None:
    student, teacher = logits(0, 3, 9).log_softmax(-1), logits(1, 3, 9).log_softmax(-1)
    assert torch.equal(generalized_jsd(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(generalized_jsd(student, teacher, 1.0), reverse_kl(student, teacher))
    for end, kl in ((1e-6, forward_kl), (1 - 1e-6, reverse_kl)):
        found = generalized_jsd(student, teacher, end) / 1e-6
        torch.testing.assert_close(found, kl(student, teacher), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"beta is 1\.5"):
        generalized_jsd(student, teacher, 1.5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_top_k_counts_the_rest_as_one_class(beta: float) -> None:
    """As torch's own KL of the distributions whose tail was added up; with all classes told, as of the whole."""
    student, teacher = logits(0, 4, 12).requires_grad_(), logits(1, 4, 12)
    ids = teacher.topk(3, -1).indices

    def added_up(values: Tensor) -> Tensor:
        p = values.softmax(-1)
        top = p.gather(1, ids)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    told = top_k_and_rest(student, ids)
    torch.testing.assert_close(told.exp(), added_up(student))
    p, q = torch.distributions.Categorical(added_up(teacher)), torch.distributions.Categorical(added_up(student))
    mixture = torch.distributions.Categorical(beta * p.probs + (1 - beta) * q.probs)
    kl = torch.distributions.kl_divergence
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, mixture) + (1 - beta) * kl(q, mixture))
    from_server = with_rest(teacher.log_softmax(-1).gather(1, ids))
    for heard in (top_k_and_rest(teacher, ids), from_server):
        torch.testing.assert_close(generalized_jsd(told, heard, beta), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_teacher_may_be_sure(beta: float) -> None:
    """A server that tells all of the mass: no rest is left, and the gradient stays finite."""
    student = logits(0, 2, 5).requires_grad_()
    sure = with_rest(torch.tensor([[0.0, -torch.inf], [-0.5, -0.9327521]], dtype=torch.float64))
    loss = generalized_jsd(top_k_and_rest(student, torch.tensor([[0, 1], [2, 3]])), sure, beta).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0.01


# -------------------------------------------------------------------------------------------------- policy gradients


def packed(padded: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, LENGTHS, strict=True)])


def owner() -> Tensor:
    return torch.repeat_interleave(torch.tensor(LENGTHS))


def trl_policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, level: str, *, weights: Tensor | None = None,
    beta: float = 0.0, reference: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """TRL's own loss of padded log-probabilities [B, T], of its trainer without a model."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    nothing = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        model=SimpleNamespace(training=True), accelerator=ALONE,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), importance_sampling_level=level,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, loss_type="grpo",
        epsilon_low=CLIP[0], epsilon_high=CLIP[1], use_vllm=weights is not None, aux_loss_enabled=False,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    inputs: dict[str, Any] = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "importance_sampling_ratio": weights,
        "ref_per_token_logps": reference,
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("level", "loss"), [("sequence", gspo_loss), ("token", grpo_loss)])
def test_policy_losses_are_trls(level: str, loss: Any, weighted: bool) -> None:
    shape = len(LENGTHS), max(LENGTHS)
    log_probs = (-logits(0, *shape).abs()).requires_grad_()
    old = (log_probs + 0.2 * logits(1, *shape)).detach()
    advantages = torch.tensor([1.2, -0.7, -1.1, 0.6], dtype=torch.float64)
    weights = padded_weights = None
    if weighted:
        padded_weights = truncated_importance_weights(old, old + 0.1 * logits(2, *shape), 1.1)
        weights = packed(padded_weights)
        assert padded_weights.max() == 1.1
        if level == "sequence":  # of a sequence TRL takes one weight; ours is the mean of its tokens'
            weights_of_answers = sequence_means(weights, owner(), len(LENGTHS))
            padded_weights = weights_of_answers[:, None]
    theirs = trl_policy_loss(log_probs, old, advantages, level, weights=padded_weights)
    found = loss(packed(log_probs), packed(old), advantages, owner(), CLIP, weights)
    torch.testing.assert_close(found.total / len(LENGTHS), theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (found.total / len(LENGTHS), theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    assert 0 < found.clipped.mean() < 1


def test_the_term_of_a_reference_is_trls() -> None:
    shape = len(LENGTHS), max(LENGTHS)
    log_probs, reference = -logits(0, *shape).abs(), -logits(3, *shape).abs()
    zero = torch.zeros(len(LENGTHS), dtype=torch.float64)
    theirs = trl_policy_loss(log_probs, log_probs, zero, "token", beta=0.3, reference=reference)
    of_tokens = kl_to_reference(packed(log_probs), packed(reference))
    ours = 0.3 * sequence_means(of_tokens, owner(), len(LENGTHS)).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (of_tokens >= 0).all()


def test_what_is_clipped_gives_no_gradient() -> None:
    """The share that is told is that of the answers whose gradient is nought."""
    log_probs = (-logits(0, sum(LENGTHS)).abs()).requires_grad_()
    old = (log_probs + 0.3 * logits(1, sum(LENGTHS))).detach()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    found = gspo_loss(log_probs, old, advantages, owner(), (0.1, 0.1))
    (gradient,) = torch.autograd.grad(found.total, log_probs)
    silent = [bool((gradient[owner() == i] == 0).all()) for i in range(len(LENGTHS))]
    assert found.clipped.bool().tolist() == silent
    assert True in silent
    assert False in silent


def test_group_advantages() -> None:
    """As the lines of TRL write them, which stand amid its sampling: (r - mean) / (std + 1e-4) of each group."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, 0.5])
    found = group_advantages(rewards, 3)
    first = (rewards[:3] - rewards[:3].mean()) / (rewards[:3].std() + 1e-4)
    torch.testing.assert_close(found, torch.cat([first, torch.zeros(3)]))
    torch.testing.assert_close(group_advantages(rewards, 3, scale=False)[:3], torch.tensor([0.5, -0.5, 0.0]))


# ------------------------------------------------------------------------------------------------------- preferences


def test_dpo_is_trls() -> None:
    """TRL's own loss of log-probabilities [chosen and rejected answers, T], of its trainer without a model."""
    lengths = torch.tensor([5, 2, 4, 7])  # two pairs
    mask = (torch.arange(8) < lengths[:, None] + 1).long()
    mask[:, 0] = 0  # the prompt
    inside = mask[:, 1:]
    policy, reference = (-logits(seed, 4, 7).abs() * inside for seed in (0, 1))
    policy.requires_grad_()

    class Model(torch.nn.Module):
        """A model that says these log-probabilities; what TRL also logs is nought."""

        is_gradient_checkpointing = False

        def __init__(self, log_probs: Tensor) -> None:
            super().__init__()
            self.log_probs = log_probs

        def forward(self, **_: Any) -> Any:
            nought = torch.zeros_like(self.log_probs)
            logged = {"entropy": nought, "mean_logits": nought, "is_top1": nought.bool()}
            return SimpleNamespace(log_probs=self.log_probs, **logged)

    trainer = SimpleNamespace(
        model=Model(policy), ref_model=Model(reference), accelerator=ALONE, aux_loss_enabled=False, ld_alpha=None,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), precompute_ref_logps=False, beta=0.3, _tp_size=1,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    inputs = {"input_ids": mask, "completion_mask": mask, "attention_mask": mask}
    theirs = DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)
    (chosen, rejected), (ref_chosen, ref_rejected) = (x.sum(1).chunk(2) for x in (policy, reference))
    ours = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
