"""What every training module of the project has in common, and what the callbacks may count on."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.table import Table
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from omnitrain.config.run_config import OptimConfig
from omnitrain.data.work import Work
from omnitrain.interop.stored import shapes
from omnitrain.training.mesh_strategy import MeshStrategy
from omnitrain.training.optim import schedule_factor
from omnitrain.training.own_time import OwnTime
from omnitrain.training.ranks import gather_objects
from omnitrain.training.transfer import Ahead, SendAhead, arrived, for_training


class TrainingModule(L.LightningModule):
    """A LightningModule whose runs resume bit for bit and whose bad steps can be dropped.

    Subclasses fill `gradient_norm` and `step_loss` before the optimizer runs, call `log_row` for every row that is due,
    and give `extra_state` / `load_extra_state` for counters that belong into the checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.samples_in_step: list[str] = []
        """Ids of the samples that this rank's current optimizer step has read."""
        self.data_stage = 0.0
        """Stage of the data's mixture, summed over ranks: it changes where the mixture does."""
        self.batch_end_time = 0.0
        """When the last batch and all that follows it (checkpoint, logging) was done; from `time.perf_counter`."""
        self.own_time = OwnTime()
        """Of this rank's forward passes."""
        self.ending = False
        """Set when the run ends amid a validation: its remaining batches are passed over."""
        self.skipped_steps = 0
        self.gradient_norm = 0.0
        self.step_loss = math.nan
        """Loss of this optimizer step over the global batch."""
        self.last_loss = math.nan
        self._discarded = False
        self._saved: list[dict[str, Any]] = []
        self._configured: list[list[dict[str, Any]]] = []

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            what = "16-mixed scales the loss, and the others round waveforms and positions"
            raise ValueError(f"trainer.precision={self.trainer.precision}: use 32-true or bf16-mixed ({what})")
        if isinstance(self.trainer.strategy, DDPStrategy):
            # A rank whose batch has no picture leaves that encoder unused. Buffers are alike on all ranks as they are;
            # to send them would be a collective in every forward pass, of which ranks may validate unequally many.
            self.trainer.strategy._ddp_kwargs |= {"find_unused_parameters": True, "broadcast_buffers": False}
        if stage == "fit":
            # Of a folder in bf16. What is trained is held in fp32: in bf16, steps of a usual learning rate round to
            # nothing. What is frozen stays as it is, unless there is no autocast to bring the two together.
            for parameter in self.parameters():
                if parameter.requires_grad or self.trainer.precision == "32-true":
                    parameter.data = parameter.data.float()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return arrived(batch) if isinstance(batch, Ahead) else for_training(batch, device)

    def configure_model(self) -> None:
        if self.mesh is not None:
            self.mesh.spread()

    @property
    def mesh(self) -> MeshStrategy | None:
        """The strategy that the model is spread by, if it is."""
        strategy = getattr(self._trainer, "strategy", None)  # there may be no trainer
        return strategy if isinstance(strategy, MeshStrategy) else None

    @property
    def data_ranks(self) -> int:
        """Ranks with packs of their own."""
        return self.trainer.world_size if self.mesh is None else self.mesh.mesh.data_ranks

    @property
    def counts_pack(self) -> bool:
        """Of the ranks that share a pack, one counts it."""
        slices = None if self.mesh is None else self.mesh.slices
        return slices is None or slices.rank == 0

    @property
    def datamodule(self) -> Any:
        """The trainer's datamodule, or None."""
        return vars(self.trainer).get("datamodule")

    def parameter_counts(self) -> tuple[int, int]:
        """Parameters that are trained, and all, of the whole model."""
        sizes = {name: (p.numel(), p.requires_grad) for name, p in self.named_parameters()}
        if self.mesh is not None:
            whole = self.mesh.whole
            sizes |= {f"model.{n}": (math.prod(whole.shape(n)), p.requires_grad) for n, p in whole.parameters.items()}
        return sum(n for n, trained in sizes.values() if trained), sum(n for n, _ in sizes.values())

    def row_is_due(self, step: int) -> bool:
        """Whether a row is logged after optimizer step number `step` (from 1)."""
        return step % vars(self.trainer)["log_every_n_steps"] == 0 or step == self.trainer.max_steps

    def discard_step(self) -> None:
        """Drop this optimizer step: weights, moments and logged losses stay as they were. Call before the optimizer
        runs (`on_before_optimizer_step`), on every rank. The schedule and the data go on."""
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._discarded = True
        self.skipped_steps += 1

    def batch_flops(self, batch: Any) -> dict[str, float]:
        """Operations of a training step on `batch` by part of the model; none if they are not counted."""
        return {}

    def work(self) -> Work | None:
        """What training on a sample costs; None if it is not counted."""
        return None

    def validation_losses(self) -> dict[str, float]:
        """What the progress bar says after a validation, by name."""
        return {}

    def validation_tables(self, step: int) -> list[Table]:
        """What is printed at the end of training."""
        return []

    def log_row(self, row: Mapping[str, float], step: int) -> None:
        """Give `row` to every logger at once. (Lightning's own logging comes after the checkpoint of the same step; a
        row would be lost if the run died in between.)"""
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(row), step=step)

    def data_row(self, ranks: Iterable[tuple[Mapping[str, int], Mapping[str, int]]]) -> dict[str, int]:
        """What a row says of the data: counts of what every rank has seen, its skipped samples by reason, and skipped
        steps."""
        seen, skipped = Counter[str](), Counter[str]()
        for seen_there, skipped_there in ranks:
            seen.update(seen_there)
            skipped.update(skipped_there)
        row = {f"seen/{name}": n for name, n in seen.items()}
        row |= {f"skipped_samples/{reason}": n for reason, n in sorted(skipped.items())}
        return row | {"skipped_steps": self.skipped_steps}

    def mark_trained(self, batch: Any) -> None:
        """The checkpoint after this batch continues behind it, whatever the loader has fetched ahead."""
        mark = getattr(self.datamodule, "mark_trained", None)
        if mark is not None:
            mark(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch_end_time = time.perf_counter()

    def extra_state(self) -> dict[str, Any]:
        """This rank's counters; plain values and tensors."""
        return {}

    def dealt_out(self, states: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """What the ranks of a checkpoint have counted, for another number of `ranks`. Raises ValueError: if this module
        cannot."""
        raise ValueError(
            f"the checkpoint was written by {len(states)} processes, this run has {ranks}; resume with as many, or "
            "start a new run from its weights with module.init_from=RUN_DIR"
        )

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what `extra_state` returned."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning leaves out: random states and counters, one entry per rank."""
        checkpoint["omnitrain"] = {
            "ranks": gather_objects({"rng": rng_state(), **self.extra_state()}),
            "skipped_steps": self.skipped_steps,
            "accumulate": self.trainer.accumulate_grad_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("omnitrain")
        if state is None and self.trainer.training:
            raise ValueError(
                f"the checkpoint holds weights alone: no {type(self).__name__} wrote it, so that there is nothing to "
                "continue; start a new run from it with module.init_from=RUN_DIR paths.run_dir=FOLDER"
            )
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        if self.mesh is not None:
            ours |= {f"model.{name}": self.mesh.whole.shape(name) for name in self.mesh.whole.parameters}
        theirs = shapes(checkpoint["state_dict"])
        for name in {**ours, **theirs}:  # torch would list them all
            found = [x.get(name, "not there") for x in (theirs, ours)]
            if found[0] != found[1]:
                raise ValueError(f"the checkpoint is of another model: {name} is {found[0]} in it, and {found[1]} here")
        if state is None:  # as of `omnitrain convert`: enough to be scored
            return
        self._saved, self.skipped_steps = state["ranks"], state["skipped_steps"]
        if len(self._saved) != self.trainer.world_size:
            self._saved = self.dealt_out(self._saved, self.trainer.world_size)
        self._go_on_with(checkpoint["loops"]["fit_loop"], state.get("accumulate"))

    def _go_on_with(self, loop: dict[str, Any], accumulated: int | None) -> None:
        """Count in batches of this run what Lightning has counted in those of one that accumulated otherwise."""
        now = self.trainer.accumulate_grad_batches
        for counts in (loop["epoch_loop.batch_progress"][key] for key in ("total", "current") if accumulated):
            for name, count in counts.items():
                counts[name] = count // accumulated * now

    def on_train_start(self) -> None:
        if self.device.type == "cuda" and self.datamodule is not None:
            self.datamodule.on_read = SendAhead(self.device)
        if not self._saved:
            rank = self.trainer.global_rank  # every rank hides other words and frames, in packs of its own
            if rank := rank if self.mesh is None else self.mesh.mesh.data_rank(rank):
                torch.manual_seed(torch.initial_seed() + rank)
            return
        mine = self._saved[self.trainer.global_rank]
        self._saved = []
        self._apply_configured()
        self.load_extra_state(mine)
        set_rng_state(mine["rng"])

    def schedule(self, config: OptimConfig, *optimizers: Optimizer) -> LambdaLR:
        """The learning rate of the first of them. What the configuration says of each group of parameters is kept: a
        restored optimizer has what it was saved with."""
        schedule = LambdaLR(optimizers[0], schedule_factor(config, config.total_steps or self.trainer.max_steps))
        self._configured = [
            [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in o.param_groups]
            for o in optimizers
        ]
        return schedule  # made first: it writes `initial_lr` into the groups

    def _apply_configured(self) -> None:
        """A resumed run goes on with its configuration's rates, decay and betas; and, where its length is another, with
        the rate that a run of this length would have now."""
        for optimizer, groups in zip(self.trainer.optimizers, self._configured, strict=True):
            for group, configured in zip(optimizer.param_groups, groups, strict=True):
                group.update(configured)
        for schedule in (entry.scheduler for entry in self.trainer.lr_scheduler_configs):
            assert isinstance(schedule, LambdaLR)
            groups = schedule.optimizer.param_groups
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)


def rng_state() -> dict[str, Any]:
    """States of the Python, NumPy, torch and CUDA generators, as tensors and plain numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
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
