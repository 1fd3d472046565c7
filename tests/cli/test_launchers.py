"""Processes that something else than Lightning starts. (They train: tests/reliability/test_kills.py, tests/slurm.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from omnitrain.__main__ import main
from omnitrain.cli import fit


def test_ranks_that_see_different_checkpoints(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is not on a shared disk: said before anything is loaded."""
    monkeypatch.setattr(fit, "gather_objects", lambda mine: [mine, 1])
    assert main(["fit", *toy, f"paths.run_dir={tmp_path}"]) == 1
    line = capsys.readouterr().err
    assert f"error: {tmp_path}: rank 1 finds another checkpoint there than rank 0, or none" in line


@pytest.mark.parametrize("said", [{"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}])
def test_processes_from_outside_need_one_folder(
    toy: list[str],
    said: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", *toy]) == 1
    assert "paths.run_dir: 2 processes were started from outside" in capsys.readouterr().err
