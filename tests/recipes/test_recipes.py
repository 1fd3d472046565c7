"""Every recipe composes, builds its objects, trains a few steps, and ends with scores and a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnitrain.__main__ import main
from omnitrain.cli.locations import PACK, RECIPES

NAMES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A recipe's prepared data need not be there: the pack has rows of the same tasks and languages.
    for folder in ("stamps", "moving_stamps"):
        (tmp_path / folder).symlink_to(PACK)
    monkeypatch.chdir(tmp_path)
    few = ["data.num_workers=0", "data.max_tokens=512", "evaluation.max_samples=2", "evaluation.max_generated=1"]
    line = ["fit", f"+recipe={name}", "+debug=fast", f"paths.data_dir={tmp_path}", "paths.run_dir=run", *few]
    assert main(line) == 0
    scores = json.loads((tmp_path / "run" / "eval" / "scores.json").read_text())
    assert {row["modality"] for row in scores["scores"]} >= {"image", "audio"}
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
