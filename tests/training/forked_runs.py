"""Training runs as processes that may be killed, without paying for the imports each time.

A server process imports torch and Lightning once and forks a child for each run that it is told to start. `Runs` is the
client. A run is a toy (`{"toy": {...}}`), a command line of omnitrain (`{"argv": [...]}`) or a function of a file
beside this one (`{"call": "MODULE:NAME", "given": {...}}`). One with a `Kill` sends a signal to itself at a place in
the program, so that the same thing is always under way.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kill:
    """The signal `number`, when the function ``MODULE:NAME`` is called for the `call`-th time, in this rank."""

    at: str
    call: int = 1
    number: int = signal.SIGKILL
    rank: int = 0

    @property
    def status(self) -> int:
        """With which the process should end."""
        return {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signal.Signals(self.number)]

    def arm(self) -> None:
        """In the process that is to be killed."""
        module, _, path = self.at.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original: Callable[..., Any] = getattr(owner, name)
        calls = 0

        def counted(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                os.kill(os.getpid(), self.number)
            return original(*arguments, **keywords)

        setattr(owner, name, counted)


class Run:
    """A started run: its processes, one per rank."""

    def __init__(self, runs: Runs, pids: list[int], errors: list[Path]) -> None:
        self.runs, self.pids, self.errors = runs, pids, errors

    def alive(self) -> bool:
        """Whether the first rank still runs."""
        return self.runs.ask({"poll": self.pids[0]}) is None

    def signal(self, number: int) -> None:
        for pid in self.pids:
            if self.runs.ask({"poll": pid}) is None:
                os.kill(pid, number)

    def wait(self, *ranks: int) -> list[int]:
        """Exit status of each rank, or of these (negative: the signal that ended it)."""
        return [self.runs.ask({"wait": self.pids[rank]}) for rank in ranks or range(len(self.pids))]

    def finish(self) -> None:
        """Wait, and fail unless every rank ended well."""
        codes = self.wait()
        assert codes == [0] * len(codes), "\n".join(path.read_text()[-4000:] for path in self.errors)


class Runs:
    """Starts runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started: list[int] = []
        assert self.ask({"hello": 1}) == "ready"

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, out: Path, ranks: int = 1, kill: Kill | None = None, **run: Any) -> Run:
        """Start a run that keeps what it prints in `out`."""
        if kill is not None:
            run["kill"] = asdict(kill)
        out.mkdir(parents=True, exist_ok=True)
        environment: list[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            environment = [
                {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
                for rank in range(ranks)
            ]
        errors = [out / f"printed.{rank}.txt" for rank in range(ranks)]
        started = [
            self.ask({"run": run, "environment": env, "errors": str(path), "folder": os.getcwd()})
            for env, path in zip(environment, errors, strict=True)
        ]
        self.started += started
        return Run(self, started, errors)

    def close(self) -> None:
        """End the server, and runs that a failed test left behind."""
        for pid in self.started:
            if self.ask({"poll": pid}) is None:
                os.kill(pid, signal.SIGKILL)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _child(request: dict[str, Any]) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server itself ignores it
    printed = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    try:
        run = request["run"]
        if "file_limit" in run:  # no file may become larger
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (run["file_limit"], run["file_limit"]))
        if "kill" in run and run["kill"]["rank"] == int(os.environ.get("LOCAL_RANK", "0")):
            Kill(**run["kill"]).arm()
        if "toy" in run:
            from toy_training import Toy, train

            train(Toy(**run["toy"]))
        elif "call" in run:
            module, _, name = run["call"].partition(":")
            getattr(importlib.import_module(module), name)(**run.get("given", {}))
        else:
            from omnitrain.__main__ import main

            sys.argv = ["omnitrain", *run["argv"]]
            return main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import toy_training  # noqa: F401  the imports that every run needs

    import omnitrain.cli.fit
    import omnitrain.config.compose
    import omnitrain.reports.run
    import omnitrain.runs.encode_shards  # noqa: F401

    codes: dict[int, int] = {}
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = _child(request)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            answer: Any = pid
        elif "wait" in request or "poll" in request:
            pid = request.get("wait", request.get("poll"))
            if pid not in codes:
                done, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        else:
            answer = "ready"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve()
