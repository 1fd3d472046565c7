"""``omnitrain test RUN_DIR +eval=NAME``: from the command line to tables and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import omnitrain.config.compose  # noqa: F401  (registers ${omnitrain.pack:})
from omnitrain.__main__ import main
from omnitrain.interop.public_format import save_pretrained
from tests.conftest import save_run

from .conftest import SMALL, recording
from .test_benchmarks import librispeech, mmstar

SHORT = ("librispeech", "mmstar")


@pytest.fixture
def run_dir(model, tokenizer, tmp_path) -> Path:
    """What `fit` leaves behind; the data that it was trained on are gone."""
    folder = tmp_path / "run"
    sizes = [f"model.{part}.{key}={value}" for part, d in SMALL.items() for key, value in d.items()]
    save_run(folder, model, tokenizer, [*sizes, "data=shards", "+data.sources.gone.path=/moved/away"])
    return folder


def benchmarks(tmp_path: Path) -> list[str]:
    folders = {name: tmp_path / name for name in SHORT}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    paths = {"librispeech": librispeech(folders["librispeech"]), "mmstar": mmstar(folders["mmstar"])}
    return [
        "+eval=[librispeech,mmstar]",
        *(f"eval.tasks.{name}.path={path}" for name, path in paths.items()),
        *(f"eval.tasks.{name}.decoding.max_new_tokens=4" for name in SHORT),
    ]


def test_a_run_folder_and_the_public_format_agree(run_dir, model, tokenizer, tmp_path, capsys):
    arguments = benchmarks(tmp_path)
    assert main(["test", str(run_dir), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "librispeech" in printed
    assert "lower" in printed
    assert "accuracy, math" in printed
    public = tmp_path / "public"
    save_pretrained(model, public)
    tokenizer.save(public / "tokenizer.json")
    out = tmp_path / "elsewhere"
    command = ["test", "model=pretrained", f"model.folder={public}", f"paths.run_dir={out}", *arguments]
    assert main(command) == 0
    for name in SHORT:
        here, there = (json.loads((d / "eval" / "tasks" / f"{name}.json").read_text()) for d in (run_dir, out))
        assert here["metrics"] == there["metrics"]
        assert here["items"] == there["items"] > 0
    assert main(["test", str(run_dir), *arguments]) == 0  # a repeated line finds everything done
    assert "0 answered before" not in capsys.readouterr().err.rpartition("mmstar")[2]


def test_one_task_takes_eval_path(run_dir, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    arguments = ["+eval=mmstar", f"eval.path={mmstar(folder)}", "eval.limit=1"]
    assert main(["test", str(run_dir), *arguments]) == 0
    assert json.loads((run_dir / "eval" / "tasks" / "mmstar.json").read_text())["items"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+eval=librispech"], "librispeech"),
        (["+eval=librispeech"], "eval.path=PATH"),
        (["+eval=librispeech", "eval.path=/nowhere"], "no *.trans.txt below it"),
        (["+eval=librispeech", "eval.path=/nowhere", "+eval.limt=3"], "did you mean limit"),
        (["+eval=mmstar", "eval.path=/nowhere", "eval.tasks.mmstar.metric=acc"], "'acc' is not one of the rule's"),
    ],
)
def test_mistakes_are_explained(run_dir, arguments, message, capsys):
    assert main(["test", str(run_dir), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_task_of_the_documentation(run_dir, tmp_path, monkeypatch, capsys):
    """What docs/benchmarks.md says of a task of one's own works as it stands there."""
    import re

    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    code, config = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL).group(1) for kind in ("python", "yaml"))
    package = tmp_path / "code" / "mypackage"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "birds.py").write_text(code)
    (tmp_path / "own" / "eval").mkdir(parents=True)
    (tmp_path / "own" / "eval" / "birds.yaml").write_text(config)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr("omnitrain.config.targets.OWN_PACKAGES", ("mypackage",))  # read once, at the start
    recording(tmp_path / "a.flac")
    (tmp_path / "birds.csv").write_text("id,file,place,bird\n1,a.flac,here,robin\n")
    own = ["--config-dir", str(tmp_path / "own"), "+eval=birds", f"eval.path={tmp_path / 'birds.csv'}"]
    assert main(["test", str(run_dir), *own]) == 0, capsys.readouterr().err
    summary = json.loads((run_dir / "eval" / "tasks" / "birds.json").read_text())
    assert summary["items"] == 1
    assert "accuracy, here" in capsys.readouterr().out
