"""The stream of packed batches and its state.

The state is integers: how many samples were drawn from each source, which places of the shuffled order wait in open
packs, and counters. Restoring fetches the waiting samples again and counts on; no sample's content is ever saved.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omnitrain.data.batch import EncodedSample, PackedBatch
from omnitrain.data.mixture import Draw, Mixture, Schedule
from omnitrain.data.packing import Item, Packing, cut
from omnitrain.data.settings import Stage
from omnitrain.data.work import Seen
from omnitrain.files import append_line, atomic, printable

STATE_VERSION = 1
TOO_LONG = "too_long"
MIN_SAMPLES_TO_STOP = 100
"""The share of bad samples can stop a run once so many were drawn: one bad row among the first ten says little."""
MAX_WITHOUT_BATCH = 1000
"""So many draws in a row of which none could be used end the run."""


class TooManyBadSamples(RuntimeError):
    """More samples cannot be read than the run tolerates."""


@dataclass
class Tally:
    """Samples and tokens handed out, by group."""

    samples: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, group: str, samples: int, tokens: int) -> None:
        self.samples[group] = self.samples.get(group, 0) + samples
        self.tokens[group] = self.tokens.get(group, 0) + tokens


class BadSampleLog:
    """One JSON object a line for every skipped sample: source, shard, row, id, reason, detail. No `path`: no log."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None

    def keep(self, lines: int) -> None:
        """Drop what was written after the state that a run resumes from, and a line that a kill left half-written."""
        if self.path is None or not self.path.is_file():
            return
        kept = self.path.read_bytes().splitlines(keepends=True)[:lines]
        with atomic(self.path) as partial:
            partial.write_bytes(b"".join(kept))

    def write(self, record: Mapping[str, Any]) -> None:
        if self.path is not None:
            append_line(self.path, json.dumps(record, ensure_ascii=False))


class Skipped:
    """Samples that could not be used: counted by reason, written to a log, and an error when they are too many.

    Args:
        most: share of the samples read that may be bad. Samples that are too long count as skipped but not as bad.
    """

    def __init__(self, most: float, log: BadSampleLog | None = None) -> None:
        self._most, self._log = most, log or BadSampleLog(None)
        self.counts: dict[str, int] = {}

    def keep_log(self) -> None:
        """Drop from the log what is not among the counts."""
        self._log.keep(sum(self.counts.values()))

    def add(self, record: Mapping[str, Any]) -> None:
        """One more: `reason`, and for the log where it lies."""
        self.counts[record["reason"]] = self.counts.get(record["reason"], 0) + 1
        self._log.write(record)

    def check(self, read: int) -> None:
        """Raise TooManyBadSamples when too many of `read` samples are bad, once enough were read."""
        bad = sum(count for reason, count in self.counts.items() if reason != TOO_LONG)
        if read < MIN_SAMPLES_TO_STOP or bad <= self._most * read:
            return
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.counts.items(), key=lambda x: -x[1]))
        raise TooManyBadSamples(
            f"{bad} of {read} samples are bad ({bad / read:.1%}, data.max_bad_fraction allows {self._most:.1%}); "
            f"{reasons}. "
            + (f"Each is named in {printable(self._log.path)}. " if self._log.path else "")
            + "Mend or remove them (`omnitrain data verify` lists them), or raise data.max_bad_fraction"
        )


class RoundRobin(Iterator[PackedBatch]):
    """The streams of one process in turn: next comes that which has given fewest packs. Where the processes of a run
    become fewer, each takes over streams of those that are gone, and a step has the packs that it would have had."""

    def __init__(self, streams: Sequence[PackedStream]) -> None:
        self.streams = list(streams)

    def __next__(self) -> PackedBatch:
        return next(min(self.streams, key=lambda stream: stream.batches))

    def close(self) -> None:
        """End the worker processes of all."""
        for stream in self.streams:
            stream.close()


