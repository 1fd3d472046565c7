"""A recipe of stages: command lines of omnitrain, run one after another as processes of their own.

    stages:
      - name: codec
        command: [fit, +recipe=codec, "paths.run_dir=${paths.run_dir}/codec", ckpt_path=last]
      - name: codes
        command: [data, encode, "${paths.run_dir}/codec", data/speech, --out, "${paths.run_dir}/codes"]

A stage that has ended well is noted in ``stages.json`` of the run folder and not run again; so the same line continues
an interrupted run, and a stage that can continue (`ckpt_path=last`, `data encode`) goes on where it was. At the end,
``report.html`` of the run folder covers all stages.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from omnitrain.config import launched
from omnitrain.config.compose import check_stage, quoted, readable
from omnitrain.config.saved import portable, read_values
from omnitrain.config.targets import ForbiddenTarget
from omnitrain.config.typed import ConfigError
from omnitrain.config.verbs import HYDRA_VERBS, VERBS, no_such_verb
from omnitrain.files import CONFIG, REPORT, STAGES, did_you_mean, printable, read_json, write_json

ALL = "all"
"""What `stage_overrides` has for every stage that is a ``fit``."""
_PLAIN = re.compile(r"[A-Za-z0-9_./-]*")
_INSIDE = "OMNITRAIN_STAGE"
"""Environment variable with the name of the stage that this process is."""


@dataclass(frozen=True)
class Stage:
    """One command line: `command` is what stands behind ``python -m omnitrain``."""

    name: str
    command: tuple[str, ...]

    def arguments(self, run_dir: Path) -> list[str]:
        """Its words for a process. Where one is KEY=PATH with a path in `run_dir`, the path is quoted for Hydra's
        grammar, in which many characters that a folder's name can have mean something."""
        words = list(self.command)
        if words[0] in HYDRA_VERBS:
            for i, (key, sign, value) in enumerate(word.partition("=") for word in words):
                if sign and value.startswith(f"{run_dir}") and not _PLAIN.fullmatch(value):
                    words[i] = f"{key}={quoted(value)}"
        return words

    def line(self, run_dir: Path) -> str:
        return shlex.join(["python", "-m", "omnitrain", *self.arguments(run_dir)])

    @property
    def folder(self) -> Path | None:
        """Where it writes, as far as its command says: `paths.run_dir`, or what follows ``--out``."""
        for word in reversed(self.command):  # the last one counts
            if word.startswith("paths.run_dir="):
                return Path(str(OverridesParser.create().parse_override(readable([word], sweep=False)[0]).value()))
        if "--out" in self.command[:-1]:
            return Path(self.command[self.command.index("--out") + 1])
        return None


def read_stages(stages: Any, overrides: Any) -> list[Stage]:
    """The stages of a resolved configuration, a list of ``{name, command}``, what `overrides` adds to each at its end:
    stage -> list of further words, or None to leave it out; `ALL` -> words for every ``fit`` among them. Raises
    ConfigError, which names it and what to write, for one that cannot be run."""
    if not isinstance(stages, list) or not stages:
        raise ConfigError("stages: write a list of {name: NAME, command: [VERB, ARGUMENT, ...]}")
    overrides = overrides or {}
    found: dict[str, Stage] = {}
    for number, given in enumerate(stages):
        place = f"stages[{number}]"
        if not isinstance(given, dict) or set(given) != {"name", "command"}:
            raise ConfigError(f"{place}: write {{name: NAME, command: [VERB, ARGUMENT, ...]}}, not {given}")
        name, command = str(given["name"]), given["command"]
        if name == ALL:
            raise ConfigError(f"{place}: no stage can be called {ALL}, which stage_overrides takes for every one")
        if name in found:
            raise ConfigError(f"{place}: two stages are called {name}")
        if not isinstance(command, list) or not command or not all(isinstance(w, str | int | float) for w in command):
            raise ConfigError(f"{place}.command ({name}): write a list of words, such as [fit, +recipe=codec]")
        general = _words(overrides, ALL) if command[0] == "fit" else []
        verb, *words = map(str, (*command, *general, *_words(overrides, name)))
        if verb not in VERBS:
            raise ConfigError(f"{place}.command ({name}): {no_such_verb(verb)}")
        found[name] = Stage(name, (verb, *words))
    for name in overrides:
        if name not in found and name != ALL:
            hint = did_you_mean(name, found, form="stage_overrides.{}")
            raise ConfigError(f"stage_overrides.{name}: there is no such stage; {hint}")
    kept = [stage for name, stage in found.items() if overrides.get(name, ...) is not None]
    if not kept:
        raise ConfigError("stage_overrides: every stage is left out (null)")
    return kept


def _words(overrides: Mapping[str, Any], name: str) -> list[Any]:
    words = overrides.get(name) or []
    if not isinstance(words, list):
        raise ConfigError(f"stage_overrides.{name}={words}: write a list, such as [trainer.max_steps=50], or null")
    return words


