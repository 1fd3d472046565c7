"""Functions of a user's Python file, for a model to call: in a process of their own, that can be stopped.

    with UserFunctions("tools.py") as functions:
        functions.call("find", {"what": "cats"}, seconds=5)

Public functions that the file itself defines, and nothing else, can be called; their signatures are made of
annotations and docstrings (`transformers.utils.get_json_schema`). They run in one process, so that they may remember;
after one that took too long it is killed with all that it started, and the next call begins anew.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omnitrain.generation.tool_loop import CallError
from omnitrain.runs.function_process import serve

_START_SECONDS = 60.0  # for the file to be imported


class UserFunctions:
    """Attributes:
        signatures: of all functions, as the public templates take them.

    Raises FileNotFoundError.  ValueError: the file cannot be run, or has no function with a signature.  ImportError:
    without the extra `tools`.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: no such file of functions")
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self.signatures: list[dict[str, Any]] = self._start()

    def __enter__(self) -> UserFunctions:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> list[dict[str, Any]]:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, str(self.file)), daemon=True)
        self._process.start()
        theirs.close()
        kind, value = self._receive(_START_SECONDS)
        if kind == "signatures":
            return value
        self.close()
        if kind == "import":
            raise ImportError(value)
        raise ValueError(f"{self.file}: {value}")

    def _receive(self, seconds: float) -> tuple[str, Any]:
        assert self._pipe is not None
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            return "error", "the process of the functions ended"
        self.close()
        return "error", f"no result after {seconds:g} seconds"

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> str:
        """See `tool_loop.Functions`."""
        import jsonschema

        known = {signature["function"]["name"]: signature["function"] for signature in self.signatures}
        if name not in known:
            raise CallError(f"there is no function {name[:80]!r}; there are {', '.join(known)}")
        schema = {**known[name]["parameters"], "additionalProperties": False}
        try:
            jsonschema.validate(arguments, schema)
        except jsonschema.ValidationError as error:
            raise CallError(f"arguments of {name}: {error.message[:500]}") from error
        if self._process is None:
            try:
                self._start()
            except (ValueError, ImportError) as error:
                raise CallError(str(error)) from error
        assert self._pipe is not None
        try:
            self._pipe.send((name, arguments))
        except OSError as error:
            self.close()
            raise CallError("the process of the functions ended") from error
        kind, value = self._receive(seconds)
        if kind != "result":
            raise CallError(f"{name}: {value}")
        return value

    def close(self) -> None:
        """End the process, and all that it started."""
        process, self._process = self._process, None
        if process is not None and process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # it may not have got to leading its group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
