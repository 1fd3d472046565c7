"""Which code a configuration may call, and the only place where it is called.

A configuration is data that people pass around: a recipe, a run folder, a checkpoint. It may name *constructors* with
``_target_``: those listed here, and classes of a package that the user (never a configuration) has named in the
environment variable ``OMNITRAIN_TARGETS``. Everything else in it is plain data. :func:`build` makes the object from the
very data that were checked; nothing in them is resolved again.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection

from omnitrain.config import run_config
from omnitrain.config.typed import TARGET, ConfigError, Named
from omnitrain.data.settings import DataConfig, WaveformsConfig
from omnitrain.files import did_you_mean
from omnitrain.models.sizes import AuTModelConfig, CodecConfig, OmniConfig

EXTRA_VARIABLE = "OMNITRAIN_TARGETS"
"""Environment variable with further packages, comma-separated."""
OWN_PACKAGES = tuple(name.strip().rstrip(".") for name in os.environ.get(EXTRA_VARIABLE, "").split(",") if name.strip())
"""What it said when the process started: no configuration can change it."""

OURS: dict[str, type] = {
    "omnitrain.models.omni.OmniModel": OmniConfig,
    "omnitrain.models.codec.Codec": CodecConfig,
    "omnitrain.models.aut_decoder.AuT": AuTModelConfig,
    "omnitrain.interop.load_pretrained": run_config.PretrainedConfig,
    "omnitrain.data.datamodule.OmniDataModule": DataConfig,
    "omnitrain.data.waveforms.WaveformDataModule": WaveformsConfig,
    "omnitrain.training.thinker.ThinkerModule": run_config.ThinkerModuleConfig,
    "omnitrain.training.talker.TalkerModule": run_config.TalkerModuleConfig,
    "omnitrain.training.distill.DistillModule": run_config.DistillModuleConfig,
    "omnitrain.training.gspo.GspoModule": run_config.GspoModuleConfig,
    "omnitrain.training.talker_dpo.TalkerDpoModule": run_config.TalkerDpoModuleConfig,
    "omnitrain.training.aut.AuTModule": run_config.AuTModuleConfig,
    "omnitrain.training.codec.CodecModule": run_config.CodecModuleConfig,
    "omnitrain.training.callbacks.AtomicCheckpoint": run_config.CheckpointConfig,
    "omnitrain.training.callbacks.SpikeGuard": run_config.SpikeGuardConfig,
    "omnitrain.training.callbacks.Throughput": run_config.ThroughputConfig,
    "omnitrain.training.callbacks.RunRecord": run_config.RunRecordConfig,
    "omnitrain.training.callbacks.TrainingProgress": run_config.ProgressConfig,
    "omnitrain.training.callbacks.Watchdog": run_config.WatchdogConfig,
    "omnitrain.training.callbacks.MediaPanels": run_config.MediaPanelsConfig,
    "omnitrain.training.logging.ExactCsvLogger": run_config.CsvLoggerConfig,
    "omnitrain.training.logging.wandb_logger": run_config.WandbConfig,
}
"""Constructor -> its configuration, which is its first argument."""

_LOOSE: dict[str, str] = {
    "lightning.pytorch.callbacks": "DeviceStatsMonitor EMAWeightAveraging EarlyStopping GradientAccumulationScheduler "
    "LearningRateMonitor ModelCheckpoint ModelSummary RichModelSummary RichProgressBar StochasticWeightAveraging Timer "
    "TQDMProgressBar WeightAveraging",
    "lightning.pytorch.loggers": "CSVLogger TensorBoardLogger WandbLogger",
    "lightning.pytorch.profilers": "AdvancedProfiler PyTorchProfiler SimpleProfiler",
    "lightning.pytorch.strategies": "DDPStrategy FSDPStrategy ModelParallelStrategy SingleDeviceStrategy",
    "lightning.pytorch.plugins.environments": "LightningEnvironment SLURMEnvironment TorchElasticEnvironment",
    "omnitrain.generation.sampling": "Decoding",
    "omnitrain.tasks.captions": "AudioCaps AudioCaptionRule",
    "omnitrain.tasks.choices": "MMMURule MMStarRule MathVistaRule RelaxedAccuracy StringMatch VideoMMERule",
    "omnitrain.tasks.lm_harness": "HarnessTask",
    "omnitrain.tasks.personas": "PersonaRule PersonaShards",
    "omnitrain.tasks.questions": "AudioBenchChoice ChartQA MMAU MMMU MMStar MathVista VideoMME",
    "omnitrain.tasks.rewards": "Constraints ErrorRate ExactMatch ItemOrder JSONSchema Judge SoundEvents ToolCalls",
    "omnitrain.tasks.shards": "ReferenceMatch Shards",
    "omnitrain.tasks.speech_to_text": "CoVoST CommonVoice ErrorRate Fleurs LibriSpeech Translation",
    "omnitrain.tasks.task": "Task",
    "omnitrain.tasks.tool_calls": "BFCL ToolCallRule ToolShards",
}
LOOSE = tuple(f"{module}.{name}" for module, names in _LOOSE.items() for name in names.split())
"""Constructors that take loose keywords."""

CONSTRUCTORS = (*OURS, *LOOSE)


class ForbiddenTarget(ConfigError):
    """A configuration names code that it may not call."""


class MissingTarget(ConfigError):
    """A configuration names code that does not exist or cannot be imported."""


def config_class(target: str, place: str) -> tuple[type | None, bool]:
    """The configuration that the constructor `target` takes (None: loose keywords), and whether it is one of ours.
    Classes of the user's own package are imported here, since they may derive from ours; nothing else is. Raises
    ForbiddenTarget for no constructor of the list, nor of a package named in the environment; MissingTarget if the
    user's package has no such class."""
    if target in OURS:
        return OURS[target], True
    if target in LOOSE:
        return None, True
    if not is_own(target):
        raise ForbiddenTarget(_refusal(target, place))
    bases = [f"{base.__module__}.{base.__qualname__}" for base in getattr(_located(target, place), "__mro__", ())]
    for name, cls in OURS.items():
        module, _, attribute = name.rpartition(".")
        if any(base.startswith(f"{module}.") and base.endswith(f".{attribute}") for base in bases):
            return cls, False
    return None, False


