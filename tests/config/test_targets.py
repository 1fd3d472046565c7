"""A configuration may only call allowed code, and is refused before anything it names is imported."""

import sys

import pytest

from omnitrain.__main__ import main
from omnitrain.config import targets
from omnitrain.config.hydra_keys import check_hydra
from omnitrain.config.targets import CONSTRUCTORS, ForbiddenTarget, MissingTarget, _located, build, check_plain
from omnitrain.config.typed import ConfigError, Named, named

MODULE = "import sys; sys.omnitrain_was_fooled = True\ndef call(): ...\n"


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"data": {"_target_": "os.system", "command": "true"}}, "data"),
        ({"data": {"_target_": "builtins.eval"}}, "data"),
        ({"data": {"_target_": "torch.load"}}, "data"),
        ({"data": {"_target_": "hydra.utils.instantiate"}}, "data"),
        ({"data": {"_target_": "omnitrain"}}, "data"),
        ({"data": {"_target_": "omnitrainer.x"}}, "data"),
        ({"data": {"_target_": "omnitrain.cli.fit.run"}}, "data"),
        ({"data": {"_target_": "omnitrain.data.shards.os.system"}}, "data"),
        ({"data": {"_target_": "omnitrain.files.write_text"}}, "data"),
        ({"data": {"_target_": "torch.nn.Linear.__init__.__globals__"}}, "data"),
        ({"data": {"_target_": ["os.system"]}}, "data"),
        ({"data": {"_partial_": True}}, "data: _partial_"),
        ({"name": "a ${oc.env:HOME}"}, "name: "),
        ({"a": [{"b": {"c": [1, {"_target_": "subprocess.run"}]}}]}, r"a\[0\].b.c\[1\]"),
    ],
)
def test_refused(config: dict, place: str) -> None:
    with pytest.raises(ForbiddenTarget, match=place):
        check_plain(config)


@pytest.mark.parametrize(
    ("node", "place"),
    [
        ({"callbacks": {"x": {"_target_": "omnitrain.models.omni.OmniModel"}}}, "hydra.callbacks.x"),
        ({"job_logging": {"handlers": {"x": {"()": "os.system"}}}}, "hydra.job_logging.handlers.x"),
        ({"job_logging": {"handlers": {"x": {"class": "logging.FileHandler"}}}}, "hydra.job_logging.handlers.x"),
        ({"job_logging": {"handlers": {"x": {"stream": "ext://os.system"}}}}, "hydra.job_logging.handlers.x"),
        ({"job": {"env_set": {"PYTHONPATH": "x"}}}, "hydra.job.env_set.PYTHONPATH"),
        ({"launcher": {"setup": ["touch x"]}}, "hydra.launcher.setup"),
        ({"sweeper": {"params": {"model._target_": "os.system"}}}, "hydra.sweeper.params"),
        ({"sweeper": {"params": {"hydra.job.chdir": "x"}}}, "hydra.sweeper.params"),
        ({"searchpath": ["pkg://stranger"]}, "hydra.searchpath"),
        ({"sweep": {"dir": "/somewhere/else"}}, "hydra.sweep.dir"),
        ({"output_subdir": "/x"}, "hydra.output_subdir"),
    ],
)
def test_hydras_own_keys(node: dict, place: str) -> None:
    with pytest.raises(ForbiddenTarget, match=place):
        check_hydra(node, {}, [], None)


def test_the_command_line_may_name_shell_lines_and_folders() -> None:
    node = {"launcher": {"setup": ["module load cuda"]}, "sweep": {"dir": "/elsewhere/runs"}}
    check_hydra(node, {}, ["hydra.launcher.setup=[module load cuda]", "hydra.sweep.dir=/elsewhere/runs"], None)


def test_every_constructor_of_the_list_exists_and_builds_are_checked() -> None:
    for target in CONSTRUCTORS:
        assert callable(_located(target, "x")), target
    assert build(Named(target="lightning.pytorch.callbacks.EarlyStopping", keywords={"monitor": "x"})).monitor == "x"
    with pytest.raises(ForbiddenTarget, match=r"x: _target_ 'os.system'"):
        build(Named(target="os.system", keywords={"command": "true"}), place="x")


def test_own_package_by_environment(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mylab.py").write_text(
        "import os\nfrom os import path\nfrom omnitrain.training.thinker import ThinkerModule\n"
        "class Mine(ThinkerModule):\n    def __init__(self, model, config, *, extra, **_): self.got = config, extra\n"
        "class Other:\n    def __init__(self, a): self.a = a\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ForbiddenTarget, match="OMNITRAIN_TARGETS"):
        named({"_target_": "mylab.Other", "a": 1}, "x")
    monkeypatch.setattr(targets, "OWN_PACKAGES", ("mylab",))
    assert build(named({"_target_": "mylab.Other", "a": {"b": 1}}, "x")).a == {"b": 1}
    config, extra = build(named({"_target_": "mylab.Mine", "word_dropout": 0.25, "extra": 3}, "module"), None).got
    assert (config.word_dropout, extra) == (0.25, 3)
    for target in ("mylab.path", "mylab.os.system", "mylab.__import__"):
        with pytest.raises(ConfigError, match=r"x: _target_"):
            build(Named(target=target), place="x")
    with pytest.raises(MissingTarget, match=r"x: _target_ 'mylab.Gone' cannot be imported"):
        named({"_target_": "mylab.Gone"}, "x")


@pytest.mark.parametrize(
    "override",
    [
        "+model.extra={_target_:stranger.call}",
        "+x=[{_partial_:true,_target_:stranger.call}]",
        "model._target_=stranger.call",
        "+hydra.callbacks.x={_target_:stranger.call}",
        "+hydra.job_logging.handlers.x={class:stranger.call}",
        "+x='${oc.create:{_target_:stranger.call}}'",
    ],
)
@pytest.mark.parametrize("flags", [[], ["-m", "seed=0,1"]])
def test_refused_on_the_command_line_before_import(
    override: str, flags: list[str], tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *flags, override]) == 1
    error = capsys.readouterr().err
    assert "stranger.call" in error
    assert "not allowed" in error
    assert "Traceback" not in error
    assert "stranger" not in sys.modules
    assert not (tmp_path / "runs").exists()


def test_a_recipe_of_a_sweep_is_refused(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "bad.yaml").write_text("# @package _global_\nx: {_target_: os.system, command: 'true'}\n")
    assert main(["fit", "--config-dir", str(tmp_path), "-m", "+recipe=quickstart,bad"]) == 1
    assert "x: _target_ 'os.system'" in capsys.readouterr().err


def test_a_recipe_cannot_widen_the_list(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "bad.yaml").write_text(
        "# @package _global_\nhydra: {job: {env_set: {OMNITRAIN_TARGETS: os}}}\n"
    )
    assert main(["fit", "--config-dir", str(tmp_path), "+recipe=bad"]) == 1
    assert "hydra.job.env_set.OMNITRAIN_TARGETS" in capsys.readouterr().err
