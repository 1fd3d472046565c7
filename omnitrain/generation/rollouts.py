"""Several answers to each prompt, sampled together, with the probability that each token was drawn with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import Answers, write
from omnitrain.models.omni import OmniModel


@dataclass(frozen=True, kw_only=True)
class SampledAnswer:
    """tokens: with the one that ended it.  log_probs: of each, at the temperature of sampling."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


@torch.no_grad()
def sample_answers(
    model: OmniModel,
    prompts: PackedBatch,
    *,
    n: int,
    temperature: float,
    max_new_tokens: int,
    seeds: Sequence[int],
    stop_ids: Iterable[int],
    aut_window_frames: int | None = None,
) -> list[SampledAnswer]:
    """n answers to each of B `prompts`, drawn from the whole distribution at `temperature`: answer i to prompt b is
    number i * B + b. Each prompt is read once.

    Args:
        seeds: one for each answer, in that order: what it says does not depend on its neighbours.
    """
    texts = Answers(model, prompts, {"aut_window_frames": aut_window_frames})
    copies = list(range(len(texts.logits))) * n
    texts.keep(copies)
    texts.logits = texts.logits[copies]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    answers = [SampledAnswer() for _ in copies]
    drawing = _Recorded(temperature=temperature, max_new_tokens=max_new_tokens)

    def keep(document: int, token: int) -> None:
        answers[document].tokens.append(token)
        answers[document].log_probs.append(drawing.drawn.pop(0))

    write(texts, prompts.input_ids.split(prompts.cu_seqlens.diff().tolist()) * n, drawing, generators,
          frozenset(stop_ids), keep)  # fmt: skip
    return answers


@dataclass(frozen=True, kw_only=True)
class _Recorded(Decoding):
    """Decoding that keeps the log-probabilities of what it has drawn, until they are taken."""

    drawn: list[float] = field(default_factory=list)

    def choose(self, logits: Tensor, occurred: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
        token = super().choose(logits, occurred, generators)
        log_probs = (logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        self.drawn.extend(log_probs.gather(1, token[:, None].to(log_probs.device)).squeeze(1).tolist())
        return token
