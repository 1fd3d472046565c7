"""Distillation: a student learns the distribution of a teacher over the tokens of answers (docs/post_training.md).

    L = sum_i D_beta(teacher(. | x, y_<i), student(. | x, y_<i)) / tokens

The answers y are those of the data (off-policy), or the student's own (on-policy, GKD, arXiv 2306.13649), in a share of
the steps. Everything else (normalisation, clipping, the spike guard, resume) is `ThinkerModule`'s; validation is the
loss of the data's answers, as there.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnitrain.config.run_config import DistillModuleConfig, OptimConfig
from omnitrain.data.answers import last_prompts, with_answers
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.generation.rollouts import sample_answers
from omnitrain.models.layers.precision import full_precision
from omnitrain.models.layers.transfer import sent
from omnitrain.models.omni import OmniModel
from omnitrain.training.losses import BatchLosses, RouterUse, SampleSums, token_weights
from omnitrain.training.other_weights import writing
from omnitrain.training.post_losses import generalized_jsd, top_k_and_rest
from omnitrain.training.sums import sample_groups
from omnitrain.training.teachers import Read, Teacher
from omnitrain.training.thinker import ThinkerModule


class DistillModule(ThinkerModule[OmniModel]):
    """Trains an `OmniModel` to be like `teacher`; arguments as of `ThinkerModule`. ValueError if there is none."""

    config: DistillModuleConfig

    def __init__(
        self,
        model: OmniModel,
        config: DistillModuleConfig | None = None,
        optim: OptimConfig | None = None,
        *,
        seed: int = 0,
        teacher: Teacher | None = None,
    ) -> None:
        config = config or DistillModuleConfig()
        if teacher is None:
            raise ValueError(
                "module=distill needs a teacher: module.teacher.folder=DIR, or module.teacher.server=URL "
                "module.teacher.name=MODEL"
            )
        super().__init__(model, config, optim, seed=seed)
        self.teacher = teacher  # no nn.Module: it is neither trained nor saved

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.mesh is not None and self.config.on_policy:
            raise ValueError(
                f"module.on_policy={self.config.on_policy} needs the whole model in each process, which writes answers "
                "of its own lengths: set parallel=ddp, or module.on_policy=0"
            )

    def on_train_start(self) -> None:
        super().on_train_start()
        self.teacher.to(self.device)

    def prepared(self, batch: PackedBatch) -> PackedBatch:
        # The same for all ranks and all packs of a step, and when it is made again.
        if random.Random(f"on_policy/{self.seed}/{self.global_step}").random() >= self.config.on_policy:
            return super().prepared(batch)
        prompts, rollout = last_prompts(batch), self.config.rollout
        with writing(self.model):
            answers = sample_answers(
                self.model, prompts, n=1, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens,
                seeds=rollout_seeds(prompts, 1, f"{self.seed}/{self.global_step}"),
                stop_ids=self.datamodule.tokenizer.stop_ids, aut_window_frames=self._aut_window_frames(),
            )  # fmt: skip
        return with_answers(prompts, [answer.tokens for answer in answers])

    def losses(self, batch: PackedBatch, window: int | None = None) -> BatchLosses:
        if not self.training:
            return super().losses(batch, window)
        read = self.teacher.read(batch if batch.read is None else batch.read, self.config.temperature)
        output = self.output_of(batch, window)
        weights = token_weights(batch, self.loss_config.modality_weights)
        rows = (batch.labels != IGNORE).nonzero().squeeze(1)
        rows, scale = sent(rows, output.hidden.device), sent(weights[rows], output.hidden.device)
        found = self._divergences(output.hidden[rows], read)
        of_positions = found.new_zeros(batch.n_tokens).index_copy(0, rows, found.detach())
        slices = None if self.mesh is None else self.mesh.slices
        n = batch.n_tokens if slices is None else slices.sizes(batch.n_tokens)[slices.rank]
        return BatchLosses(
            total=(found * scale).sum() if len(rows) else output.hidden.sum() * 0.0,
            weight=weights.sum(),
            routers={"thinker": RouterUse(output.router_counts, output.router_prob_sums, n)},
            groups=sample_groups(batch, SampleSums.of(batch, of_positions)),
        )

    def _divergences(self, hidden: Tensor, read: Read) -> Tensor:
        """[n], fp32, of student's hidden states [n, D] at the target positions; logits of a chunk at a time are made,
        and made again in the backward pass."""
        head, config = self.model.output_embedding, self.config

        def of_chunk(h: Tensor, ids: Tensor | None, teacher: Tensor) -> Tensor:
            with full_precision(h):
                size = teacher.shape[1] if ids is None else len(head)
                logits = h.float() @ head[:size].float().T / config.temperature
                student = logits.log_softmax(-1) if ids is None else top_k_and_rest(logits, ids)
                return generalized_jsd(student, teacher, config.beta)

        parts = []
        for start in range(0, len(hidden), self.loss_config.chunk):
            part = slice(start, start + self.loss_config.chunk)
            parts.append(checkpoint(of_chunk, hidden[part], *read(part), use_reentrant=False))
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def batch_flops(self, batch: PackedBatch) -> dict[str, float]:
        return {}  # not counted: the teacher's, and the student's writing


def rollout_seeds(prompts: PackedBatch, n: int, where: str) -> list[int]:
    """A seed for each of n answers to each prompt, in the order of `sample_answers`: of the sample and of `where` in
    the training, so that neither resuming nor the number of ranks changes an answer."""
    seen = Counter[str]()
    occurrences = []
    for name in prompts.sample_ids:
        occurrences.append(seen[name])
        seen[name] += 1
    return [
        zlib.crc32(f"{where}/{name}/{k}/{i}".encode())
        for i in range(n)
        for name, k in zip(prompts.sample_ids, occurrences, strict=True)
    ]
