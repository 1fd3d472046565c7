"""One process owns a run folder: whatever dies, whatever the clocks say, and whoever comes at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from omnitrain.__main__ import main
from omnitrain.files import LOCK
from omnitrain.runs import lock
from omnitrain.runs.lock import FolderInUse, Owner, hold

FORK = multiprocessing.get_context("fork")


def start(function: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hold_long(folder: Path) -> None:
    with hold(folder):
        time.sleep(60)


def leave(folder: Path, **changed: object) -> Owner:
    """A lock as another process would have left it."""
    owner = replace(Owner.this_process(), pid=4_194_304_000, token="left-over", **changed)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    return owner


def silent_for(folder: Path, seconds: float) -> None:
    past = time.time() - seconds
    os.utime(folder / LOCK, (past, past))


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs, with blanks = and ü"
    first = start(hold_long, folder)
    wait_for((folder / LOCK).exists)
    with pytest.raises(FolderInUse) as refused, hold(folder):
        pass
    [line] = str(refused.value).splitlines()
    for part in (
        str(folder),
        f"process {first.pid} on {os.uname().nodename}",
        "since 20",
        f"kill {first.pid}",
        "another",
    ):
        assert part in line
    assert json.loads((folder / LOCK).read_text())["pid"] == first.pid
    first.kill()
    first.join()
    with hold(folder), hold(folder):  # free at once; and what we hold we may hold again
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_fit_does_not_mix_two_runs(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(hold_long, tmp_path / "run")
    wait_for((tmp_path / "run" / LOCK).exists)
    assert main(["fit", *toy, f"paths.run_dir={tmp_path / 'run'}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'run'} is in use by process {first.pid}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    first.kill()
    first.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_let_go_on_signals(tmp_path: Path, number: int) -> None:
    process = start(hold_long, tmp_path)
    wait_for((tmp_path / LOCK).exists)
    time.sleep(0.1)  # the handler stands
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (143 if number == signal.SIGTERM else 1)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_let_go_on_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the run"), hold(tmp_path):
        raise RuntimeError("of the run")
    assert list(tmp_path.iterdir()) == []


def test_a_zombie_and_a_reused_process_id_hold_nothing(tmp_path: Path) -> None:
    process = start(hold_long, tmp_path)
    wait_for((tmp_path / LOCK).exists)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    with hold(tmp_path):
        pass
    process.join()
    mine = Owner.this_process()
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(mine, started=mine.started - 1, token="old"))))
    with hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("elsewhere", [{"machine": "another"}, {"machine": "another", "host": "node7"}])
def test_a_lock_of_another_machine_is_left_over_when_nobody_touches_it(tmp_path: Path, elsewhere: dict) -> None:
    leave(tmp_path, **elsewhere)
    silent_for(tmp_path, lock.STALE_AFTER - 20)
    with pytest.raises(FolderInUse, match="end it there"), hold(tmp_path):
        pass
    silent_for(tmp_path, lock.STALE_AFTER + 1)
    with hold(tmp_path):
        pass


def test_clocks_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the file system's clock counts: this machine's may be a day off."""
    leave(tmp_path, machine="another")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1e10)
        with pytest.raises(FolderInUse), hold(tmp_path):
            pass


@pytest.mark.parametrize(
    ("launcher", "job", "restart"),
    [
        ("slurm", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        ("torchrun", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    ],
)
def test_a_job_that_is_started_again_goes_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, job: str, restart: str
) -> None:
    """On another node, although the first start died without letting go; another job has to wait."""
    leave(tmp_path, machine="node1", job=f"{launcher} 77")
    monkeypatch.setenv(job, "78")
    monkeypatch.setenv(restart, "1")
    with pytest.raises(FolderInUse, match=f"{launcher} 77"), hold(tmp_path):
        pass
    monkeypatch.setenv(job, "77")
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("rank", [{"RANK": "1"}, {"SLURM_PROCID": "3"}, {"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}])
def test_only_the_first_rank_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: dict[str, str]) -> None:
    first = start(hold_long, tmp_path)
    wait_for((tmp_path / LOCK).exists)
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with hold(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == first.pid
    first.kill()
    first.join()


def test_the_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    with hold(tmp_path):
        silent_for(tmp_path, 1000)
        wait_for(lambda: time.time() - (tmp_path / LOCK).stat().st_mtime < 100)
        (tmp_path / LOCK).unlink()  # by hand: it comes back
        wait_for((tmp_path / LOCK).exists)
    time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def hold_until_taken(folder: Path) -> None:
    lock.HEARTBEAT = 0.02
    hold_long(folder)


def test_who_has_lost_the_folder_writes_nothing_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stopped for long (a laptop that slept), it wakes up beside the process that took its place."""
    process = start(hold_until_taken, tmp_path)
    wait_for((tmp_path / LOCK).exists)
    new = tmp_path / "new"
    new.write_text(json.dumps(asdict(Owner.this_process())))
    os.replace(new, tmp_path / LOCK)
    process.join(20)
    assert process.exitcode == 1
    assert "another process has taken this folder" in capfd.readouterr().err
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


RACERS = 12


def race(folder: Path, won: Path, at: float) -> None:
    time.sleep(max(0, at - time.monotonic()))
    try:
        with hold(folder):
            (won / str(os.getpid())).touch()
            wait_for(lambda: len(list(won.parent.glob("lost.*"))) == RACERS - 1)
    except FolderInUse:
        (won.parent / f"lost.{os.getpid()}").touch()


@pytest.mark.parametrize("state", ["free", "left over", "left over twice", "garbage"])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, links: bool) -> None:
    folder, won = tmp_path / "run", tmp_path / "won"
    folder.mkdir()
    won.mkdir()
    if state != "free":
        owner = leave(folder)
    if state == "left over twice":  # one has begun to replace it, and was killed
        (folder / f"{LOCK}.after-{owner.token}").write_text(json.dumps(asdict(replace(owner, token="second"))))
    if state == "garbage":
        (folder / LOCK).write_text("{")
        silent_for(folder, 1000)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    at = time.monotonic() + 0.2
    processes = [start(race, folder, won, at) for _ in range(RACERS)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(won.iterdir())) == 1
    assert list(folder.iterdir()) == []
