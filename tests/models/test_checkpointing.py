"""What is computed again in the backward pass, and what is kept of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import step_samples, toy_model

from omnitrain.config.run_config import LoraConfig, ThinkerModuleConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.models.omni import OmniModel

ATTENTION, EXPERTS = "aten._scaled_dot_product_flash_attention_for_cpu", "aten._grouped_mm"
LAYERED = ["thinker", "aut", "visual"]


class Executed(Counter[str], TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        Counter.__init__(self)
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def both_passes(model: OmniModel) -> tuple[dict[str, Tensor], Executed]:
    model.zero_grad()
    with Executed() as executed:
        output = model(**PackedBatch.pack(step_samples(0)).model_inputs())
        (output.hidden.square().sum() + output.router_prob_sums.square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, executed


def test_what_is_kept_is_not_computed_again_and_changes_no_gradient() -> None:
    model = toy_model()
    expected, once = both_passes(model)
    assert EXPERTS not in once
    products = 2 * 2 * 3  # two layers' two, and the gradients of both factors of each
    for kept, attentions, grouped in (
        ([], 2 * once[ATTENTION], 0),
        (["attention"], once[ATTENTION], 0),
        (["experts"], 2 * once[ATTENTION], products),
        (["attention", "experts"], once[ATTENTION], products),
    ):
        model.set_activation_checkpointing(LAYERED, kept)
        found, executed = both_passes(model)
        assert (executed[ATTENTION], executed[EXPERTS]) == (attentions, grouped), kept
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=f"{kept} {name}")
    for layer in model.thinker.layers:  # otherwise grouped products are computed again like all else
        layer.mlp.experts.grouped = True
    model.thinker.kept_activations = []
    assert both_passes(model)[1][EXPERTS] == products + 2 * 2


def test_nothing_can_be_kept_where_nothing_is_computed_again() -> None:
    with pytest.raises(ValueError, match=r"module\.kept_activations.*module\.activation_checkpointing"):
        ThinkerModuleConfig(kept_activations=["attention"])


def test_adapters_of_experts_are_not_compiled() -> None:
    lora = LoraConfig(rank=2, parts=["thinker"], targets=["experts"])
    with pytest.raises(ValueError, match=r"module\.compile=layers.*module\.lora\.targets"):
        ThinkerModuleConfig(lora=lora, compile="layers")
