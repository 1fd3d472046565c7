"""Open training of omni-modal models of the Qwen3-Omni design.

docs/python.md says what is to be had from Python: :func:`omnitrain.load`, :class:`omnitrain.Sample` and a few more.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnitrain import interop as interop
    from omnitrain.config.compose import run_config as run_config
    from omnitrain.data.sample import Message as Message
    from omnitrain.data.sample import Sample as Sample
    from omnitrain.data.sample import Segment as Segment
    from omnitrain.runs.experiment import build_experiment as build_experiment
    from omnitrain.runs.load import load as load

# Grain, which orders the data, warns at import that JAX's profiler is absent; nothing here uses JAX. (Its worker
# processes may import it before this file, and then say so once.)
logging.getLogger("absl").addFilter(lambda record: "jax profiler" not in record.getMessage())

_ENTRIES = {
    "load": "omnitrain.runs.load",
    "Sample": "omnitrain.data.sample",
    "Message": "omnitrain.data.sample",
    "Segment": "omnitrain.data.sample",
    "run_config": "omnitrain.config.compose",
    "build_experiment": "omnitrain.runs.experiment",
}


def __getattr__(name: str) -> Any:
    """What `omnitrain` gives from Python is imported when it is first used: a verb's help needs no torch."""
    if name == "interop":
        return importlib.import_module("omnitrain.interop")
    if name in _ENTRIES:
        return getattr(importlib.import_module(_ENTRIES[name]), name)
    raise AttributeError(f"module 'omnitrain' has no attribute {name!r}")
