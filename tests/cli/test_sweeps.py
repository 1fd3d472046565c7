"""Sweeps on one machine: jobs side by side, and the search for learning rates. (Slurm: tests/slurm.)"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from omnitrain.__main__ import main
from omnitrain.config.compose import check_command_line
from omnitrain.config.locations import RECIPES
from omnitrain.study.learning_rates import best_rates

MICRO = [
    "+model.thinker={layers:2,accept_hidden_layer:1,d_model:32,heads:2,kv_heads:1,ffn:32,expert_width:16}",
    "+model.aut={d_model:16,layers:1,heads:2,ffn:16,conv_hidden:4}",
    "+model.vision={d_model:32,layers:2,heads:2,ffn:32,deepstack_layers:[0]}",
]


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side_with_their_share_of_the_cores(tmp_path: Path) -> None:
    line = [
        sys.executable, "-m", "omnitrain", "fit", "-m", "+recipe=quickstart", *MICRO, "trainer.max_steps=6",
        "data.max_tokens=256", "evaluation.after_fit=false", "trainer.limit_val_batches=1",
        "trainer.val_check_interval=6",
    ]  # fmt: skip
    unset = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    both = [*line, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}/both"]
    subprocess.run(both, env=unset, check=True, capture_output=True)
    alone = [*line, "seed=1", f"hydra.sweep.dir={tmp_path}/alone"]
    subprocess.run(alone, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)

    runs = [tmp_path / "both" / str(number) for number in (0, 1)]
    for run in runs:
        environment = json.loads((run / "environment.json").read_text())
        assert environment["torch_threads"] == max(1, environment["cpus"] // 2)
    started = [(run / "config.yaml").stat().st_mtime for run in runs]
    ended = [(run / "checkpoints/last.ckpt").stat().st_mtime for run in runs]
    assert max(started) < min(ended)
    assert losses(runs[1]) == pytest.approx(losses(tmp_path / "alone/0"), rel=1e-4)
    assert losses(runs[0]) != pytest.approx(losses(runs[1]), rel=1e-3)


@pytest.mark.parametrize("option", ["hydra/launcher=joblib", "hydra/launcher=submitit_slurm", "+launcher=slurm"])
def test_launchers_compose(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_command_line(["-m", "seed=0,1", option])
    if "slurm" in option:
        assert main(["fit", option, "hydra.launcher.partition=p", "--cfg", "hydra", "-p", "hydra.launcher"]) == 0
        launcher = yaml.safe_load(capfd.readouterr().out)
        assert launcher["partition"] == "p"
        assert launcher["max_num_timeout"] > 0  # the plugin's own 0: a job whose time is over is not queued again


@pytest.mark.slow
def test_search_of_one_arm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two trials through Optuna's sweeper; the table and the file name the better one, and the study takes the line."""
    few = [
        *MICRO, "optim.lr=choice(1e-5,3e-2)", "data.max_tokens=128", "evaluation.report=false",
        "+data.sources.texts.limit=24", "+data.sources.translations.limit=10",
    ]  # fmt: skip
    others = [f"stage_overrides.{arm}=null" for arm in ("vision", "audio", "omni_early", "omni_late")]
    line = ["fit", "+recipe=nondegradation_lr", f"paths.run_dir={tmp_path}", *others]
    assert main([*line, f"stage_overrides.text=[{','.join(few)}]"]) == 0
    found, planned = {}, []
    for path in tmp_path.glob("text/lr=*"):
        with (path / "metrics.csv").open(newline="") as file:
            found[float(path.name.partition("=")[2])] = [
                float(row["validation/loss"]) for row in csv.DictReader(file) if row["validation/loss"]
            ][-1]
        record = json.loads((path / "study_run.json").read_text())
        assert (record["arm"], record["seed"]) == ("text", 100)
        planned.append(record["planned"])
    assert set(found) == {1e-5, 3e-2}
    assert planned[0] == planned[1]
    assert planned[0]["samples"] == {"texts": 6, "translations": 5}  # a quarter and a half of what there is
    assert found[3e-2] < found[1e-5]
    best = yaml.safe_load((tmp_path / "text/optimization_results.yaml").read_text())
    assert best["best_params"] == {"optim.lr": 3e-2}
    assert best["best_value"] == pytest.approx(found[3e-2], rel=1e-6)
    assert yaml.safe_load((tmp_path / "learning_rates.yaml").read_text()) == {"study": {"lr": {"text": 3e-2}}}
    out = capfd.readouterr().out
    (override,) = [text.strip().strip("'") for text in out.splitlines() if text.startswith("  '+study.lr=")]
    assert main(["fit", "+recipe=nondegradation", override, "--cfg", "job", "-p", "study.lr"]) == 0
    assert yaml.safe_load(capfd.readouterr().out) == {"text": 3e-2}


def test_search_is_a_quarter_of_the_study() -> None:
    study, search = (yaml.safe_load((RECIPES / f"nondegradation{x}.yaml").read_text()) for x in ("", "_lr_arm"))
    assert {name: 4 * epochs for name, epochs in search["study"]["epochs"].items()} == study["study"]["epochs"]
    assert set(search["tasks_of_arm"]) == set(study["study"]["arms"])


def trial(folder: Path, arm: str, rate: float, loss: float | str, finished: bool = True) -> None:
    run = folder / arm / f"lr={rate}"
    run.mkdir(parents=True)
    (run / "study_run.json").write_text(json.dumps({"arm": arm, "lr": rate, "finished": finished}))
    (run / "metrics.csv").write_text(f"step,validation/loss\n1,9.0\n2,\n3,{loss}\n4,\n")


def test_search_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(tmp_path)]) == 1
    assert "no finished trial" in capsys.readouterr().err
    for rate, text, audio in ((1e-3, 3.0, 2.5), (2e-3, 2.0, 2.25), (4e-3, "nan", 2.5)):
        trial(tmp_path, "text", rate, text)
        trial(tmp_path, "audio", rate, audio, finished=rate != 1e-3)
    assert main(["search", str(tmp_path)]) == 1  # audio lacks a trial: its rate is not chosen as the others are
    assert "not finished: audio at 0.001" in capsys.readouterr().err
    (tmp_path / "audio/lr=0.001/study_run.json").write_text('{"arm": "audio", "lr": 0.001, "finished": true}')
    assert main(["search", str(tmp_path)]) == 0
    assert "'+study.lr={audio: 0.002, text: 0.002}'" in capsys.readouterr().out
    trial(tmp_path, "text", 8e-3, 1.0)
    trial(tmp_path, "audio", 8e-3, 7.0)
    assert main(["search", str(tmp_path)]) == 0
    assert "text: the best rate, 0.008, is at the edge" in capsys.readouterr().err
    assert best_rates({"x": {1.0: float("nan"), 2.0: 5.0, 3.0: 5.0}}) == {"x": 2.0}
