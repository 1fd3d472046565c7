"""Steps that would wreck the model are skipped; too many in a row end the run."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from omnitrain.config.run_config import SpikeGuardConfig
from omnitrain.files import SKIPPED_STEPS, append_line, write_text
from omnitrain.training.callbacks.checkpoint import AtomicCheckpoint
from omnitrain.training.module import TrainingModule
from omnitrain.training.ranks import gather_objects


class TrainingDiverged(RuntimeError):
    """Too many optimizer steps in a row had to be skipped."""


class SpikeGuard(Callback):
    """Skips an optimizer step whose loss or gradient is not finite, or whose gradient norm jumps.

    The bound is `factor` times the median norm of the last `window` accepted steps; it holds from the `min_steps`-th
    accepted step on. A skipped step leaves weights and moments alone and writes one line to `skipped_steps.jsonl`:
    step, reason, loss, norm, bound and the ids of the samples of the global batch. The schedule and the data go on.
    Where the data pass to another stage of their mixture, norms may well jump for good: the median starts anew.
    After too many skipped steps in a row, `TrainingDiverged` names the last good checkpoint.
    """

    def __init__(self, config: SpikeGuardConfig | None = None, *, run_dir: str | os.PathLike[str]) -> None:
        self.config = config or SpikeGuardConfig()
        self.path = Path(run_dir) / SKIPPED_STEPS
        self.norms: deque[float] = deque(maxlen=self.config.window)
        self.in_a_row = 0
        self.stage = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "stage": self.stage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.norms.extend(state_dict["norms"])
        self.in_a_row, self.stage = state_dict["in_a_row"], state_dict.get("stage", 0.0)

    @property
    def bound(self) -> float:
        """Largest gradient norm that is accepted now."""
        if len(self.norms) < self.config.min_steps:
            return math.inf
        return self.config.factor * statistics.median(self.norms)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.path.exists():  # drop what comes after the state that we resume from
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= trainer.global_step]
            write_text(self.path, "".join(kept))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.data_stage != self.stage:
            self.norms.clear()
            self.stage = pl_module.data_stage
        # Loss and norm are those of the global batch: every rank comes to the same decision.
        loss, norm, bound = pl_module.step_loss, pl_module.gradient_norm, self.bound
        if not math.isfinite(loss):
            reason = "loss is not finite"
        elif not math.isfinite(norm):
            reason = "gradient norm is not finite"
        elif norm > bound:
            reason = f"gradient norm is above {self.config.factor:g} x the running median"
        else:
            if norm:  # a step without targets says nothing
                self.norms.append(norm)
            self.in_a_row = 0
            return
        pl_module.discard_step()
        self.in_a_row += 1
        ids = [i for rank in gather_objects(pl_module.samples_in_step) for i in rank]
        step = trainer.global_step + 1
        if trainer.is_global_zero:
            numbers = {"loss": loss, "gradient_norm": norm, "bound": bound}
            # JSON has no NaN and no infinity: as text.
            numbers = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
            record = {"step": step, "reason": reason, **numbers, "samples": ids}
            append_line(self.path, json.dumps(record, ensure_ascii=False))
        if self.in_a_row >= self.config.max_in_a_row:
            checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, AtomicCheckpoint)), None)
            good = "no checkpoint is written" if checkpoint is None else checkpoint.last_good(trainer)
            raise TrainingDiverged(
                f"{self.in_a_row} optimizer steps in a row were skipped, the last (step {step}) because its {reason} "
                f"(loss {loss:.4g}, norm {norm:.4g}); {good}. The samples are listed in {self.path}. Lower "
                "optim.lr, or remove the samples; where all norms rise because learning begins, raise "
                "callbacks.spike_guard.factor"
            )
