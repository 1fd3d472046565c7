"""Preferences for speech: the Talker learns to say a text rather as in one take of it than as in another (report
section 4, stage 3; docs/post_training.md).

A sample has two takes of one answer, as `omnitrain data pairs` writes them; they stand one behind the other in
`PackedBatch.spoken`. With y a take, F its frames of Q codes,

    log p(y) = sum_f [ log p(c_0f) + sum_{q >= 1} log p(c_qf) ]  + log p(end)
    L = dpo_loss(log p(y_w), log p(y_l), of the model that training began with)  -  chosen * log p(y_w) / (F + 1)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from omnitrain.config.run_config import OptimConfig, TalkerDpoModuleConfig
from omnitrain.data.batch import IGNORE, SpokenAnswers
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.layers.transfer import sent
from omnitrain.models.omni import OmniModel
from omnitrain.models.talker import TalkerInputs
from omnitrain.training.losses import BatchLosses, RouterUse
from omnitrain.training.notes import NotingModule
from omnitrain.training.other_weights import instead, trained_weights
from omnitrain.training.post_losses import dpo_loss
from omnitrain.training.talker import TalkerModule


class Predicted(NamedTuple):
    """Of one codebook: hidden [n, D], head [K, D], labels int64 [n] and the document of each position, int64 [n]."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    documents: Tensor


class TalkerDpoModule(NotingModule, TalkerModule):
    """Trains the Talker of an `OmniModel` on pairs of takes; arguments as of `TalkerModule`. ValueError if parts of the
    Thinker are to learn."""

    NOTES = "preference"

    def __init__(
        self,
        model: OmniModel,
        config: TalkerDpoModuleConfig | None = None,
        optim: OptimConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        config = config or TalkerDpoModuleConfig()
        super().__init__(model, config, optim, seed=seed)
        self.beta, self.chosen = config.beta, config.chosen
        if self.joint:
            raise ValueError("module=talker_dpo: the Thinker is frozen, name no part of it in module.train")
        self._reference: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.mesh is not None:
            raise ValueError(
                "module=talker_dpo needs the whole model in each process, to compare it with what it was: set "
                "parallel=ddp"
            )
        if stage == "fit":  # before a checkpoint is read: what training begins with, also when it goes on
            self._reference = trained_weights(self.model)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._reference = {name: value.to(self.device) for name, value in self._reference.items()}

    def _speech_losses(self, spoken: SpokenAnswers, accept_hidden: Tensor | None) -> BatchLosses:
        inputs = TalkerInputs(**spoken.inputs())
        takes = len(inputs.cu_seqlens) - 1
        with instead(self.model, self._reference):
            predicted, _ = self._predicted(inputs, accept_hidden)
            reference = self._log_probs(predicted, takes)
        predicted, router = self._predicted(inputs, accept_hidden)
        # The gradient in the log-probabilities first, in closed form; then it weighs each code's cross-entropy.
        log_probs = self._log_probs(predicted, takes).requires_grad_()
        lengths = torch.bincount(predicted[0].documents, minlength=takes).to(log_probs)
        with torch.enable_grad():
            gains = log_probs - reference
            losses = dpo_loss(log_probs[0::2], log_probs[1::2], reference[0::2], reference[1::2], self.beta)
            total = losses.sum() - self.chosen * (log_probs / lengths)[0::2].sum()
            (gradient,) = torch.autograd.grad(total, log_probs)
        weighted = [
            chunked_cross_entropy(
                part.hidden, part.head, part.labels, -gradient.float().to(part.labels.device)[part.documents],
                chunk=self.loss_config.chunk, compiled=bool(self.config.compile) and self.training,
            ).total
            for part in predicted
        ]  # fmt: skip
        loss = torch.stack(weighted).sum()
        won = gains[0::2] - gains[1::2]
        if self.training:
            for name, values in (("accuracy", won > 0), ("margin", self.beta * won), ("chosen", gains[0::2]),
                                 ("rejected", gains[1::2])):  # fmt: skip
                self.note(name, values.tolist())
        pairs = float(takes // 2)
        return BatchLosses(
            total=loss - loss.detach() + total.detach(),
            weight=torch.tensor(pairs),
            routers={"talker": router},
            groups=[(("speech", "preference"), (float(losses.detach().sum()), pairs, 0.0, pairs))],
        )

    def _predicted(self, inputs: TalkerInputs, accept_hidden: Tensor | None) -> tuple[list[Predicted], RouterUse]:
        """What predicts the codes of all takes, codebook 0 and its end first."""
        talker, output = self.talker, self.spoken_output(inputs, accept_hidden)
        documents = torch.repeat_interleave(inputs.cu_seqlens.diff().long()).to(inputs.labels.device)
        rows = (inputs.labels != IGNORE).nonzero().squeeze(1)
        first = Predicted(
            output.hidden[sent(rows, output.hidden.device)], talker.codec_head.weight, inputs.labels[rows],
            documents[rows],
        )  # fmt: skip

        def others() -> Iterator[Predicted]:
            hidden = talker.residual_hidden(output.hidden, inputs)  # [F, Q - 1, D]
            of_frames = documents[inputs.frame_sources.to(documents.device)]
            for q, head in enumerate(talker.mtp.code_head):
                yield Predicted(hidden[:, q], head, inputs.codes[:, q + 1], of_frames)

        router = RouterUse(output.router_counts, output.router_prob_sums, len(inputs.labels))
        return [first, *others()], router

    @torch.no_grad()
    def _log_probs(self, predicted: list[Predicted], takes: int) -> Tensor:
        """fp32 [takes], in nats: log-probability of all codes of each take, and of its end."""
        total = torch.zeros(takes, device=predicted[0].hidden.device)
        for part in predicted:
            nll = chunked_cross_entropy(part.hidden, part.head, part.labels, chunk=self.loss_config.chunk).nll
            total.index_add_(0, sent(part.documents, total.device), -nll)
        return total
