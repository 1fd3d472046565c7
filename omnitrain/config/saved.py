"""The configuration in a run folder: ``config.yaml``, whole, resolved, and of use wherever the folder is moved to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from lightning_utilities.core.apply_func import apply_to_collection

from omnitrain.config.door import read
from omnitrain.config.run_config import RunConfig
from omnitrain.config.typed import ConfigError, plain
from omnitrain.files import CONFIG, WRITTEN, write_text

HERE = "{run_dir}"
"""Stands in `config.yaml` for the folder that it lies in."""
_LARGEST = 4 << 20  # bytes


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """Without anchors: a few lines of them can stand for more than fits into memory, and we write none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to an anchor (*NAME); write the values out")
        return super().compose_node(parent, index)


for _kind in (_Loader, _Dumper):  # numbers such as 1e-3, which YAML 1.1 takes for text
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def portable(values: Any, run_dir: Path) -> Any:
    """Plain `values` with `HERE` where a text names the folder `run_dir` or something in it."""
    inside = re.compile(r"(?<![\w./~-])" + re.escape(str(run_dir)) + r"(?![^/'\",\]\s])")
    return apply_to_collection(values, str, lambda text: inside.sub(HERE, text))


def write_config(config: RunConfig, run_dir: Path) -> None:
    """Write ``run_dir/config.yaml``, all or nothing."""
    values = portable(plain(config), run_dir)
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_text(run_dir / CONFIG, text)


def read_values(run_dir: Path, *, of_any_version: bool = False) -> dict[str, Any]:
    """The plain values of ``run_dir/config.yaml``, their own folder in place. Raises ConfigError if there is none, it
    is no configuration, or (unless they are read `of_any_version`) one of before sizes stood in it."""
    path = run_dir / CONFIG
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path}: larger than {_LARGEST >> 20} MiB, which no configuration is")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{run_dir}: not a run folder (it has no {CONFIG})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ConfigError(f"{path}: not the configuration of a run (it has no mapping `model`)")
    if not of_any_version and str(values["model"].get("_target_", "")).startswith("omnitrain.models.presets."):
        raise ConfigError(
            f"{path}: written by an earlier version, without the model's sizes; `omnitrain report` still reads the "
            "run; for anything else, write its weights with version 0.1.0 (`interop.public_format.save_pretrained`) as "
            "a folder that this version reads"
        )
    own = str(run_dir.resolve())
    before = (values.get("paths") or {}).get("run_dir")
    values = apply_to_collection(values, str, lambda text: text.replace(HERE, own))
    if isinstance(before, str) and before.startswith("/") and before != own:  # of before folders could be moved
        values = apply_to_collection(values, str, lambda text: text.replace(before, own))
    values["paths"] = {**(values.get("paths") or {}), "run_dir": own}
    return values


def check_folder(run_dir: Path) -> None:
    """Refuse a run folder in which a part that a run writes is a link to somewhere else: a run writes into its own
    folder alone. Data that the user linked there are read through the link. Raises ConfigError, which names the
    link."""
    for path in map(run_dir.joinpath, sorted(WRITTEN)):
        if path.is_symlink() and not path.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(f"{path} is a link that leads out of the run folder; put the file itself there")


def read_config(run_dir: Path) -> RunConfig:
    """The configuration of the run in a folder, checked as any other is (`door.read`). Raises ConfigError, which names
    the file, if there is none or it cannot be used."""
    values = read_values(Path(run_dir))
    try:
        return read(values)
    except ConfigError as error:
        raise type(error)(f"{Path(run_dir) / CONFIG}: {error}") from error
