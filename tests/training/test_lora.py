"""Low-rank adapters: which matrices get them, what learns, and that merged weights compute the same."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from omnitrain.config.run_config import LoraConfig, ThinkerModuleConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.interop.lora import merged
from omnitrain.interop.public_format import load_pretrained
from omnitrain.models.omni import OmniModel
from omnitrain.training.flops import BatchSizes, forward_flops, training_flops
from omnitrain.training.lora import add_lora, lora_targets
from omnitrain.training.thinker import ThinkerModule
from tests.interop.public_models import public_sample, save_public_model

ALL = LoraConfig(rank=3, alpha=6, parts=["aut", "visual", "thinker"], targets=["attention", "mlp", "experts"])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model of random public weights (layers with and without experts), and a pack of text, a picture and sound."""
    folder = tmp_path_factory.mktemp("public")
    reference = save_public_model(folder, 1, "full")
    samples = [
        public_sample(reference.config, [("text", 5), ("image", (1, 4, 6)), ("audio", 150), ("text", 9)], s)
        for s in (1, 2)
    ]
    return load_pretrained(folder), PackedBatch.pack([sample.encoded for sample in samples])


def logits(model: OmniModel, pack: PackedBatch) -> torch.Tensor:
    return model.thinker.logits(model(**pack.model_inputs()).hidden)


def shaken(model: OmniModel) -> None:
    """Adapters as if they had learnt something."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.05


def test_adapters_change_nothing_at_first_and_merge_to_the_same(case) -> None:
    """All targets, stacked experts included; `merged` makes what peft's own merge makes, and computes the same."""
    original, pack = case
    model = copy.deepcopy(original)
    add_lora(model, ALL, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, pack), logits(original, pack))
        shaken(model)
        expected = logits(model, pack)
    assert (expected - logits(original, pack)).abs().max() > 0.1
    plain = copy.deepcopy(original)
    plain.load_state_dict(merged(model.state_dict(), scale=2.0))
    with torch.no_grad():
        torch.testing.assert_close(logits(plain, pack), expected, rtol=0, atol=1e-4)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    theirs = {name.replace(".base_layer", ""): x for name, x in model.state_dict().items() if ".lora_" not in name}
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-6)


def test_the_gradient_of_the_adapters_is_that_of_the_product(case) -> None:
    """dL/dA = scale B^T dL/dW and dL/dB = scale dL/dW A^T, with dL/dW of the merged model; also for each expert."""
    original, pack = case
    model = copy.deepcopy(original).requires_grad_(False)
    add_lora(model, ALL, seed=0)
    shaken(model)
    plain = copy.deepcopy(original)
    plain.load_state_dict(merged(model.state_dict(), scale=2.0))
    for one in (model, plain):
        logits(one, pack).logsumexp(-1).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".lora_" in name}
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)
    layer, name = model.thinker.layers[0], "thinker.layers.0.attention.qkv"
    dw = plain.thinker.layers[0].attention.qkv.weight.grad
    a, b = layer.attention.qkv.lora_A.default.weight, layer.attention.qkv.lora_B.default.weight
    torch.testing.assert_close(grads[f"{name}.lora_A.default.weight"], 2 * b.T @ dw, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grads[f"{name}.lora_B.default.weight"], 2 * dw @ a.T, rtol=1e-3, atol=1e-4)
    i = next(i for i, layer in enumerate(plain.thinker.layers) if hasattr(layer.mlp, "experts"))
    experts, dw = model.thinker.layers[i].mlp.experts, plain.thinker.layers[i].mlp.experts.gate_up.grad
    pairs = [m for m in experts.modules() if hasattr(m, "lora_A") and m.parameter_name == "gate_up"]
    a, b = pairs[0].lora_A.default.weight, pairs[0].lora_B.default.weight
    a_of, b_of = a.view(len(dw), 3, -1), b.view(b.shape[0], 3, len(dw)).permute(2, 0, 1)
    torch.testing.assert_close(a.grad.view_as(a_of), 2 * b_of.mT @ dw, rtol=1e-3, atol=1e-4)


