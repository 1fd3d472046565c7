"""The process in which a user's functions run (`user_functions`). It imports little, to begin soon."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def serve(pipe: Connection, file: str) -> None:
    """Signatures out; then calls in, results out."""
    os.setsid()  # a group of its own: what functions start ends with it, and Ctrl-C is for the parent
    os.dup2(2, 1)  # what they print is no answer
    try:
        functions = _functions(Path(file))
        from transformers.utils import get_json_schema
    except ImportError as error:
        pipe.send(("import", f"{error}; functions for a model need: pip install 'omnitrain[tools]'"))
        return
    except BaseException as error:
        pipe.send(("error", f"cannot be run: {_shown(error)}"))
        return
    signatures = []
    for name, function in functions.items():
        try:
            signatures.append(get_json_schema(function))
        except Exception as error:
            pipe.send(("error", f"function {name!r} has no signature that a model could read: {_shown(error)}"))
            return
    if not signatures:
        pipe.send(("error", "there is no public function in it"))
        return
    pipe.send(("signatures", signatures))
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = functions[name](**arguments)
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            pipe.send(("result", text))
        except BaseException as error:
            pipe.send(("error", _shown(error)))


def _functions(file: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("omnitrain_user_functions", file)
    if spec is None or spec.loader is None:
        raise ValueError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]
