"""What a run of a study will do, known before it trains: its samples, steps, tokens and operations.

The real order, mixing and packing run over samples that have sizes and hold nothing (docs/nondegradation_matching.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from omnitrain.data.batch import IGNORE, EncodedSample
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.mixture import Mixture
from omnitrain.data.sizes import SizedSource, as_it_is, measure, sized_sources
from omnitrain.data.stream import PackedStream, Stage
from omnitrain.evaluation.progress import progress_bar
from omnitrain.files import write_parquet
from omnitrain.models.omni import OmniModel
from omnitrain.study.spec import StudySpec
from omnitrain.training.flops import BatchSizes, thinker_work, training_flops, training_flops_by_part


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before it is run.

    Attributes:
        stages: what its data stream does.
        samples: drawn by source (those that cannot be used included).
        tokens, flops: trained on up to and with each step.
        flops_by_part: over the whole run.
        batches: ids of the samples of each step; a piece of a document has its borders behind its id.
    """

    stages: tuple[Stage, ...]
    samples: dict[str, int]
    tokens: tuple[int, ...]
    flops: tuple[float, ...]
    flops_by_part: dict[str, float]
    batches: tuple[tuple[str, ...], ...]

    @property
    def steps(self) -> int:
        return len(self.batches)

    def summary(self) -> dict[str, Any]:
        """What ``study_run.json`` says of it."""
        return {
            "steps": self.steps, "tokens": self.tokens[-1], "samples": self.samples, "flops": self.flops[-1],
            "flops_by_part": self.flops_by_part,
        }  # fmt: skip


class Planner:
    """Plans the runs of a study for one seed: that of `data`, which has all sources, budgets and window. `sizes`: of
    all samples, by source. Operations are those of `model`, on any device; what `requires_grad` counts as learning."""

    def __init__(
        self, spec: StudySpec, data: OmniDataModule, sizes: Mapping[str, SizedSource], model: OmniModel
    ) -> None:
        self._spec, self._data, self._model = spec, data, model
        data.work = thinker_work(model)
        self._packing = replace(data.packing, n_bytes=len)
        self._sizes = {name: sizes[name] for name in data.opened("sources")}
        self._mixture = Mixture(self._sizes, as_it_is, seed=data.seed)
        self._cost = cache(partial(training_flops, model))
        self._running: dict[str, list[float]] = {}

    def plan(self, arm: str, match: str, max_steps: int | None = None) -> Plan:
        """The run of `arm`, cut off after `max_steps`."""
        factor = 1.0 if match == "data" else self.compute_factor(arm)
        stages = self._stages(arm, self._counts(arm, factor))
        names = [name for name in self._sizes if name in self._spec.arms[arm].sources]
        stream = PackedStream(
            Mixture({name: self._sizes[name] for name in names}, as_it_is, seed=self._data.seed),
            weights=dict.fromkeys(names, 1),
            packing=self._packing,
            stages=stages,
            max_bad_fraction=self._data.config.max_bad_fraction,
        )
        tokens, flops, batches = [0], [0.0], []
        by_part: dict[str, float] = {}
        drawn = [0] * len(names)
        for batch in stream:
            for part, operations in training_flops_by_part(self._model, BatchSizes.of(batch)).items():
                by_part[part] = by_part.get(part, 0.0) + operations
            tokens.append(tokens[-1] + batch.n_tokens)
            flops.append(sum(by_part.values()))
            batches.append(batch.sample_ids)
            state = batch.stream_state
            assert state is not None
            drawn = [a + b for a, b in zip(state["drawn"], state["before"], strict=True)]
            if len(batches) == max_steps:
                break
        return Plan(
            stages=stages, samples=dict(zip(names, drawn, strict=True)), tokens=tuple(tokens[1:]),
            flops=tuple(flops[1:]), flops_by_part=by_part, batches=tuple(batches),
        )  # fmt: skip

    def compute_factor(self, arm: str) -> float:
        """By which all epochs of `arm` are multiplied so that its operations come nearest to those of the reference arm
        under ``match=data``."""
        goal = self._flops(self._spec.compute_reference, 1.0)
        low, high = 0.0, 1.0
        while self._flops(arm, high) < goal:
            low, high = high, 2 * high
        if self._flops(arm, high) == goal:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._flops(arm, middle) < goal else (low, middle)
        return min((low, high), key=lambda factor: abs(self._flops(arm, factor) - goal))

    def _counts(self, arm: str, factor: float) -> dict[str, int]:
        """Samples drawn by source."""
        epochs = self._spec.epochs
        return {
            name: round(factor * epochs[name] * len(source))
            for name, source in self._sizes.items()
            if name in self._spec.arms[arm].sources
        }

    def _stages(self, arm: str, counts: Mapping[str, int]) -> tuple[Stage, ...]:
        of = self._spec.arms[arm]
        if not of.first:
            return (Stage(samples=dict(counts)),)
        kept = {name: round(of.kept * n) if name in of.first else n for name, n in counts.items()}
        return (Stage(samples={name: counts[name] - kept[name] for name in of.first}), Stage(samples=kept))

    def _flops(self, arm: str, factor: float) -> float:
        """Operations of a run: they add up over samples, whatever pack each of them comes to."""
        return sum(self._up_to(name, n) for name, n in self._counts(arm, factor).items())

    def _up_to(self, name: str, count: int) -> float:
        """Operations of the first `count` samples of a source's endless order."""
        running = self._running.setdefault(name, [0.0])
        number = self._mixture.names.index(name)
        while len(running) <= count:
            sample = self._mixture.fetch(number, len(running) - 1).sample
            packed = () if sample is None else self._packed_sizes(sample)
            running.append(running[-1] + sum(map(self._cost, packed)))
        return running[count]

    def _packed_sizes(self, sample: EncodedSample) -> Iterable[BatchSizes]:
        """Of `sample` as the stream packs it: whole, in pieces, or not at all."""
        for _, _, part in self._packing.parts(sample):
            yield BatchSizes(
                lengths=(len(part),),
                targets=int((part.labels != IGNORE).sum()),
                mel_lengths=tuple(len(mel) for mel in part.mel),
                grid_thw=tuple(map(tuple, part.grid_thw.tolist())),
            )


def sample_sizes(data: OmniDataModule, path: Path) -> dict[str, SizedSource]:
    """The sizes of all samples of `data`, from the Parquet file `path`, or measured and written there."""
    if not path.exists():
        sources = data.opened("sources")
        total = sum(map(len, sources.values()))
        with progress_bar(True, f"measuring {total} samples, once for this study") as bar:
            task = bar.add_task("measuring samples", total=total)
            table = measure(sources, data.encoder, on_sample=lambda: bar.advance(task))
        write_parquet(path, table)
    return sized_sources(pq.read_table(path))
