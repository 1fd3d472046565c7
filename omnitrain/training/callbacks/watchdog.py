"""A rank that the others wait for in vain is named, with the place where it is."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from omnitrain.config.run_config import WatchdogConfig
from omnitrain.files import printable
from omnitrain.training.ranks import collectives_begun, distributed, groups_of_ranks, second_store

STATUS = 75
"""With which a run ends here: EX_TEMPFAIL of sysexits.h, the same line may well succeed."""
_PHASES = {
    "_DataFetcher.__next__": "reading a pack",
    "training_step": "the forward pass",
    "backward": "the backward pass",
    "on_after_backward": "the norms of the gradients",
    "optimizer_step": "the optimizer step",
    "validation_step": "a validation",
    "on_validation_epoch_end": "the end of a validation",
    "on_train_batch_end": "the end of the step",
    "save_checkpoint": "saving a checkpoint",
    "_restore_modules_and_callbacks": "loading the checkpoint",
    "restore_training_state": "loading the checkpoint",
    "configure_model": "building the model",
}
"""Functions, of Lightning or as it calls them, and what a run does in them. The innermost one counts."""
_OURS = str(Path(__file__).parents[2])
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_NET = 60.0
"""Seconds after which, if this file's thread cannot run, torch's own bound and a timer of C end the process."""
_PATIENCE = 6
"""Looks, one every few seconds, within which a missing rank has to give a sign, or is said to be silent."""
_MOST = 8  # ranks that a message names


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank last said of itself.

    Attributes:
        beat: its number.
        place: what the rank was doing, and where in the program.
        seconds: so long it had not moved.
        together: whether it stood in a call of torch.distributed.
        counts: collectives begun, by group of ranks.
    """

    beat: int
    place: str
    seconds: float
    together: bool
    counts: dict[str, int]


class Watchdog(Callback):
    """Ends a run of several processes, all of them, in which one has waited `timeout_seconds` for the others in vain.

    A thread of each rank looks every few seconds where its training stands: the step, the innermost function of
    `_PHASES` on the stack, the innermost line that is no library's, and how many collectives each group of ranks has
    begun. It leaves that in the store that the ranks share. Who has begun fewer collectives than another rank of a
    group, and waits in none itself, is missing. A rank that waits says so in one sentence; the missing one prints its
    stacks. All end with status `STATUS`; the last checkpoint stands.

    The bound of torch.distributed itself, and a timer that needs no Python, come `_NET` seconds later: for a rank in
    which this thread cannot run.
    """

    def __init__(self, config: WatchdogConfig | None = None, *, timeout_seconds: float = 600.0) -> None:
        self.timeout = timeout_seconds
        self.every = min(5.0, timeout_seconds / 5)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = 0  # batches

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not distributed():
            return
        for group in groups_of_ranks().values():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout + _NET), group)
        self._ended.clear()
        watch = _Watch(trainer, self, threading.get_ident())
        self._thread = threading.Thread(target=watch.run, args=(self._ended,), daemon=True, name="watchdog")
        self._thread.start()

    @property
    def begun(self) -> int:
        """Batches that this rank has begun."""
        return self._begun

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._begun += 1

    on_validation_batch_start = on_test_batch_start = on_train_batch_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join(self.every)
            self._thread = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


