"""The optimizer's options."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from toy_training import toy_model

from omnitrain.config.run_config import OptimConfig
from omnitrain.training.optim import adamw, by_decay
from omnitrain.training.thinker import ThinkerModule

INT8 = OptimConfig(lr=1e-2, states="int8", fused=False)


def test_moments_in_8_bits_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"optim\.states=int8 needs torchao: pip install 'omnitrain\[low_bit\]'"):
        ThinkerModule(toy_model(), optim=INT8)


def test_moments_in_8_bits_follow_those_in_32_and_resume_exactly() -> None:
    pytest.importorskip("torchao")

    def begun(config: OptimConfig) -> tuple[nn.Linear, Any]:
        torch.manual_seed(0)
        layer = nn.Linear(128, 64)
        return layer, adamw(by_decay(layer.parameters(), config), config)

    def step(layer: nn.Linear, optimizer: Any, i: int) -> None:
        x = torch.randn(32, 128, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (layer(x) - x[:, :64]).square().mean().backward()
        optimizer.step()

    whole, other, exact = begun(INT8), begun(INT8), begun(OptimConfig(lr=1e-2))
    for i in range(6):
        for run in (whole, exact):
            step(*run, i)
    moved = (exact[0].weight - begun(INT8)[0].weight).norm()
    assert 0 < (whole[0].weight - exact[0].weight).norm() < 0.1 * moved
    for i in range(3):
        step(*other, i)
    state = other[1].state_dict()
    assert {type(v) for values in state["state"].values() for v in values.values()} == {torch.Tensor}
    again = begun(INT8)
    again[0].load_state_dict(other[0].state_dict())
    again[1].load_state_dict(state)
    assert again[1].state[again[0].weight]["exp_avg"].codes.dtype == torch.uint8
    for i in range(3, 6):
        step(*again, i)
    assert torch.equal(again[0].weight, whole[0].weight)
