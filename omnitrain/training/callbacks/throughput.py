"""How fast a run is, and how much of the machine it uses."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from omnitrain.config.run_config import ThroughputConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.training.callbacks.checkpoint import step_ended
from omnitrain.training.flops import peak_flops
from omnitrain.training.module import TrainingModule
from omnitrain.training.ranks import sum_over_ranks


class Throughput(Callback):
    """Speed of training over the steps since the last row, under ``time/`` (file `throughput.csv`): tokens and samples
    per second, seconds per step, MFU, share of the time spent waiting for data, peak memory.

    Time spent in validation, checkpoints and logging is left out; the first step (warm-up) too.
    """

    def __init__(self, config: ThroughputConfig | None = None) -> None:
        peak = (config or ThroughputConfig()).peak_tflops
        self.peak = None if peak is None else (peak * 1e12, "configured")
        """Operations per second of one device, and where the figure is from."""
        self._clear()
        self._batch_start = self._validation_end = 0.0
        self._counted_any = False

    def _clear(self) -> None:
        self._busy = self._waited = self._flops = 0.0
        self._tokens = self._samples = self._steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.peak is None:
            self.peak = peak_flops(pl_module.device)
        self._clear()
        self._counted_any = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_end = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
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
        if pl_module.counts_pack:
            self._tokens += batch.n_tokens
            self._samples += len(batch)
            self._flops += pl_module.batch_flops(batch)
        if not step_ended(trainer):
            return
        self._steps += 1
        if pl_module.row_is_due(trainer.global_step):
            assert self.peak is not None
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
                row["time/mfu"] = flops / seconds / trainer.world_size / self.peak[0]
            if pl_module.device.type == "cuda":
                row["time/memory_cuda_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            pl_module.log_row(row, trainer.global_step)
            self._clear()
