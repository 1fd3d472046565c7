"""How fast a run is, and how much of the machine it uses."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from omnitrain.config.run_config import ThroughputConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.training.callbacks.checkpoint import step_ended
from omnitrain.training.flops import peak_flops
from omnitrain.training.logging import TIME_PREFIX
from omnitrain.training.module import TrainingModule
from omnitrain.training.own_time import waiting
from omnitrain.training.ranks import gather_objects
from omnitrain.vocabulary import TEXT


@dataclass
class _Rank:
    """What one rank has done since the last row, of which the ranks tell one another.

    Attributes:
        busy, waited: seconds in steps, and for the next batch.
        memory, memory_cuda: the most that was taken so far, GB.
        own: seconds that it computed itself in each forward pass, by part of the model (`OwnTime`).
        counted: operations of each pass, likewise.
    """

    busy: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    text: int = 0
    samples: int = 0
    memory: float = 0.0
    memory_cuda: float = 0.0
    own: list[dict[str, float]] = field(default_factory=list)
    counted: list[dict[str, float]] = field(default_factory=list)


class Throughput(Callback):
    """Speed of training over the steps since the last row, under ``time/`` (file `throughput.csv`), of all ranks
    together: tokens (of them text) and samples per second, seconds per step, operations per second and device, MFU, the
    longest share of the time that a rank waited for data, the largest memory.

    With several ranks, also the share of the computing time that they wait for the slowest of them: `waiting`, and
    `waiting/RANK` of each (of at most `PER_RANK` ranks), by the clock of their forward passes (`OwnTime`; a backward
    pass is taken to be as much longer on each); and `waiting_counted`, what it would be by the operations of their
    packs, were all devices equally fast. All begin each pass together, and on a mesh each part of the model. They tell
    one another once a row.

    Time spent in validation, checkpoints and logging is left out; the first step (warm-up) too.
    """

    PER_RANK = 64

    def __init__(self, config: ThroughputConfig | None = None) -> None:
        peak = (config or ThroughputConfig()).peak_tflops
        self.peak = None if peak is None else (peak * 1e12, "configured")
        """Operations per second of one device, and where the figure is from."""
        self._batch_start = self._validation_end = 0.0
        self._counted_any = False
        self._mine, self._steps = _Rank(), 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self.peak is None:
            self.peak = peak_flops(pl_module.device)
        self._mine, self._steps = _Rank(), 0
        self._counted_any = False
        if pl_module.mesh is not None:
            pl_module.own_time.watch(pl_module.get_submodule("model"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.own_time.forget()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_end = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._batch_start = time.perf_counter()
        if self._counted_any:
            self._mine.waited += self._batch_start - max(pl_module.batch_end_time, self._validation_end)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not self._counted_any:
            self._counted_any = True
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        mine = self._mine
        mine.busy += time.perf_counter() - self._batch_start
        mine.own.append(pl_module.own_time.seconds())
        mine.counted.append(pl_module.batch_flops(batch))
        if pl_module.counts_pack:
            mine.tokens += batch.n_tokens
            mine.text += _text(batch)
            mine.samples += len(batch)
        if not step_ended(trainer):
            return
        self._steps += 1
        if pl_module.row_is_due(trainer.global_step):
            mine.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            if pl_module.device.type == "cuda":
                mine.memory_cuda = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            row = self._row(gather_objects(mine), pl_module)
            pl_module.log_row({f"{TIME_PREFIX}{name}": value for name, value in row.items()}, trainer.global_step)
            self._mine, self._steps = _Rank(), 0

    def _row(self, ranks: list[_Rank], pl_module: TrainingModule) -> dict[str, float]:
        assert self.peak is not None
        seconds = self._mine.busy + self._mine.waited
        row = {
            "tokens_per_second": sum(rank.tokens for rank in ranks) / seconds,
            "samples_per_second": sum(rank.samples for rank in ranks) / seconds,
            "seconds_per_step": seconds / self._steps,
            "data_wait": max(rank.waited / (rank.busy + rank.waited) for rank in ranks),
            "memory_gb": max(rank.memory for rank in ranks),
        }
        if text := sum(rank.text for rank in ranks):
            row["text_tokens_per_second"] = text / seconds
        if largest := max(rank.memory_cuda for rank in ranks):
            row["memory_cuda_gb"] = largest
        # Those that share a pack have all counted its operations.
        packs = pl_module.data_ranks / len(ranks)
        counted = [rank.counted for rank in ranks]
        if flops := sum(sum(each.values()) for passes in counted for each in passes) * packs / len(ranks):
            row |= {"tflops": flops / seconds / 1e12, "mfu": flops / seconds / self.peak[0]}
        if len(ranks) > 1 and any(self._mine.own):
            by_part = pl_module.mesh is not None
            shares = waiting([rank.own for rank in ranks], by_part=by_part)
            row["waiting"] = sum(shares) / len(shares)
            if len(ranks) <= self.PER_RANK:
                row |= {f"waiting/{number}": share for number, share in enumerate(shares)}
            if flops:
                shares = waiting(counted, by_part=by_part)
                row["waiting_counted"] = sum(shares) / len(shares)
        return row


def _text(batch: Any) -> int:
    """Positions of a batch that are text."""
    return int((batch.token_types == TEXT).sum()) if isinstance(batch, PackedBatch) else 0
