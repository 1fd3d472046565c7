"""What a run was made with and what data it saw."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from omnitrain.config.run_config import RunRecordConfig
from omnitrain.data.composition import composition
from omnitrain.data.stream import add_counts
from omnitrain.files import write_json
from omnitrain.training.module import TrainingModule
from omnitrain.training.ranks import gather_objects


class RunRecord(Callback):
    """Writes `environment.json` (versions, machine) at the start, and `data.json` (mixture as planned and as seen,
    skipped samples by reason) whenever a checkpoint is written and at the end."""

    PACKAGES = ("omnitrain", "torch", "torchvision", "torchaudio", "lightning", "datasets", "grain", "av", "tokenizers")

    def __init__(self, config: RunRecordConfig | None = None, *, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._composition: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_json(self.run_dir / "environment.json", environment(trainer))

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
            seen = add_counts(seen, rank)
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
            write_json(self.run_dir / "data.json", record)


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
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
