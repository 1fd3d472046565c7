"""Recipes of stages: run in order, once each, and stopped as one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forked_runs import Kill, Runs
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from omnitrain.__main__ import main
from omnitrain.config.compose import read_stage_overrides
from omnitrain.config.typed import ConfigError
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import write_shards
from omnitrain.runs.chain import Stage, read_stages, stages_of

QUICK = ["data", "--help"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """own(*stages) -> the line that runs a recipe with them in `tmp_path`/run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    document = Message(role="document", segments=(Segment(type="text", text="a cat on a mat"),))
    write_shards([Sample(id="a", source="texts", messages=(document,))], "texts", "texts", progress=False)

    def write(*stages: dict) -> list[str]:
        (tmp_path / "own" / "recipe").mkdir(parents=True, exist_ok=True)
        recipe = {"name": "staged", "stages": list(stages)}
        text = "# @package _global_\n" + yaml.safe_dump(recipe, sort_keys=False)
        (tmp_path / "own" / "recipe" / "staged.yaml").write_text(text)
        return ["fit", "--config-dir", str(tmp_path / "own"), "+recipe=staged", "paths.run_dir=run"]

    return write


def html(name: str) -> list[str]:
    return ["data", "inspect", "texts", "--count", "1", "--html", f"${{paths.run_dir}}/{name}/report.html"]


def record(tmp_path: Path) -> dict:
    folder = tmp_path / "run" if (tmp_path / "run").is_dir() else tmp_path
    return json.loads((folder / "stages.json").read_text())


def test_stages_run_in_order_and_once(own, tmp_path, capfd) -> None:
    line = own({"name": "count", "command": QUICK}, {"name": "look", "command": html("look")})
    assert main(line) == 0
    out = capfd.readouterr().out
    run_dir = tmp_path / "run"
    parts = [
        "stage 1/2 count: python -m omnitrain data --help",
        "usage: omnitrain data",
        "stage 2/2 look: python",
        "wrote ",
    ]
    assert [out.index(part) for part in parts] == sorted(out.index(part) for part in parts)
    assert (run_dir / "look" / "report.html").stat().st_size > 1_000
    assert list(record(tmp_path)) == ["count", "look"]
    assert record(tmp_path)["look"]["command"][-1] == "{run_dir}/look/report.html"
    assert list(tmp_path.glob("run/.*")) == []
    # Nothing is run again, by the same line or by the folder alone.
    for again in (line, ["fit", str(run_dir)]):
        assert main(again) == 0
        out = capfd.readouterr().out
        assert "stage 1/2 count: done before" in out
        assert "stage 2/2 look: done before" in out
        assert "usage:" not in out


HOSTILE = ["a = b", "größe, 1", 'it\'s "new"', "100% (2) [x] {y}", "x#y:z;q&!", "$x", "back\\'s", "trailing/"]


@pytest.mark.parametrize("name", HOSTILE)
def test_paths_are_quoted_for_hydra(name) -> None:
    run_dir = Path("/somewhere") / name
    stage = Stage("a", ("fit", f"paths.run_dir={run_dir}/toy"))
    parsed = OverridesParser.create().parse_override(stage.arguments(run_dir)[1])
    assert str(parsed.value()) == f"{run_dir}/toy"
    assert stage.folder == run_dir / "toy"
    assert Stage("a", ("data", "encode", f"a={run_dir}")).arguments(run_dir)[2] == f"a={run_dir}"


@pytest.mark.parametrize("name", ["größe = 'a, b' \"c\" (d) [x] {y}", "trailing/"])
def test_folders_of_any_name_run_move_and_report(own, tmp_path, capfd, name) -> None:
    """What its stages are told, what is recorded and what is shown follow the folder to where it is moved to."""
    compose = ["fit", "+recipe=quickstart", "paths.run_dir=${paths.run_dir}/toy", "--cfg", "job"]
    line = own({"name": "compose", "command": compose}, {"name": "look", "command": html("look")})
    line[-1] = f"paths.run_dir={name}"
    assert main(line) == 0
    run_dir, moved = tmp_path / name, tmp_path / "moved to, 'elsewhere' = ö"
    shown = " ".join(capfd.readouterr().out.replace("''", "'").replace("run_dir: '", "run_dir: ").split())
    assert f"run_dir: {run_dir}/toy" in shown  # YAML breaks long lines
    assert (run_dir / "look" / "report.html").is_file()
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    assert str(tmp_path) not in before["stages.json"].decode()
    shutil.copytree(run_dir, moved)
    (moved / "look" / "report.html").unlink()
    (moved / "stages.json").write_text(json.dumps({"compose": record(run_dir)["compose"]}))
    assert main(["fit", f"{moved}/"]) == 0
    assert "stage 1/2 compose: done before" in capfd.readouterr().out
    assert (moved / "look" / "report.html").is_file()
    assert main(["report", str(moved)]) == 0
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before
    (stage, *_) = stages_of(moved)
    assert stage.folder == moved / "toy"


