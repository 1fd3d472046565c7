"""One line that says what is happening."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omnitrain.config.run_config import ProgressConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.training.callbacks.checkpoint import step_ended
from omnitrain.training.module import TrainingModule


class TrainingProgress(ProgressBar):
    """One line that says what is happening (steps, loss, tokens/s, what the trainer is doing), and at the end a table
    with loss and bits per byte of each modality. Without a terminal it prints a plain line now and then."""

    def __init__(self, config: ProgressConfig | None = None) -> None:
        super().__init__()
        self._enabled = True
        self.config = config or ProgressConfig()
        self.console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_plain = 0.0
        self._window: deque[tuple[float, int]] = deque(maxlen=20)
        self._doing = ""

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        return self._enabled and self.trainer.is_global_zero

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.is_enabled:
            return
        assert isinstance(pl_module, TrainingModule)
        trained, parameters = pl_module.parameter_counts()
        self.console.print(
            f"Training {trained / 1e6:.1f} M of {parameters / 1e6:.1f} M parameters on {trainer.world_size} x "
            f"{pl_module.device.type}, optimizer steps {trainer.global_step} to {trainer.max_steps}",
            highlight=False,
        )
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
            )
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._progress.add_task("training", total=total, completed=trainer.global_step, status="")
            self._progress.start()
        self._window.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        if not self.is_enabled:
            return
        assert isinstance(pl_module, TrainingModule)
        self._window.append((time.perf_counter(), batch.n_tokens * pl_module.data_ranks))
        if not step_ended(trainer):
            return
        status = f"loss {pl_module.last_loss:.3f}"
        if len(self._window) > 1:
            seconds = self._window[-1][0] - self._window[0][0]
            status += f"  {sum(n for _, n in list(self._window)[1:]) / max(seconds, 1e-9):,.0f} tokens/s"
        if pl_module.skipped_steps:
            status += f"  {pl_module.skipped_steps} steps skipped"
        self._show(trainer, "training", status)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_enabled and trainer.state.fn == "fit":
            self._show(trainer, "validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.is_enabled or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, TrainingModule)
        losses = [f"{name} {value:.3f}" for name, value in pl_module.validation_losses().items()]
        self.console.print(
            f"step {trainer.global_step}: validation loss  {'  '.join(losses)}", highlight=False, soft_wrap=True
        )
        self._window.clear()
        self._show(trainer, "training")

    def _show(self, trainer: L.Trainer, doing: str, status: str | None = None) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, description=doing)
            if status is not None:
                self._progress.update(self._task, status=status)
        elif status is not None and time.perf_counter() - self._last_plain > self.config.plain_every_n_seconds:
            self._last_plain = time.perf_counter()
            self.console.print(f"step {trainer.global_step}/{trainer.max_steps}  {status}", highlight=False)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.is_enabled:
            return
        self._stop()
        assert isinstance(pl_module, TrainingModule)
        for table in pl_module.validation_tables(trainer.global_step):
            self.console.print(table)
