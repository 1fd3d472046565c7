"""Teachers: what would have been said at the positions of a pack at which a student is to say something.

    read = teacher.read(batch)        # once a pack
    ids, log_probs = read(rows)       # of a slice of its target positions; ids None: of the whole vocabulary

With `ids` [n, k], log_probs [n, k + 1] are of those tokens and, last, of all others together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.interop.openai_server import OpenAIServer
from omnitrain.models.layers.precision import full_precision
from omnitrain.models.omni import OmniModel
from omnitrain.training.post_losses import top_k_and_rest, with_rest
from omnitrain.vocabulary import TEXT

Read = Callable[[slice], tuple[Tensor | None, Tensor]]


class Teacher(Protocol):
    """See above. `temperature`: of the teacher's distribution."""

    def to(self, device: torch.device) -> None: ...

    def read(self, batch: PackedBatch, temperature: float) -> Read: ...


class ModelTeacher:
    """A model of the same vocabulary, frozen, whole on each process. `vocab_size`: of the tokenizer that student and
    teacher share; a public model's matrix has more rows. `top_k`: of its tokens are told; None: all."""

    def __init__(self, model: OmniModel, vocab_size: int, top_k: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size, self.top_k = vocab_size, top_k

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    def read(self, batch: PackedBatch, temperature: float) -> Read:
        with torch.autocast(batch.input_ids.device.type, enabled=False):  # in the teacher's own precision
            hidden = self.model(**batch.model_inputs()).hidden
        hidden = hidden[(batch.labels != IGNORE).to(hidden.device)]
        head = self.model.output_embedding[: self.vocab_size]

        def of(rows: slice) -> tuple[Tensor | None, Tensor]:
            with torch.no_grad(), full_precision(hidden):
                logits = hidden[rows].float() @ head.float().T / temperature
                if self.top_k is None:
                    return None, logits.log_softmax(-1)
                ids = logits.topk(min(self.top_k, logits.shape[1] - 1), dim=-1).indices
                return ids, top_k_and_rest(logits, ids)

        return of


class ServerTeacher:
    """A server that tells the log-probabilities of a prompt's tokens: it reads text alone, as token ids, so that its
    tokenizer must be the student's. `vocabulary`: its ids by spelling."""

    def __init__(self, server: OpenAIServer, vocabulary: dict[str, int], top_k: int) -> None:
        self.server, self.vocabulary, self.top_k = server, vocabulary, top_k

    def to(self, device: torch.device) -> None:
        pass

    def read(self, batch: PackedBatch, temperature: float) -> Read:
        """Raises ValueError: a sample has media (docs/post_training.md: data.transcripts), or another temperature."""
        if temperature != 1:
            raise ValueError(f"module.temperature={temperature}: a server tells its distribution at 1 alone")
        if bool((batch.token_types != TEXT).any()):
            raise ValueError(
                "module.teacher.server reads text alone, and a sample has sound or pictures: set data.transcripts=true "
                "for questions that are only heard, or take a teacher in a folder"
            )
        ids, log_probs, lengths = [], [], batch.cu_seqlens.diff().tolist()
        for document, labels in zip(batch.input_ids.split(lengths), batch.labels.split(lengths), strict=True):
            told = self.server.prompt_log_probs(document.tolist(), self.top_k, self.vocabulary)
            for position in (labels != IGNORE).nonzero().squeeze(1).tolist():
                best = sorted(told[position + 1].items(), key=lambda pair: -pair[1])[: self.top_k]
                if len(best) < self.top_k:
                    raise ValueError(
                        f"module.teacher.top_k={self.top_k}, but {self.server.url} tells {len(best)} tokens"
                    )
                ids.append([token for token, _ in best])
                log_probs.append([log_prob for _, log_prob in best])
        device = batch.input_ids.device
        all_ids = torch.tensor(ids, dtype=torch.int64, device=device).view(-1, self.top_k)
        known = with_rest(torch.tensor(log_probs, device=device).view(-1, self.top_k))
        return lambda rows: (all_ids[rows], known[rows])
