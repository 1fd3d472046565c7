"""Which keys may change when a run is continued, and what becomes of them."""

import json
from pathlib import Path

import pytest
import torch

from omnitrain.__main__ import main
from omnitrain.config.compose import run_config
from omnitrain.config.saved import read_config, write_config
from omnitrain.config.typed import ConfigError, leaves, plain
from omnitrain.runs.resume import check_resume, rule


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("trainer.max_steps", "safe"), ("data.num_workers", "safe"), ("logger.wandb._target_", "safe"),
        ("evaluation.max_samples", "safe"), ("data.sources.pack.path", "safe"), ("trainer.log_every_n_steps", "safe"),
        ("optim.lr", "recorded"), ("optim.weight_decay", "recorded"), ("optim.betas", "recorded"),
        ("optim.schedule", "recorded"), ("trainer.gradient_clip_val", "recorded"), ("trainer.precision", "recorded"),
        ("trainer.accumulate_grad_batches", "recorded"), ("module.word_dropout", "recorded"),
        ("module.loss.balance_coefficient", "recorded"), ("callbacks.spike_guard.factor", "recorded"),
        ("seed", "exact"), ("data.seed", "exact"), ("data.sources.pack.weight", "exact"), ("data.max_tokens", "exact"),
        ("model.thinker.layers", "exact"), ("module.train", "exact"), ("module._target_", "exact"),
        ("data.audio.n_mels", "exact"), ("optim.states", "exact"), ("module.compile", "recorded"),
    ],
)  # fmt: skip
def test_every_key_has_one_rule(key: str, expected: str) -> None:
    assert rule(key) == expected


def test_no_key_of_a_recipe_is_left_to_chance() -> None:
    """A key that no rule names is exact, so forgetting one refuses too much, never too little."""
    rules = {key: rule(key) for key, _ in leaves(plain(run_config(["+recipe=quickstart"])))}
    assert {key.split(".")[0] for key, found in rules.items() if found == "exact"} == {
        "seed",
        "data",
        "model",
        "module",
        "trainer",
        "optim",  # the kind of its moments
    }


@pytest.fixture(scope="module")
def begun(toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run of two steps, and its line."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    line = ["fit", *toy, f"paths.run_dir={run_dir}", "trainer.max_steps=2", "ckpt_path=last"]
    assert main(line) == 0
    return line, run_dir


def test_exact_keys_are_refused_and_the_folder_stays(begun: tuple[list[str], Path], capsys) -> None:
    line, run_dir = begun
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for override, key in (("seed=5", "seed: 0 -> 5"), ("data.max_tokens=99", "data.max_tokens: "),
                          ("model.thinker.ffn=48", "model.thinker.ffn: 32 -> 48")):  # fmt: skip
        assert main([*line, "trainer.max_steps=4", override]) == 1
        error = capsys.readouterr().err
        assert key in error
        assert f"module.init_from={run_dir}" in error
        assert "Traceback" not in error
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_recorded_keys_apply_are_said_and_noted(begun: tuple[list[str], Path], tmp_path: Path, capsys) -> None:
    line, _ = begun
    line = [word if not word.startswith("paths.run_dir") else f"paths.run_dir={tmp_path / 'run'}" for word in line]
    assert main(line) == 0
    capsys.readouterr()
    changes = ["optim.lr=0.01", "optim.weight_decay=0.3", "optim.betas=[0.8,0.9]", "trainer.gradient_clip_val=0.5"]
    assert main([*line, "trainer.max_steps=4", "optim.schedule=constant", *changes]) == 0
    said = capsys.readouterr().out
    assert "from step 3 on: optim.lr 0.001 -> 0.01" in said
    (noted,) = [json.loads(text) for text in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert noted["step"] == 2
    assert noted["changed"]["optim.lr"] == [0.001, 0.01]
    assert set(noted["changed"]) == {"optim.lr", "optim.weight_decay", "optim.betas", "optim.schedule",
                                     "trainer.gradient_clip_val"}  # fmt: skip
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    (optimizer,) = state["optimizer_states"]
    assert {tuple(group["betas"]) for group in optimizer["param_groups"]} == {(0.8, 0.9)}
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {0.01}
    assert {group["lr"] for group in optimizer["param_groups"]} == {0.01}
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.3}
    assert read_config(tmp_path / "run").optim.lr == 0.01


def test_a_longer_run_goes_on_with_the_rate_that_it_would_have_had(toy: list[str], tmp_path: Path) -> None:
    def rates(name: str, *lengths: int) -> list[str]:
        for length in lengths:
            line = ["fit", *toy, f"paths.run_dir={tmp_path / name}", f"trainer.max_steps={length}", "ckpt_path=last"]
            assert main([*line, "optim.decay_fraction=1.0", "optim.warmup_steps=0"]) == 0
        rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("lr/thinker")
        return [row.split(",")[column] for row in rows[1:] if row.split(",")[column]]

    whole, longer = rates("whole", 4), rates("longer", 2, 4)
    assert longer[2:] == whole[2:]
    assert longer[:2] != whole[:2]  # they were the shorter run's


def test_a_file_goes_on_in_another_folder(toy: list[str], tmp_path: Path) -> None:
    """`ckpt_path=FILE`: the new folder ends as an undisturbed run does, the old one stays as it was."""

    def line(name: str, steps: int, checkpoint: str) -> list[str]:
        where = [f"paths.run_dir={tmp_path / name}", f"trainer.max_steps={steps}", f"ckpt_path={checkpoint}"]
        return ["fit", *toy, *where, "optim.total_steps=4"]

    assert main(line("whole", 4, "null")) == 0
    assert main(line("first", 2, "null")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert main([*line("second", 4, str(last)), "data.max_tokens=99"]) == 1  # refused: nothing is brought over
    assert not list((tmp_path / "second").glob("*.csv"))
    assert main(line("second", 4, str(last))) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()} == before
    assert (tmp_path / "second" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "second")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_moved_folder_is_a_run_of_its_own(begun: tuple[list[str], Path], tmp_path: Path) -> None:
    _, run_dir = begun
    moved = tmp_path / "ein Lauf = 1, zwei"
    moved.mkdir()
    config = read_config(run_dir)
    write_config(config, run_dir)
    (moved / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    assert str(run_dir) not in (moved / "config.yaml").read_text(encoding="utf-8")
    assert read_config(moved).paths.run_dir == str(moved)
    assert not check_resume(read_config(moved), moved)
    with pytest.raises(ConfigError, match="not a run folder"):
        read_config(tmp_path)
