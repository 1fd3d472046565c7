"""What post-training minimises: divergences from a teacher, policy gradients of groups of answers, preferences.

Answers stand end to end, as everywhere: T tokens of B answers, and `owner` int64 [T] says whose each is.
Log-probabilities are of the tokens that were written, in nats. docs/post_training.md has the equations beside these
functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ distillation


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum_c p_T (log p_T - log p_S): the student covers all that the teacher would say.

    Args:
        student, teacher: log-probabilities [N, C] of the same C classes, each row summing to one. A class that the
            teacher never chooses may be -inf.

    Returns:
        [N], in nats.
    """
    return _kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) = sum_c p_S (log p_S - log p_T): the student says nothing that the teacher would not.
    Arguments as of `forward_kl`; what the student may choose, the teacher must know."""
    return _kl(student, teacher)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2023, arXiv 2306.13649, eq. 1).

        M = beta p_T + (1 - beta) p_S
        D = beta KL(p_T || M) + (1 - beta) KL(p_S || M)

    Its ends are taken as what it tends to once divided by beta or 1 - beta: 0 is `forward_kl`, 1 is `reverse_kl`.

    Args:
        student, teacher: as of `forward_kl`.  beta: in [0, 1].

    Returns:
        [N], in nats. Raises ValueError for another beta.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must lie in [0, 1]")
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    weights = student.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logaddexp(teacher + weights[0], student + weights[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [N, C]; a class without mass in p adds nothing."""
    # `where` inside: 0 * (-inf) would be nan, and so would its gradient.
    difference = torch.where(p == -torch.inf, 0.0, p - q)
    return (p.exp() * difference).sum(-1)


def top_k_and_rest(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the classes `ids` int64 [N, k] and of all others as one more: [N, V] -> [N, k + 1]."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], dim=1) - normaliser


def with_rest(log_probs: Tensor) -> Tensor:
    """The k log-probabilities that a server tells, with the mass of what it does not tell as one more class: [N, k] ->
    [N, k + 1]. Without a gradient; a rest that rounding has made negative has none."""
    rest = 1 - log_probs.double().exp().sum(-1, keepdim=True)
    return torch.cat([log_probs, rest.clamp_min(0).log().to(log_probs.dtype)], dim=1)


# -------------------------------------------------------------------------------------------------- policy gradients


def group_advantages(rewards: Tensor, n: int, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """What an answer is worth against the others to the same prompt (GRPO, Shao et al. 2024, arXiv 2402.03300).

        A_i = (r_i - mean of its group) / (std of its group + eps)

    Args:
        rewards: [B], the n answers to a prompt side by side.  n: at least 2.
        scale: divide by the standard deviation (that of a sample, n - 1).

    Returns:
        [B]; 0 in a group whose answers are all worth the same.
    """
    groups = rewards.view(-1, n)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + eps) if scale else centred).flatten()


def sequence_means(values: Tensor, owner: Tensor, answers: int) -> Tensor:
    """[T] -> [B], the mean over the tokens of each answer; 0 of one without any."""
    sums = values.new_zeros(answers).index_add(0, owner, values)
    return sums / torch.bincount(owner, minlength=answers).clamp_min(1)


def kl_to_reference(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from the tokens that were written, never negative and without bias where
    the policy wrote them (Schulman 2020, "k3"; GRPO, eq. 4): [T] -> [T].

        r - log r - 1,   r = p_reference / p_policy
    """
    log_ratio = reference - log_probs
    return log_ratio.exp() - log_ratio - 1


def truncated_importance_weights(old: Tensor, sampler: Tensor, most: float) -> Tensor:
    """min(p_old / p_sampler, most) of each token, [T]: the trainer's old policy and what sampled (another kernel,
    another precision, a server) do not quite agree (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"). Without a gradient."""
    return (old - sampler).exp().clamp(max=most).detach()


class PolicyLoss(NamedTuple):
    """total: [], the sum over the answers of their losses, with a gradient.  ratios: [B], of each answer as a whole,
    exp(mean of its tokens' log ratios).  clipped: [B], the share of it that gives no gradient since its ratio was
    clipped. Both without one."""

    total: Tensor
    ratios: Tensor
    clipped: Tensor


def gspo_loss(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    owner: Tensor,
    clip: tuple[float, float],
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Group Sequence Policy Optimization (Zheng et al. 2025, arXiv 2507.18071, eq. 5 and 7): one ratio an answer.

        s_i = (p(y_i) / p_old(y_i)) ^ (1 / |y_i|) = exp(mean over its tokens of log p - log p_old)
        L_i = - min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)

    Args:
        log_probs, old: [T], of the policy that learns and of that which the answers are of.
        advantages: [B].  owner: int64 [T].
        clip: (low, high).
        weights: [T], `truncated_importance_weights`; an answer's loss counts as much as the mean of its tokens'.
    """
    ratio = sequence_means(log_probs - old, owner, len(advantages)).exp()
    surrogate, clipped = _clipped(ratio, advantages, clip)
    if weights is not None:
        surrogate = surrogate * sequence_means(weights, owner, len(advantages))
    return PolicyLoss(-surrogate.sum(), ratio.detach(), clipped.float())


def grpo_loss(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    owner: Tensor,
    clip: tuple[float, float],
    weights: Tensor | None = None,
) -> PolicyLoss:
    """GRPO (arXiv 2402.03300, eq. 3), without its KL term (`kl_to_reference`): one ratio a token.

        L_i = - mean over its tokens of min(r_t A_i, clip(r_t, 1 - low, 1 + high) A_i),   r_t = p(y_t) / p_old(y_t)

    Arguments as of `gspo_loss`; each token's loss has its own weight.
    """
    log_ratio = log_probs - old
    surrogate, clipped = _clipped(log_ratio.exp(), advantages[owner], clip)
    if weights is not None:
        surrogate = surrogate * weights
    total = -sequence_means(surrogate, owner, len(advantages)).sum()
    whole = sequence_means(log_ratio.detach(), owner, len(advantages)).exp()
    return PolicyLoss(total, whole, sequence_means(clipped.float(), owner, len(advantages)))


def _clipped(ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic bound of ratio * advantage, and where it is the clipped ratio's, which has no gradient."""
    low, high = 1 - clip[0], 1 + clip[1]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    beyond = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    return surrogate, beyond.detach()


# ------------------------------------------------------------------------------------------------------- preferences


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) of each pair.

        - log sigmoid(beta ((log p(y_w) - log p_ref(y_w)) - (log p(y_l) - log p_ref(y_l))))

    Args:
        chosen, rejected: [P], log-probabilities of whole answers.  reference_*: those of the model that training began
            with.  beta: how dearly it costs to leave it.

    Returns:
        [P]
    """
    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))
