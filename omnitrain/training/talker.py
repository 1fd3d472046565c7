"""Training of the Talker with MTP: codebook 0 from text, the other codebooks of a frame from its hidden state.

The Thinker is frozen unless one of its parts is named in `train`; then the answer's text is learnt beside its speech,
in the same step. Everything else (normalisation, clipping, the spike guard, resume) is `ThinkerModule`'s.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from omnitrain.config.run_config import THINKER_PARTS, OptimConfig, TalkerLossConfig, TalkerModuleConfig
from omnitrain.data.batch import IGNORE, PackedBatch, SpokenAnswers
from omnitrain.data.work import Work
from omnitrain.models.layers.decoder import DecoderOutput
from omnitrain.models.omni import OmniModel
from omnitrain.models.talker import Talker, TalkerInputs
from omnitrain.training.flops import talker_work
from omnitrain.training.losses import BatchLosses, RouterUse, talker_loss
from omnitrain.training.thinker import ThinkerModule


def hide_frames(inputs: TalkerInputs, share: float) -> Tensor:
    """`frame_rows` [T] of which some name nothing any more. Of each answer another share is hidden, drawn evenly from
    as far around `share` as it goes within 0 and 1: some answers are nearly blind and can only be read off the text, in
    others the sound so far is there, as it is when the Talker speaks."""
    rows = inputs.frame_rows
    lengths = inputs.cu_seqlens.diff().long()
    shares = share + min(share, 1 - share) * (2 * torch.rand(len(lengths), device=rows.device) - 1)
    return rows.masked_fill(torch.rand(len(rows), device=rows.device) < shares.repeat_interleave(lengths), -1)


class TalkerModule(ThinkerModule[OmniModel]):
    """Trains the Talker of an `OmniModel` (report section 4: `talker_pretrain`, `talker_continue`,
    `speaker_finetune`); arguments as of `ThinkerModule`. ValueError if the model has none."""

    config: TalkerModuleConfig
    loss_config: TalkerLossConfig

    def __init__(
        self,
        model: OmniModel,
        config: TalkerModuleConfig | None = None,
        optim: OptimConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if model.talker is None:
            raise ValueError("module=talker: the model has no Talker; choose one with it, as model=tiny_speech")
        super().__init__(model, config or TalkerModuleConfig(), optim, seed=seed)
        self.joint = any(part in THINKER_PARTS for part in self.config.whole_parts + self.config.lora_parts)

    @property
    def talker(self) -> Talker:
        assert self.model.talker is not None
        return self.model.talker

    def losses(self, batch: PackedBatch, window: int | None = None) -> BatchLosses:
        spoken = batch.spoken
        text, accept_hidden = None, spoken.heard if spoken is not None else None
        listens = spoken is not None and spoken.heard is None and bool((spoken.hidden_rows >= 0).any())
        together = self.mesh is not None and not self.config.cached_thinker  # whoever listens needs all
        if self.joint or listens or together:  # of text alone the Talker reads the embeddings, which need no Thinker
            with nullcontext() if self.joint else torch.no_grad():
                output = self.output_of(batch, window)
            accept_hidden = output.accept_hidden
            text = self.text_losses(batch, output) if self.joint else None
            if text is not None and self.mesh is not None and self.mesh.slices is not None:
                # Its gradient is collected from all who share the pack, of whom one speaks.
                text = replace(text, total=text.total + 0.0 * accept_hidden.sum())
        return self._together(text, self._silence() if spoken is None else self._speech_losses(spoken, accept_hidden))

    def spoken_output(self, inputs: TalkerInputs, accept_hidden: Tensor | None) -> DecoderOutput:
        """What the Talker makes of spoken answers."""
        words = self.model.thinker.embed_tokens
        x = self.talker.embed(inputs, words, None if accept_hidden is None else accept_hidden.to(words.weight.dtype))
        return self.talker(x, inputs.position_ids, inputs.cu_seqlens)

    def _speech_losses(self, spoken: SpokenAnswers, accept_hidden: Tensor | None) -> BatchLosses:
        talker, config = self.talker, self.loss_config
        inputs = TalkerInputs(**spoken.inputs())
        if self.training and self.config.frame_dropout:
            inputs = replace(inputs, frame_rows=hide_frames(inputs, self.config.frame_dropout))
        output = self.spoken_output(inputs, accept_hidden)
        frames, share = None, self.config.mtp_frames
        if self.training and share < 1:
            order = torch.rand(len(inputs.codes), device=inputs.codes.device).argsort()
            frames = order[: math.ceil(share * len(order))].sort().values
        total, by_codebook = talker_loss(
            talker, output.hidden, inputs, residual=config.residual, frames=frames, chunk=config.chunk,
            compiled=bool(self.config.compile) and self.training,
        )  # fmt: skip
        n_targets = int((inputs.labels != IGNORE).sum())
        counted = [n_targets, *[len(inputs.codes if frames is None else frames)] * (len(by_codebook) - 1)]
        return BatchLosses(
            total=total,
            weight=torch.tensor(float(n_targets)),
            routers={"talker": RouterUse(output.router_counts, output.router_prob_sums, len(inputs.labels))},
            groups=[
                (("speech", f"codebook_{q}"), (nll, float(n), 0.0, float(len(spoken.samples))))
                for q, (nll, n) in enumerate(zip(by_codebook.tolist(), counted, strict=True))
            ],
        )

    def _silence(self) -> BatchLosses:
        """Of a pack in which nobody speaks: no loss, a zero gradient for every part, and the same message to the other
        ranks as of any other."""
        c = self.talker.config
        if self.mesh is None:
            zero = torch.stack([p.sum() for p in self.talker.parameters() if p.requires_grad]).sum() * 0.0
        else:  # a frame in which all ranks take part, nought times
            codes = torch.zeros(1, c.codebooks, dtype=torch.int64)
            first = self.talker.codec_embedding(codes[:, 0].to(self.device))
            borders = torch.tensor([0, 1], dtype=torch.int32)
            hidden = self.talker(first, torch.zeros(3, 1, device=self.device), borders).hidden
            zero = 0.0 * (hidden.sum() + self.talker.mtp(hidden, first, codes).sum())
        counts = zero.new_zeros(c.layers, c.n_experts, dtype=torch.float32)
        return BatchLosses(
            total=zero, weight=torch.zeros(()), routers={"talker": RouterUse(counts, counts, 0)}, groups=[]
        )

    def _together(self, text: BatchLosses | None, speech: BatchLosses) -> BatchLosses:
        parts = [(speech, 1.0)] if text is None else [(text, self.loss_config.text), (speech, 1.0)]
        return BatchLosses(
            total=torch.stack([w * part.total for part, w in parts]).sum(),
            weight=torch.stack([w * part.weight.float() for part, w in parts]).sum(),
            routers={name: use for part, _ in parts for name, use in part.routers.items()},
            groups=[group for part, _ in parts for group in part.groups],
        )

    def batch_flops(self, batch: PackedBatch) -> dict[str, float]:
        return {}  # not counted for the Talker

    def work(self) -> Work:
        return talker_work(self.model, self.talker, joint=self.joint, listens=not self.config.cached_thinker)
