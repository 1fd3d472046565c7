"""The wheel carries configuration, recipes and the embedded pack, and works in another environment, outside the
clone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    # The build back end straight from this environment: no isolated one, so nothing is downloaded.
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    wheel = tmp_path / run(sys.executable, "-c", build, tmp_path, cwd=ROOT).splitlines()[-1]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"omnitrain/_conf/config.yaml", "omnitrain/_recipes/quickstart.yaml"} <= names
    assert {"omnitrain/pack/tokenizer.json", "omnitrain/pack/media.parquet", "omnitrain/pack/NOTICE.md"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not {name.split("/")[0] for name in names} & {"conf", "recipes", "tests", "data"}

    # A fresh environment that borrows this one's packages (all but omnitrain, which is found in its own first).
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import omnitrain; print(omnitrain.__path__[0])", cwd=elsewhere).strip()
    assert Path(where) == site / "omnitrain"
    assert "+recipe=quickstart" in run(python, "-m", "omnitrain", "fit", "--help", cwd=elsewhere)
    line = ["+recipe=quickstart", "trainer.max_steps=5", "evaluation.max_samples=2", "evaluation.max_generated=1"]
    out = run(python, "-m", "omnitrain", "fit", *line, cwd=elsewhere, OMP_NUM_THREADS="1")
    (folder,) = (elsewhere / "runs").iterdir()
    assert f"run folder: {folder}" in out
    assert (folder / "report.html").is_file()
    assert str(site) in (folder / "config.yaml").read_text()