def is_own(target: str) -> bool:
    """Whether `target` lies in a package that the user has named in the environment."""
    parts = target.split(".")
    plain_name = all(part.isidentifier() and not part.startswith("__") for part in parts)
    return plain_name and any(target.startswith(f"{package}.") for package in OWN_PACKAGES)


def _refusal(target: str, place: str) -> str:
    otherwise = "it may name the constructors listed in docs/keys.md."
    hint = did_you_mean(target, CONSTRUCTORS, otherwise=otherwise, cutoff=0.8)
    return (
        f"{place or 'the configuration'}: {TARGET} {target!r} is not allowed in a configuration; {hint} A class of "
        f"your own package is allowed by the environment variable {EXTRA_VARIABLE}=PACKAGE"
    )


def _located(target: str, place: str) -> Any:
    module, _, attribute = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise MissingTarget(f"{place}: {TARGET} {target!r} cannot be imported: {error}") from error
    origin = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', '')}"
    if is_own(target) and not (callable(found) and is_own(origin)):
        raise ForbiddenTarget(f"{place}: {TARGET} {target!r} is not allowed: it is '{origin}', defined elsewhere")
    return found


def build(node: Named, *arguments: Any, place: str = "", **offered: Any) -> Any:
    """The object that `node` describes: its constructor, with its configuration first, then `arguments`. What is
    `offered` is given to a constructor of ours (or one derived from it) that has such a parameter. Raises ConfigError,
    which names the place, if the constructor refuses."""
    config_class(node.target, place)
    constructor = _located(node.target, place)
    keywords = built(node.keywords)
    if node.config is not None:
        if inspect.isclass(constructor):
            arguments = (*arguments, node.config)
        else:  # a function, such as load_pretrained
            keywords |= vars(node.config)
        parameters = inspect.signature(constructor).parameters
        keywords |= {key: value for key, value in offered.items() if key in parameters}
    try:
        return constructor(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {error}" if place and place not in str(error) else str(error)) from error


def built(value: Any) -> Any:
    """`value` with every :class:`Named` in it built."""
    return apply_to_collection(value, Named, build)


def check_targets(config: Any) -> None:
    """Refuse names of code that are not allowed; what is not resolved yet is left alone. Raises as `check_plain`."""
    for where, key, value in walk(config):
        if key == TARGET and not isinstance(value, str):
            raise ForbiddenTarget(f"{where}: {TARGET} must be the name of a constructor, not {value!r}")
        if key == TARGET and "${" not in value and value not in CONSTRUCTORS and not is_own(value):
            raise ForbiddenTarget(_refusal(value, where))


def check_plain(config: Any) -> None:
    """Refuse what would mean more than it shows: names of code that are not allowed, Hydra's own marks, and text that
    would be resolved again. Imports nothing, but what lies in the user's own packages. Raises ForbiddenTarget or
    MissingTarget."""
    check_targets(config)
    for where, key, value in walk(config):
        if key in ("_partial_", "_args_", "_recursive_", "_convert_"):
            raise ForbiddenTarget(f"{where}: {key} is not allowed in a configuration; leave it out")
        if isinstance(value, str) and "${" in value:
            raise ForbiddenTarget(
                f"{where + '.' if where else ''}{key}: {value!r} still holds an interpolation after all have been "
                "resolved; write the value itself"
            )


def walk(node: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """(place, key, value) of everything below `node`."""
    if depth > 64:
        raise ForbiddenTarget(f"{place[:80]}...: a configuration is not nested this deep")
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in items:
        yield place, str(key), value
        inner = f"{place}[{key}]" if not isinstance(node, Mapping) else f"{place}.{key}" if place else str(key)
        yield from walk(value, inner, depth + 1)


def check_inside(node: Named, run_dir: Path, place: str) -> None:
    """Refuse texts among loose keywords (`dirpath`, `save_dir`, `filename`, ...) that lead out of the run folder.
    Raises ForbiddenTarget, which names the key."""
    for where, key, value in walk(node.keywords, place):
        if not isinstance(value, str) or not ("/" in value or "\\" in value or ".." in value or "~" in value):
            continue
        if "://" in value or value.startswith("~") or not (run_dir / value).resolve().is_relative_to(run_dir.resolve()):
            raise ForbiddenTarget(f"{where}.{key}={value}: leads out of the run folder, where a run writes")
