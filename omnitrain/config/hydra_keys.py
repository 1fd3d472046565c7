"""What a configuration may change of Hydra itself, which runs code of its own before any job starts.

A recipe, or a folder given with ``--config-dir``, is a stranger's data; the command line is the user's word. So
whatever names code or shell lines below ``hydra`` must be on a list here, or stand on the command line.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnitrain.config.targets import ForbiddenTarget, walk
from omnitrain.config.typed import TARGET, ConfigError

CONSTRUCTORS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra.experimental.callbacks.LogJobReturnCallback",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    *(f"optuna.samplers.{name}Sampler" for name in ("CmaEs", "Grid", "MOTPE", "NSGAII", "Random", "TPE")),
)
"""Launchers, sweepers and their samplers, and a callback, that may be named below ``hydra``."""
_LOGGING = {"class": ("logging.StreamHandler", "logging.NullHandler"), "()": ("colorlog.ColoredFormatter",)}
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM", "WANDB_MODE")
_OWN = ("config.yaml", "schema", "hydra/launcher", "hydra/sweeper", "hydra/job_logging", "hydra/callbacks")
"""What a folder given with ``--config-dir`` may not replace."""
SHELL = ("setup", "python", "srun_args", "additional_parameters", "comment")
"""Keys of ``hydra.launcher`` that end up in a shell or choose a program."""
_FROM_USER = ("callbacks", "output_subdir", "sweeper.custom_search_space", "sweeper.storage", "launcher.temp_folder")
"""Keys below ``hydra`` that only the command line may set: by some of them Optuna imports a function or opens a data
base, and joblib writes elsewhere."""


def check_arguments(args: Namespace) -> None:
    """What must be known of a command line before Hydra composes: where it will look. Raises ForbiddenTarget for a
    search path in a Python package, which would be imported, for a pickle that would be loaded, and for a folder that
    would replace the root configuration; ConfigError for a folder that is missing."""
    config_dir = args.config_dir
    for name in ("config_path", "config_name", "experimental_rerun"):
        if getattr(args, name, None) is not None:
            raise ForbiddenTarget(
                f"--{name.replace('_', '-')} {getattr(args, name)}: omnitrain has one root configuration; change it "
                "with a recipe (+recipe=NAME, --config-dir DIR), or name a run folder in front of the overrides"
            )
    for text in args.overrides:
        key, _, value = text.partition("=")
        if key.lstrip("+~").startswith("hydra.searchpath") and "pkg:" in value.replace(" ", ""):
            raise ForbiddenTarget(f"{text}: a search path may not name a Python package; name a folder")
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder")
        for name in _OWN:
            if (Path(config_dir) / name).exists():
                raise ForbiddenTarget(
                    f"--config-dir {config_dir}: {name} there would replace omnitrain's own; give it another name, and "
                    "change single keys in a recipe"
                )


def check_hydra(
    hydra: Mapping[str, Any], defaults: Mapping[str, Any], overrides: Sequence[str], run_dir: str | None
) -> None:
    """Refuse a resolved ``hydra`` node that names code, shell lines or folders that only a user may name. Raises
    ForbiddenTarget, which names the key.

    Args:
        defaults: the same node without the recipe: with the user's choice of launcher and sweeper alone.
        overrides: the user's command line.
        run_dir: `paths.run_dir`, resolved.
    """

    def was_given(key: str) -> bool:
        return any(text.lstrip("+~").partition("=")[0].startswith(key) for text in overrides)

    def found(path: str) -> Any:
        node: Any = hydra
        for key in path.split("."):
            node = (node or {}).get(key)
        return node

    for where, key, value in walk(hydra, "hydra"):
        place = f"{where}.{key}"
        if key == TARGET and value not in CONSTRUCTORS:
            raise ForbiddenTarget(f"{where}: {TARGET} {value!r} is not allowed there")
        in_logging = where.startswith(("hydra.job_logging", "hydra.hydra_logging"))
        if in_logging and key in _LOGGING and not isinstance(value, Mapping) and value not in _LOGGING[key]:
            raise ForbiddenTarget(f"{where}: {key} '{value}' is not allowed there; log to the terminal")
        if in_logging and isinstance(value, str) and "://" in value and value not in _STREAMS:
            raise ForbiddenTarget(f"{place}: '{value}' is not allowed there")
    for name in found("job.env_set") or {}:
        if name not in _ENVIRONMENT:
            raise ForbiddenTarget(
                f"hydra.job.env_set.{name}: a configuration may not change what code is run; set it in the shell"
            )
    if any("pkg:" in str(path) for path in found("searchpath") or []):
        raise ForbiddenTarget("hydra.searchpath: a search path may not name a Python package; name a folder")
    launcher, usual = hydra.get("launcher") or {}, defaults.get("launcher") or {}
    for key in SHELL:
        if launcher.get(key) != usual.get(key) and not was_given(f"hydra.launcher.{key}"):
            raise ForbiddenTarget(
                f"hydra.launcher.{key}: it is run by a shell, so only the command line may set it, with "
                f"'hydra.launcher.{key}=...'"
            )
    for path in _FROM_USER:
        if found(path) not in (None, {}) and not was_given(f"hydra.{path}"):
            raise ForbiddenTarget(f"hydra.{path}: only the command line may set it")
    for key in found("sweeper.params") or {}:
        name = str(key).lstrip("+~")
        adds = str(key).startswith("+") and not was_given("hydra.sweeper.params")
        if adds or name.startswith("hydra") or TARGET in name or "@" in name:
            raise ForbiddenTarget(f"hydra.sweeper.params.{key}: a search may vary values, not code or Hydra itself")
    subdir = str(found("sweep.subdir") or "")
    if ".." in Path(subdir).parts or Path(subdir).is_absolute():
        raise ForbiddenTarget(f"hydra.sweep.subdir={subdir}: a job's folder lies in that of its sweep")
    folders = {f"hydra.{key}": found(key) for key in ("run.dir", "sweep.dir", "launcher.submitit_folder")}
    for key, folder in {"paths.run_dir": run_dir, **folders}.items():
        if folder is not None and not _was_asked_for(folder, overrides):
            raise ForbiddenTarget(
                f"{key}={folder}: a recipe may only write below the current folder; name another with {key}=FOLDER"
            )


def _was_asked_for(folder: str, overrides: Sequence[str]) -> bool:
    """Whether `folder` lies below the current one, or below one that stands on the command line."""
    place = Path(folder).resolve()
    values = (text.partition("=")[2].strip("'\"") for text in overrides)
    named = [Path(value).resolve() for text in values for value in (text, *text.split(",")) if value]
    return any(place.is_relative_to(root) for root in (Path.cwd().resolve(), *named))
