"""Composition: groups, recipes, a user's own folder, and help with misspelt overrides."""

import pytest
from omegaconf import OmegaConf

from omnitrain.__main__ import main
from omnitrain.config.compose import check_command_line, run_config
from omnitrain.config.locations import CONF, RECIPES
from omnitrain.config.saved import write_config

OPTIONS = [
    (group.name, option.stem)
    for group in sorted(CONF.iterdir())
    if group.is_dir()
    for option in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    sign = "+" if group in ("debug", "eval", "launcher") else ""
    check_command_line([f"{sign}{group}={option}"])


def test_cfg_job_prints_and_runs_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+recipe=quickstart", "trainer.max_steps=7", "--cfg", "job"]) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert cfg.trainer.max_steps == 7
    assert cfg.name == "quickstart"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("trainer.max_step=3", "trainer.max_steps=3"),
        ("optim.leaning_rate=3", "no key 'optim.leaning_rate'"),
        ("modle=tiny", "model=tiny"),
        ("model=tny", "model=tiny"),
        ("+recipe=quickstrat", "+recipe=quickstart"),
        ("model.aut.init_from=RUN", "write module.init_from={aut: RUN}"),
        ("+model.thinker.init_from=DIR", "write module.init_from={thinker: DIR}"),
        ("recipe=quickstart", "+recipe=quickstart"),
        ("+recpe=quickstart", "+recipe=quickstart"),
        ("model.thinker.layer=3", "model.thinker.layers=3"),
        ("+debug=fastt", "+debug=fast"),
        ("sed=1", "seed=1"),
        ("trainer.plugins.a=1", "no key 'trainer.plugins.a'"),
        ("optim.lr=[1", "optim.lr=[1"),
        ("data.vocab=${nothing.here}", "nothing.here"),
        ("nonsense", "neither an override"),
    ],
)
def test_misspelt_override(override: str, hint: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", override] if override == "nonsense" else ["fit", "seed=0", override]) == 1
    error = capsys.readouterr().err
    assert hint in error.replace("data.vocab=${nothing.here}", "nothing.here")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_misspelt_override_in_a_sweep(capsys) -> None:
    assert main(["fit", "-m", "trainer.max_step=3,4"]) == 1
    assert "did you mean trainer.max_steps" in capsys.readouterr().err


def test_own_folder_of_recipes(tmp_path, capsys) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\n  - override /model: small\nname: mine\n"
    )
    (tmp_path / "recipe" / "quickstart.yaml").write_text("# @package _global_\nname: replaced\n")
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "hot.yaml").write_text("defaults: [wsd]\nlr: 1.0\n")
    arguments = ["--config-dir", str(tmp_path), "--cfg", "job"]
    assert main(["fit", *arguments, "+recipe=mine", "optim=hot"]) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert (cfg.name, cfg.model.thinker.layers, cfg.optim.lr) == ("mine", 12, 1.0)
    assert main(["fit", *arguments, "+recipe=quickstart"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).name == "replaced"
    assert main(["fit", "--config-dir", str(tmp_path / "none"), "+recipe=mine"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_an_earlier_run_is_a_configuration(tmp_path, capsys) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_config(run_config(["+recipe=quickstart", f"paths.run_dir={run_dir}", "optim.lr=0.5"]), run_dir)
    assert main(["test", str(run_dir), "trainer.max_steps=9", "--cfg", "job"]) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert (cfg.optim.lr, cfg.trainer.max_steps, cfg.ckpt_path) == (0.5, 9, "last")
    assert cfg.paths.run_dir == str(run_dir)
    assert main(["test", str(run_dir), "trainer.max_step=9"]) == 1
    assert "trainer.max_steps=9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("omnitrain va", {"validate"}),
        ("omnitrain fit +recipe=quick", {"+recipe=quickstart"}),
        ("omnitrain fit model=t", {"model=tiny"}),
        ("omnitrain fit trainer.max_st", {"trainer.max_steps="}),
    ],
)
def test_tab_completion(line: str, expected: set[str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert expected <= set(capsys.readouterr().out.split())


def test_recipes_say_what_they_do_and_cost() -> None:
    for path in RECIPES.rglob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# @package _global_\n# "), path
        assert "Costs:" in text, path
