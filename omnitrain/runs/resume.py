"""What may change when a run is continued: one rule for each key.

- *safe*: it changes no result of a step (paths, logging, workers, length of the run, evaluation): it applies.
- *recorded*: it changes what is learnt from here on (optimizer, schedule, clipping, dropout, precision): it applies, is
  said, and stands in ``history.jsonl`` of the run folder with the step from which it holds.
- *exact*: the run could not be continued as the same run (data, seed, sizes of the model, which parts are trained): it
  is refused by name, and nothing in the folder changes.

A key without a rule is exact.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnitrain.config.run_config import RunConfig
from omnitrain.config.saved import read_values
from omnitrain.config.typed import ConfigError, changes, plain, shown_change
from omnitrain.files import HISTORY, append_line

SAFE = (
    "name", "ckpt_path", "paths.*", "logger.*", "variables*", "stages*", "stage_overrides*", "eval*",
    "evaluation.*", "callbacks.checkpoint*", "callbacks.throughput*", "callbacks.record*", "callbacks.progress*",
    "callbacks.media_panels*", "callbacks.watchdog*", "trainer.max_steps", "trainer.max_epochs", "trainer.max_time",
    "trainer.log_every_n_steps", "trainer.val_check_interval", "trainer.limit_*", "trainer.check_val_every_n_epoch",
    "trainer.num_sanity_val_steps", "trainer.enable_*", "trainer.detect_anomaly", "trainer.profiler*",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy*", "trainer.plugins*",
    "parallel.*", "trainer.benchmark", "trainer.deterministic",
    "data.num_workers", "data.worker_buffer", "data.max_bad_fraction", "data.validation_max_tokens",
    "data.validation_sources.*", "data.test_sources.*", "data.predict_sources.*", "data.voice_sources.*",
    "data.validation_rows", "data.tokenizer", "data.sources.*.path", "data.stages*", "module.generation.*",
    "module.init_from*", "codec", "codes", "study*", "arm", "match", "model.folder", "optim.fused",
)  # fmt: skip
"""Of these, the data stream compares the tokenizer, the content of the sources and the stages that have begun itself;
and the number of processes is compared with the checkpoint's."""
RECORDED = (
    "optim.*", "trainer.gradient_clip_val", "trainer.precision", "trainer.accumulate_grad_batches",
    "trainer.sync_batchnorm", "module.loss.*", "module.word_dropout", "module.frame_dropout", "module.clip",
    "module.aut_window_seconds*", "module.compile", "module.kept_activations*", "callbacks.*",
)  # fmt: skip


EXACT = ("optim.states",)
"""Though their patterns are recorded."""


def rule(key: str) -> str:
    """``safe``, ``recorded`` or ``exact``."""
    if key in EXACT:
        return "exact"
    for name, patterns in (("safe", SAFE), ("recorded", RECORDED)):
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
            return name
    return "exact"


def check_resume(config: RunConfig, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Key -> (before, now) of the recorded keys that change when `config` continues the run in `folder`. Raises
    ConfigError if an exact key changes, which names it, and how to start anew."""
    differing = changes(read_values(folder), plain(config))
    found = {key: values for key, values in differing.items() if rule(key) != "safe"}
    exact = {key: values for key, values in found.items() if rule(key) == "exact"}
    if exact:
        rows = [f"  {key}: {shown_change(values)}" for key, values in exact.items()]
        more = [f"  and {len(rows) - 8} more"] if len(rows) > 8 else []
        raise ConfigError(
            f"the run in {folder} cannot be continued exactly with other settings than it was begun with:\n"
            + "\n".join([*rows[:8], *more])
            + f"\nset these back, or start a new run from its weights: module.init_from={folder} paths.run_dir=FOLDER"
        )
    return found


def record_changes(found: Mapping[str, tuple[Any, Any]], run_dir: Path, step: int) -> None:
    """Say what changes from `step` on, and note it in ``history.jsonl``."""
    for key, values in found.items():
        print(f"from step {step + 1} on: {key} {shown_change(values)}", flush=True)
    if found:
        line = {"step": step, "changed": {key: list(values) for key, values in found.items()}}
        append_line(run_dir / HISTORY, json.dumps(line, ensure_ascii=False))
