"""Who writes into a run folder: one process, or one distributed job.

The lock is the file ``.lock`` in the folder, made whole in one step (`os.link`, as network file systems have it). It
says who holds it: host, process and its start, job. The holder touches it every few seconds. A lock is left over,

- at once, if its process ran on this machine and is gone, or was an earlier start of this very job;
- `STALE_AFTER` seconds after its last touch, wherever its process ran. Both times are the file system's, the lock's and
  that of a file just written, so clocks that differ between machines do not matter.

A left-over lock is replaced by one process alone: whoever makes ``.lock.after-TOKEN``, TOKEN being that of the old one.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omnitrain.config import launched
from omnitrain.config.typed import ConfigError
from omnitrain.files import LOCK, printable

HEARTBEAT = 5.0
"""Seconds between two touches."""
STALE_AFTER = 120.0
"""Seconds without a touch after which a lock counts as left over."""


class FolderInUse(ConfigError):
    """Another process writes into the folder; the message says which, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock.

    Attributes:
        machine: tells machines, boots and containers apart: process ids are comparable within one.
        started: of the process, in clock ticks since the machine's boot; 0 where the system does not say.
        job, restart: of Slurm or torchrun, and how often it was started again.
        since, command: for people.
    """

    host: str
    machine: str
    pid: int
    started: int | None
    job: str
    restart: int
    since: str
    command: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            job=launched.job(),
            restart=launched.restarts(),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            command=shlex.join(["omnitrain", *sys.argv[1:]]),
            token=uuid.uuid4().hex[:16],
        )

    def is_gone(self, silent: float) -> bool:
        """Whether the lock, last touched `silent` seconds ago, is left over."""
        mine = Owner.this_process()
        if self.machine == mine.machine:
            return _started(self.pid) != self.started
        started_again = bool(self.job) and self.job == mine.job and self.restart < mine.restart
        return started_again or silent > STALE_AFTER

    def write(self, path: Path) -> Path:
        """Write this down beside the lock `path`, to be made the lock in one step."""
        ours = path.with_name(f"{path.name}.{self.token}")
        ours.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")
        return ours


@contextmanager
def hold(folder: str | os.PathLike[str]) -> Generator[None]:
    """Hold the run folder, made if missing, for the block; SIGTERM ends the block by `SystemExit`. The first process of
    a distributed job holds it for all. To hold again what this process holds does nothing. Raises FolderInUse if
    another process holds it."""
    path = Path(os.path.realpath(folder)) / LOCK
    if path in _held or not launched.is_first():
        yield
        return
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = Owner.this_process()
    _acquire(path, owner)
    _held.add(path)
    ended = threading.Event()
    threading.Thread(target=_keep_alive, args=(path, owner, ended), daemon=True).start()
    in_main = threading.current_thread() is threading.main_thread()
    default = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if default:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if default and signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ended.set()
        _held.discard(path)
        if _token(path) == owner.token:
            path.unlink(missing_ok=True)
        if new:
            with suppress(OSError):  # nothing was written: as if we had never been there
                path.parent.rmdir()


_UNREADABLE = "unreadable"
_held: set[Path] = set()
"""Locks that this process holds."""


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _acquire(path: Path, owner: Owner) -> None:
    """Make the lock, or raise `FolderInUse`."""
    ours = owner.write(path)
    try:
        for _ in range(5):
            if _make(path, ours):
                return
            with suppress(FileNotFoundError):  # let go in between: once more
                held, silent = _read(path, ours)
                if held is not None and not held.is_gone(silent):
                    raise FolderInUse(_in_use(path, held, silent))
                if held is None and silent <= STALE_AFTER:
                    raise FolderInUse(f"{path} says nothing of who holds the folder; delete it if nobody does")
                if _replace(path, ours, _UNREADABLE if held is None else held.token):
                    return
        raise FolderInUse(f"{path.parent}: other processes are taking this folder; try again, or name another one")
    finally:
        ours.unlink(missing_ok=True)


def _make(path: Path, content: Path) -> bool:
    """Let `path` begin to exist, with what stands in `content`. Returns whether it did."""
    try:
        os.link(content, path)
    except FileExistsError:
        return _token(path) == _token(content)  # a network file system may have done it and lost its answer
    except OSError:  # one without links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(content.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _read(path: Path, ours: Path) -> tuple[Owner | None, float]:
    """Who holds the lock (None: it cannot be read), and for how many seconds nobody has touched it."""
    with path.open(encoding="utf-8") as file:  # opening asks a network file system for what stands there now
        touched, text = os.fstat(file.fileno()).st_mtime, file.read()
    os.utime(ours)
    silent = ours.stat().st_mtime - touched
    try:
        return Owner(**json.loads(text)), silent
    except (ValueError, TypeError):
        return None, silent


def _token(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["token"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _replace(path: Path, ours: Path, token: str) -> bool:
    """Put our lock in the place of the left-over one with this token, unless somebody else does."""
    claim = path.with_name(f"{path.name}.after-{token}")
    if not _make(claim, ours):
        try:
            claimant, silent = _read(claim, ours)
        except FileNotFoundError:
            return False
        if not (claimant.is_gone(silent) if claimant is not None else silent > STALE_AFTER):
            time.sleep(0.1)
            return False
        # It died in between: its claim is left over as a lock is. (Deleted, it might be a newer one by then.)
        if not _replace(claim, ours, _UNREADABLE if claimant is None else claimant.token):
            return False
    try:
        if not path.exists() or (_token(path) or _UNREADABLE) != token:
            return False  # somebody was through before we began
        os.replace(shutil.copyfile(ours, path.with_name(f"{ours.name}.new")), path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _keep_alive(path: Path, owner: Owner, ended: threading.Event) -> None:
    """Touch the lock until `ended`. One who has lost it to another process writes nothing more: it ends here."""
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):  # a file system that does not answer for a while, or a folder that is gone
            found = _token(path)
            if found == owner.token:
                os.utime(path)
            elif found is None and path.parent.is_dir() and not path.exists():  # somebody has deleted it
                again = owner.write(path)
                _make(path, again)
                again.unlink(missing_ok=True)
            elif found is not None and not ended.is_set():
                lost = f"another process has taken this folder while this one did not answer for {STALE_AFTER:g} s"
                print(f"error: {printable(path.parent)}: {lost}; it ends, and writes nothing more", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)


def _in_use(path: Path, held: Owner, silent: float) -> str:
    job = f" ({held.job})" if held.job else ""
    cure = f"end it there (a lock is free {STALE_AFTER:g} s after its last touch)"
    if held.machine == _machine():
        cure = f"end it (kill {held.pid})"
    return (
        f"{path.parent} is in use by process {held.pid} on {held.host}{job} since {held.since}, last heard of "
        f"{max(silent, 0):.0f} s ago: {held.command}; wait for it, {cure}, or name another folder"
    )


def _machine() -> str:
    """This machine since its boot, or this container on it: within it, a process id means one process."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _started(pid: int) -> int | None:
    """When a living process was started; None if there is none. Without /proc: 0 for every living one."""
    try:
        # Behind the name, which may hold blanks: state, parent, ...; the start is field 22 of all.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    return 0