class _Watch:
    """The thread of one rank; `trains` is the thread that it watches."""

    def __init__(self, trainer: L.Trainer, settings: Watchdog, trains: int) -> None:
        self.trainer, self.settings, self.trains = trainer, settings, trains
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.store = dist.PrefixStore("watchdog", second_store())
        self.store.set_timeout(timedelta(seconds=settings.timeout))
        self.beat = 0
        self.seen: Any = None
        self.moved = time.monotonic()

    def run(self, ended: threading.Event) -> None:
        try:
            while not ended.is_set():
                faulthandler.dump_traceback_later(self.settings.timeout + _NET, exit=True)
                mine = self.say()
                if self.store.check(["verdict"]):
                    self.leave(json.loads(self.store.get("verdict")))
                if mine.seconds > self.settings.timeout:
                    self.judge(ended)
                ended.wait(self.settings.every)
        except dist.DistError as error:  # the store is gone, and with it the first rank
            if not ended.wait(self.settings.timeout):
                end(f"error: rank {self.rank} has not heard of rank 0 for {self.settings.timeout:.0f} s ({error})")
        finally:
            faulthandler.cancel_dump_traceback_later()

    def say(self) -> Sign:
        """Leave this rank's sign in the store."""
        frames = list(_frames(self.trains))
        counts = collectives_begun()
        seen = (self.settings.begun, self.trainer.global_step, counts, [(id(f.f_code), f.f_lasti) for f in frames])
        now = time.monotonic()
        if seen != self.seen:
            self.seen, self.moved = seen, now
        self.beat += 1
        sign = Sign(
            beat=self.beat,
            place=f"step {self.trainer.global_step + 1}, {place(frames)}",
            seconds=now - self.moved,
            together=any("/torch/distributed/" in frame.f_code.co_filename for frame in frames),
            counts=counts,
        )
        self.store.set(str(self.rank), json.dumps(asdict(sign)))
        return sign

    def signs(self) -> dict[int, Sign]:
        """Of all ranks that have ever given one."""
        ranks = [str(rank) for rank in range(self.world)]
        if not self.store.check(ranks):
            ranks = [rank for rank in ranks if self.store.check([rank])]
        found = self.store.multi_get(ranks)
        return {int(rank): Sign(**json.loads(sign)) for rank, sign in zip(ranks, found, strict=True)}

    def judge(self, ended: threading.Event) -> None:
        """This rank has not moved for long: end the run, if that is because it waits for another."""
        before = self.signs()
        for _ in range(_PATIENCE):
            if ended.wait(self.settings.every):
                return
            if self.store.check(["verdict"]):
                self.leave(json.loads(self.store.get("verdict")))
            mine, signs = self.say(), self.signs()
            if mine.seconds <= self.settings.timeout:
                return
            missing = missing_ranks({rank: sign.counts for rank, sign in signs.items()}, self.world)
            silent = {rank for rank in missing if rank in before and signs[rank].beat == before[rank].beat}
            if not silent and all(rank in before for rank in missing):
                break
        if self.rank in missing or not (mine.together or missing):
            return
        sentence = verdict(self.rank, mine, missing, {r: s for r, s in signs.items() if r in missing}, silent)
        said = json.dumps({"missing": missing, "by": self.rank, "sentence": sentence})
        self.leave(json.loads(self.store.compare_set("verdict", "", said)))

    def leave(self, verdict: Mapping[str, Any]) -> None:
        """End with all others: those that wait once those that are missing have shown where they are, or cannot."""
        if self.rank in verdict["missing"]:
            print(f"rank {self.rank}, for which the others wait, is here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self.store.add("gone", 1)
        deadline = time.monotonic() + 2 * self.settings.every + 1
        while self.store.add("gone", 0) < self.world and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.rank == 0:  # the others ask the store that lies in this process
            time.sleep(0.5)
        end(verdict["sentence"] if self.rank == verdict["by"] else "")


def missing_ranks(counts: Mapping[int, Mapping[str, int]], world: int) -> list[int]:
    """Ranks that others wait for: that have begun fewer collectives than another rank of a group, and themselves wait
    for nobody; where ranks wait for one another in a circle, all of these. And ranks of which nothing is known.

    Args:
        counts: collectives begun, by rank and group.
    """
    begun: dict[str, list[int]] = {}
    for of_rank in counts.values():
        for group, count in of_rank.items():
            begun.setdefault(group, []).append(count)
    behind = [rank for rank, of in counts.items() if any(count < max(begun[group]) for group, count in of.items())]
    waiting = [rank for rank, of in counts.items() if any(count > min(begun[group]) for group, count in of.items())]
    unknown = [rank for rank in range(world) if rank not in counts]
    return sorted(unknown + ([rank for rank in behind if rank not in waiting] or ([] if unknown else behind)))


def verdict(rank: int, mine: Sign, missing: list[int], signs: Mapping[int, Sign], silent: set[int]) -> str:
    """One sentence: for whom `rank` has waited in vain, and where they are."""
    here = f"rank {rank} has waited for {mine.seconds:.0f} s in {mine.place}"
    again = "all processes end, and the same line with ckpt_path=last goes on from the last checkpoint"
    if not missing:
        return f"error: {here}; no rank is missing, but a message between them does not end; {again}"
    places = []
    for r in missing[:_MOST]:
        if r not in signs:
            places.append(f"rank {r} has not arrived: it has never been heard of")
            continue
        since = "and has not been heard of since" if r in silent else f"{signs[r].seconds:.0f} s there"
        places.append(f"rank {r} has not arrived: it last reported {signs[r].place}, {since}")
    more = f", and {len(missing) - _MOST} more ranks" if len(missing) > _MOST else ""
    return f"error: {'; '.join(places)}{more}; {here}; {again}"


def place(frames: list[FrameType]) -> str:
    """What a thread with these `frames`, the innermost first, is doing, and in which line that is no library's."""
    names = [(frame.f_code.co_qualname, frame.f_code.co_name) for frame in frames]
    doing = next((_PHASES[n] for pair in names for n in pair if n in _PHASES), "between steps")
    for frame in frames:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) or not file.startswith((*_LIBRARIES, "<")):
            where = "/".join(Path(file).parts[-3:])
            return f"{doing} ({where}:{frame.f_lineno} in {frame.f_code.co_name})"
    return doing


def end(sentence: str) -> None:
    """Leave the process from a thread: the one that trains cannot be asked."""
    if sentence:
        print(printable(sentence), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)


def _frames(thread: int) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back