def test_a_failing_stage_ends_the_run_and_is_tried_again(own, tmp_path, capfd) -> None:
    blocked = {"name": "blocked", "command": ["data", "verify", "${paths.run_dir}/shards"]}
    line = own({"name": "count", "command": QUICK}, blocked, {"name": "last", "command": QUICK})
    assert main(line) == 1
    captured = capfd.readouterr()
    assert "shard" in captured.err  # what the stage itself said
    assert "stage 2/3 blocked: ended with status 1; continue: python -m omnitrain fit" in captured.err
    assert "3/3" not in captured.out
    assert list(record(tmp_path)) == ["count"]
    (tmp_path / "run" / "shards").symlink_to(tmp_path / "texts")
    assert main(line) == 0
    out = capfd.readouterr().out
    assert "stage 1/3 count: done before" in out
    assert "1 rows, 0 bad" in out
    assert list(record(tmp_path)) == ["count", "blocked", "last"]


def test_a_changed_stage_is_refused(own, tmp_path, capfd) -> None:
    line = own({"name": "count", "command": QUICK}, {"name": "look", "command": QUICK})
    assert main(line) == 0
    capfd.readouterr()
    before = record(tmp_path)
    assert main([*line, "stage_overrides.count=[--json]"]) == 1
    captured = capfd.readouterr()
    assert "stage 'count' has been run with another command" in captured.err
    assert "--json" in captured.err
    assert "choose another paths.run_dir" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert record(tmp_path) == before


def test_overrides_reach_their_stage(own, tmp_path, toy, capfd) -> None:
    """A whole run with more steps than it would have, and its report named at the end."""
    overrides = [*toy, "paths.run_dir=${paths.run_dir}/toy", "ckpt_path=last", "trainer.max_steps=1"]
    line = own({"name": "train", "command": ["fit", *overrides, "evaluation.report=false"]})
    assert main([*line, "stage_overrides.train=[trainer.max_steps=2,optim.lr=1e-3]"]) == 0
    out = capfd.readouterr().out
    assert shlex.join(["trainer.max_steps=2", "optim.lr=1e-3"]) in out
    assert f"train: {tmp_path}/run/toy\n" in out
    assert "train: report:" not in out
    assert OmegaConf.load(tmp_path / "run" / "toy" / "config.yaml").trainer.max_steps == 2
    (tmp_path / "run" / "toy" / "report.html").write_text("")
    assert main([*line, "stage_overrides.train=[trainer.max_steps=2,optim.lr=1e-3]"]) == 0
    assert f"train: report: {tmp_path}/run/toy/report.html" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stage_overrides.count=[trainer.max_step=2]", "stage 'count': trainer.max_step=2: there is no key"),
        ("stage_overrides.cuont=[trainer.max_steps=2]", "no such stage; did you mean stage_overrides.count?"),
        ("+stage_overrides.other=[trainer.max_steps=2]", "stage_overrides.other: there is no such stage; there are"),
        ("stage_overrides.count=trainer", "write a list, such as"),
        ("stage_override.count=[trainer.max_steps=2]", "did you mean stage_overrides="),
        ("stage=null", "did you mean"),
    ],
)
def test_misspelt(own, tmp_path, capfd, override, hint) -> None:
    """Before anything is run, also in the last stage."""
    line = own({"name": "first", "command": QUICK}, {"name": "count", "command": ["fit", "+recipe=quickstart"]})
    assert main([*line, override]) == 1
    captured = capfd.readouterr()
    assert hint in captured.err
    assert "Traceback" not in captured.err
    assert "stage 1/2" not in captured.out
    assert not (tmp_path / "run" / "stages.json").exists()


def test_only_fit_runs_stages(own, capfd) -> None:
    line = own({"name": "count", "command": QUICK})
    assert main(["test", *line[1:]]) == 1
    assert "only `fit` runs them" in capfd.readouterr().err