class PackedStream(Iterator[PackedBatch]):
    """Packed batches of one rank, without end unless the last stage has one; each carries the state after it.

    Args:
        weights: by source name, for stages without weights of their own.
        packing: its budget is for stages without budgets of their own.
        stages: see `check_stages`.
        max_bad_fraction, log: see `Skipped`.
        num_workers, ahead: processes that decode and encode, and how many samples each keeps ready.
        state: continue after this state (of a batch of an equal stream).

    Raises (from `next`):
        TooManyBadSamples. RuntimeError: nothing of `MAX_WITHOUT_BATCH` draws in a row could be used.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        weights: Mapping[str, float],
        packing: Packing,
        stages: Sequence[Stage] = (),
        max_bad_fraction: float = 0.01,
        num_workers: int = 0,
        ahead: int = 4,
        log: BadSampleLog | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._mixture = mixture
        self._stages = check_stages(stages, mixture.names)
        if mixture.world_size > 1 and any(stage.samples is not None for stage in self._stages):
            raise ValueError(
                f"data stages with `samples` need one process, not {mixture.world_size}: ranks would end after "
                "different numbers of batches. Use until_tokens, or trainer.devices=1"
            )
        self._weights, self._own_budget = dict(weights), packing.budget
        self._num_workers, self._ahead = num_workers, ahead
        self._skipped = Skipped(max_bad_fraction, log)
        self._draws: Any = None
        self._unused = 0  # draws in a row that gave nothing
        self._pending: list[Item] = []
        self._stage, self._drawn, self._before = 0, [0] * len(mixture.names), [0] * len(mixture.names)
        self._read, self._batches, self._tokens, self._filling = 0, 0, 0, 0.0
        self._seen = {"source": Tally(), "modality": Tally(), "languages": Tally()}
        self._brought = [Seen() for _ in mixture.names]
        self._open_packer(packing)
        if state is not None:
            self._restore(state)
        self._skipped.keep_log()

    def __next__(self) -> PackedBatch:
        while True:
            while self._pending:
                closed = self._packer.add(self._pending.pop(0))
                if closed:
                    return self._emit(closed)
            if self._drawn_out():
                if closed := self._packer.close_fullest():
                    return self._emit(closed)
                if self._stage + 1 == len(self._stages):
                    self.close()
                    raise StopIteration
                self._enter(self._stage + 1)
                continue
            if self._draws is None:
                done = self._drawn, self._before
                self._draws = self._mixture.draws(self._stage_weights(), *done, self._num_workers, self._ahead)
            self._take(next(self._draws))

    @property
    def batches(self) -> int:
        """How many it has given."""
        return self._batches

    def close(self) -> None:
        """End the worker processes. The stream may be continued; it starts them again."""
        if self._draws is not None:
            self._draws.close()
            self._draws = None

    def _take(self, draw: Draw) -> None:
        self._drawn[draw.pick.source] += 1
        self._read += 1
        if draw.sample is None:
            self._skipped.add(draw.bad)
            self._skipped.check(self._read)
        else:
            self._admit(draw.pick.source, draw.pick.position, draw.sample)
            self._learn(draw.pick.source)
        self._unused = 0 if self._pending else self._unused + 1
        if self._unused >= MAX_WITHOUT_BATCH:
            raise RuntimeError(
                f"none of the last {self._unused} samples could be used; skipped so far: {self._skipped.counts}. Raise "
                "the budgets (max_tokens, max_mel_frames, max_patches), or see the log of bad samples"
            )

    def _admit(self, source: int, position: int, whole: EncodedSample, start: int = 0, end: int | None = None) -> None:
        """Queue tokens start..end of a sample for packing, in pieces if it is a document too long for a pack."""
        parts = self._packing.parts(whole, start, end)
        self._pending += [Item(source, position, a, b, part) for a, b, part in parts]
        if not parts:
            bad = {"reason": TOO_LONG, "detail": self._packing.budget.excess(whole.sizes)}
            self._skipped.add(self._mixture.row(source, position, whole.id) | bad)

    def _learn(self, source: int) -> None:
        """What the sample brings that was queued, and so how much work a pack may hold from now on."""
        if (balance := self._packing.balance) is None or not self._pending:
            return
        seen = self._brought[source]
        seen.samples += 1
        for item in self._pending:
            seen.sizes = list(map(operator.add, seen.sizes, item.sample.sizes))
            seen.work = list(map(operator.add, seen.work, balance.work.of(item.sample)))
        self._bound()

    def _bound(self) -> None:
        if (balance := self._packing.balance) is not None:
            self._packer.bounds = balance.bounds(self._brought, self._stage_weights(), self._packing.budget)

    def _emit(self, items: list[Item]) -> PackedBatch:
        batch = PackedBatch.pack([item.sample for item in items])
        for item in items:
            sample, languages = item.sample, ">".join(item.sample.languages) or "und"
            groups = {"source": self._mixture.names[item.source], "modality": sample.modality, "languages": languages}
            for kind, group in groups.items():
                self._seen[kind].add(group, int(item.start == 0), len(sample))  # a document's pieces: one sample
        self._batches += 1
        self._tokens += batch.n_tokens
        sizes = zip(*(item.sample.sizes for item in items), strict=True)
        self._filling += self._packing.budget.filling(map(sum, sizes))
        until = self._stages[self._stage].until_tokens
        # (A stage with `samples` is left once all its packs are out, when the next batch is asked for.)
        while until is not None and self._tokens * self._mixture.world_size >= until:
            self._enter(self._stage + 1)
            until = self._stages[self._stage].until_tokens
        return replace(batch, stream_state=self.state_dict(), skipped=dict(self._skipped.counts))

    def _stage_weights(self) -> list[float]:
        weights = _weights(self._stages[self._stage], self._weights)
        return [weights.get(name, 0) for name in self._mixture.names]

    def _drawn_out(self) -> bool:
        """Whether all samples that a stage with `samples` asks for are drawn. In weights n_i of sum n, the schedule has
        given source i within less than one of n_i after n draws, hence exactly n_i."""
        samples = self._stages[self._stage].samples
        return samples is not None and sum(self._drawn) >= sum(samples.values())

    def _open_packer(self, packing: Packing) -> None:
        """Pack as `packing` says, within the budget of the current stage."""
        stage = self._stages[self._stage]
        own = {"tokens": stage.max_tokens, "mel_frames": stage.max_mel_frames, "patches": stage.max_patches}
        budget = replace(self._own_budget, **{name: most for name, most in own.items() if most})
        self._packing = replace(packing, budget=budget)
        self._packer = self._packing.packer()
        self._bound()

    def _enter(self, stage: int) -> None:
        """Change mixture and budgets. Samples that wait in open packs are packed anew, first; what worker processes
        have fetched ahead under the old weights is dropped and drawn again when its turn comes."""
        self.close()
        self._stage = stage
        self._before = [a + b for a, b in zip(self._before, self._drawn, strict=True)]
        self._drawn = [0] * len(self._drawn)
        waiting = [*(item for pack in self._packer.waiting() for item in pack), *self._pending]
        self._open_packer(self._packing)
        self._pending = []
        for item in waiting:
            if self._packing.budget.excess(item.sample.sizes):
                whole = self._whole(item.source, item.position)
                self._admit(item.source, item.position, whole, item.start, item.end)
            else:
                self._pending.append(item)

    def state_dict(self) -> dict[str, Any]:
        """Plain integers, strings, lists and dicts, independent of the number of workers."""
        state = {
            "version": STATE_VERSION,
            "rank": self._mixture.rank,
            "stage": self._stage,
            "drawn": self._drawn,
            "before": self._before,
            "waiting": [[item.key() for item in pack] for pack in self._packer.waiting()],
            "pending": [item.key() for item in self._pending],
            "read": self._read,
            "batches": self._batches,
            "tokens": self._tokens,
            "filling": self._filling,
            "skipped": self._skipped.counts,
            "seen": {kind: vars(tally) for kind, tally in self._seen.items()},
        }
        if self._packing.balance is not None:
            state["brought"] = [vars(seen) for seen in self._brought]
        return deepcopy(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["version"] != STATE_VERSION:
            raise ValueError(f"stream state has version {state['version']}, this omnitrain reads {STATE_VERSION}")
        if state["rank"] != self._mixture.rank:
            raise ValueError(f"stream state of rank {state['rank']} given to rank {self._mixture.rank}")
        state = deepcopy(dict(state))
        self._stage, self._drawn, self._before = state["stage"], state["drawn"], state["before"]
        self._read, self._batches, self._tokens = state["read"], state["batches"], state["tokens"]
        self._filling, self._skipped.counts = state["filling"], state["skipped"]
        self._seen = {kind: Tally(**tally) for kind, tally in state["seen"].items()}
        self._brought = [Seen(**seen) for seen in state.get("brought", [{} for _ in self._mixture.names])]
        fetched: dict[tuple[int, int], EncodedSample] = {}

        def item(source: int, position: int, start: int, end: int) -> Item:
            if (source, position) not in fetched:
                fetched[source, position] = self._whole(source, position)
            return Item(source, position, start, end, cut(fetched[source, position], start, end, self._packing.n_bytes))

        self._open_packer(self._packing)
        self._packer.restore([[item(*key) for key in pack] for pack in state["waiting"]])
        self._pending = [item(*key) for key in state["pending"]]

    def _whole(self, source: int, position: int) -> EncodedSample:
        draw = self._mixture.fetch(source, position)
        if draw.sample is None:
            raise RuntimeError(
                f"a sample that could be read before the stop no longer can: {draw.bad}; were the shards changed?"
            )
        return draw.sample


def add_counts(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Nested counts summed by key."""
    return {
        key: add_counts(a.get(key, {}), b.get(key, {}))
        if isinstance(a.get(key, b.get(key)), Mapping)
        else a.get(key, 0) + b.get(key, 0)
        for key in [*a, *(k for k in b if k not in a)]
    }


