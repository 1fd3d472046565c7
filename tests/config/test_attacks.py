"""Configurations from strangers: a recipe, a run folder, a checkpoint folder, a stage. None may run code, and none may
write outside of the run folder that the user has named.

Every attack would leave a trace in the folder OUTSIDE (mostly the file CANARY) or import the module `stranger`. It has
failed when the verb ends with an error that names the place, and nothing was written or imported.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics.functional.audio  # noqa: F401  whose onnxruntime leaves an id in the home of whoever imports it first
import yaml

from omnitrain.__main__ import main
from omnitrain.config import compose
from omnitrain.config.locations import PACK, PACK_ANNOUNCEMENTS, RECIPES
from omnitrain.config.targets import ForbiddenTarget, check_plain
from omnitrain.config.typed import plain
from omnitrain.models.sizes import CODEC_PRESETS
from omnitrain.runs import chain
from tests.interop.public_models import save_small_folder

STRANGER = "import pathlib\npathlib.Path({canary!r}).touch()\nclass Thing:\n    pass\n"


class Started(Exception):
    """The check has let a command line through, and the job would begin."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where an attack takes place: the user works in `work`; a stranger has made `theirs` in it; `outside` is the user's."""

    work: Path
    theirs: Path
    outside: Path

    @property
    def canary(self) -> Path:
        return self.outside / "canary"

    def fill(self, text: str) -> str:
        names = {"CANARY": self.canary, "OUTSIDE": self.outside, "THEIRS": self.theirs}
        return re.sub("|".join(names), lambda m: str(names[m[0]]), text)

    def recipe(self, text: str, name: str = "evil") -> list[str]:
        """Words of the command line that use a recipe of the stranger's."""
        path = self.theirs / "recipe" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("# @package _global_\n" + self.fill(text), encoding="utf-8")
        return ["--config-dir", str(self.theirs), f"+recipe={name}"]

    def files(self, *folders: Path) -> dict[str, tuple[bytes | str, int]]:
        """What stands in `folders`: each file's content and time."""
        found: dict[str, tuple[bytes | str, int]] = {}
        for path in (p for folder in folders for p in sorted(folder.rglob("*"))):
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
            found[str(path)] = content, path.lstat().st_mtime_ns if path.is_file() else 0
        return found

    def assert_nothing_happened(self) -> None:
        assert sorted(p.name for p in self.outside.iterdir()) == ["victim.txt"]
        assert (self.outside / "victim.txt").read_text() == "precious"
        assert "stranger" not in sys.modules


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene(work=tmp_path / "work", theirs=tmp_path / "work" / "theirs", outside=tmp_path / "outside")
    for folder in (scene.work, scene.theirs, scene.outside):
        folder.mkdir()
    (scene.outside / "victim.txt").write_text("precious")
    (tmp_path / "modules" / "stranger").mkdir(parents=True)
    (tmp_path / "modules" / "stranger" / "__init__.py").write_text(STRANGER.format(canary=str(scene.canary)))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("OMNITRAIN_TEST_TARGET", "os.system")
    monkeypatch.chdir(scene.work)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return scene


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check lets through does not run, but raises `Started`."""

    def started(*args: object, **options: object) -> int:
        raise Started

    monkeypatch.setattr(compose, "run_hydra", started)


def assert_refused(
    scene: Scene, arguments: Sequence[str], place: str, capsys: pytest.CaptureFixture[str], *watched: Path
) -> None:
    """`main(arguments)` ends with an error that matches `place`, and has changed nothing: neither where the user works
    nor in the folders `watched`."""
    before = scene.files(scene.work, *watched)
    capsys.readouterr()
    status = main(list(arguments))
    error = capsys.readouterr().err
    scene.assert_nothing_happened()
    assert status not in (0, None), error
    assert_explained(error, place)
    assert scene.files(scene.work, *watched) == before


def assert_explained(error: str, place: str) -> None:
    """One error of a few lines that a terminal can show, and that says where to look."""
    assert re.search(r"^error: ", error, re.MULTILINE), error
    assert re.search(place, error), error
    assert "Traceback" not in error
    assert "\x1b" not in error
    assert len(error.strip().splitlines()) <= 8, error


# ------------------------------------------------------------------------------------------------- what may be named

NAMED = {
    "shell": ("os.system", "{command: touch CANARY}"),
    "subprocess": ("subprocess.run", "{args: [touch, CANARY]}"),
    "popen": ("subprocess.Popen", "{_args_: [[touch, CANARY]]}"),
    "eval": ("builtins.eval", '{_args_: [\'open("CANARY", "w")\']}'),
    "exec": ("builtins.exec", '{_args_: [\'open("CANARY", "w")\']}'),
    "import": ("builtins.__import__", "{name: stranger}"),
    "import_module": ("importlib.import_module", "{name: stranger}"),
    "run_path": ("runpy.run_path", "{path_name: THEIRS/evil.py}"),
    "pickle": ("pickle.load", "{file: THEIRS/evil.pickle}"),
    "numpy": ("numpy.load", "{file: THEIRS/evil.npy, allow_pickle: true}"),
    "torch_load": ("torch.load", "{f: THEIRS/evil.ckpt, weights_only: false}"),
    "torch_hub": ("torch.hub.load", "{repo_or_dir: THEIRS, model: evil, source: local}"),
    "load_inline": ("torch.utils.cpp_extension.load_inline", "{name: evil, cpp_sources: ''}"),
    "sympy": ("torch.utils._sympy.functions.sympy.sympify", "{a: '__import__(\"stranger\")'}"),
    "dict_config": ("logging.config.dictConfig", "{config: {version: 1}}"),
    "file_handler": ("logging.FileHandler", "{filename: CANARY}"),
    "wandb": ("wandb.init", "{dir: OUTSIDE, mode: offline}"),
    "instantiate": ("hydra.utils.instantiate", "{config: {}}"),
    "get_method": ("hydra.utils.get_method", "{path: os.system}"),
    "hydra_locate": ("hydra._internal.utils._locate", "{path: stranger.Thing}"),
    "yaml": ("yaml.unsafe_load", "{stream: '!!python/object/apply:os.system [touch CANARY]'}"),
    "through_our_module": ("omnitrain.files.os.system", "{command: touch CANARY}"),
    "through_our_class": ("omnitrain.data.mixture.os.system", "{command: touch CANARY}"),
    "through_torch": ("torch.nn.functional.importlib.import_module", "{name: stranger}"),
    "through_torch_load": ("torch.nn.modules.module.torch.load", "{f: THEIRS/evil.ckpt}"),
    "through_lightning": ("lightning.pytorch.loggers.wandb.os.system", "{command: touch CANARY}"),
    "write_text": ("omnitrain.files.write_text", "{path: CANARY, text: x}"),
    "write_json": ("omnitrain.files.write_json", "{path: CANARY, value: x}"),
    "append_line": ("omnitrain.files.append_line", "{path: CANARY, line: x}"),
    "atomic": ("omnitrain.files.atomic", "{path: CANARY}"),
    "reexported_writer": ("omnitrain.training.callbacks.run_record.write_json", "{path: CANARY, value: x}"),
    "write_shards": ("omnitrain.data.shards.write_shards", "{samples: [], folder: OUTSIDE/shards, name: x}"),
    "bad_sample_log": ("omnitrain.data.stream.BadSampleLog", "{path: CANARY}"),
    "unbound_method": (
        "omnitrain.data.stream.BadSampleLog.write",
        "{self: {_target_: omnitrain.data.stream.BadSampleLog, path: CANARY}, record: {}}",
    ),
    "checkpoint_io": (
        "lightning.fabric.plugins.io.torch_io.TorchCheckpointIO.load_checkpoint",
        "{self: null, path: THEIRS/evil.ckpt, weights_only: false}",
    ),
    "checkpoint_io_save": (
        "lightning.fabric.plugins.io.torch_io.TorchCheckpointIO.save_checkpoint",
        "{self: null, checkpoint: {}, path: CANARY}",
    ),
    "csv_elsewhere": ("lightning.pytorch.loggers.csv_logs.ExperimentWriter", "{log_dir: OUTSIDE/log}"),
    "load_from_checkpoint": (
        "omnitrain.training.thinker.ThinkerModule.load_from_checkpoint",
        "{checkpoint_path: THEIRS/evil.ckpt, weights_only: false}",
    ),
    "lightning_cli": ("lightning.pytorch.cli.LightningCLI", "{args: []}"),
    "lightning_lambda": ("lightning.pytorch.callbacks.LambdaCallback", "{setup: {_target_: os.getcwd}}"),
    "our_verbs": ("omnitrain.cli.generate.main", "{arguments: []}"),
    "our_main": ("omnitrain.__main__.main", "{argv: []}"),
    "start_stages": ("omnitrain.runs.chain.run_stages", "{stages: [], run_dir: OUTSIDE, done: {}}"),
    "save_pretrained": ("omnitrain.interop.public_format.save_pretrained", "{model: null, folder: OUTSIDE/x}"),
    "globals": ("omnitrain.models.omni.OmniModel.__init__.__globals__", "{}"),
    "globals_of_torch": ("torch.nn.Linear.__init__.__globals__", "{}"),
    "subclasses": ("torch.nn.Linear.__base__.__subclasses__", "{}"),
    "the_package": ("omnitrain", "{}"),
    "a_module": ("omnitrain.training.callbacks", "{}"),
    "a_prefix_only": ("omnitrainer.training.callbacks.SpikeGuard", "{}"),
    "cyrillic": ("оmnitrain.training.callbacks.SpikeGuard", "{}"),
    "fullwidth": ("ｏs.system", "{command: touch CANARY}"),
    "space_before": ("' os.system'", "{command: touch CANARY}"),
    "space_behind": ("'omnitrain.training.callbacks.SpikeGuard '", "{}"),
    "line_break": ('"omnitrain.training.callbacks.SpikeGuard\\nos.system"', "{}"),
    "nul": ('"os.system\\0"', "{command: touch CANARY}"),
    "escape_sequence": ('"os.sys\\e[2Jtem"', "{command: touch CANARY}"),
    "leading_dot": (".os.system", "{command: touch CANARY}"),
    "two_dots": ("omnitrain..files.write_text", "{path: CANARY, text: x}"),
    "only_dots": ("'...'", "{}"),
    "empty": ("''", "{}"),
    "list": ("[os.system]", "{command: touch CANARY}"),
    "mapping": ("{name: os.system}", "{command: touch CANARY}"),
    "number": ("17", "{}"),
    "yes": ("true", "{}"),
    "colon": ("'os:system'", "{command: touch CANARY}"),
    "slash": ("os/system", "{command: touch CANARY}"),
}
"""What a configuration names as the code to call, and the arguments."""


@pytest.mark.parametrize("name", NAMED)
def test_named_in_a_configuration(name: str, scene: Scene) -> None:
    target, arguments = NAMED[name]
    text = scene.fill(f"{{callbacks: {{evil: {{_target_: {target}, arguments: {arguments}}}}}}}")
    before = set(sys.modules)
    with pytest.raises(ForbiddenTarget, match=r"callbacks\.evil") as refusal:
        check_plain(yaml.safe_load(text))
    scene.assert_nothing_happened()
    assert "\x1b" not in str(refusal.value)
    assert not {name for name in set(sys.modules) - before if name.startswith(("lightning", "torch", "omnitrain"))}


@pytest.mark.parametrize("place", ["model", "data", "module", "optim", "trainer", "module.loss", "logger.csv"])
def test_named_in_every_place(place: str, scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"++{place}._target_=os.system", f"++{place}.command='touch {scene.canary}'"]
    assert_refused(scene, ["fit", *words], place.replace(".", "[./]"), capsys)


def test_named_in_a_sweep(scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = scene.recipe("callbacks: {evil: " + SHELL + "}")
    assert_refused(scene, ["fit", "-m", *words, "seed=0,1"], r"callbacks[./]evil", capsys)


# --------------------------------------------------------------------------------------------------- how it is written

SHELL = "{_target_: os.system, command: touch CANARY}"
WRITTEN = {
    # Escaped: a string for the check, an interpolation for who resolves the resolved configuration once more.
    "escaped_create": ("callbacks: {evil: '\\${oc.create:" + SHELL + "}'}", r"callbacks[./]evil"),
    "escaped_decode": ("callbacks: {evil: '\\${oc.decode:\"" + SHELL + "\"}'}", r"callbacks[./]evil"),
    "escaped_twice": ("callbacks: {evil: '\\\\\\${oc.create:" + SHELL + "}'}", r"callbacks[./]evil"),
    "escaped_in_a_list": ("trainer: {plugins: ['\\${oc.create:" + SHELL + "}']}", r"trainer[./]plugins"),
    "escaped_in_the_model": ("model: {thinker: '\\${oc.create:" + SHELL + "}'}", r"model[./]thinker"),
    "escaped_in_an_argument": ("callbacks: {checkpoint: {dirpath: '\\${oc.env:HOME}'}}", r"checkpoint[./]dirpath"),
    "escaped_target": ("callbacks: {evil: {_target_: 'omnitrain.\\${name}', path: CANARY}}", r"callbacks[./]evil"),
    "escaped_reference": (
        f"stage_overrides: {{a: {SHELL.replace('_target_', 'other')}}}\ncallbacks: {{evil: '\\${{stage_overrides.a}}'}}",
        r"callbacks[./]evil",
    ),
    "escaped_in_a_key": ("callbacks: {'\\${name}': " + SHELL + "}", r"callbacks|name"),
    "escaped_by_a_resolver": (
        "callbacks: {evil: \"${oc.decode:'\\\\${oc.create:{_target_:os.system,command:touch}}'}\"}",
        r"callbacks[./]evil",
    ),
    # Made by resolvers.
    "create": ("callbacks: {evil: '${oc.create:" + SHELL + "}'}", r"callbacks[./]evil"),
    "decode": ("callbacks: {evil: \"${oc.decode:'" + SHELL + "'}\"}", r"callbacks[./]evil"),
    "environment": ("callbacks: {evil: {_target_: '${oc.env:OMNITRAIN_TEST_TARGET}'}}", r"callbacks[./]evil"),
    "select": ("name: os.system\ncallbacks: {evil: {_target_: '${oc.select:name}'}}", r"callbacks[./]evil"),
    "pieces": (
        "name: os\npaths: {data_dir: .system}\ncallbacks: {evil: {_target_: '${name}${paths.data_dir}'}}",
        "evil",
    ),
    "hydra_name": (
        "hydra: {job: {name: os.system}}\ncallbacks: {evil: {_target_: '${hydra:job.name}'}}",
        "evil|job.name",
    ),
    # By the ways of YAML.
    "merge_key": ("callbacks: {evil: {<<: " + SHELL + "}}", r"callbacks[./]evil"),
    "anchor": ("optim: &x " + SHELL + "\ncallbacks: {evil: *x}", r"optim|callbacks[./]evil"),
    "quoted_key": ('callbacks: {evil: {"\\x5ftarget\\x5f": os.system, command: touch CANARY}}', r"callbacks[./]evil"),
    "tag_object": ("name: !!python/object/apply:os.system ['touch CANARY']", r"name|python/object|evil"),
    "tag_module": ("name: !!python/module:stranger", r"name|python/module|evil"),
    "tag_name": ("callbacks: {evil: {_target_: !!python/name:os.system }}", r"python/name|evil"),
    # By Hydra's other keys of a node.
    "partial": ("callbacks: {evil: {_target_: os.system, _partial_: true}}", r"callbacks[./]evil"),
    "not_recursive": (
        "callbacks: {evil: {_target_: omnitrain.training.callbacks.SpikeGuard, _recursive_: false, run_dir: "
        + SHELL
        + "}}",
        r"callbacks[./]evil",
    ),
    "convert_object": (
        "callbacks: {evil: {_target_: omnitrain.training.callbacks.SpikeGuard, _convert_: object, run_dir: "
        + SHELL
        + "}}",
        r"callbacks[./]evil",
    ),
    "positional": ("callbacks: {evil: {_target_: os.system, _args_: [touch CANARY]}}", r"callbacks[./]evil"),
    "positional_of_ours": (
        "callbacks: {evil: {_target_: omnitrain.training.callbacks.SpikeGuard, _args_: [" + SHELL + "]}}",
        r"callbacks[./]evil",
    ),
    "in_a_list": ("trainer: {plugins: [1, [2, " + SHELL + "]]}", r"trainer[./]plugins"),
    "in_data": ("data: {limits: " + SHELL + "}", r"data[./]limits"),
    "in_a_source": ("data: {sources: {evil: {path: " + SHELL + "}}}", r"data[./]sources"),
    "in_the_study": ("study: {arms: {evil: " + SHELL + "}}", r"study"),
    "in_the_evaluation": ("evaluation: {max_samples: " + SHELL + "}", r"evaluation"),
    "in_a_new_key": ("evil: " + SHELL, "evil"),
    "200_deep": ("callbacks: {evil: " + "{a: " * 200 + SHELL + "}" * 200 + "}", r"evil"),
    "defaults": ("defaults: [/stranger@callbacks.evil]\n", r"stranger"),
    "package_import": ("defaults: ['pkg://stranger/conf']\n", r"stranger"),
    "absolute_default": ("defaults: ['file://OUTSIDE/victim']\n", r"victim"),
}
"""A recipe, and what the error must name."""


@pytest.mark.parametrize("name", WRITTEN)
def test_written_in_a_recipe(name: str, scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]) -> None:
    text, place = WRITTEN[name]
    assert_refused(scene, ["fit", *scene.recipe(text + "\n")], place, capsys)


def test_put_together_from_two_files(scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]) -> None:
    scene.recipe("callbacks: {evil: {command: touch CANARY}}", "half")
    words = scene.recipe("defaults: [half]\ncallbacks: {evil: {_target_: os.system}}\n")
    assert_refused(scene, ["fit", *words], r"callbacks[./]evil", capsys)


def test_put_into_a_group(scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]) -> None:
    (scene.theirs / "optim").mkdir()
    (scene.theirs / "optim" / "evil.yaml").write_text(scene.fill(SHELL))
    assert_refused(scene, ["fit", "--config-dir", str(scene.theirs), "optim=evil"], "optim", capsys)


@pytest.mark.parametrize("bomb", ["aliases", "nesting", "flow_nesting"])
def test_a_bomb(bomb: str, scene: Scene) -> None:
    """A few lines of YAML that grow to gigabytes, or deeper than Python recurses, are refused in a moment."""
    texts = {
        "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "nesting": "".join(" " * i + f"a{i}:\n" for i in range(2000)) + " " * 2000 + "x: 1\n",
        "flow_nesting": "a: " + "[" * 20_000 + "]" * 20_000 + "\n",
    }
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20)); "
        "from omnitrain.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = scene.recipe(texts[bomb])
    line = [sys.executable, "-c", limited, "fit", *words, "--cfg", "job"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr[-2000:]
    assert_explained(result.stderr, r"evil|a0|\ba\b|YAML|deep|large")


# --------------------------------------------------------------------------------------------------- Hydra's own keys

HYDRA = {
    "launcher": ("hydra: {launcher: {_target_: os.system}}", r"hydra[./]launcher"),
    "sweeper": ("hydra: {sweeper: {_target_: stranger.Thing}}", r"hydra[./]sweeper"),
    "sampler": (
        "defaults: [{override /hydra/sweeper: optuna}]\nhydra: {sweeper: {sampler: {_target_: stranger.Thing}}}",
        r"hydra[./]sweeper",
    ),
    "search_space": (
        "defaults: [{override /hydra/sweeper: optuna}]\nhydra: {sweeper: {custom_search_space: stranger.Thing}}",
        r"custom_search_space",
    ),
    "plugin": ("hydra: {launcher: {_target_: hydra_plugins.stranger.Thing}}", r"hydra[./]launcher"),
    "callback": ("hydra: {callbacks: {evil: {_target_: stranger.Thing}}}", r"hydra[./]callbacks"),
    "callback_of_ours": ("hydra: {callbacks: {evil: {_target_: omnitrain.files.write_text}}}", r"hydra[./]callbacks"),
    "callback_of_hydra": (
        "hydra: {callbacks: {evil: {_target_: hydra.experimental.callbacks.PickleJobInfoCallback}}}",
        r"hydra[./]callbacks",
    ),
    "callback_escaped": (
        "hydra: {callbacks: {evil: '\\${oc.create:{_target_: stranger.Thing}}'}}",
        r"hydra[./]callbacks",
    ),
    "sweep_of_targets": (
        "hydra: {sweeper: {params: {+callbacks.evil._target_: 'os.system,os.getcwd'}}}",
        r"sweeper[./]params|callbacks[./]evil",
    ),
    "sweep_of_environment": (
        "hydra: {sweeper: {params: {+hydra.job.env_set.OMNITRAIN_TARGETS: 'os,posix', "
        "'+callbacks.evil': '{_target_:os.system,command:\"touch CANARY\"}'}}}",
        r"sweeper[./]params",
    ),
    "sweep_of_logging": (
        "hydra: {sweeper: {params: {+hydra.job_logging.filters.evil: '{\"()\":stranger.Thing}'}}}",
        r"sweeper[./]params",
    ),
    "sweep_of_folders": ("hydra: {sweeper: {params: {hydra.sweep.dir: OUTSIDE/a}}}", r"sweeper[./]params"),
    "sweep_of_recipes": (
        "hydra: {sweeper: {params: {+recipe: 'second,evil2'}}}",
        r"sweeper[./]params|callbacks[./]evil",
    ),
    "logging_factory": ("hydra: {job_logging: {filters: {evil: {(): stranger.Thing}}}}", r"hydra[./]job_logging"),
    "logging_class": ("hydra: {job_logging: {handlers: {evil: {class: stranger.Thing}}}}", r"hydra[./]job_logging"),
    "logging_formatter": ("hydra: {hydra_logging: {formatters: {evil: {class: stranger.Thing}}}}", "hydra_logging"),
    "logging_ext": (
        "hydra: {job_logging: {handlers: {evil: {class: logging.StreamHandler, stream: 'ext://stranger.Thing'}}}}",
        r"hydra[./]job_logging",
    ),
    "logging_cfg": (
        "hydra: {job_logging: {evil: stranger.Thing, filters: {evil: {(): 'cfg://evil'}}}}",
        r"hydra[./]job_logging",
    ),
    "logging_file": (
        "hydra: {job_logging: {version: 1, handlers: {evil: {class: logging.FileHandler, filename: CANARY}}, "
        "root: {handlers: [evil]}}}",
        r"hydra[./]job_logging",
    ),
    "logging_socket": (
        "hydra: {job_logging: {handlers: {evil: {class: logging.handlers.SocketHandler, host: h, port: 1}}}}",
        r"hydra[./]job_logging",
    ),
    "logging_config": (
        "hydra: {job_logging: {handlers: {evil: {(): logging.config.listen}}}}",
        r"hydra[./]job_logging",
    ),
    **{
        f"environment_{name}": (f"hydra: {{job: {{env_set: {{{name}: THEIRS}}}}}}", rf"env_set[./]?.*{name}")
        for name in (
            "PYTHONPATH",
            "PYTHONSTARTUP",
            "LD_PRELOAD",
            "OMNITRAIN_TARGETS",
            "PATH",
            "CC",
            "BASH_ENV",
            "HF_HOME",
            "TORCHINDUCTOR_CACHE_DIR",
            "WANDB_DIR",
        )
    },
    "environment_by_reference": (
        "hydra: {job: {env_set: '${oc.create:{PYTHONPATH:THEIRS}}'}}",
        r"env_set",
    ),
    "search_path_package": ("hydra: {searchpath: ['pkg://stranger']}", r"searchpath"),
    "search_path_file": ("hydra: {searchpath: ['file://OUTSIDE']}", r"searchpath"),
    "run_folder": ("hydra: {run: {dir: OUTSIDE}}", r"hydra[./]run[./]dir"),
    "sweep_folder": ("hydra: {sweep: {dir: OUTSIDE}}", r"hydra[./]sweep[./]dir"),
    "sweep_subfolder": ("hydra: {sweep: {subdir: ../../../../outside}}", r"hydra[./]sweep[./]subdir"),
    "output_subfolder": ("hydra: {output_subdir: ../../outside}", r"output_subdir"),
    "output_subfolder_absolute": ("hydra: {output_subdir: OUTSIDE/x}", r"output_subdir"),
    "change_folder": ("hydra: {job: {chdir: true}, run: {dir: OUTSIDE}}", r"chdir|hydra[./]run[./]dir"),
    "shell_before_jobs": (
        "defaults: [{override /hydra/launcher: submitit_slurm}]\nhydra: {launcher: {setup: [touch CANARY]}}",
        r"launcher[./]setup",
    ),
    "options_of_sbatch": (
        "defaults: [{override /hydra/launcher: submitit_slurm}]\n"
        "hydra: {launcher: {additional_parameters: {wrap: touch CANARY}}}",
        r"additional_parameters",
    ),
    "python_of_sbatch": (
        "defaults: [{override /hydra/launcher: submitit_slurm}]\nhydra: {launcher: {+python: THEIRS/python}}",
        r"launcher",
    ),
    "folder_of_sbatch": (
        "defaults: [{override /hydra/launcher: submitit_slurm}]\nhydra: {launcher: {submitit_folder: OUTSIDE/s}}",
        r"submitit_folder",
    ),
    "comment_of_sbatch": (
        "defaults: [{override /hydra/launcher: submitit_slurm}]\n"
        'hydra: {launcher: {comment: "x\\n#SBATCH --wrap=touch"}}',
        r"launcher[./]comment",
    ),
    "folder_of_joblib": (
        "defaults: [{override /hydra/launcher: joblib}]\nhydra: {launcher: {temp_folder: OUTSIDE/j}}",
        r"temp_folder",
    ),
    "storage_of_optuna": (
        "defaults: [{override /hydra/sweeper: optuna}]\nhydra: {sweeper: {storage: 'sqlite:///CANARY'}}",
        r"sweeper[./]storage",
    ),
}
"""A recipe, and what the error must name."""


@pytest.mark.parametrize("name", HYDRA)
def test_keys_of_hydra(name: str, scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]) -> None:
    text, place = HYDRA[name]
    scene.recipe("name: second", "second")
    scene.recipe("callbacks: {evil: {_target_: os.system}}", "evil2")
    assert_refused(scene, ["fit", "-m", *scene.recipe(text + "\n"), "seed=0,1"], place, capsys)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        pytest.param(["--experimental-rerun", "THEIRS/evil.pickle"], "rerun", id="pickle"),
        pytest.param(["--experimental-rer=THEIRS/evil.pickle"], "rer", id="pickle_abbreviated"),
        pytest.param(["hydra.searchpath=[pkg://stranger]"], "searchpath", id="search_path"),
        pytest.param(["--config-path", "pkg://stranger"], "config-path|stranger", id="config_path"),
        pytest.param(
            ["-m", "+t=name,stranger.Thing", "+callbacks.evil={_target_:'${t}'}"], "callbacks[./]evil", id="second_job"
        ),
        pytest.param(["+recipe=../../theirs/recipe/evil"], "recipe", id="recipe_by_path"),
        pytest.param(["--config-dir", "pkg://stranger"], "config-dir", id="config_dir_package"),
    ],
)
def test_on_the_command_line(
    words: list[str], place: str, scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (scene.theirs / "evil.pickle").write_bytes(poisoned(scene.canary))
    assert_refused(scene, ["fit", *map(scene.fill, words)], place, capsys)


ELSEWHERE = {
    "run_dir": ("paths: {run_dir: OUTSIDE/run}", r"paths[./]run_dir"),
    "run_dir_upwards": ("paths: {run_dir: ../outside/run}", r"paths[./]run_dir"),
    "checkpoints": ("callbacks: {checkpoint: {dirpath: OUTSIDE/c}}", r"checkpoint[./]dirpath"),
    "checkpoints_upwards": ("callbacks: {checkpoint: {dirpath: '${paths.run_dir}/../../outside/c'}}", r"dirpath"),
    "metrics": ("logger: {csv: {run_dir: OUTSIDE/m}}", r"logger[./]csv"),
    "record": ("callbacks: {record: {run_dir: OUTSIDE/r}}", r"callbacks[./]record"),
    "skipped_steps": ("callbacks: {spike_guard: {run_dir: OUTSIDE/r}}", r"spike_guard"),
    "bad_samples": ("data: {bad_samples_path: OUTSIDE/victim.txt}", r"bad_samples_path"),
    "lightning": ("trainer: {default_root_dir: OUTSIDE}", r"default_root_dir"),
    "wandb": ("defaults: [{override /logger: wandb}]\nlogger: {wandb: {save_dir: OUTSIDE}}", r"save_dir"),
}
"""Recipes that write elsewhere than into the run folder."""


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_recipe_that_writes_elsewhere(
    name: str, scene: Scene, no_job: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text, place = ELSEWHERE[name]
    words = scene.recipe(text + "\n")
    named = [] if "paths[./]run_dir" in place else ["paths.run_dir=run"]
    assert_refused(scene, ["fit", *words, *named], place, capsys)


LOOSE = {
    "profiler": (
        "trainer: {profiler: {_target_: lightning.pytorch.profilers.SimpleProfiler, dirpath: OUTSIDE, filename: p}}",
        r"profiler",
    ),
    "profiler_file": (
        "trainer: {profiler: {_target_: lightning.pytorch.profilers.SimpleProfiler, filename: ../../outside/p}}",
        r"profiler",
    ),
    "logger": (
        "logger: {evil: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: OUTSIDE}}",
        r"logger[./]evil",
    ),
    "logger_version": (
        "logger: {evil: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x, version: ../../../outside/v}}",
        r"logger[./]evil",
    ),
    "checkpoint": (
        "callbacks: {evil: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: OUTSIDE}}",
        r"callbacks[./]evil",
    ),
    "checkpoint_url": (
        "callbacks: {evil: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: 'file://OUTSIDE/c'}}",
        r"callbacks[./]evil",
    ),
    "checkpoint_home": (
        "callbacks: {evil: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: '~', every_n_train_steps: 1}}",
        r"callbacks[./]evil",
    ),
}
"""Constructors with loose keywords that would write elsewhere; looked at when they are built."""


@pytest.mark.parametrize("name", LOOSE)
def test_a_constructor_that_writes_elsewhere(
    name: str, toy: list[str], scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(scene.outside))
    monkeypatch.setenv("MPLCONFIGDIR", str(scene.theirs))  # its list of fonts
    text, place = LOOSE[name]
    words = [*scene.recipe(text + "\n"), *toy, "paths.run_dir=run", "trainer.max_steps=1"]
    assert main(["fit", *words]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, place)


# ------------------------------------------------------------------------------------------------------------- stages

STAGES = {
    "another_program": "[sh, -c, touch CANARY]",
    "another_verb": "[exec, CANARY]",
    "hidden_verb": "[__main__, x]",
    "no_verb": "[--help]",
    "shell": "[fit, +callbacks.evil._target_=os.system]",
    "shell_quoted": '["fit; touch CANARY"]',
    "their_folder": "[fit, --config-dir, THEIRS, +recipe=second]",
    "search_path": "[fit, 'hydra.searchpath=[pkg://stranger]']",
    "config_path": "[fit, --config-path, THEIRS]",
    "config_name": "[fit, --config-name, stranger]",
    "rerun": "[fit, --experimental-rerun, THEIRS/evil.pickle]",
    "rerun_abbreviated": "[fit, --experimental-rer=THEIRS/evil.pickle]",
    "environment": "[fit, +hydra.job.env_set.PYTHONPATH=THEIRS]",
    "shell_before_jobs": "[fit, -m, hydra/launcher=submitit_slurm, 'hydra.launcher.setup=[touch CANARY]']",
    "run_folder_of_hydra": "[fit, hydra.run.dir=OUTSIDE]",
    "run_folder": "[fit, paths.run_dir=OUTSIDE/run]",
    "talk": "[talk, THEIRS, hello, --out, OUTSIDE/victim.txt]",
    "talk_joined": "[talk, THEIRS, hello, --out=OUTSIDE/victim.txt]",
    "import": "[data, import, --mapping, THEIRS/x.yaml, --out, OUTSIDE]",
    "inspect": "[data, inspect, --html, OUTSIDE/victim.txt]",
    "report": "[report, THEIRS, --out, OUTSIDE/victim.txt]",
    "collect": "[report, --study, THEIRS, --collect, OUTSIDE]",
    "search": "[search, OUTSIDE]",
    "convert": "[convert, from-hf, THEIRS, OUTSIDE/x]",
    "convert_option": "[convert, to-hf, --layout=full, THEIRS, OUTSIDE/x, --layout, thinker]",
    "convert_dash": "[convert, to-hf, --, THEIRS, -/../../x]",
    "convert_base": "[convert, to-hf, --base, a, THEIRS, OUTSIDE/x, --base, b]",
}
"""Command of a stage in a recipe."""


@pytest.fixture
def no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a stage does not start, but raises `Started`."""

    def started(*args: object, **options: object) -> None:
        raise Started

    monkeypatch.setattr(chain.subprocess, "Popen", started)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage(name: str, scene: Scene, no_stage: None, capsys: pytest.CaptureFixture[str]) -> None:
    (scene.theirs / "evil.pickle").write_bytes(poisoned(scene.canary))
    scene.recipe("callbacks: {evil: " + SHELL + "}", "second")
    words = scene.recipe(f"stages: [{{name: bad, command: {STAGES[name]}}}]")
    assert main(["fit", *words, "paths.run_dir=run"]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, r"stages\[0\]|bad")


