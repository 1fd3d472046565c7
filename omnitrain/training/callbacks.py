"""What watches over a training run: checkpoints, the spike guard, throughput, the run's record and the progress bar."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim import Optimizer

from omnitrain.data.batch import PackedBatch
from omnitrain.data.composition import composition
from omnitrain.training.flops import peak_flops
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.losses import gather_objects, sum_over_ranks
from omnitrain.training.module import TrainingModule


def _step_ended(trainer: L.Trainer) -> bool:
    """Whether the batch that just ended was the last of an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either the old or the new content, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class AtomicCheckpoint(Checkpoint):
    """`last.ckpt`: the whole training state, every N steps, before each validation, at the end, on SIGTERM and SIGUSR2.

    The file is written beside its place, forced to disk and renamed, so a kill at any moment leaves a whole checkpoint.
    On SIGTERM the current optimizer step is finished, the state is saved and the process exits with status 143. SIGUSR2
    is how Slurm tells a job that its time runs out: the same. In a job of submitit, SIGUSR2 queues it again
    once the state is saved, and SIGTERM only saves.
    A run that resumes from here continues bit for bit, `metrics.csv` included.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: optimizer steps between checkpoints.
        keep_every_n_steps: also keep `step=N.ckpt` at multiples of this; None keeps only the last.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(
        self, dirpath: str | os.PathLike[str], every_n_steps: int = 100, keep_every_n_steps: int | None = None
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_n_steps={every_n_steps}: must be at least 1")
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
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
        if not _step_ended(trainer):
            return
        step = trainer.global_step
        terminated = self._signals_of_any_rank(trainer)
        final = step == trainer.max_steps
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._validation_due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        if final and self._validation_due and not terminated:
            return  # saved after that validation: a finished run is not entered again to make up for it
        if terminated or final or self._validation_due or step % self.every_n_steps == 0:
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
        partial = self.dirpath / "last.ckpt.partial"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            folder = os.open(self.dirpath, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            if self.keep_every_n_steps and trainer.global_step % self.keep_every_n_steps == 0:
                kept = self.dirpath / f"step={trainer.global_step:07d}.ckpt"
                kept.unlink(missing_ok=True)
                os.link(self.path, kept)
        self.last_step = trainer.global_step

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:  # Lightning may have put back what was there before it
                signal.signal(number, handler)
        self._handlers = {}


class TrainingDiverged(RuntimeError):
    """Too many optimizer steps in a row had to be skipped."""


class SpikeGuard(Callback):
    """Skips an optimizer step whose loss or gradient is not finite, or whose gradient norm jumps.

    The bound is `factor` times the median norm of the last `window` accepted steps; it holds from the `min_steps`-th
    accepted step on. A skipped step leaves weights and moments alone and writes one line to `skipped_steps.jsonl`:
    step, reason, loss, norm, bound and the ids of the samples of the global batch. The schedule and the data go on.
    Where the data pass to another stage of their mixture, norms may well jump for good: the median starts anew.

    Args:
        run_dir: the run folder.
        factor, window, min_steps: the bound.
        max_in_a_row: so many skipped steps in a row end the run.

    Raises (while training):
        TrainingDiverged: naming the last good checkpoint.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        factor: float = 10.0,
        window: int = 200,
        min_steps: int = 20,
        max_in_a_row: int = 5,
    ) -> None:
        self.path = Path(run_dir) / "skipped_steps.jsonl"
        self.factor, self.min_steps, self.max_in_a_row = factor, min_steps, max_in_a_row
        self.norms: deque[float] = deque(maxlen=window)
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
        return self.factor * statistics.median(self.norms) if len(self.norms) >= self.min_steps else math.inf

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.path.exists():  # drop what comes after the state that we resume from
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= trainer.global_step]
            write_atomically(self.path, "".join(kept))

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
            reason = f"gradient norm is above {self.factor:g} x the running median"
        else:
            self.norms.append(norm)
            self.in_a_row = 0
            return
        pl_module.discard_step()
        self.in_a_row += 1
        ids = [i for rank in gather_objects(pl_module.samples_in_step) for i in rank]
        step = trainer.global_step + 1
        if trainer.is_global_zero:
            record = {
                "step": step,
                "reason": reason,
                "loss": loss,
                "gradient_norm": norm,
                "bound": bound,
                "samples": ids,
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _json_number(v) for k, v in record.items()}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if self.in_a_row >= self.max_in_a_row:
            checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, AtomicCheckpoint)), None)
            good = (
                f"the last good checkpoint is {checkpoint.path} (step {checkpoint.last_step})"
                if checkpoint is not None and checkpoint.last_step is not None
                else "no checkpoint was written yet"
            )
            raise TrainingDiverged(
                f"{self.in_a_row} optimizer steps in a row were skipped, the last (step {step}) because its {reason} "
                f"(loss {loss:.4g}, norm {norm:.4g}); {good}. The samples are listed in {self.path}. Lower "
                "optim.lr, or remove the samples"
            )


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Throughput(Callback):
    """Speed of training over the steps since the last row, under ``time/`` (file `throughput.csv`): tokens, target
    tokens and samples per second, seconds per step, MFU, share of the time spent waiting for data, peak memory.

    Time spent in validation, checkpoints and logging is left out; the first step (warm-up) too.

    Args:
        peak_tflops: what MFU is measured against, per device; None: see `training.flops.peak_flops`.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self._peak = None if peak_tflops is None else (peak_tflops * 1e12, "configured")
        self._clear()
        self._batch_start = self._validation_end = 0.0
        self._counted_any = False

    def _clear(self) -> None:
        self._busy = self._waited = 0.0
        self._flops = 0.0
        self._tokens = self._samples = self._steps = 0

    @property
    def peak(self) -> tuple[float, str] | None:
        """Operations per second of one device, and where the figure is from."""
        return self._peak

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._peak is None:
            self._peak = peak_flops(pl_module.device)
        self._clear()
        self._counted_any = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_end = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._batch_start = time.perf_counter()
        if self._counted_any:
            self._waited += self._batch_start - max(pl_module.batch_end_time, self._validation_end)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not self._counted_any:
            self._counted_any = True
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._busy += time.perf_counter() - self._batch_start
        self._tokens += batch.n_tokens
        self._samples += len(batch)
        self._flops += pl_module.batch_flops(batch)
        if not _step_ended(trainer):
            return
        self._steps += 1
        if pl_module.row_is_due(trainer.global_step):
            assert self._peak is not None
            seconds = self._busy + self._waited
            sums = torch.tensor([self._tokens, self._samples, self._flops], dtype=torch.float64)
            tokens, samples, flops = sum_over_ranks(sums.to(pl_module.device)).tolist()
            row = {
                "time/tokens_per_second": tokens / seconds,
                "time/samples_per_second": samples / seconds,
                "time/seconds_per_step": seconds / self._steps,
                "time/data_wait": self._waited / seconds,
                "time/memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            }
            if not math.isnan(flops):
                row["time/mfu"] = flops / seconds / trainer.world_size / self._peak[0]
            if pl_module.device.type == "cuda":
                row["time/memory_cuda_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            pl_module.log_row(row, trainer.global_step)
            self._clear()


class RunRecord(Callback):
    """Writes `environment.json` (versions, machine) at the start, and `data.json` (mixture as planned and as seen,
    skipped samples by reason) whenever a checkpoint is written and at the end.

    Args:
        run_dir: the run folder.
    """

    PACKAGES = ("omnitrain", "torch", "torchvision", "torchaudio", "lightning", "datasets", "grain", "av", "tokenizers")

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._composition: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_atomically(self.run_dir / "environment.json", json.dumps(environment(trainer), indent=2) + "\n")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write_data(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_data(trainer, pl_module)

    def _write_data(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        data = pl_module.datamodule
        if not hasattr(data, "planned_mixture"):
            return
        seen: dict[str, Any] = {}
        for rank in gather_objects(data.seen_mixture()):
            seen = _add_counts(seen, rank)
        # Not sums over ranks: a mean and a position.
        if "packing_efficiency" in seen:
            seen["packing_efficiency"] /= trainer.world_size
        seen["stage"] = seen.get("stage", 0) // trainer.world_size
        if trainer.is_global_zero:
            if self._composition is None:
                self._composition = {name: composition(source) for name, source in data.opened("sources").items()}
            record = {
                "step": trainer.global_step,
                "processes": trainer.world_size,
                "planned": data.planned_mixture(),
                "composition": self._composition,
                **seen,
            }
            text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
            write_atomically(self.run_dir / "data.json", text + "\n")


def _add_counts(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Nested counts summed by key."""
    return {
        key: _add_counts(a.get(key, {}), b.get(key, {}))
        if isinstance(a.get(key, b.get(key)), Mapping)
        else a.get(key, 0) + b.get(key, 0)
        for key in [*a, *(k for k in b if k not in a)]
    }