def finished_stages(stages: Sequence[Stage], run_dir: Path) -> dict[str, Any]:
    """What ``stages.json`` says of the stages that have been run, once all others have been checked. Raises ConfigError
    for a command that is another than the one that was run, or does not compose; ForbiddenTarget for one that names
    code outside the allowed packages."""
    if os.environ.get(_INSIDE):
        raise ConfigError(f"stages: the stage '{os.environ[_INSIDE]}' has stages itself; name theirs in one recipe")
    if launched.processes() > 1:
        raise ConfigError(
            "stages: every process would run them; start one process that starts the others (trainer.devices=N in "
            "stage_overrides.all), or give the stages' own commands one after another"
        )
    done = _read_record(run_dir)
    for stage in stages:
        command = list(stage.command)
        before = done[stage.name]["command"] if stage.name in done else None
        if before not in (None, portable(command, run_dir), command):  # `command`: of before folders could be moved
            raise ConfigError(
                f"stage '{stage.name}' has been run with another command: {shlex.join(before)}\n"
                f"now it is: {shlex.join(command)}\nchoose another paths.run_dir, or take '{stage.name}' out of "
                f"{run_dir / STAGES} to run it again (and the stages behind it, which have used what it made)"
            )
        if command[0] not in HYDRA_VERBS:
            _check_places(stage, run_dir)
        elif before is None:
            check_stage(stage.name, stage.arguments(run_dir), run_dir)
    return done


def _check_places(stage: Stage, run_dir: Path) -> None:
    """Refuse a stage that would write somewhere else than below the current folder and `run_dir`."""
    words = stage.command
    written = [b for a, b in pairwise(words) if a in ("--out", "--html", "--collect")]
    written += [word.partition("=")[2] for word in words if word.startswith(("--out=", "--html=", "--collect="))]
    if words[0] == "convert":  # OUT stands behind its verb and the source; options may lie between
        written += words[3:]
    for place in (*written, *(words[1:2] if words[0] == "search" else ())):
        if not any(Path(place).resolve().is_relative_to(root.resolve()) for root in (Path.cwd(), run_dir)):
            raise ForbiddenTarget(
                f"stage '{stage.name}': {place}: a recipe may only write below the current folder and the run folder"
            )


def run_stages(stages: Sequence[Stage], run_dir: Path, done: dict[str, Any]) -> int:
    """Run all but those that are `done`, each with a line above its own output, then name the folders. SIGINT and
    SIGTERM go to the running stage, which ends in its own way; then nothing further is started. Returns 0, or the
    status of the stage that failed or was ended (128 + signal where that killed it)."""
    with _forwarded() as child:
        for number, stage in enumerate(stages, start=1):
            header = f"stage {number}/{len(stages)} {printable(stage.name)}"
            if stage.name in done:
                print(f"{header}: done before", flush=True)
                continue
            print(f"{header}: {printable(stage.line(run_dir))}", flush=True)
            start = time.monotonic()
            status = child.run(stage.name, stage.arguments(run_dir))
            if status or child.signal:
                status = status or 128 + child.signal  # it ended well, but may have been cut short
                again = f"python -m omnitrain fit {shlex.quote(str(run_dir))}"
                print(f"{header}: ended with status {status}; continue: {printable(again)}", file=sys.stderr)
                return status
            seconds = round(time.monotonic() - start, 1)
            done[stage.name] = {"command": portable(list(stage.command), run_dir), "seconds": seconds}
            write_json(run_dir / STAGES, done)
            print(f"{header}: {seconds:g} s", flush=True)
    for name, folder in ((stage.name, stage.folder) for stage in stages):
        if folder is not None:
            print(printable(f"{name}: {folder}"))
            if (folder / REPORT).is_file():
                print(printable(f"{name}: report: {folder / REPORT}"))
    print(f"report over all stages: {printable(write_report(stages, run_dir)[0])}")
    return 0


def write_report(stages: Sequence[Stage], run_dir: Path, out: Path | None = None) -> tuple[Path, list[str]]:
    """One page over all stages, of what there is so far. Returns its path, and what is missing in it."""
    from omnitrain.reports.chain import StageRecord, write_stages_report

    done = _read_record(run_dir)
    records = [
        StageRecord(name=stage.name, command=stage.line(run_dir), folder=stage.folder, finished=stage.name in done)
        for stage in stages
    ]
    return write_stages_report(run_dir, records, out)


def stages_of(run_dir: Path) -> list[Stage] | None:
    """The stages of a run folder, from its ``config.yaml``; None if it is not a run of stages. Raises ConfigError if
    they cannot be read."""
    if not (run_dir / CONFIG).is_file():
        return None
    saved = read_values(run_dir, of_any_version=True)
    return None if saved.get("stages") is None else read_stages(saved["stages"], saved.get("stage_overrides"))


def _ends_with_its_parent() -> Callable[[], None] | None:
    """What a stage's process calls first: after a kill -9 of ours nobody would forward signals to it, and the next call
    of the same line would train in its folder beside it. (Only Linux can promise this.)"""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def follow() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)

    return follow


class _Child:
    """The process of the running stage, and the last signal that was meant for it (0: none)."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.signal = 0

    def run(self, stage: str, arguments: Sequence[str]) -> int:
        if self.signal:
            return 128 + self.signal
        # A process group of its own: Ctrl-C in a terminal reaches all of ours, and the stage would get it twice.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "omnitrain", *arguments],
            env={**os.environ, _INSIDE: stage},
            process_group=0,
            preexec_fn=_ends_with_its_parent(),
        )
        if self.signal:  # it came in between
            self.process.send_signal(self.signal)
        status = self.process.wait()
        self.process = None
        return status if status >= 0 else 128 - status

    def forward(self, number: int, frame: Any) -> None:
        self.signal = number
        if self.process is not None:
            self.process.send_signal(number)


@contextmanager
def _forwarded() -> Generator[_Child]:
    """SIGINT and SIGTERM go to the child. (Only a process's main thread may say so; a sweep may run us in another.)"""
    child = _Child()
    if threading.current_thread() is not threading.main_thread():
        yield child
        return
    before = {number: signal.signal(number, child.forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_record(run_dir: Path) -> dict[str, Any]:
    return read_json(run_dir / STAGES) if (run_dir / STAGES).is_file() else {}
