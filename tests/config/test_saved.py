"""config.yaml of a run is whole: no edited preset or default changes an old run."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from omnitrain.config import schemas
from omnitrain.config.compose import run_config
from omnitrain.config.door import read
from omnitrain.config.locations import PACK, RECIPES
from omnitrain.config.run_config import RunConfig
from omnitrain.config.saved import read_config, read_values, write_config
from omnitrain.config.targets import ForbiddenTarget, build
from omnitrain.config.typed import ConfigError, leaves, plain
from omnitrain.files import CONFIG
from omnitrain.runs.chain import finished_stages, read_stages
from tests.interop.public_models import save_small_folder

GIVEN = {
    "talker_pretrain": ["codec=c", "codes=d"],
    "talker_continue": ["codec=c", "codes=d", "module.init_from=t"],
    "speaker_finetune": ["codec=c", "codes=d", "module.init_from=t"],
    "speech": [f"speech={PACK}"],
    "talker_post": [f"speech={PACK}", "judge=j"],
    "post": [f"base={PACK}", "teacher=t", "judge=j"],
    "talker_dpo": ["pairs=p", f"module.init_from={PACK}"],
    "dialogue": [f"dialogues={PACK}"],
    "dialogue_thinker": [f"dialogues={PACK}", "answers=a"],
    "dialogue_talker": [f"dialogues={PACK}", "answers=a", "module.init_from=t"],
    "codec_finetune": ["speech=s"],
    "aut": [f"data.tokenizer={PACK}"],
    **{f"pretrain_{name}": ["module.init_from=t"] for name in ("s1_audio", "s1_vision", "s2", "s3")},
}
"""What a recipe must be told."""


@cache
def folder() -> Path:
    return save_small_folder(tempfile.mkdtemp())


def recipe(name: str, run_dir: Path) -> RunConfig:
    given = [f"model.folder={folder()}"] if name == "finetune" else GIVEN.get(name, ())
    return run_config([f"+recipe={name}", *given, f"paths.run_dir={run_dir}"])


STAGED = sorted(path.stem for path in RECIPES.glob("*.yaml") if "\nstages:" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", STAGED)
def test_stages_compose_before_anything_is_made(name: str, tmp_path: Path) -> None:
    """What a stage reads while it composes, such as a tokenizer, is there before those in front of it have run."""
    run = recipe(name, tmp_path / "run")
    assert finished_stages(read_stages(run.stages, run.stage_overrides), tmp_path / "run") == {}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_it_stands_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(name, tmp_path)
    write_config(config, tmp_path)
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "${" not in text
    assert str(tmp_path) not in text
    # Another version: presets of other sizes, other defaults in the options.
    smaller = {k: replace(v, thinker=replace(v.thinker, layers=40)) for k, v in schemas.PRESETS.items()}
    monkeypatch.setattr(schemas, "PRESETS", smaller)
    again = read_config(tmp_path)
    assert again == config
    assert {key for key, _ in leaves(yaml.safe_load(text))} == {key for key, _ in leaves(plain(config))}
    with torch.device("meta"):
        before, after = build(config.model), build(again.model)
    assert [(n, p.shape) for n, p in before.state_dict().items()] == [
        (n, p.shape) for n, p in after.state_dict().items()
    ]


def test_a_folder_that_has_been_moved_is_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "a = b, c", tmp_path / "ümlaut 'x'"
    for folder in (first, second):
        folder.mkdir()
    write_config(recipe("speech", first), first)
    (second / "config.yaml").write_bytes((first / "config.yaml").read_bytes())
    moved = read_config(second)
    assert moved.paths.run_dir == str(second)
    write_config(moved, second)
    assert str(first) not in (second / CONFIG).read_text(encoding="utf-8")
    assert not [value for _, value in leaves(plain(moved)) if str(first) in str(value)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no mapping `model`"),
        ("[1, 2]", "no mapping `model`"),
        ("model: {", "cannot be read"),
        ("a: &x [1]\nmodel: {b: *x}\n", "anchor"),
        ("model: !!python/object/apply:os.system [true]", "cannot be read"),
        ("\x00", "cannot be read"),
        ("model: {_target_: omnitrain.models.presets.build, preset: tiny}", "written by an earlier version"),
    ],
)
def test_what_is_no_configuration_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n" + "#" * (5 << 20))
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        read_values(tmp_path)


def test_text_that_would_be_resolved_again_is_refused(tmp_path: Path) -> None:
    values = plain(recipe("quickstart", tmp_path))
    values["name"] = "${oc.env:HOME}"
    with pytest.raises(ForbiddenTarget, match=r"name: .*still holds an interpolation"):
        read(values)
