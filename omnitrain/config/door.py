"""The one door from plain values to a :class:`RunConfig`: whatever a configuration comes from passes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omnitrain.config.run_config import RunConfig
from omnitrain.config.targets import check_plain
from omnitrain.config.typed import ConfigError, typed
from omnitrain.evaluation.settings import SETTINGS
from omnitrain.files import did_you_mean

_KEYS = tuple(f.name for f in fields(RunConfig))


def read(values: Mapping[str, Any]) -> RunConfig:
    """The typed configuration that resolved, plain `values` describe. Builds nothing, and imports nothing but classes
    of the user's own packages. Raises ForbiddenTarget if it names code that it may not call, or holds text that would
    be resolved again; ConfigError, which names the key and the nearest one, for an unknown key or a value of another
    type."""
    values = {str(key): value for key, value in values.items() if key not in ("hydra", "defaults")}
    check_plain(values)
    variables = {**(values.pop("variables", None) or {}), **{k: v for k, v in values.items() if k not in _KEYS}}
    known = {key: value for key, value in values.items() if key in _KEYS}
    evaluation = known.pop("evaluation", None) or {}
    kind = evaluation.get("scores", "heldout")
    if kind not in SETTINGS:
        raise ConfigError(f"evaluation.scores={kind}; {did_you_mean(kind, SETTINGS)}")
    scores = typed(SETTINGS[kind], evaluation, "evaluation")
    return typed(RunConfig, {**known, "evaluation": scores, "variables": variables})
