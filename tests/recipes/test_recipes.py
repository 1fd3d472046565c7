"""Every recipe composes, builds its objects, trains a few steps, and ends with scores and a report; with PyTorch's
deterministic algorithms, which also fill memory that nobody has written with NaN."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omnitrain.__main__ import main
from omnitrain.config.locations import PACK, PACK_SPEECH, RECIPES

NAMES = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
SPEECH = {"codec", "talker_pretrain", "talker_continue", "speaker_finetune", "speech_quickstart", "speech"}
"""These build on one another, and run as such below."""
PRETRAIN = {name for name in NAMES if name.startswith("pretrain")}
"""So do these, all in tests/cli/test_pretrain.py."""
SEARCH = {"nondegradation_lr", "nondegradation_lr_arm"}
"""Sweeps of `nondegradation`, in tests/cli/test_sweeps.py."""

EXACT = "trainer.deterministic=true"


@pytest.fixture(autouse=True)
def algorithms() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES - SPEECH - PRETRAIN - SEARCH))
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A recipe's prepared data need not be there: the pack has rows of the same tasks and languages.
    (tmp_path / "long").mkdir()
    long = [f"long/{part}" for part in ("train", "validation", "test", "test30", "heldout")]
    for folder in ("stamps", "moving_stamps", *long):
        (tmp_path / folder).symlink_to(PACK)
    monkeypatch.chdir(tmp_path)
    few = [
        "trainer.deterministic=true",
        "data.num_workers=0",
        "data.max_tokens=512",
        "evaluation.max_samples=2",
        "evaluation.max_generated=1",
    ]
    line = ["fit", f"+recipe={name}", "+debug=fast", f"paths.data_dir={tmp_path}", "paths.run_dir=run", *few]
    assert main(line) == 0
    scores = json.loads((tmp_path / "run" / "eval" / "scores.json").read_text())
    assert {row["modality"] for row in scores["scores"]} >= {"image", "audio"}
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


FEW = [
    "trainer.deterministic=true",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "data.num_workers=0",
    "evaluation.max_samples=2",
]
SHORT = ["data.max_frames=120", "evaluation.players=1", "evaluation.seconds_limit=0.4"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["speech_quickstart", "speech"])
def test_speech_recipes_run(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = {"codec": [*FEW, "data.rows=1"], "talker": [*FEW, *SHORT]}
    overrides = [f"stage_overrides.{name}=[{','.join(words)}]" for name, words in stages.items()]
    needs = [f"speech={PACK_SPEECH}"] if recipe == "speech" else []
    assert main(["fit", f"+recipe={recipe}", "paths.run_dir=run", *needs, *overrides]) == 0
    runs = ["run/codec", "run/talker"]
    if recipe == "speech_quickstart":  # the later stages of a Talker start from its result
        made = ["codec=run/codec", "codes=run/codes", "module.init_from=run/talker"]
        for later in ("talker_continue", "speaker_finetune"):
            assert main(["fit", f"+recipe={later}", f"paths.run_dir={later}", *made, *FEW, *SHORT]) == 0
            runs.append(later)
    for run in runs:
        speech = json.loads((tmp_path / run / "eval" / "speech.json").read_text())
        assert speech["n"] == 2
        assert speech["wer"]["open"]["reference"]["mean"] < 1
        page = (tmp_path / run / "report.html").read_text()
        assert page.count("<audio") >= (2 if run == "run/codec" else 3)  # a player for each signal
