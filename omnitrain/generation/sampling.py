"""From logits to the next token.

The filters and their order are those of `transformers`' `generate`: repetition penalty, temperature, top-k, top-p. So
every filter sees what the one before left over; top-p, for example, counts probabilities after the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token (then top_k and top_p do nothing)
        top_k: only the k most probable tokens (and those tied with the last of them); 0 = all
        top_p: only the most probable tokens that together hold this probability, at least one (nucleus sampling,
            Holtzman et al., 2020, arXiv 1904.09751); 1 = all
        repetition_penalty: positive logits of tokens that occurred, in the prompt or after it, are divided by it,
            negative ones multiplied (Keskar et al., 2019, arXiv 1909.05858); 1 = none
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the most probable token) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be positive (1 = none)")

    def filter(self, logits: Tensor, occurred: Tensor | None = None) -> Tensor:
        """Logits after all filters; what was filtered out is -inf.

        Args:
            logits: [B, V].  occurred: bool [B, V], tokens in each document so far (needed for `repetition_penalty`).

        Returns:
            fp32 [B, V]
        """
        logits = logits.float()
        if self.repetition_penalty != 1 and occurred is not None:
            logits = repetition_penalty(logits, occurred, self.repetition_penalty)
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        return logits

    def choose(self, logits: Tensor, occurred: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of every document, int64 [B], from logits [B, V].

        `generators`: one CPU generator per document. One number is drawn from each, so that a document's tokens do
        not depend on its neighbours.
        """
        logits = self.filter(logits, occurred)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        draws = torch.tensor([torch.rand((), generator=g, dtype=torch.float64).item() for g in generators])
        cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)  # [B, V]; double, as V is large
        point = draws.to(cumulative)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


@dataclass(frozen=True, kw_only=True)
class Decoding(Sampling):
    """How texts are written.

    Attributes:
        max_new_tokens: at most this many tokens per document.
        seed: document i draws from its own generator, seeded with `seed` + i.
    """

    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


def repetition_penalty(logits: Tensor, occurred: Tensor, penalty: float) -> Tensor:
    """[B, V], bool [B, V] -> [B, V]"""
    return torch.where(occurred, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    """[B, V] -> [B, V], -inf below the k-th largest logit"""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """[B, V] -> [B, V], -inf outside the smallest set of most probable tokens that holds more than p"""
    ascending, order = logits.sort(dim=-1)
    # what lies below a token, itself included, holds <= 1 - p: the tokens above it already hold p
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False  # at least the most probable token stays
    return logits.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), -torch.inf)