def environment(trainer: L.Trainer) -> dict[str, Any]:
    """Versions and machine of a run, for `environment.json`."""
    device = trainer.strategy.root_device
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of what a run depends on; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for name in RunRecord.PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


class TrainingProgress(ProgressBar):
    """One line that says what is happening (steps, loss, tokens/s, what the trainer is doing), and at the end a table
    with loss and bits per byte of each modality. Without a terminal it prints a plain line now and then.

    Args:
        plain_every_n_seconds: time between the lines when there is no terminal.
    """

    def __init__(self, plain_every_n_seconds: float = 20.0) -> None:
        super().__init__()
        self._enabled = True
        self.plain_every_n_seconds = plain_every_n_seconds
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
        parameters = sum(p.numel() for p in pl_module.parameters())
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
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
        self._window.append((time.perf_counter(), batch.n_tokens * trainer.world_size))
        if not _step_ended(trainer):
            return
        assert isinstance(pl_module, TrainingModule)
        status = f"loss {pl_module.last_loss:.3f}"
        if len(self._window) > 1:
            seconds = self._window[-1][0] - self._window[0][0]
            status += f"  {sum(n for _, n in list(self._window)[1:]) / max(seconds, 1e-9):,.0f} tokens/s"
        if pl_module.skipped_steps:
            status += f"  {pl_module.skipped_steps} steps skipped"
        self._show(trainer, "training", status)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_enabled and trainer.state.fn == "fit":
            self._show(trainer, "validating", None)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.is_enabled or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, TrainingModule)
        losses = [f"{name} {value:.3f}" for name, value in pl_module.validation_losses().items()]
        self.console.print(
            f"step {trainer.global_step}: validation loss  {'  '.join(losses)}", highlight=False, soft_wrap=True
        )
        self._window.clear()
        self._show(trainer, "training", None)

    def _show(self, trainer: L.Trainer, doing: str, status: str | None) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, description=doing)
            if status is not None:
                self._progress.update(self._task, status=status)
        elif status is not None and time.perf_counter() - self._last_plain > self.plain_every_n_seconds:
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
