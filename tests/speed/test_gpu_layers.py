"""The benchmark of single layers: both sides compute the same, and its operations are those that are executed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from speed import gpu_layers
from tests.speed.test_thinker_training import attention

TINY = ["--device", "cpu", "--preset", "tiny", "--tokens", "48", "--repeats", "1", "--no-compile"]


def test_the_command_measures_both_sides_of_every_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_layers, "FRAME", 32)
    monkeypatch.setattr(gpu_layers, "WINDOW", 20)
    rows = gpu_layers.main(TINY)
    assert [row.kind for row in rows] == [kind for kind in gpu_layers.KINDS for _ in range(2)]
    assert all(row.difference < 1e-5 and row.seconds > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)

    sides = gpu_layers.sides

    def one_louder(*arguments: Any) -> Iterator[gpu_layers.Side]:
        for side in sides(*arguments):
            yield replace(side, compute=lambda x, side=side: 1.01 * side.compute(x)) if "omni" in side.name else side

    monkeypatch.setattr(gpu_layers, "sides", one_louder)
    with pytest.raises(SystemExit, match=r"omnitrain is 1.0e-02 from transformers in aut: no claim"):
        gpu_layers.main([*TINY, "--layers", "aut"])


@pytest.mark.parametrize("kind", ["talker", "vision"])
def test_operations_are_those_that_are_executed(kind: str) -> None:
    lengths, aten = [40, 24] if kind == "vision" else [64], torch.ops.aten
    ours = next(iter(gpu_layers.sides(kind, "tiny", lengths, torch.device("cpu"), False)))
    config = gpu_layers.model_of("tiny").config
    x = torch.randn(64, (config.vision if kind == "vision" else config.talker).d_model, requires_grad=True)
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention(2, 0),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention(4, 1),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        ours.compute(x).sum().backward()
    assert counter.get_total_flops() == pytest.approx(gpu_layers.operations(kind, config, lengths), rel=0.02)
