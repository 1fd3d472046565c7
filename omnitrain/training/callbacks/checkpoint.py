"""The whole state of a run in one file that is always whole."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from omnitrain.config.run_config import CheckpointConfig
from omnitrain.files import CHECKPOINTS, atomic
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.ranks import sum_over_ranks


def step_ended(trainer: L.Trainer) -> bool:
    """Whether the batch that just ended was the last of an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


class AtomicCheckpoint(Checkpoint):
    """`last.ckpt`: the whole training state, every N steps, before each validation, at the end, on SIGTERM and SIGUSR2.

    The file is written beside its place, forced to disk and renamed, so a kill at any moment leaves a whole checkpoint.
    On SIGTERM the current optimizer step is finished, the state is saved and the process exits with status 143. SIGUSR2
    is how Slurm tells a job that its time runs out: the same. In a job of submitit, SIGUSR2 queues it again
    once the state is saved, and SIGTERM only saves.
    A run that resumes from here continues bit for bit, `metrics.csv` included.

    Args:
        config: how often.
        run_dir: the run folder.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(self, config: CheckpointConfig | None = None, *, run_dir: str | os.PathLike[str]) -> None:
        self.config = config or CheckpointConfig()
        self.dirpath = Path(run_dir) / CHECKPOINTS
        self.last_step: int | None = None
        self._saved: dict[str, Any] | None = None
        self._validation_due = False
        self._received: set[int] = set()
        self._handlers: dict[int, Any] = {}  # what was there before ours

    @property
    def path(self) -> Path:
        """Where the last checkpoint stands, once there is one."""
        return self.dirpath / "last.ckpt"

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        csv = next((logger for logger in trainer.loggers if isinstance(logger, ExactCsvLogger)), None)
        checkpoint["atomic_checkpoint"] = {
            "csv": None if csv is None else csv.state_dict(),
            "validation_due": self._validation_due,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("atomic_checkpoint")
        self.last_step = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        saved, self._saved = self._saved, None
        for logger in trainer.loggers:
            if isinstance(logger, ExactCsvLogger):
                logger.begin(None if saved is None else saved["csv"])
        self._received.clear()
        self._handlers = {number: signal.signal(number, self._on_signal) for number in self._SIGNALS}
        if saved is not None and saved["validation_due"]:
            # Lightning takes the validation that follows this checkpoint as done; it was not.
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch
            trainer.validating = True
            validation.run()
            trainer.training = True

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._received.add(signum)

    def _signals_of_any_rank(self, trainer: L.Trainer) -> list[int]:
        flags = [float(number in self._received) for number in self._SIGNALS]
        counts = sum_over_ranks(torch.tensor(flags, device=trainer.strategy.root_device)).tolist()
        return [number for number, count in zip(self._SIGNALS, counts, strict=True) if count > 0]

    def _leave(self, trainer: L.Trainer, received: list[int]) -> None:
        """End the process, whose state is saved. Only a job of submitit that gets SIGTERM goes on until it is killed:
        where Slurm preempts with a time of grace, a job that ends within it is not queued again."""
        launcher = self._handlers[signal.SIGUSR2]
        if not callable(launcher):
            raise SIGTERMException(143)
        self._received.clear()
        if signal.SIGUSR2 in received:
            try:
                launcher(signal.SIGUSR2, None)  # queues the job again from rank 0, and exits there
            finally:
                trainer.strategy.barrier()  # before another rank's exit can end the job
            raise SIGTERMException(143)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_ended(trainer):
            return
        step = trainer.global_step
        terminated = self._signals_of_any_rank(trainer)
        final = step == trainer.max_steps
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._validation_due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        if final and self._validation_due and not terminated:
            return  # saved after that validation: a finished run is not entered again to make up for it
        if terminated or final or self._validation_due or step % self.config.every_n_steps == 0:
            self.save(trainer)
        if terminated:
            self._leave(trainer, terminated)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if terminated := self._signals_of_any_rank(trainer):
            self._leave(trainer, terminated)  # the checkpoint before this validation stands

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and self._validation_due and trainer.global_step == trainer.max_steps:
            self._validation_due = False
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt` now. Called on every rank."""
        # Every rank takes part in gathering the state; only rank 0 writes, and so only its place gets the name.
        with atomic(self.path) if trainer.is_global_zero else nullcontext(self.path) as partial:
            trainer.save_checkpoint(partial)
        due = bool(self.config.keep_every_n_steps) and trainer.global_step % (self.config.keep_every_n_steps or 1) == 0
        if trainer.is_global_zero and due:
            kept = self.dirpath / f"step={trainer.global_step:07d}.ckpt"
            kept.unlink(missing_ok=True)
            os.link(self.path, kept)
        self.last_step = trainer.global_step

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:  # Lightning may have put back what was there before it
                signal.signal(number, handler)
        self._handlers = {}
