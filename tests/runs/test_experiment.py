"""What a configuration means on the machine that it runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omnitrain.config.compose import run_config
from omnitrain.config.run_config import TrainerConfig
from omnitrain.config.saved import write_config
from omnitrain.config.typed import ConfigError
from omnitrain.runs.experiment import check_start, precision


@pytest.mark.parametrize(
    ("accelerator", "cuda", "bf16", "expected"),
    [
        ("auto", True, True, "bf16-mixed"),
        ("gpu", True, True, "bf16-mixed"),
        ("auto", True, False, "32-true"),
        ("auto", False, False, "32-true"),
        ("cpu", True, True, "32-true"),
    ],
)
def test_automatic_precision(monkeypatch, accelerator: str, cuda: bool, bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)
    assert precision(TrainerConfig(accelerator=accelerator, precision="auto")) == expected
    assert precision(TrainerConfig(accelerator=accelerator, precision="32-true")) == "32-true"
    assert run_config(["trainer=ddp"]).trainer.precision == "auto"


@pytest.mark.parametrize("begun", [["model=aut_tiny", "module=aut"], []], ids=["AuT", "Thinker"])
def test_weights_that_were_read_otherwise_are_refused(tmp_path: Path, begun: list[str]) -> None:
    """128 features are four heads of 32 or eight of 16, and no shape says which."""
    write_config(run_config([*begun, f"paths.run_dir={tmp_path}"]), tmp_path)
    start = f"module.init_from={{aut: {tmp_path}}}"
    check_start(run_config([start]))
    with pytest.raises(ConfigError, match=r"has aut\.heads=4, and this model 8"):
        check_start(run_config([start, "model.aut.heads=8"]))
    check_start(run_config([start, "model=pretrained", "model.folder=DIR"]))  # whose sizes are not known here
    check_start(run_config([f"module.init_from={{visual: {tmp_path}}}", "model.aut.heads=8"]))
