"""The notebooks run from beginning to end (a few steps), and are kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

from tests.study.simulated_study import write_collected_study

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STUDY = ROOT / "docs" / "results" / "nondegradation"
FEW = (
    "trainer.max_steps=3 data.num_workers=0 evaluation.max_samples=4 evaluation.max_generated=2"
    " evaluation.max_new_tokens=4"
)


_TWO_STEPS = "trainer.max_steps=2,trainer.val_check_interval=2,data.num_workers=0,evaluation.max_samples=2"
FEW_SPEECH = f"{_TWO_STEPS} data.max_frames=120 evaluation.seconds_limit=0.4 trainer.log_every_n_steps=1".replace(
    ",", " "
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs, f"strip the outputs of {path.name}"
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("OMNITRAIN_NOTEBOOK_OVERRIDES", os.environ.get("OMNITRAIN_NOTEBOOK_OVERRIDES", FEW))
    monkeypatch.setenv("OMNITRAIN_NOTEBOOK_SPEECH_OVERRIDES", FEW_SPEECH)
    monkeypatch.setenv("OMNITRAIN_NOTEBOOK_AUT_OVERRIDES", f"{_TWO_STEPS} data.max_tokens=256".replace(",", " "))
    if path.stem == "05_nondegradation":
        # The committed results, or, where there are none, a simulated study.
        study = STUDY if STUDY.is_dir() else write_collected_study(tmp_path / "raw", tmp_path / "study", seeds=2)
        monkeypatch.setenv("OMNITRAIN_STUDY_DIR", str(study))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert list(tmp_path.glob("runs/**/report.html"))
