"""What a configuration means on the machine that it runs on."""

from __future__ import annotations

import pytest
import torch

from omnitrain.config.compose import run_config
from omnitrain.config.run_config import TrainerConfig
from omnitrain.runs.experiment import precision


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
