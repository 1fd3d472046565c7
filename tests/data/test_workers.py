"""Worker processes: results in order, errors as they were, and none that outlives its use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from omnitrain.data.workers import WorkerDied, Workers

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # worker processes cannot import test modules


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def large(number: int) -> bytes:
    return bytes(4 << 20)  # far more than a pipe holds


class Endless:
    def __iter__(self) -> Iterator[int]:
        return iter(range(10**9))


def alive() -> int:
    return len(multiprocessing.active_children())


def test_results_come_in_order_and_end() -> None:
    workers = Workers(square, range(7), count=2, ahead=3)
    results = list(workers)
    assert [result for result, _ in results] == [n * n for n in range(7)]
    assert len({pid for _, pid in results}) == 2
    assert alive() == 0
    assert next(workers, None) is None


@pytest.mark.parametrize("count", [1, 2])
def test_closing_takes_no_time(count: int) -> None:
    """Grain's workers took 25 s each, since they waited for their results to be read. Samples wait in full pipes."""
    workers = Workers(large, Endless(), count, ahead=8)
    for _ in range(3 * count):
        next(workers)
    start = time.monotonic()
    workers.close()
    assert time.monotonic() - start < 5
    assert alive() == 0
    assert next(workers, None) is None


def test_errors_come_with_their_place() -> None:
    def divide(number: int) -> float:
        return 1 / number

    workers = Workers(divide, [2, 1, 0, 4], count=2, ahead=2)
    assert [next(workers), next(workers)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError) as error:
        next(workers)
    assert any("in a worker process" in note and "divide" in note for note in error.value.__notes__)
    assert alive() == 0


def test_errors_that_cannot_travel_are_told() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd one")

    def fail(number: int) -> None:
        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="odd one"):
        next(Workers(fail, [0], count=1, ahead=1))


def test_a_dead_worker_is_said_at_once() -> None:
    def die(number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number

    workers = Workers(die, range(10), count=1, ahead=1)
    with pytest.raises(WorkerDied, match="exit code -9"):
        next(workers)
    assert alive() == 0


SCRIPT = """
import os, sys, time
from omnitrain.data.workers import Workers

def large(number):
    return bytes(4 << 20)

if __name__ == "__main__":
    workers = Workers(large, range(10**6), 2, 8)
    next(workers), next(workers)
    print(*(process.pid for process in workers._processes), flush=True)
    if sys.argv[1] == "raise":
        raise ValueError("on purpose")
    time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"  # dead; whoever collects orphans has not come yet


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "raise"])
def test_no_worker_outlives_its_run(tmp_path: Path, end: str) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    run = subprocess.Popen([sys.executable, script, end], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout is not None
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2
    start = time.monotonic()
    if end != "raise":
        run.send_signal(getattr(signal, end))
    run.wait(60)
    while not all(map(gone, pids)):
        assert time.monotonic() - start < 5
        time.sleep(0.05)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_of_the_group_leave_workers_at_work(tmp_path: Path) -> None:
    """A scheduler warns every process: the run still needs data to finish its step, also while workers start."""
    workers = Workers(square, Endless(), count=1, ahead=1)
    [process] = workers._processes
    for _ in range(3):
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        assert next(workers)[1] == process.pid
    workers.close()
