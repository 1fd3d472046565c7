"""Processes that do a function's work ahead of whoever needs its results, in order.

Process j of N does items j, j + N, ...; results come in the order of the items, whatever N is. The processes hold
nothing that is not a function of the items, so ending them is killing them: no waiting, nothing lost. They end with
whoever started them, also after its kill -9.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

R = TypeVar("R")

# Ctrl-C and SIGTERM (a scheduler's warning) come to every process of a group. What they mean, the run decides: it still
# needs its workers to finish a step and save.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerDied(RuntimeError):
    """A worker process has ended although it is needed."""


class Workers(Iterator[R], Generic[R]):
    """``work(item)`` for every item, in order, by processes that take turns.

    Args:
        work, items: travel pickled (by value where a module cannot be imported there); every process goes through all
            items, so naming one must be cheap, and does its own.
        count: of processes, at least one.
        ahead: results that each keeps ready.

    Raises (from `next`):
        WorkerDied. What `work` raises, with the worker's traceback as a note; nothing comes after it.
    """

    def __init__(self, work: Callable[[Any], R], items: Iterable[Any], count: int, ahead: int) -> None:
        import cloudpickle

        job = cloudpickle.dumps((work, items))
        context = multiprocessing.get_context("spawn")  # a process that has used torch's threads must not be forked
        self._turn, self._results, self._processes = 0, [], []
        self._finalizer = util.Finalize(  # also when this is forgotten, and before the interpreter ends
            self, _end, args=(self._processes, self._results), exitpriority=10
        )
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited, until the worker can ignore them
        try:
            for index in range(count):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(theirs, job, index, count, ahead), daemon=True)
                process.start()
                theirs.close()
                self._results.append(ours)
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def close(self) -> None:
        """End the processes."""
        self._finalizer()

    def __next__(self) -> R:
        if not self._results:
            raise StopIteration
        index = self._turn % len(self._results)
        self._turn += 1
        try:
            kind, result = self._results[index].recv()
        except (EOFError, ConnectionResetError) as error:
            process = self._processes[index]
            process.join(1)
            self.close()
            raise WorkerDied(
                f"worker {index} died with exit code {process.exitcode}, most likely for want of memory"
            ) from error
        except BaseException:  # such as Ctrl-C amid a result, whose rest nobody would read
            self.close()
            raise
        if kind == "result":
            return result
        self.close()
        raise StopIteration if kind == "end" else result


def _end(processes: list[BaseProcess], results: list[Connection]) -> None:
    """Kill them; what they had ready is dropped."""
    for process in processes:
        process.kill()
    for process, result in zip(processes, results, strict=True):
        process.join()
        result.close()
    results.clear()


def _run(results: Connection, job: bytes, index: int, count: int, ahead: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    ready: queue.Queue[bytes] = queue.Queue(ahead)
    threading.Thread(target=_follow_parent, daemon=True).start()
    sender = threading.Thread(target=_send, args=(results, ready), daemon=True)
    sender.start()
    try:
        work, items = pickle.loads(job)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        for item in islice(items, index, None, count):
            ready.put(pickle.dumps(("result", work(item)), protocol=5))
        ready.put(pickle.dumps(("end", None)))
    except Exception as error:
        error.add_note("in a worker process:\n" + traceback.format_exc())
        ready.put(_dumped(error))
    ready.put(b"")
    sender.join()


def _dumped(error: Exception) -> bytes:
    try:
        data = pickle.dumps(("error", error))
        pickle.loads(data)
        return data
    except Exception:  # exceptions with arguments of their own do not come back from a pickle
        return pickle.dumps(("error", RuntimeError("\n".join([repr(error), *error.__notes__]))))


def _send(results: Connection, ready: queue.Queue[bytes]) -> None:
    while data := ready.get():
        results.send_bytes(data)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
