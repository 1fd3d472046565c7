"""Which code a configuration may call.

A recipe is data that people pass around, and Hydra's ``_target_`` would let that data call any Python function. Before
anything is imported, every ``_target_`` of the composed configuration must therefore start with one of a few prefixes;
and since ``omnitrain.data.shards.os.system`` would start with one too, the object that it leads to must also have been
*defined* under one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

ALLOWED = (
    "omnitrain.",
    "torch.optim.",
    "torch.nn.",
    "torch.distributed.fsdp.",
    "torch.distributed.device_mesh.",
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.plugins.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.",
    "lightning.fabric.plugins.",
    "lightning.fabric.strategies.",
    "torchmetrics.",
)
HYDRA_ALLOWED = ("hydra._internal.core_plugins.", "hydra.experimental.callbacks.", "hydra_plugins.", "optuna.samplers.")
"""What Hydra itself calls below the node `hydra`: launchers, sweepers and their samplers, its own callbacks."""
LOGGING_ALLOWED = ("logging.", "colorlog.")
"""Classes of Python's logging configuration (keys `()` and `class` below `hydra`), called before any job starts."""

EXTRA_VARIABLE = "OMNITRAIN_TARGETS"
"""Environment variable with further packages, comma-separated. Who runs omnitrain sets it; a recipe cannot."""


class ForbiddenTarget(ValueError):
    """A configuration names code outside the allowed packages."""


class MissingTarget(ImportError):
    """A configuration names code that does not exist or cannot be imported."""


def allowed_prefixes() -> tuple[str, ...]:
    """:data:`ALLOWED` and the packages named by the environment variable ``OMNITRAIN_TARGETS``."""
    extra = os.environ.get(EXTRA_VARIABLE, "")
    return ALLOWED + tuple(f"{name.strip().rstrip('.')}." for name in extra.split(",") if name.strip())


def check_targets(config: Any) -> dict[str, str]:
    """Refuse a configuration that names code outside the allowed packages. Imports nothing.

    Args:
        config: nested dicts and lists, with interpolations resolved.

    Returns:
        Each target and the place where it first stands, in order.

    Raises:
        ForbiddenTarget: names the target, where it stands, and how to allow it.
    """
    found: dict[str, str] = {}
    for where, key, target in _targets(config, ""):
        in_hydra = where == "hydra" or where.startswith("hydra.")
        if in_hydra:
            prefixes = HYDRA_ALLOWED if key == "_target_" else LOGGING_ALLOWED
        elif key == "_target_":
            prefixes = allowed_prefixes()
            found.setdefault(str(target), where)
        else:
            continue
        if not isinstance(target, str) or not _allowed(target, prefixes):
            raise ForbiddenTarget(
                f"{where or 'the configuration'}: {key} '{target}' is not allowed. A configuration may only call "
                f"{', '.join(prefix.rstrip('.') for prefix in prefixes)}"
                + ("" if in_hydra else f"; add your own package with the environment variable {EXTRA_VARIABLE}=NAME")
            )
    return found


def check_origins(targets: dict[str, str]) -> None:
    """Import `targets` (which :func:`check_targets` has passed) and refuse those defined elsewhere.

    ``omnitrain.data.shards.os.system`` is reached through an allowed module, but is not that module's own.

    Raises:
        ForbiddenTarget: names the target and where it really comes from.
        MissingTarget: there is no such target.
    """
    from hydra._internal.utils import _locate

    for target, where in targets.items():
        try:
            thing = _locate(target)
        except ImportError as error:
            raise MissingTarget(f"{where}: _target_ '{target}' cannot be imported: {error}") from error
        origin = f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', '')}"
        if not callable(thing) or not _allowed(origin, allowed_prefixes()):
            raise ForbiddenTarget(f"{where}: _target_ '{target}' is not allowed: it is '{origin}', defined elsewhere")


def _allowed(name: str, prefixes: tuple[str, ...]) -> bool:
    inner = name.startswith(tuple(p for p in prefixes if p.endswith("."))) or name in prefixes
    return inner and not name.startswith("omnitrain.cli.") and "__" not in name


def _targets(node: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """(place, key, value) of every key by which a configuration can name code."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_" or (key in ("()", "class") and not isinstance(value, dict)):
                yield place, key, value
            yield from _targets(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _targets(value, f"{place}[{i}]")
