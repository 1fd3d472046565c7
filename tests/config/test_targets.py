"""A configuration may only call allowed code, and is refused before anything it names is imported."""

import sys

import pytest

from omnitrain.__main__ import main
from omnitrain.config.targets import ForbiddenTarget, MissingTarget, check_origins, check_targets

MODULE = "import sys; sys.omnitrain_was_fooled = True\ndef call(): ...\n"


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"data": {"_target_": "os.system", "command": "true"}}, "data"),
        ({"data": {"_target_": "builtins.eval"}}, "data"),
        ({"data": {"_target_": "torch.load"}}, "data"),
        ({"data": {"_target_": "torch.hub.load"}}, "data"),
        ({"data": {"_target_": "hydra.utils.get_method", "path": "os.system"}}, "data"),
        ({"data": {"_target_": "hydra.utils.instantiate"}}, "data"),
        ({"data": {"_target_": "omnitrain"}}, "data"),
        ({"data": {"_target_": "omnitrainer.x"}}, "data"),
        ({"data": {"_target_": "omnitrain.cli.fit.run"}}, "data"),
        ({"data": {"_target_": "torch.nn.Linear.__init__.__globals__"}}, "data"),
        ({"data": {"_target_": ["os.system"]}}, "data"),
        ({"a": [{"b": {"c": [1, {"_target_": "subprocess.run", "_partial_": True}]}}]}, r"a\[0\].b.c\[1\]"),
        ({"hydra": {"callbacks": {"x": {"_target_": "omnitrain.models.presets.build"}}}}, "hydra.callbacks.x"),
        ({"hydra": {"job_logging": {"handlers": {"x": {"()": "os.system"}}}}}, "hydra.job_logging.handlers.x"),
        ({"hydra": {"job_logging": {"handlers": {"x": {"class": "os.system"}}}}}, "hydra.job_logging.handlers.x"),
    ],
)
def test_refused(config: dict, place: str) -> None:
    with pytest.raises(ForbiddenTarget, match=place):
        check_targets(config)


def test_reached_through_an_allowed_module() -> None:
    for target in ("omnitrain.data.shards.os.path.join", "torch.nn.modules.module.functools.partial"):
        found = check_targets({"x": {"_target_": target}})
        with pytest.raises(ForbiddenTarget, match="x: _target_"):
            check_origins(found)


def test_allowed() -> None:
    targets = ["torch.optim.AdamW", "lightning.pytorch.Trainer", "omnitrain.training.callbacks.SpikeGuard"]
    found = check_targets([{"_target_": target} for target in targets])
    assert list(found) == targets
    check_origins(found)


def test_missing_target_is_named() -> None:
    with pytest.raises(MissingTarget, match=r"x: _target_ 'omnitrain\.nothing\.Here'"):
        check_origins(check_targets({"x": {"_target_": "omnitrain.nothing.Here"}}))


def test_own_package_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNITRAIN_TARGETS", "mylab")
    assert check_targets({"x": {"_target_": "mylab.models.Mine"}}) == {"mylab.models.Mine": "x"}


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
