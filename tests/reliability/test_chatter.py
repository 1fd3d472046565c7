"""A run prints what is meant for whoever trains, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RULE = r"[\s━─│┃┏┓┗┛┡┩┳┻╇┴└┘├┤┬┼]*"
SAID = (
    r"run folder: \S+",
    r"memory before activations: [\d.]+ MB of [\d.]+ GB free here \(weights [\d.]+ kB, gradients .*, optimizer .*\)",
    r"Training [\d.]+ M of [\d.]+ M parameters on 1 x cpu, optimizer steps 0 to 2",
    r"step \d+/2  loss [\d.]+(  [\d,]+ tokens/s)?",
    r"step 2: validation loss( +\w+ [\d.]+)+",
    r" *validation, step 2 *",
    r"[│┃]( [\w ()/]+ [│┃]){5}",  # head and rows of its table: modality, samples, tokens, loss, bits per byte
    r"[│┃]( *[\w.]+ *[│┃]){5}",
    r"scoring \d+ held-out samples, answering \d+",
    r"held-out samples scored .*",
    r" *Held-out samples *",
    r" +n loss bits/B unigram chrF exact +.*",
    r"(text|image|  cell|  all) .*",
    r"(cell|loss|media swap): .*",
    r"above 0, the model looks and listens\.",
    r"report: \S+",
    RULE,
)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_says_nothing_that_is_not_meant_for_its_user(toy: list[str], tmp_path: Path, workers: int) -> None:
    """With all that sets libraries talking: no cache of fonts, Slurm's commands at hand, nothing to validate on."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text("#!/bin/sh\n")
    (tools / "srun").chmod(0o755)
    overrides = [
        "trainer.max_steps=2",
        f"data.num_workers={workers}",
        "evaluation.after_fit=true",
        f"paths.run_dir={tmp_path}/run",
    ]
    overrides += ["evaluation.max_samples=2", "evaluation.max_generated=1", "trainer.val_check_interval=2"]
    if workers:
        overrides += ["data.validation_sources={}"]
    done = subprocess.run(
        [sys.executable, "-m", "omnitrain", "fit", *toy, *overrides],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(tmp_path),
            "PATH": f"{tools}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line.startswith("report: ") for line in lines)
    assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in SAID)] == []
