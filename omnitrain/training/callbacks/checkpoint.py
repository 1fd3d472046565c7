"""The whole state of a run in one place that is always whole."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from omnitrain.config.run_config import CheckpointConfig
from omnitrain.files import CHECKPOINTS, delete, linked, place, printable, sweep, unfinished
from omnitrain.interop.start_from import read_checkpoint
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.mesh_strategy import MeshStrategy
from omnitrain.training.module import TrainingModule
from omnitrain.training.ranks import sum_over_ranks, tell_ranks, told

_ENDING = "ending"


def step_ended(trainer: L.Trainer) -> bool:
    """Whether the batch that just ended was the last of an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


class RunFolderGone(RuntimeError):
    """The run folder was deleted or moved while the run wrote into it."""


class AtomicCheckpoint(Checkpoint):
    """`last.ckpt`: the whole training state, every N steps, before each validation, at the end, and on signals.

    It is written beside its place, forced to disk and renamed, so a kill at any moment leaves a whole checkpoint.
    The one before it stays as `previous.ckpt`: two whole states on the disk, and never more while one is written.
    A run that resumes from here continues bit for bit, `metrics.csv` included. One process writes a file, and waits for
    it; those that share the model write a folder while they go on (`MeshStrategy`), and wait for it before the next one
    and where the run ends.

    On SIGTERM or Ctrl-C the current optimizer step is finished, the state is saved and the process exits with status
    143 or 130; a second Ctrl-C ends it at once. SIGUSR2 is how Slurm tells a job that its time runs out: the same as
    SIGTERM. In a job of submitit, SIGUSR2 queues it again once the state is saved, and SIGTERM only saves.

    Nothing is saved while steps are skipped (`SpikeGuard`): what is due waits for the next step that counts. Only the
    end of a run is saved in any case.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self, config: CheckpointConfig | None = None, *, run_dir: str | os.PathLike[str]) -> None:
        self.config = config or CheckpointConfig()
        self.dirpath = Path(run_dir) / CHECKPOINTS
        self.path, self.previous = self.dirpath / "last.ckpt", self.dirpath / "previous.ckpt"
        self.last_step: int | None = None
        self._saved: dict[str, Any] | None = None
        self._validation_due = False
        self._received: set[int] = set()
        self._handlers: dict[int, Any] = {}  # what was there before ours
        self._folder: int | None = None  # the run folder, kept open: no other one can get its number on the disk
        self._skipped = 0  # steps, up to the last one
        self._overdue = False  # a checkpoint was due while steps were skipped
        self._went_on = True  # a step that counts has followed the last checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _CheckedIO()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        csv = next((logger.state_dict() for logger in trainer.loggers if isinstance(logger, ExactCsvLogger)), None)
        checkpoint["atomic_checkpoint"] = {"csv": csv, "validation_due": self._validation_due}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("atomic_checkpoint")
        self.last_step = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        saved, self._saved = self._saved, None
        for logger in trainer.loggers:
            if isinstance(logger, ExactCsvLogger):
                logger.begin(None if saved is None else saved["csv"])
        self.dirpath.parent.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(self.dirpath.parent, os.O_RDONLY)
        if trainer.is_global_zero:
            sweep(self.dirpath)
        self._skipped = getattr(pl_module, "skipped_steps", 0)
        self._overdue, self._went_on = False, self.last_step is None
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
        if signum == signal.SIGINT:
            if signum in self._received:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nending after this step, which is then saved; Ctrl-C again ends at once\n")
        self._received.add(signum)

    def _signals_of_any_rank(self, trainer: L.Trainer) -> list[int]:
        """Also raises what a checkpoint under way has failed of."""
        mesh = _mesh(trainer)
        flags = [float(number in self._received) for number in self._SIGNALS]
        flags.append(float(mesh is not None and mesh.saving_failed))
        *counts, failed = sum_over_ranks(torch.tensor(flags, device=trainer.strategy.root_device)).tolist()
        if failed and mesh is not None:
            mesh.finish_saving()
        return [number for number, count in zip(self._SIGNALS, counts, strict=True) if count > 0]

    def _survived(self) -> set[int]:
        """Signals that do not end the run: a job of submitit that gets SIGTERM saves and goes on until it is killed,
        since where Slurm preempts with a time of grace, a job that ends within it is not queued again."""
        return {signal.SIGTERM} if callable(self._handlers[signal.SIGUSR2]) else set()

    def _leave(self, trainer: L.Trainer, received: list[int]) -> None:
        """End the process, whose state is saved, unless all that it got is `_survived`."""
        if (mesh := _mesh(trainer)) is not None:
            mesh.finish_saving()
        if trainer.is_global_zero:
            saved = f"step {self.last_step} is in {self.path}" if self.path.exists() else "nothing was saved yet"
            if self._overdue:
                saved += " (no later one, since steps are being skipped)"
            line = f"continue: python -m omnitrain fit {shlex.quote(str(self.dirpath.parent))}"
            print(printable(f"{signal.Signals(received[0]).name}: {saved}; {line}"), file=sys.stderr, flush=True)
        if signal.SIGINT in received:
            raise SIGTERMException(130)
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

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._check_place()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if not step_ended(trainer):
            return
        step = trainer.global_step
        skipped = getattr(pl_module, "skipped_steps", 0)
        skipping, self._skipped = skipped > self._skipped, skipped
        self._went_on = self._went_on or not skipping
        terminated = self._signals_of_any_rank(trainer)
        final = step == trainer.max_steps
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._validation_due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        if final and self._validation_due and not terminated:
            return  # saved after that validation: a finished run is not entered again to make up for it
        self._overdue |= bool(terminated or final or self._validation_due or step % self.config.every_n_steps == 0)
        if final or (self._overdue and not skipping):
            self.save(trainer)
        if terminated:
            self._leave(trainer, terminated)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        # Ranks may have unequally many batches: no collective here. Who gets a signal tells the others, all pass over
        # the rest of their batches, and leave together at the end.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            assert isinstance(pl_module, TrainingModule)
            if self._received - self._survived():
                tell_ranks(_ENDING)
                pl_module.ending = True
            pl_module.ending |= told(_ENDING)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if terminated := self._signals_of_any_rank(trainer):
            self._leave(trainer, terminated)  # the checkpoint before this validation stands

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and self._validation_due and trainer.global_step == trainer.max_steps:
            self._validation_due = False
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt` now, or begin to. Called on every rank. RunFolderGone if its folder is no longer there;
        OSError if it, or the last one that was begun, could not be written: the one before it stands."""
        self._check_place()
        if (mesh := _mesh(trainer)) is not None:
            mesh.finish_saving()  # before the place for the next one is prepared
            trainer.save_checkpoint(self.path, storage_options=self._new(trainer.global_step))
        else:
            self._save_file(trainer)
        self.last_step = trainer.global_step
        self._went_on = self._overdue = False

    def _save_file(self, trainer: L.Trainer) -> None:
        gathered = False
        try:
            # Every rank takes part in gathering the state; only rank 0 writes, and so only its place gets the name.
            new = self._new(trainer.global_step) if trainer.is_global_zero else nullcontext(self.path)
            with new as partial:
                trainer.save_checkpoint(partial)
                gathered = True
        except OSError:
            if not gathered:
                trainer.strategy.barrier()  # in which the other ranks wait for the file
            self._say_whether_saved(trainer, False)
            raise
        self._say_whether_saved(trainer, True)

    @contextmanager
    def _new(self, step: int) -> Generator[Path]:
        """A place to write the checkpoint of `step` to, which at the end of the block gets its names; the last one
        becomes the one before it, if training went on after it."""
        keep = self._went_on and self.path.exists()
        with unfinished(self.path) as partial:
            if keep:
                delete(self.previous)
            yield partial
            if keep:
                with suppress(OSError):  # a file system without links keeps one checkpoint
                    linked(self.path, self.previous)
            place(partial, self.path)
        if (kept_every := self.config.keep_every_n_steps) and step % kept_every == 0:
            linked(self.path, self.dirpath / f"step={step:07d}.ckpt")

    def _say_whether_saved(self, trainer: L.Trainer, saved: bool) -> None:
        """End the other ranks where rank 0 could not write."""
        failed = sum_over_ranks(torch.tensor(float(not saved), device=trainer.strategy.root_device))
        if failed and saved:
            raise SystemExit(1)

    def last_good(self, trainer: L.Trainer) -> str:
        """For the message of a run that has diverged: the last checkpoint after which training went on.

        If all steps after `last.ckpt` were skipped, its weights may be what made them fail: it becomes `diverged.ckpt`,
        and `previous.ckpt` the last one.
        """
        if (mesh := _mesh(trainer)) is not None:
            mesh.finish_saving()
        if trainer.is_global_zero and not self._went_on and self.path.exists() and self.previous.exists():
            delete(self.dirpath / "diverged.ckpt")
            os.replace(self.path, self.dirpath / "diverged.ckpt")
            os.replace(self.previous, self.path)
            self.last_step = read_checkpoint(self.path)["global_step"]
        elif not self._went_on and self.path.exists():
            return f"training never went on after {self.path} (step {self.last_step}); begin anew"
        if self.last_step is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {self.path} (step {self.last_step})"

    def _check_place(self) -> None:
        if self._folder is None:
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(self.dirpath.parent.stat(), os.fstat(self._folder)):
                return
        raise RunFolderGone(
            f"{self.dirpath.parent} was deleted or moved while the run wrote into it; the run ends, and what it learnt "
            "since is lost"
        )

    def _close(self) -> None:
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (mesh := _mesh(trainer)) is not None:
            mesh.finish_saving()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:  # Lightning may have put back what was there before it
                signal.signal(number, handler)
        self._handlers = {}
        self._close()


def _mesh(trainer: L.Trainer) -> MeshStrategy | None:
    return trainer.strategy if isinstance(trainer.strategy, MeshStrategy) else None


class _CheckedIO(TorchCheckpointIO):
    """Looks at the checksums of what is loaded, and takes folders of several processes too."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args, **options)
        for optimizer in checkpoint.get("optimizer_states", []):
            optimizer["state"] = {number: dict(moments) for number, moments in optimizer["state"].items()}
        return checkpoint
