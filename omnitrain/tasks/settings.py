"""What can be set of benchmarks, as plain frozen dataclasses; `BenchmarkRun` is the configuration ``eval`` too.

Nothing heavy is imported here. Types are those that structured configurations take (OmegaConf 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """Tasks (``conf/eval``), and how they are run.

    Attributes:
        path: the benchmark in its own format, for the tasks whose own `path` names it.
        limit, batch, restart: see `RunOptions`.
        device: ``auto``, ``cpu``, ``cuda``, ...
        dtype: of the weights: ``auto``, ``float32``, ``bfloat16``, ...
        tasks: by name, with the class of each as ``_target_``; None leaves one out.
    """

    path: str | None = None
    limit: int | None = None
    batch: int = 16
    restart: bool = False
    device: str = "auto"
    dtype: str = "auto"
    tasks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a task is run.

    Attributes:
        limit: at most so many items, evenly spaced over the benchmark (in lm-evaluation-harness: of each of its tasks,
            from the beginning); None: all.
        batch: items that are answered between two parts on disk.
        restart: throw away answers of another model or of other settings.
        fingerprint: of the model (`results.model_fingerprint`), if it is known already.
        progress: show a progress bar.

    Raises ValueError for a limit that leaves nothing.
    """

    limit: int | None = None
    batch: int = 16
    restart: bool = False
    fingerprint: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"eval.limit={self.limit} leaves no item to ask; give at least 1, or null for all")
