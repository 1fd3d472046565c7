"""Training of the Talker with MTP: codebook 0 from text, the other codebooks of a frame from its hidden state.

The Thinker is frozen unless one of its parts is named in `train`; then the answer's text is learnt beside its speech,
in the same step. Everything else (normalisation, clipping, the spike guard, resume) is `ThinkerModule`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omnitrain.data.batch import IGNORE, PackedBatch, SpokenAnswers
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.omni import OmniModel
from omnitrain.models.talker import Talker, TalkerInputs
from omnitrain.training.losses import BatchLosses, LossConfig, RouterUse
from omnitrain.training.optim import THINKER_PARTS, OptimConfig
from omnitrain.training.thinker import ThinkerModule

TALKER_PARTS = ("mtp", "talker_router", "talker")


@dataclass(frozen=True, kw_only=True)
class TalkerLossConfig(LossConfig):
    """
    Attributes:
        residual: weight of the mean over the other codebooks' losses against codebook 0's.
        text: weight of a text token against a frame, where the Thinker is trained too.
    """

    residual: float = 1.0
    text: float = 1.0


class TalkerModule(ThinkerModule):
    """Trains the Talker of an `OmniModel` (report, section 4: `talker_pretrain`, `talker_continue`,
    `speaker_finetune`).

    Args:
        train: parts that learn. With a part of the Thinker among them the two are trained jointly, and gradients of
            speech reach the word embeddings and, at user media, the Thinker's lower layers.
        frame_dropout: share of the positions that do not see the codes of their frame in training, their word alone.
            A Talker that always sees true codes learns to continue sounds and hardly listens to the text; left to
            itself it then babbles fluently (word dropout: Bowman et al. 2016, arXiv 1511.06349, section 3.1).
        cached_thinker: the frozen Thinker is not run; its hidden states at media are read from the shards, where
            ``omnitrain data encode --thinker`` wrote them (with the audio encoder's own attention window).
        Others: see `ThinkerModule`.

    Raises:
        ValueError: the model has no Talker, or a Thinker that is trained cannot be read from shards.
    """

    def __init__(
        self,
        model: OmniModel,
        optim: OptimConfig | None = None,
        loss: TalkerLossConfig | None = None,
        *,
        train: Sequence[str] = TALKER_PARTS,
        frame_dropout: float = 0.0,
        cached_thinker: bool = False,
        **options: Any,
    ) -> None:
        if not 0 <= frame_dropout < 1:
            raise ValueError(f"module.frame_dropout={frame_dropout}: must lie in [0, 1)")
        if model.talker is None:
            raise ValueError("the model has no Talker: set model.speech=true")
        super().__init__(model, optim, loss or TalkerLossConfig(), train=train, **options)
        self.joint = any(part in THINKER_PARTS for part in train)
        self.frame_dropout = frame_dropout
        self.cached_thinker = cached_thinker
        if cached_thinker and self.joint:
            learning = ", ".join(part for part in train if part in THINKER_PARTS)
            raise ValueError(
                f"module.cached_thinker needs a frozen Thinker, but module.train has its parts {learning}: leave them "
                "out, or set module.cached_thinker=false"
            )

    @property
    def talker(self) -> Talker:
        assert self.model.talker is not None
        return self.model.talker

    def losses(self, batch: PackedBatch, window: int | None = None) -> BatchLosses:
        assert isinstance(self.loss_config, TalkerLossConfig)
        spoken = batch.spoken
        text, accept_hidden = None, spoken.heard if spoken is not None else None
        listens = spoken is not None and spoken.heard is None and bool((spoken.hidden_rows >= 0).any())
        if self.joint or listens:  # of text alone the Talker reads the embeddings, which need no Thinker
            with nullcontext() if self.joint else torch.no_grad():
                output = self.model(**batch.model_inputs(), aut_window_frames=window)
            accept_hidden = output.accept_hidden
            text = self.text_losses(batch, output) if self.joint else None
        speech = None if spoken is None else self._speech_losses(spoken, accept_hidden)
        return self._together(text, speech)

    def _speech_losses(self, spoken: SpokenAnswers, accept_hidden: Tensor | None) -> BatchLosses:
        talker, config = self.talker, self.loss_config
        assert isinstance(config, TalkerLossConfig)
        inputs = TalkerInputs(**spoken.inputs())
        if self.training and self.frame_dropout:
            hidden = torch.rand(len(inputs.frame_rows), device=inputs.frame_rows.device) < self.frame_dropout
            inputs = replace(inputs, frame_rows=inputs.frame_rows.masked_fill(hidden, -1))
        words = self.model.thinker.embed_tokens
        x = talker.embed(inputs, words, None if accept_hidden is None else accept_hidden.to(words.weight.dtype))
        output = talker(x, inputs.position_ids, inputs.cu_seqlens)
        first = chunked_cross_entropy(output.hidden, talker.codec_head.weight, inputs.labels, chunk=config.chunk)
        residual_hidden = talker.residual_hidden(output.hidden, inputs)  # [F, Q - 1, D]
        residual = [
            chunked_cross_entropy(residual_hidden[:, q], head, inputs.codes[:, q + 1], chunk=config.chunk).sum()
            for q, head in enumerate(talker.mtp.code_head)
        ]
        n_frames, n_targets = len(inputs.codes), int((inputs.labels != IGNORE).sum())
        total = first.sum() + config.residual * torch.stack(residual).mean()
        by_codebook = [(first.sum(), n_targets), *((nll, n_frames) for nll in residual)]
        return BatchLosses(
            total=total,
            weight=torch.tensor(float(n_targets), device=total.device),
            routers={
                "talker": RouterUse(
                    counts=output.router_counts, prob_sums=output.router_prob_sums, positions=len(inputs.labels)
                )
            },
            groups=[
                (("speech", f"codebook_{q}"), (float(nll.detach()), float(n), 0.0, float(len(spoken.samples))))
                for q, (nll, n) in enumerate(by_codebook)
            ],
        )

    def _together(self, text: BatchLosses | None, speech: BatchLosses | None) -> BatchLosses:
        assert isinstance(self.loss_config, TalkerLossConfig)
        parts = [(part, w) for part, w in ((text, self.loss_config.text), (speech, 1.0)) if part is not None]
        if not parts:  # nobody speaks in this pack: no loss, and zero gradients for every part
            zero = torch.stack([p.sum() for p in self.talker.parameters() if p.requires_grad]).sum() * 0.0
            return BatchLosses(total=zero, weight=zero.detach(), routers={}, groups=[])
        return BatchLosses(
            total=torch.stack([w * part.total for part, w in parts]).sum(),
            weight=torch.stack([w * part.weight.float() for part, w in parts]).sum(),
            routers={name: use for part, _ in parts for name, use in part.routers.items()},
            groups=[group for part, _ in parts for group in part.groups],
        )

    def batch_flops(self, batch: PackedBatch) -> float:
        return float("nan")  # not counted for the Talker

    def validation_losses(self) -> dict[str, float]:
        return {
            name.removeprefix("validation/").removeprefix("loss_by_task/").removeprefix("loss/"): value
            for sums in self.evaluation_sums.values()
            for name, value in sums.metrics("validation").items()
            if name.startswith("validation/loss/") or name == "validation/loss_by_task/codebook_0"
        }
