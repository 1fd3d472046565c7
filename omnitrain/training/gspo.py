"""Reinforcement learning from rewards of sampled answers: GSPO, and GRPO as its token-level variant
(docs/post_training.md).

    prompts of a pack -> n answers each, of the sampling policy -> rewards -> advantages in each group -> one step

The sampling policy is the model as it was at the first of `steps_per_rollout` optimizer steps. Its weights are kept and
saved, not the answers: each is sampled, from seeds, when its pack is there, which gives what sampling all of them at
once would, and needs no room for media that wait. So a run that is killed amid such a phase goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnitrain.config.run_config import GspoModuleConfig, OptimConfig
from omnitrain.data.answers import last_answers, last_prompts, repeated, with_answers
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.evaluation.rollouts import Reward, Rollout, worth
from omnitrain.files import ROLLOUTS, write_parquet
from omnitrain.generation.rollouts import SampledAnswer, sample_answers
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.layers.moe import TopKRouter
from omnitrain.models.layers.precision import full_precision
from omnitrain.models.layers.transfer import sent
from omnitrain.models.omni import OmniModel
from omnitrain.training.distill import rollout_seeds
from omnitrain.training.losses import BatchLosses, RouterUse
from omnitrain.training.notes import NotingModule
from omnitrain.training.other_weights import instead, trained_weights
from omnitrain.training.post_losses import (
    group_advantages,
    grpo_loss,
    gspo_loss,
    kl_to_reference,
    sequence_means,
    truncated_importance_weights,
)


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """What the trainer knows of the answers in a pack: T tokens of B answers.

    Attributes:
        old, sampled: fp32 [T], log-probabilities under the sampling policy, by the trainer's forward pass and by the
            sampler.
        reference: fp32 [T], under the weights that training began with; None where they do not count.
        advantages: fp32 [B].  owner: int64 [T].
        rows: of the rollouts' table, to which ratios are still to come.
    """

    old: Tensor
    sampled: Tensor
    reference: Tensor | None
    advantages: Tensor
    owner: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list)


class GspoModule(NotingModule):
    """Trains an `OmniModel` on `rewards`, by name; arguments as of `ThinkerModule`. ValueError if there is none."""

    NOTES = "rollout"

    config: GspoModuleConfig

    def __init__(
        self,
        model: OmniModel,
        config: GspoModuleConfig | None = None,
        optim: OptimConfig | None = None,
        *,
        seed: int = 0,
        rewards: Mapping[str, Reward] | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("module=gspo needs a reward: module.rewards.NAME._target_=omnitrain.tasks.rewards...")
        super().__init__(model, config or GspoModuleConfig(), optim, seed=seed)
        self.rewards = dict(rewards)
        self._sampler: dict[str, Tensor] = {}  # the trained weights of the sampling policy
        self._sampler_step = -1  # the optimizer step that they are of
        self._reference: dict[str, Tensor] = {}
        self._phase: _Phase | None = None
        self._rows: list[dict[str, Any]] = []  # of the rollouts of this step

    # ------------------------------------------------------------------------------------------------------ weights

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.mesh is not None:
            raise ValueError(
                "module=gspo needs the whole model in each process, which samples answers of its own lengths: set "
                "parallel=ddp"
            )
        if self.config.kl:  # before a checkpoint is read: what training begins with, also when it goes on
            self._reference = trained_weights(self.model)

    def on_train_start(self) -> None:
        super().on_train_start()
        for kept in (self._sampler, self._reference):
            kept.update({name: value.to(self.device) for name, value in kept.items()})

    def _take_sampler(self) -> None:
        """Keep the weights of the first step of a phase."""
        first = self.global_step - self.global_step % self.config.steps_per_rollout
        if first != self._sampler_step:
            self._sampler = trained_weights(self.model) if self.config.steps_per_rollout > 1 else {}
            self._sampler_step = first

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.global_step % self.config.steps_per_rollout:  # else the next step begins a phase
            checkpoint["omnitrain"]["sampler"] = {"step": self._sampler_step, "weights": self._sampler}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        kept = (checkpoint.get("omnitrain") or {}).get("sampler")
        if kept is not None:
            self._sampler, self._sampler_step = dict(kept["weights"]), kept["step"]

    # ----------------------------------------------------------------------------------------------------- rollouts

    def prepared(self, batch: PackedBatch) -> PackedBatch:
        """`batch` with sampled answers in the place of its own."""
        config, tokenizer = self.config, self.datamodule.tokenizer
        window = self._aut_window_frames()
        self._take_sampler()
        prompts = last_prompts(batch)
        with instead(self.model, self._sampler):
            answers = sample_answers(
                self.model, prompts, n=config.answers, temperature=config.rollout.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                seeds=rollout_seeds(prompts, config.answers, f"{self.seed}/{self.global_step}"),
                stop_ids=tokenizer.stop_ids, aut_window_frames=window,
            )  # fmt: skip
            new = with_answers(repeated(prompts, config.answers), [answer.tokens for answer in answers])
            with recording(self.model) as experts:
                old, entropy = self._token_statistics(new, window)
        if config.routing_replay:
            replay(self.model, experts)
        reference = None
        if config.kl:
            with instead(self.model, self._reference):
                reference, _ = self._token_statistics(new, window)
        self._phase = self._judged(batch, prompts, answers, old, reference)
        self._note_policy(self._phase, entropy)
        return new

    def _token_statistics(self, batch: PackedBatch, window: int | None) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of the answers in `batch`, and entropy there, fp32 [T], at the temperature of
        sampling."""
        hidden = self.output_of(batch, window).hidden / self.config.rollout.temperature
        rows = sent((batch.labels != IGNORE).nonzero().squeeze(1), hidden.device)
        entropy = []
        with full_precision(hidden):
            head = self.model.output_embedding.float()
            for part in rows.split(self.loss_config.chunk):
                found = (hidden[part].float() @ head.T).log_softmax(-1)
                entropy.append(-(found.exp() * found).sum(-1))
        return self._log_probs(hidden, batch, rows), torch.cat(entropy)

    def _log_probs(self, hidden: Tensor, batch: PackedBatch, rows: Tensor) -> Tensor:
        """Of the tokens of the answers, [T], without a gradient. One function for the old policy and the new: where
        their weights are the same, their ratio is 1 in any precision."""
        with torch.no_grad():
            nll = chunked_cross_entropy(
                hidden, self.model.output_embedding, batch.labels, chunk=self.loss_config.chunk
            ).nll
        return -nll[rows]

    def _judged(
        self,
        batch: PackedBatch,
        prompts: PackedBatch,
        answers: list[SampledAnswer],
        old: Tensor,
        reference: Tensor | None,
    ) -> _Phase:
        """What the `answers` to `prompts`, those of `batch`, are worth."""
        config, tokenizer = self.config, self.datamodule.tokenizer
        asked = prompts.input_ids.cpu().split(prompts.cu_seqlens.diff().tolist())
        facts = zip(
            prompts.sample_ids, prompts.sources, prompts.tasks, prompts.metas or ({},) * len(prompts),
            (tokenizer.decode(ids.tolist()) for ids in asked), (tokenizer.decode(ids) for ids in last_answers(batch)),
            strict=True,
        )  # fmt: skip
        names = ("sample", "source", "task", "meta", "prompt", "reference")
        questions = [dict(zip(names, row, strict=True)) for row in facts] * config.answers
        rollouts = [
            Rollout(**question, text=tokenizer.decode(answer.tokens))
            for question, answer in zip(questions, answers, strict=True)
        ]
        total, by_name = worth(rollouts, self.rewards)
        # Answer i to prompt b is number i * B + b; a group stands side by side.
        groups = torch.tensor(total).view(config.answers, -1).T
        advantages = group_advantages(groups.flatten(), config.answers, scale=config.scale_advantages)
        advantages = advantages.view(-1, config.answers).T.flatten()
        lengths = torch.tensor([len(answer.tokens) for answer in answers])
        ended = [answer.tokens[-1] in tokenizer.stop_ids for answer in answers]
        rows = [
            {
                "step": self.global_step + 1, "sample": r.sample, "source": r.source, "task": r.task,
                "prompt": r.prompt, "answer": r.text, "reference": r.reference, "reward": total[i],
                **{f"reward/{name}": values[i] for name, values in by_name.items()},
                "advantage": float(advantages[i]), "tokens": len(answers[i].tokens), "ended": ended[i],
            }
            for i, r in enumerate(rollouts)
        ]  # fmt: skip
        self.note("reward", total)
        for name, values in by_name.items():
            self.note(f"reward/{name}", [value for value in values if value is not None])
        self.note("length", lengths.tolist())
        self.note("ended", ended)
        self.note("groups_without_difference", (groups == groups[:, :1]).all(1).float().tolist())
        return _Phase(
            old=old,
            sampled=torch.tensor([p for answer in answers for p in answer.log_probs], device=old.device),
            reference=reference,
            advantages=advantages.to(old.device),
            owner=torch.repeat_interleave(lengths).to(old.device),
            rows=rows,
        )

    def _note_policy(self, phase: _Phase, entropy: Tensor) -> None:
        difference = (phase.old - phase.sampled).double()
        self.note("entropy", entropy.double().tolist())
        self.note("mismatch", difference.abs().tolist())
        if self.config.truncate is not None:
            self.note("truncated", (difference.exp() > self.config.truncate).double().tolist())

    # --------------------------------------------------------------------------------------------------------- loss

    def losses(self, batch: PackedBatch, window: int | None = None) -> BatchLosses:
        if not self.training:
            return super().losses(batch, window)
        phase, config = self._phase, self.config
        assert phase is not None
        output = self.output_of(batch, window)
        # The gradient in the log-probabilities first, in closed form; then it weighs each token's cross-entropy, which
        # so never needs the logits of the whole pack.
        hidden = output.hidden / config.rollout.temperature
        head, chunk = self.model.output_embedding, self.loss_config.chunk
        rows = (batch.labels != IGNORE).nonzero().squeeze(1)
        log_probs = self._log_probs(hidden, batch, sent(rows, hidden.device)).requires_grad_()
        with torch.enable_grad():
            weights = None
            if config.truncate is not None:
                weights = truncated_importance_weights(phase.old, phase.sampled, config.truncate)
            loss = gspo_loss if config.level == "sequence" else grpo_loss
            found = loss(log_probs, phase.old, phase.advantages, phase.owner, config.clip, weights)
            total = found.total
            if phase.reference is not None:
                kl = kl_to_reference(log_probs, phase.reference)
                total = total + config.kl * sequence_means(kl, phase.owner, len(phase.advantages)).sum()
                self.note("kl", kl.detach().tolist())
            (gradient,) = torch.autograd.grad(total, log_probs)
        of_tokens = torch.zeros(batch.n_tokens).index_copy(0, rows, -gradient.float().cpu())
        weighted = chunked_cross_entropy(
            hidden, head, batch.labels, of_tokens.to(batch.labels.device), chunk=chunk
        ).total
        for row, ratio, clipped in zip(phase.rows, found.ratios.tolist(), found.clipped.tolist(), strict=True):
            row |= {"ratio": ratio, "clipped": clipped}
        self.note("ratio", found.ratios.tolist())
        self.note("clipped", found.clipped.tolist())
        self._rows += phase.rows
        self._phase = None
        n = len(phase.advantages)
        return BatchLosses(
            total=weighted - weighted.detach() + total.detach(),
            weight=torch.tensor(float(n)),
            routers={"thinker": RouterUse(output.router_counts, output.router_prob_sums, batch.n_tokens)},
            groups=[(("policy", config.level), (float(total.detach()), float(n), 0.0, float(n)))],
        )

    def on_after_backward(self) -> None:
        replay(self.model, [])  # not before: activations that are computed again go the same way
        super().on_after_backward()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        self._write_rollouts(step)

    def _write_rollouts(self, step: int) -> None:
        """``rollouts/step=0000012.parquet`` of each rank's; made again, with the same content, where a run resumes."""
        import pyarrow as pa

        rank = "" if self.trainer.world_size == 1 else f".rank={self.trainer.global_rank}"
        folder = Path(self.trainer.default_root_dir) / ROLLOUTS
        write_parquet(folder / f"step={step:07d}{rank}.parquet", pa.Table.from_pylist(self._rows))
        self._rows = []

    def batch_flops(self, batch: PackedBatch) -> dict[str, float]:
        return {}  # not counted: most of a step is sampling


def routers(model: OmniModel) -> list[TopKRouter]:
    """Those of the Thinker, in the order of its layers."""
    return [module for module in model.thinker.modules() if isinstance(module, TopKRouter)]


@contextmanager
def recording(model: OmniModel) -> Generator[list[Tensor]]:
    """Fills a list with the experts that each token of a forward pass goes to, int64 [N, k] for each such layer."""
    experts: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _, __, routing: experts.append(routing.experts))
        for router in routers(model)
    ]
    try:
        yield experts
    finally:
        for hook in hooks:
            hook.remove()


def replay(model: OmniModel, experts: list[Tensor]) -> None:
    """From now on the tokens of `model` go to these `experts` (`recording`); none: to those that its routers choose."""
    given: list[Tensor | None] = [*experts] if experts else [None] * len(routers(model))
    for router, ids in zip(routers(model), given, strict=True):
        router.given = ids