def test_words_that_a_recipe_adds_to_a_stage(scene: Scene, no_stage: None, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "stage_overrides: {talker: ['+callbacks.evil._target_=os.system']}"
    words = scene.recipe(f"defaults: [speech]\nspeech: {PACK_ANNOUNCEMENTS}\n{evil}")
    assert main(["fit", *words, "paths.run_dir=run"]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, r"callbacks[./]evil")


# -------------------------------------------------------------------------------------------------------- run folders


def poisoned(canary: Path) -> bytes:
    """A pickle that makes the file `canary` when it is loaded."""

    class Poison:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {canary}",)

    return pickle.dumps(Poison())


@pytest.fixture(scope="module")
def a_run(toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fit` leaves behind after one step."""
    folder = tmp_path_factory.mktemp("a") / "run"
    assert main(["fit", *toy, "trainer.max_steps=1", f"paths.run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def their_run(a_run: Path, scene: Scene) -> Path:
    return Path(shutil.copytree(a_run, scene.theirs / "run"))


def put(run: Path, dotted: str, value: Any) -> None:
    """Set a key of the configuration that is saved in a run folder."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    node, (*parents, last) = config, dotted.split(".")
    for key in parents:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


DOORS = {
    "generate": ["generate", "RUN", "hello"],
    "talk": ["talk", "RUN", "hello", "--out", "answer.wav"],
    "encode": ["data", "encode", "RUN", str(PACK), "--out", "codes", "--workers", "1"],
    "validate": ["validate", "RUN"],
    "test": ["test", "RUN"],
    "predict": ["predict", "RUN"],
    "fit": ["fit", "RUN"],
    "codec": ["fit", "TOY", "model=tiny_speech", "codec=RUN", "trainer.max_steps=1", "paths.run_dir=mine"],
    "init_from": ["fit", "TOY", "module.init_from=RUN", "trainer.max_steps=1", "paths.run_dir=mine"],
    "report": ["report", "RUN"],
}
READS_NO_CODE = ("init_from", "report")
"""They take weights or texts from a run folder and build nothing from its configuration."""
POISON = {
    "model": ("model", {"_target_": "os.system", "command": "touch CANARY"}),
    "data": ("data", {"_target_": "omnitrain.files.write_text", "path": "CANARY", "text": "x"}),
    "escaped": ("model.thinker", "\\${oc.create:{_target_: os.system, command: touch CANARY}}"),
    "created": ("model.special_tokens", "${oc.create:{_target_: os.system, command: touch CANARY}}"),
    "escaped_data": ("data.limits", "\\${oc.create:{_target_: os.system, command: touch CANARY}}"),
    "environment": ("model._target_", "${oc.env:OMNITRAIN_TEST_TARGET}"),
}


@pytest.mark.parametrize(
    ("door", "poison"), [(d, p) for d in DOORS for p in POISON if d not in READS_NO_CODE or p in ("model", "escaped")]
)
def test_a_run_folder(door: str, poison: str, their_run: Path, toy: list[str], scene: Scene, capsys) -> None:
    key, value = POISON[poison]
    filled = yaml.safe_load(scene.fill(yaml.safe_dump(value, width=10_000)))
    put(their_run, key, filled)
    words = [w for word in DOORS[door] for w in (toy if word == "TOY" else [word.replace("RUN", str(their_run))])]
    capsys.readouterr()
    status = main(words)
    error = capsys.readouterr().err
    scene.assert_nothing_happened()
    assert "Traceback" not in error
    if door not in READS_NO_CODE:
        assert status not in (0, None), error
        assert_explained(error, r"model|data|codec")


KEYS_OF_A_RUN = {
    "hydra": ("hydra.callbacks.evil", {"_target_": "stranger.Thing"}),
    "search_path": ("hydra.searchpath", ["pkg://stranger"]),
    "defaults": ("defaults", ["/stranger", {"pkg://stranger": "x"}]),
    "callback": ("callbacks.evil", {"_target_": "stranger.Thing"}),
    "logger": ("logger.evil", {"_target_": "stranger.Thing"}),
    "task": ("eval", {"path": "x", "tasks": {"evil": {"_target_": "stranger.Thing"}}}),
    "strategy": ("trainer.strategy", {"_target_": "stranger.Thing"}),
    "logged": ("trainer.logger", {"_target_": "stranger.Thing"}),
}


@pytest.mark.parametrize("name", KEYS_OF_A_RUN)
def test_other_keys_of_a_run_folder(name: str, their_run: Path, scene: Scene, capsys) -> None:
    """Hydra's keys of a run folder are not read at all; whatever else names code is refused."""
    put(their_run, *KEYS_OF_A_RUN[name])
    status = main(["validate", str(their_run)])
    scene.assert_nothing_happened()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if name not in ("hydra", "search_path", "defaults"):
        assert status == 1
        assert_explained(error, "evil|strategy|logger")


def test_task_files_of_a_run_folder(their_run: Path, scene: Scene, capsys) -> None:
    """lm-evaluation-harness calls Python from `!function` in the YAML of a task."""
    pytest.importorskip("lm_eval")
    (their_run / "tasks").mkdir()
    (their_run / "tasks" / "mmlu.yaml").write_text("task: mmlu\ndoc_to_text: !function evil.Thing\n")
    (their_run / "tasks" / "evil.py").write_text(STRANGER.format(canary=str(scene.canary)))
    target = {"_target_": "omnitrain.tasks.lm_harness.HarnessTask", "name": "mmlu", "tasks": ["mmlu"], "metric": "acc"}
    put(their_run, "eval", {"path": None, "tasks": {"mmlu": {**target, "path": str(their_run / "tasks")}}})
    put(their_run, "evaluation.max_samples", 1)
    assert main(["test", str(their_run)]) == 0  # the run's own scores: which benchmarks are run, only the user says
    scene.assert_nothing_happened()
    assert not (their_run / "eval" / "tasks").exists()


OUTPUTS = (
    "paths.run_dir",
    "callbacks.checkpoint.dirpath",
    "callbacks.spike_guard.run_dir",
    "callbacks.record.run_dir",
    "logger.csv.run_dir",
    "trainer.default_root_dir",
)
"""Keys that say where a run writes."""


@pytest.mark.parametrize("written", ["absolute", "upwards", "file"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_run_folder_that_writes_elsewhere(written: str, verb: str, their_run: Path, scene: Scene, capsys) -> None:
    """The verb is refused, or writes into the folder that the user has named and nowhere else."""
    where = {"absolute": "OUTSIDE/NAME", "upwards": "../outside/NAME", "file": "file://OUTSIDE/NAME"}[written]
    for key in OUTPUTS:
        put(their_run, key, scene.fill(where.replace("NAME", key)))
    put(their_run, "data.bad_samples_path", str(scene.outside / "victim.txt"))
    put(
        their_run,
        "evaluation",
        {**yaml.safe_load((their_run / "config.yaml").read_text())["evaluation"], "max_samples": 1},
    )
    words = ["trainer.max_steps=2"] if verb == "fit" else []
    main([verb, str(their_run), *words])
    scene.assert_nothing_happened()
    assert sorted(p.name for p in scene.theirs.iterdir()) == ["run"]
    assert sorted(p.name for p in scene.work.iterdir()) == ["theirs"]
    assert "Traceback" not in capsys.readouterr().err


LINKS = {
    "metrics.csv": "fit",
    "throughput.csv": "fit",
    "config.yaml": "fit",
    "environment.json": "fit",
    "checkpoints": "fit",
    "checkpoints/last.ckpt": "fit",
    "eval": "test",
    "report.html": "report",
}


@pytest.mark.parametrize("name", LINKS)
def test_links_in_a_run_folder(name: str, their_run: Path, scene: Scene, capsys) -> None:
    """A link that leads out of the folder is refused or replaced; what it leads to stays as it is."""
    link, victim = their_run / name, scene.theirs / "victim"
    if link.exists():
        shutil.move(link, victim)
    elif name == "eval":
        victim.mkdir()
    else:
        victim.write_text("precious")
    link.symlink_to(victim)
    before = scene.files(victim) if victim.is_dir() else victim.read_bytes()
    words = {"fit": ["trainer.max_steps=2"], "test": ["evaluation.max_samples=1"], "report": []}[LINKS[name]]
    main([LINKS[name], str(their_run), *words])
    assert (scene.files(victim) if victim.is_dir() else victim.read_bytes()) == before
    scene.assert_nothing_happened()
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- checkpoints and tokenizers

CHECKPOINTS = {
    "generate": ["generate", "RUN", "hello"],
    "talk": ["talk", "RUN", "hello", "--out", "answer.wav"],
    "validate": ["validate", "RUN"],
    "fit": ["fit", "RUN"],
    "encode": ["data", "encode", "RUN", str(PACK), "--out", "codes", "--workers", "1"],
    "init_from": ["fit", "TOY", "module.init_from=RUN", "paths.run_dir=mine"],
    "ckpt_path": ["fit", "TOY", "ckpt_path=RUN/checkpoints/last.ckpt", "paths.run_dir=mine"],
}


@pytest.mark.parametrize("kind", ["pickle", "zip"])
@pytest.mark.parametrize("door", CHECKPOINTS)
def test_a_pickle_as_checkpoint(door: str, kind: str, their_run: Path, toy: list[str], scene: Scene, capsys) -> None:
    checkpoint = their_run / "checkpoints" / "last.ckpt"
    if kind == "pickle":
        checkpoint.write_bytes(poisoned(scene.canary))
    else:
        torch.save({"state_dict": _Poisonous(scene.canary)}, checkpoint)
    if door == "encode":
        put(their_run, "model", {"_target_": "omnitrain.models.codec.Codec", **plain(CODEC_PRESETS["tiny"])})
    words = [w for x in CHECKPOINTS[door] for w in (toy if x == "TOY" else [x.replace("RUN", str(their_run))])]
    capsys.readouterr()
    status = main(words)
    scene.assert_nothing_happened()
    assert status not in (0, None)
    assert_explained(capsys.readouterr().err, r"last\.ckpt")


class _Poisonous:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


TOKENIZERS = {
    "no_json": b"cos\nsystem\n(S'touch CANARY'\ntR.",
    "other_json": b'{"model": {"type": "os.system"}}',
    "deep_json": b"[" * 100_000 + b"]" * 100_000,
    "binary": bytes(range(256)),
    "empty": b"",
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("door", ["generate", "validate"])
def test_a_tokenizer(door: str, name: str, their_run: Path, scene: Scene, capsys) -> None:
    (their_run / "tokenizer.json").write_bytes(TOKENIZERS[name])
    put(their_run, "data.tokenizer", str(their_run / "tokenizer.json"))
    words = [str(their_run), *(["hello"] if door == "generate" else [])]
    assert main([door, *words]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, r"tokenizer")


def test_config_json_of_a_million_layers(public_dir: Path, scene: Scene, capsys) -> None:
    folder = Path(shutil.copytree(public_dir, scene.theirs / "public"))
    config = json.loads((folder / "config.json").read_text())
    text = config["thinker_config"]["text_config"] if "thinker_config" in config else config["text_config"]
    text["num_hidden_layers"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    line = [sys.executable, "-m", "omnitrain", "generate", str(folder), "hello"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert_explained(result.stderr, "num_hidden_layers")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from omnitrain.data.chat import train_bpe

    return train_bpe(["a red cat and a blue moon"] * 20, 400)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    from omnitrain.models.presets import build, init_weights

    small: dict[str, Any] = {"thinker": {"layers": 2}, "aut": {"layers": 1}, "vision": {"layers": 2}}
    model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=tokenizer.special_ids, **small)
    init_weights(model, seed=0)
    return model


@pytest.mark.parametrize("kind", ["pickle_as_safetensors", "only_a_pickle", "code_of_its_own", "index_upwards"])
def test_a_folder_in_the_public_format(kind: str, public_dir: Path, scene: Scene, capsys) -> None:
    folder = Path(shutil.copytree(public_dir, scene.theirs / "public"))
    (weights,) = folder.glob("*.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if kind == "pickle_as_safetensors":
        weights.write_bytes(poisoned(scene.canary))
    elif kind == "only_a_pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(poisoned(scene.canary))
    elif kind == "code_of_its_own":
        (folder / "stranger_code.py").write_text(STRANGER.format(canary=str(scene.canary)))
        config |= {"auto_map": {"AutoConfig": "stranger_code.Thing"}, "model_type": "stranger"}
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Stranger"]}))
    else:
        shutil.move(weights, scene.theirs / "w.safetensors")
        from safetensors import safe_open

        with safe_open(scene.theirs / "w.safetensors", "pt") as file:
            index = {"weight_map": dict.fromkeys(file.keys(), "../w.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["generate", str(folder), "hello"]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, r"safetensors|architectures|model_type|public")


def test_a_mimi_that_is_a_pickle(scene: Scene, capsys) -> None:
    folder = scene.theirs / "mimi"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "mimi", "auto_map": {"AutoModel": "stranger.Thing"}, "num_quantizers": 32}'
    )
    (folder / "pytorch_model.bin").write_bytes(poisoned(scene.canary))
    assert main(["data", "encode", str(folder), str(PACK), "--out", "codes", "--workers", "1"]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, r"mimi")


def test_a_mapping_with_tags(scene: Scene, capsys) -> None:
    mapping = scene.theirs / "cats.yaml"
    mapping.write_text(scene.fill("kind: !!python/object/apply:os.system ['touch CANARY']\n"))
    assert main(["data", "verify", str(mapping)]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, r"cats\.yaml")


# ---------------------------------------------------------------------------------------------------------- what is read

RECORDS = {
    "stages.json": b'{"a": {"hash": "\\u001b[2J", "command": "x"}}',
    "config.yaml": b"!!python/object/apply:os.system ['touch CANARY']",
    "environment.json": b'["\\u001b[2J"]',
    "data.json": b"17",
    "eval/scores.json": b"[" * 100_000,
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_a_report_reads(name: str, their_run: Path, scene: Scene, capsys) -> None:
    """A report is written without what cannot be read, or is refused in a line."""
    path = their_run / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(scene.fill(RECORDS[name].decode()).encode())
    if name == "stages.json":
        put(their_run, "stages", [{"name": "a", "command": ["fit", "+recipe=codec"]}])
    status = main(["report", str(their_run)])
    out, error = capsys.readouterr()
    scene.assert_nothing_happened()
    assert "Traceback" not in error
    assert "\x1b" not in out + error
    assert (their_run / "report.html").is_file() or (status == 1 and error.startswith("error: "))


def test_names_in_a_report_are_text(their_run: Path, scene: Scene, capsys) -> None:
    script = "</style></script><script>alert(1)</script>"
    put(their_run, "name", script)
    put(their_run, "data.sources", {script: {"path": script}})
    assert main(["report", str(their_run)]) == 0
    assert script not in (their_run / "report.html").read_text()
    assert "<script>alert" not in (their_run / "report.html").read_text()


def test_a_study_that_a_report_reads(scene: Scene, capsys) -> None:
    (scene.theirs / "study.json").write_text('{"arms": {"\\u001b[2J": {"_target_": "stranger.Thing"}}}')
    assert main(["report", "--study", str(scene.theirs)]) not in (0, None)
    scene.assert_nothing_happened()
    assert_explained(capsys.readouterr().err, "stud")


# -------------------------------------------------------------------------------------------------- what must still work


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_let_through(name: str, scene: Scene, no_job: None) -> None:
    starts_from = (
        "pretrain_s1",
        "pretrain_s2",
        "pretrain_s3",
        "speaker_finetune",
        "talker_continue",
        "dialogue_talker",
    )
    needs = [
        *(["module.init_from=x"] if name.startswith(starts_from) else []),
        *(["teacher=x"] if name.startswith("distill") or name == "post" else []),
        *(["base=x"] if name == "post" else []),
        *(["answers=x"] if name in ("distill_off_policy", "dialogue_thinker", "dialogue_talker") else []),
        *(["speech=x"] if name == "codec_finetune" else []),
        # Their data bring a tokenizer, which has to be there.
        *([f"speech={PACK_ANNOUNCEMENTS}"] if name in ("speech", "talker_post", "post") else []),
        *([f"dialogues={PACK_ANNOUNCEMENTS}"] if name.startswith("dialogue") else []),
        *([f"module.init_from={PACK_ANNOUNCEMENTS}", "pairs=x"] if name == "talker_dpo" else []),
        *(["judge=x"] if name in ("talker_post", "post") else []),
        *([f"data.tokenizer={PACK}"] if name == "aut" else []),
        *([f"model.folder={save_small_folder(scene.theirs / 'public')}"] if name == "finetune" else []),
    ]
    with pytest.raises(Started):
        main(["fit", f"+recipe={name}", *needs])


@pytest.mark.parametrize(
    "words",
    [
        "-m +launcher=joblib seed=0,1",
        "-m +launcher=slurm trainer=gpu seed=0,1",
        "-m hydra/launcher=submitit_slurm hydra.launcher.partition=long seed=0,1",
        "-m +recipe=nondegradation arm=text,vision match=data,compute seed=0,1 +launcher=joblib hydra.launcher.n_jobs=2",
        "-m +recipe=nondegradation_lr_arm arm=text hydra/launcher=joblib",
        "-m +recipe=quickstart optim.lr=1e-3,2e-3 hydra.sweep.dir=sweeps",
        "+recipe=quickstart logger=wandb logger.wandb.offline=true trainer=ddp",
        "+recipe=quickstart +callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging",
        "+recipe=quickstart +callbacks.rate._target_=lightning.pytorch.callbacks.LearningRateMonitor",
        "+recipe=quickstart paths.run_dir=/tmp/elsewhere/run",
        "hydra.run.dir=elsewhere",
    ],
)
def test_what_users_write_is_let_through(words: str, scene: Scene, no_job: None) -> None:
    with pytest.raises(Started):
        main(["fit", *words.split()])


def test_a_run_folder_may_lie_anywhere(
    their_run: Path, scene: Scene, no_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user has named it, although not with paths.run_dir."""
    monkeypatch.chdir(scene.outside)
    with pytest.raises(Started):
        main(["validate", str(their_run)])


OWN = """\
from omnitrain.training.callbacks import SpikeGuard
def function(): ...
class Guard(SpikeGuard): ...
"""


@pytest.mark.parametrize(
    ("allowed", "target", "status"),
    [
        ("mylab", "mylab.Guard", 0),
        ("other, mylab", "mylab.Guard", 0),
        ("", "mylab.Guard", 1),
        ("mylabs", "mylab.Guard", 1),
        ("mylab", "mylab.SpikeGuard.__init__.__globals__", 1),
    ],
)
def test_a_package_of_the_users_own(allowed: str, target: str, status: int, scene: Scene) -> None:
    (scene.work / "mylab.py").write_text(OWN)
    line = [sys.executable, "-m", "omnitrain", "fit", f"+callbacks.own={{_target_:{target},run_dir:x}}", "--cfg", "job"]
    result = subprocess.run(line, env={**os.environ, "OMNITRAIN_TARGETS": allowed}, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert ("callbacks.own" in result.stderr) == (status == 1)