def test_a_stage_has_no_stages(own, capfd) -> None:
    line = own({"name": "outer", "command": ["fit", "--config-dir", "own", "+recipe=staged", "paths.run_dir=inner"]})
    assert main(line) == 1
    assert "the stage 'outer' has stages itself" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "write a list"),
        ({"name": "a"}, "write a list"),
        ([{"name": "a"}], r"stages\[0\]: write"),
        ([{"name": "a", "command": "fit"}], r"stages\[0\]\.command \(a\): write a list of words"),
        ([{"name": "a", "command": ["fitt"]}], r"there is no verb 'fitt'; did you mean 'fit'"),
        ([{"name": "a", "command": ["rm", "-rf"]}], r"there is no verb 'rm'; verbs are"),
        ([{"name": "a", "command": ["fit"]}, {"name": "a", "command": ["fit"]}], "two stages are called a"),
    ],
)
def test_what_is_no_list_of_stages(stages, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_stages(stages, {})


def test_overrides_for_all_and_for_none() -> None:
    given = [
        {"name": "codec", "command": ["fit", "+recipe=codec"]},
        {"name": "codes", "command": ["data", "encode"]},
        {"name": "talker", "command": ["fit", "+recipe=talker_pretrain"]},
    ]
    words = read_stage_overrides(["stage_overrides.all=[seed=1]", "stage_overrides.codes=null"])
    assert words == ["++stage_overrides.all=['seed=1']", "++stage_overrides.codes=null"]
    stages = read_stages(given, {"all": ["seed=1"], "talker": ["seed=2"], "codes": None})
    assert [stage.command for stage in stages] == [
        ("fit", "+recipe=codec", "seed=1"),
        ("fit", "+recipe=talker_pretrain", "seed=1", "seed=2"),  # its own words come last and count
    ]
    assert read_stages(given, {"all": ["seed=1"]})[1].command == ("data", "encode")
    with pytest.raises(ConfigError, match="every stage is left out"):
        read_stages(given, dict.fromkeys(["codec", "codes", "talker"]))
    with pytest.raises(ConfigError, match="no stage can be called all"):
        read_stages([{"name": "all", "command": ["fit"]}], {})


def test_a_report_over_what_there_is(own, tmp_path, capfd) -> None:
    line = own({"name": "count", "command": QUICK}, {"name": "last", "command": ["data", "verify", "nowhere"]})
    assert main(line) == 1
    capfd.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    captured = capfd.readouterr()
    assert "missing: stage last: not begun" in captured.err
    assert "stage count" not in captured.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "1 of 2 stages" in page
    assert "No stage has logged a loss" in page


def test_folders_are_read_from_commands() -> None:
    assert Stage("a", ("fit", "paths.run_dir='/x y'")).folder == Path("/x y")
    assert Stage("a", ("data", "encode", "c", "s", "--out", "codes")).folder == Path("codes")
    assert Stage("a", ("data", "stats", "--out")).folder is None


def test_quotes() -> None:
    def quoted(text: str) -> str:
        return read_stage_overrides([text])[0]

    assert quoted("stage_overrides.a=[b=1,+c=d]") == "++stage_overrides.a=['b=1','+c=d']"
    assert quoted("+stage_overrides.a=[b=[1,2], 'c=3']") == "++stage_overrides.a=['b=[1,2]','c=3']"
    assert quoted("stage_overrides.a=[b='x,y']") == r"++stage_overrides.a=['b=\'x,y\'']"
    assert quoted("stage_overrides.a=[]") == "++stage_overrides.a=[]"
    assert quoted("data.languages=[a=1]") == "data.languages=[a=1]"


def test_killed_between_stages(own, tmp_path: Path, runs: Runs) -> None:
    """Four kills: a stage has ended and is not noted yet, the next begins (twice), the page about all is written."""
    line = own({"name": "one", "command": html("one")}, {"name": "two", "command": html("two")})
    chain = "omnitrain.runs.chain"
    for kill, done in (
        (Kill(f"{chain}:write_json"), []),
        (Kill(f"{chain}:_Child.run", 2, signal.SIGINT), ["one"]),
        (Kill(f"{chain}:_Child.run"), ["one"]),
        (Kill(f"{chain}:write_report"), ["one", "two"]),
    ):
        assert runs.start(tmp_path / "printed", kill=kill, argv=line).wait() == [kill.status]
        assert (list(record(tmp_path)) if (tmp_path / "run" / "stages.json").exists() else []) == done
    runs.start(tmp_path / "printed", argv=line).finish()
    assert "2 of 2 stages" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "one" / "report.html").read_bytes() == (tmp_path / "run/two/report.html").read_bytes()
    assert list((tmp_path / "run").rglob(".*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_running_stage(own, tmp_path, toy, number) -> None:
    """The trainer saves and ends with 143 or 130; the next call goes on from there."""
    train = ["fit", *toy, "paths.run_dir=${paths.run_dir}/toy", "ckpt_path=last", "callbacks.progress=null"]
    line = own({"name": "train", "command": [*train, "trainer.max_steps=2000"]}, {"name": "count", "command": QUICK})
    metrics = tmp_path / "run" / "toy" / "metrics.csv"
    process = subprocess.Popen([sys.executable, "-m", "omnitrain", *line], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 128 + number, out
    assert "stage 2/2" not in out
    assert not (tmp_path / "run" / "stages.json").exists()
    steps = int(metrics.read_text().splitlines()[-1].split(",")[0])
    assert 0 < steps < 2000
    assert (tmp_path / "run" / "toy" / "checkpoints" / "last.ckpt").is_file()
    assert os.environ.get("OMNITRAIN_STAGE") is None
