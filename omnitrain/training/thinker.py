"""Training of the Thinker with its encoders: which parts learn, from which loss.

Gradients are exact over the global batch. `training_step` back-propagates un-normalised sums; once the last micro-batch
of an optimizer step has been back-propagated (and DDP has reduced the gradients), they are divided by the number of
target tokens of all ranks and all accumulation steps. Clipping, the spike guard and AdamW see that gradient.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.omni import OmniModel
from omnitrain.training.losses import (
    LossConfig,
    SampleSums,
    balance_loss,
    gather_objects,
    sum_over_ranks,
    token_weights,
)
from omnitrain.training.optim import PARTS, OptimConfig, build_optimizer, check_parts, part_of, schedule_factor
from omnitrain.training.sums import LossSums, expert_load


class ThinkerModule(L.LightningModule):
    """Trains an `OmniModel` to predict text.

    Args:
        model: the `OmniModel`.
        optim: optimizer and schedule.
        loss: loss weights.
        train: parts that learn (names of `PARTS`); the others are frozen.
        init_from: folder with weights in the public format that replace the model's (same shapes).
        aut_window_seconds: attention window of the audio encoder, drawn anew for each optimizer step from these bounds
            (whole seconds, inclusive; report, section 3: 1 to 8 s). None: the encoder's own window. Evaluation always
            uses the encoder's own.
        seed: of the window draws.
        generation: arguments of `generation.text.generate` for `predict` (`max_new_tokens`, `temperature`, ...).
    """

    def __init__(
        self,
        model: OmniModel,
        optim: OptimConfig | None = None,
        loss: LossConfig | None = None,
        *,
        train: Sequence[str] = tuple(PARTS),
        init_from: str | None = None,
        aut_window_seconds: tuple[int, int] | None = (1, 8),
        seed: int = 0,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_parts(train, "module.train")
        self.model: OmniModel = model
        self.optim_config = optim or OptimConfig()
        self.loss_config = loss or LossConfig()
        self.aut_window_seconds = tuple(aut_window_seconds) if aut_window_seconds else None
        self.seed = seed
        self.generation = dict(generation or {"max_new_tokens": 64, "temperature": 0.0})
        if init_from is not None:
            _load_public_weights(model, init_from)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in train)

        # One optimizer step: (weighted nats, weight) of all ranks, positions and [L, E] expert counts of all ranks, and
        # this rank's sums by modality.
        self._window = torch.zeros(3, dtype=torch.float64)
        self._window_counts: Tensor | None = None
        self._window_sums = LossSums()
        self._discarded = False
        self.samples_in_step: list[str] = []
        """Ids of the samples that this rank's current optimizer step has read."""
        self.batch_end_time = 0.0
        """When the last batch and all that follows it (checkpoint, logging) was done; from `time.perf_counter`."""
        # Since the last logged row; since the start.
        self._row_sums = LossSums()
        self._row_counts: Tensor | None = None
        self._seen = {"tokens": 0, "samples": 0, "target_tokens": 0}
        self._stream: dict[str, Any] = {"skipped": {}, "packing": []}
        self.skipped_steps = 0
        self.gradient_norm = 0.0
        self._part_norms: dict[str, float] = {}
        self.last_loss = math.nan
        self._evaluation: dict[int, LossSums] = {}
        self.evaluation_sums: dict[str, LossSums] = {}
        """Sums of the last evaluation by the name of its loader, over all ranks; for tables and reports."""
        self._saved: list[dict[str, Any]] = []

    # ------------------------------------------------------------------ training

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        output, nll = self._forward(batch, window=self._aut_window_frames())
        weights = token_weights(batch, self.loss_config.modality_weights)
        loss = (nll * weights).sum()
        step = torch.tensor([loss.detach().double(), weights.sum(), batch.n_tokens], dtype=torch.float64)
        counts = output.router_counts.double()
        flat = sum_over_ranks(torch.cat([step.to(self.device), counts.flatten()]))
        step, counts = flat[:3].cpu(), flat[3:].view_as(counts)
        self._window += step
        self._window_counts = counts if self._window_counts is None else self._window_counts + counts
        self._window_sums.add_batch(batch, SampleSums.of(batch, nll))

        if self.loss_config.balance_coefficient and counts.numel():
            # f over what the global batch has brought so far, P over this micro-batch of all ranks; weighted by its
            # target tokens, because every gradient is divided by those in the end.
            share = (self._window_counts / self._window[2]).to(nll.dtype)
            balance = balance_loss(
                share, output.router_prob_sums / step[2].item(), pool_layers=self.loss_config.balance_pools_layers
            )
            loss = loss + self.loss_config.balance_coefficient * step[1].item() * balance
        self._count(batch)
        mark_trained: Callable[[PackedBatch], None] | None = getattr(self.datamodule, "mark_trained", None)
        if mark_trained is not None:  # the checkpoint after this batch continues behind it, whatever is fetched ahead
            mark_trained(batch)
        # Lightning divides by the accumulation steps and DDP by the ranks: undo both, so that gradients are plain sums.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _count(self, batch: PackedBatch) -> None:
        self.samples_in_step += batch.sample_ids
        self._seen["tokens"] += batch.n_tokens
        self._seen["samples"] += len(batch)
        self._seen["target_tokens"] += int((batch.labels != IGNORE).sum())
        state = batch.stream_state or {}
        filled = [state["filling"] / state["batches"]] if state.get("batches") else []
        self._stream = {"skipped": dict(batch.skipped), "packing": filled}

    def _forward(self, batch: PackedBatch, window: int | None = None) -> tuple[Any, Tensor]:
        output = self.model(**batch.model_inputs(), aut_window_frames=window)
        head = self.model.thinker.lm_head.weight
        return output, chunked_cross_entropy(output.hidden, head, batch.labels, chunk=self.loss_config.chunk)

    def _aut_window_frames(self) -> int | None:
        """Frames (10 ms) of this step's audio attention window; a function of seed and step, so resume repeats it."""
        if self.aut_window_seconds is None:
            return None
        return 100 * random.Random(f"{self.seed}/{self.global_step}").randint(*self.aut_window_seconds)

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        by_part: dict[str, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                by_part.setdefault(part_of(name), []).append(parameter.grad)
        gradients = [g for part in by_part.values() for g in part]
        if not gradients:
            self.gradient_norm = 0.0
            return
        torch._foreach_div_(gradients, max(1.0, float(self._window[1])))
        norms = {part: torch.stack(torch._foreach_norm(g)).norm() for part, g in by_part.items()}
        self._part_norms = {part: float(norm) for part, norm in norms.items()}
        self.gradient_norm = float(torch.stack(list(norms.values())).norm())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # By the norm that is known already; Lightning's own clipping refuses fused optimizers under bf16-mixed.
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: only `norm` is supported")
        if gradient_clip_val and self.gradient_norm > gradient_clip_val and not self._discarded:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, gradient_clip_val / self.gradient_norm)

    @property
    def datamodule(self) -> Any:
        """The trainer's datamodule, or None."""
        return vars(self.trainer).get("datamodule")

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizers[0]

    def row_is_due(self, step: int) -> bool:
        """Whether a row is logged after optimizer step number `step` (from 1)."""
        return step % vars(self.trainer)["log_every_n_steps"] == 0 or step == self.trainer.max_steps

    @property
    def step_loss(self) -> float:
        """Loss of this optimizer step over the global batch (without the balance term), nats per target token."""
        return float(self._window[0] / self._window[1].clamp(min=1.0))

    def discard_step(self) -> None:
        """Drop this optimizer step: weights, moments and logged losses stay as they were. Call before the optimizer
        runs (`on_before_optimizer_step`), on every rank. The schedule and the data go on."""
        self._optimizer.zero_grad(set_to_none=True)
        self._discarded = True
        self.skipped_steps += 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self._discarded:
            self._row_sums.merge(self._window_sums)
            counts = self._window_counts
            self._row_counts = counts if self._row_counts is None or counts is None else self._row_counts + counts
            self.last_loss = self.step_loss
        step = self.global_step + 1  # Lightning counts this step after the hook
        if self.row_is_due(step):
            self._log_row(step)
        self._window.zero_()
        self._window_counts, self._window_sums, self._discarded = None, LossSums(), False
        self.samples_in_step = []

    def _log_row(self, step: int) -> None:
        sums, seen = LossSums(), dict.fromkeys(self._seen, 0)
        skipped: dict[str, int] = {}
        packing: list[float] = []
        for rank in gather_objects((self._row_sums, self._seen, self._stream)):
            sums.merge(rank[0])
            seen = {name: n + rank[1][name] for name, n in seen.items()}
            for reason, n in rank[2]["skipped"].items():
                skipped[reason] = skipped.get(reason, 0) + n
            packing += rank[2]["packing"]
        row: dict[str, float] = sums.metrics("train") | {"gradient_norm": self.gradient_norm}
        row |= {f"gradient_norm/{part}": norm for part, norm in self._part_norms.items()}
        row |= {
            f"lr/{group['name']}": group["lr"]
            for group in self._optimizer.param_groups
            if not group["name"].endswith(".no_decay")
        }
        if self._row_counts is not None:
            row |= expert_load(self._row_counts)
        if packing:
            row["packing/efficiency"] = sum(packing) / len(packing)
        row |= {f"seen/{name}": n for name, n in seen.items()}
        row |= {f"skipped_samples/{reason}": n for reason, n in sorted(skipped.items())}
        row["skipped_steps"] = self.skipped_steps
        self.log_row(row, step)
        self._row_sums, self._row_counts = LossSums(), None

    def log_row(self, row: Mapping[str, float], step: int) -> None:
        """Give `row` to every logger at once. (Lightning's own logging comes after the checkpoint of the same step; a
        row would be lost if the run died in between.)"""
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(row), step=step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.model, self.optim_config)
        total_steps = self.optim_config.total_steps or self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor(self.optim_config, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        self.batch_end_time = time.perf_counter()

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        _, nll = self._forward(batch)
        self._evaluation.setdefault(dataloader_idx, LossSums()).add_batch(batch, SampleSums.of(batch, nll))

    def test_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("validation", self.trainer.val_dataloaders)

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test", self.trainer.test_dataloaders)

    def _finish_evaluation(self, stage: str, loaders: Any) -> None:
        """Losses over all ranks. Several loaders are told apart by the keys of the datamodule's dictionary."""
        named = list(loaders) if isinstance(loaders, Mapping) else None
        self.evaluation_sums = {}
        row: dict[str, float] = {}
        for states in zip(*gather_objects(sorted(self._evaluation.items())), strict=True):
            index, merged = states[0][0], LossSums()
            for _, sums in states:
                merged.merge(sums)
            name = stage if named is None or named[index] == stage else f"{stage}/{named[index]}"
            self.evaluation_sums[name] = merged
            row |= merged.metrics(name)
        self._evaluation = {}
        self.log_dict(row, logger=False, sync_dist=True)  # for callbacks; all ranks have the same values
        if not self.trainer.sanity_checking:
            self.log_row(row, self.global_step)

    def predict_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Answers to a batch of prompts: `id`, `source`, `task`, `modality` and `text` of each sample."""
        from omnitrain.generation.text import generate

        tokenizer = self.datamodule.tokenizer
        options: dict[str, Any] = {"stop_ids": tokenizer.stop_ids, **self.generation}
        answers = generate(self.model, batch, **options)
        return [
            {"id": i, "source": s, "task": t, "modality": m, "text": tokenizer.decode(ids)}
            for i, s, t, m, ids in zip(
                batch.sample_ids, batch.sources, batch.tasks, batch.modalities, answers, strict=True
            )
        ]

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning leaves out: random states and counters, one entry per rank."""
        mine = {
            "rng": rng_state(),
            "row_sums": self._row_sums.state_dict(),
            "seen": dict(self._seen),
            "stream": self._stream,
        }
        checkpoint["omnitrain"] = {
            "ranks": gather_objects(mine),
            "row_counts": None if self._row_counts is None else self._row_counts.cpu(),
            "skipped_steps": self.skipped_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("omnitrain")
        if state is None:
            raise ValueError("the checkpoint holds no 'omnitrain' entry: it was not written by ThinkerModule")
        self._saved = state["ranks"]
        self._row_counts, self.skipped_steps = state["row_counts"], state["skipped_steps"]

    def on_fit_start(self) -> None:
        if self.trainer.precision == "16-mixed":
            raise ValueError("trainer.precision=16-mixed scales the loss, which is not supported; use bf16-mixed")

    def on_train_start(self) -> None:
        if not self._saved:
            return
        if len(self._saved) != self.trainer.world_size:
            raise ValueError(
                f"the checkpoint was written by {len(self._saved)} processes, this run has {self.trainer.world_size}; "
                "resume with as many, or start a new run from its weights"
            )
        mine = self._saved[self.trainer.global_rank]
        self._saved = []
        self._row_sums.load_state_dict(mine["row_sums"])
        self._seen, self._stream = dict(mine["seen"]), mine["stream"]
        self._row_counts = None if self._row_counts is None else self._row_counts.to(self.device)
        set_rng_state(mine["rng"])


def rng_state() -> dict[str, Any]:
    """States of the Python, NumPy, torch and CUDA generators, as tensors and plain numbers."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": (version, internal, gauss),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _load_public_weights(model: OmniModel, folder: str) -> None:
    from omnitrain.interop.public_format import load_pretrained

    weights = load_pretrained(folder).state_dict()
    own = model.state_dict()
    wrong = [
        f"{name}: {tuple(weights[name].shape) if name in weights else 'missing'} in the folder, "
        f"{tuple(own[name].shape) if name in own else 'missing'} in the model"
        for name in sorted(own.keys() | weights.keys())
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(
            f"module.init_from={folder}: {len(wrong)} weights do not fit this model; choose the model preset that the "
            f"folder holds. First: {'; '.join(wrong[:3])}"
        )
    model.load_state_dict(weights)
