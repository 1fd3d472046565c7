"""Answers that were sampled in training, and what judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A sampled answer.

    Attributes:
        sample, source, task: of the sample that was asked.
        prompt: what was asked, as text; media are left out.
        text: the answer.  reference: the data's.
        meta: of the sample.
    """

    sample: str
    prompt: str
    text: str
    reference: str
    source: str = ""
    task: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


class Reward(Protocol):
    """Called with rollouts, says what each is worth, as a rule from 0 to 1; None of one that it says nothing of.
    `weight`: in the sum of several."""

    weight: float

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]: ...


def worth(
    rollouts: Sequence[Rollout], rewards: Mapping[str, Reward]
) -> tuple[list[float], dict[str, list[float | None]]]:
    """What each rollout is worth, the weighted sum of the rewards that apply to it, and what each reward says."""
    said = {name: reward(rollouts) for name, reward in rewards.items()}
    weighted = [
        sum(rewards[name].weight * value for name, values in said.items() if (value := values[i]) is not None)
        for i in range(len(rollouts))
    ]
    return [float(value) for value in weighted], said