def planned_mixture(stages: Sequence[Stage], weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """Per stage: `until_tokens`, `samples` where the stage counts them, and each source's share of the samples drawn.
    `weights` are by source name, for stages without weights of their own."""
    plan = []
    for stage in check_stages(stages, list(weights)):
        shares = Schedule([_weights(stage, weights).get(name, 0) for name in weights]).shares
        counted = {} if stage.samples is None else {"samples": dict(stage.samples)}
        plan.append({"until_tokens": stage.until_tokens, **counted, "shares": dict(zip(weights, shares, strict=True))})
    return plan


def _weights(stage: Stage, own: Mapping[str, float]) -> Mapping[str, float]:
    """The weights of `stage`: its counts, its weights, or the sources' `own`."""
    return stage.samples or stage.weights or own


def check_stages(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """`stages`, or one endless stage if there is none. Raises ValueError: ends that do not rise, an end in tokens on
    the last stage or none on another, weights or samples for unknown sources, a stage with `samples` and `weights` or
    `until_tokens`, or without a sample."""
    stages = list(stages) or [Stage()]
    ends = [stage.until_tokens for stage in stages if stage.samples is None]
    if stages[-1].until_tokens is not None:
        raise ValueError(f"the last data stage has until_tokens {ends[-1]}; leave it out: max_steps ends a run")
    given = [end for end in ends if end is not None]
    endless = [number for number, stage in enumerate(stages[:-1]) if stage.samples is None is stage.until_tokens]
    if endless or sorted(set(given)) != given:
        raise ValueError(
            f"until_tokens of the data stages must be given and rise, except the last (or `samples` be given); "
            f"they are {ends}"
        )
    for number, stage in enumerate(stages):
        for field_name, by_source in (("weights", stage.weights), ("samples", stage.samples)):
            if unknown := sorted(set(by_source or ()) - set(names)):
                raise ValueError(f"data stage {number} has {field_name} for {unknown}; the sources are {list(names)}")
        if stage.samples is None:
            continue
        if stage.weights is not None or stage.until_tokens is not None:
            raise ValueError(f"data stage {number} has samples, so leave out its weights and until_tokens")
        counts = list(stage.samples.values())
        if min(counts, default=0) < 0 or sum(counts) < 1 or any(int(n) != n for n in counts):
            raise ValueError(f"samples of data stage {number} must be whole, not negative, and at least one; {counts}")
    return stages


class FinitePacks(Iterable[PackedBatch]):
    """All samples of some sources once, in order, packed in order: the same packs at every pass (validation). Rank r of
    R takes samples r, r + R, .... Arguments and errors as of `PackedStream`."""

    def __init__(self, mixture: Mixture, *, packing: Packing, max_bad_fraction: float = 0.01) -> None:
        self._mixture, self._packing, self._max_bad_fraction = mixture, packing, max_bad_fraction

    def __iter__(self) -> Iterator[PackedBatch]:
        packer, skipped = self._packing.packer(), Skipped(self._max_bad_fraction)
        read = packs = 0

        def pack(items: list[Item]) -> PackedBatch:
            nonlocal packs
            packs += 1
            return PackedBatch.pack([item.sample for item in items], skipped=dict(skipped.counts))

        for draw in self._mixture.once():
            read += 1
            if draw.sample is None:
                skipped.add(draw.bad)
                skipped.check(read)
                continue
            parts = self._packing.parts(draw.sample)
            if not parts:
                skipped.add({"reason": TOO_LONG})
            for start, end, part in parts:
                if closed := packer.add(Item(draw.pick.source, draw.pick.index, start, end, part)):
                    yield pack(closed)
        while closed := packer.close_fullest():
            yield pack(closed)
        if not packs and read:
            names = self._mixture.names
            raise TooManyBadSamples(f"none of the {read} samples of {names} can be used: {skipped.counts}")