def test_what_learns(case) -> None:
    """Adapters of the parts in `lora`, the whole of those in `train`, and nothing else; each A from its own stream."""
    original, _ = case
    lora = LoraConfig(rank=2, parts=["thinker", "aut"], targets=["attention"])
    models = [copy.deepcopy(original), copy.deepcopy(original)]
    other = LoraConfig(rank=2, parts=["visual", "thinker"], targets=["mlp", "attention"])
    for model, config in zip(models, (lora, other), strict=True):
        torch.manual_seed(len(config.targets))
        ThinkerModule(model, ThinkerModuleConfig(lora=config, train=["router", "aut_adapter"]), seed=5)
    learning = {name for name, p in models[0].named_parameters() if p.requires_grad}
    whole = {name for name in learning if ".lora_" not in name}
    assert whole == {name for name, _ in original.named_parameters() if ".router." in name and "talker" not in name} | {
        name for name, _ in original.named_parameters() if name.startswith(("aut.ln_post", "aut.proj"))
    }
    adapters = {name for name in learning if ".lora_" in name}
    layers = len(original.thinker.layers) * 2 + len(original.aut.layers) * 4
    assert len(adapters) == 2 * layers
    assert sum(t.parameters(2) for t in lora_targets(original, lora)) == sum(
        p.numel() for name, p in models[0].named_parameters() if name in adapters
    )
    name = "thinker.layers.1.attention.qkv.lora_A.default.weight"
    one, other = (dict(model.named_parameters())[name] for model in models)
    assert one.equal(other)
    assert one.abs().max() <= one.shape[1] ** -0.5
    assert ThinkerModuleConfig(lora=lora).train == []


def test_operations_are_those_without_adapters(case) -> None:
    """Forward as before; backward only towards the input, since no matrix of the model itself learns."""
    original, pack = case
    sizes, model = BatchSizes.of(pack), copy.deepcopy(original).requires_grad_(False)
    add_lora(model, ALL, seed=0)
    assert forward_flops(model, sizes) == forward_flops(original, sizes)
    assert training_flops(model, sizes) == 2 * sum(forward_flops(original, sizes).values())


def test_the_talker_and_mtp_have_adapters_too(case) -> None:
    original, _ = case
    model = copy.deepcopy(original).requires_grad_(False)
    lora = LoraConfig(rank=2, parts=["talker", "mtp"], targets=["attention", "mlp", "experts"])
    add_lora(model, lora, seed=0)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("talker.") and ".lora_" in name for name in learning)
    assert len(learning) == 2 * len(lora_targets(original, lora))
    shaken(model)
    plain = copy.deepcopy(original)
    plain.load_state_dict(merged(model.state_dict(), scale=16.0))
    c = model.config.talker
    inputs = (
        torch.randn(5, c.d_model),
        torch.randn(5, c.d_model),
        torch.randint(0, c.mtp.codebook_size, (5, c.codebooks)),
    )
    with torch.no_grad():
        first, expected, before = (m.talker.mtp(*inputs) for m in (model, plain, original))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, before, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "module.lora.rank=0: must be at least 1"),
        ({"parts": ["head"]}, "module.lora.parts: no part 'head'; the parts are aut, visual, thinker, talker, mtp"),
        ({"targets": ["router"]}, "no target 'router'; the targets are attention, mlp, experts"),
        ({"dropout": 0.1, "targets": ["experts"]}, "module.lora.dropout=0.1: experts have none"),
    ],
)
def test_what_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        LoraConfig(**wrong)
    assert message in str(error.value)


def test_what_does_not_fit_the_model(case, monkeypatch) -> None:
    original, _ = case
    with pytest.raises(ValueError, match=r"module\.lora: aut has no experts in this model; choose other"):
        lora_targets(original, LoraConfig(parts=["thinker", "aut"], targets=["experts"]))
    with pytest.raises(ValueError, match=r"module\.lora\.parts has thinker, which module\.train trains as a whole"):
        ThinkerModuleConfig(lora=LoraConfig(), train=["thinker"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"module\.lora needs peft: pip install 'omnitrain\[lora\]'"):
        add_lora(copy.deepcopy(original), ALL, seed=0)
