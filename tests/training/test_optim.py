"""The optimizer's options."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from toy_training import toy_model

from omnitrain.config.run_config import OptimConfig
from omnitrain.models.presets import build
from omnitrain.training.optim import Muon, adamw, by_decay, optimizer_of, orthogonal, with_muon
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


def test_muon_is_that_of_pytorch_for_matrices_and_adamw_for_the_rest() -> None:
    config = OptimConfig(lr=1e-2, weight_decay=0.1, matrices="muon", fused=False)

    def begun() -> nn.ModuleList:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(24, 40), nn.Conv1d(3, 8, 5), nn.Conv1d(8, 1, 7)])

    ours, theirs = begun(), begun()
    optimizer = with_muon(by_decay(ours.parameters(), config), config)
    # The convolution's matrix stands in PyTorch's Muon as one; vectors, also one that is a row, in AdamW.
    matrix = nn.Parameter(theirs[1].weight.detach().flatten(1).clone())
    vectors = [theirs[0].bias, theirs[1].bias, theirs[2].bias]
    references = [
        torch.optim.Muon([theirs[0].weight, matrix], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": [theirs[2].weight]}], lr=1e-2,
                          betas=(0.9, 0.95), weight_decay=0.1),
    ]  # fmt: skip
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        matrix.grad = ours[1].weight.grad.flatten(1).clone()
        for one in (optimizer, *references):
            one.step()
    for p, q in zip(vectors, (ours[0].bias, ours[1].bias, ours[2].bias), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(ours[2].weight, theirs[2].weight)
    start = begun()
    # PyTorch's steps are in bf16, ours in fp32.
    for p, q, was in (
        (ours[0].weight, theirs[0].weight, start[0].weight),
        (ours[1].weight.flatten(1), matrix, start[1].weight.flatten(1)),
    ):
        assert float((p - q).detach().norm() / (p - was).detach().norm()) < 0.02
    saved = optimizer.state_dict()
    again = with_muon(by_decay(ours.parameters(), config), config)
    again.load_state_dict(saved)
    assert [g["muon"] for g in again.param_groups] == [g["muon"] for g in optimizer.param_groups]


def test_orthogonal_matrices_keep_their_directions() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 50) * torch.logspace(0, -1, 50)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = torch.linalg.svd(orthogonal(x))
    assert 0.6 < float(found.S.min()) <= float(found.S.max()) < 1.3
    assert float((u.T @ orthogonal(x) @ v.T).diagonal().min()) > 0.6
    torch.testing.assert_close(orthogonal(x.T), orthogonal(x).T)


def test_muon_takes_each_expert_as_a_matrix_and_leaves_tables_to_adamw() -> None:
    config = OptimConfig(lr=1e-2, matrices="muon", fused=False)
    model = build("tiny", speech=True)
    optimizer = optimizer_of(model, config)
    assert isinstance(optimizer, Muon)
    names = {p: name for name, p in model.named_parameters()}
    groups = {names[p]: (group["muon"], group["stacked"]) for group in optimizer.param_groups for p in group["params"]}
    assert groups["talker.layers.0.mlp.experts.gate_up"] == (True, True)
    assert groups["aut.conv2d1.weight"] == groups["talker.mtp.layers.0.mlp.down.weight"] == (True, False)
    for table in (
        "thinker.embed_tokens.weight", "thinker.lm_head.weight", "talker.codec_embedding.weight",
        "talker.mtp.code_head", "talker.layers.0.mlp.router.weight", "visual.pos_embed.weight", "talker.norm.weight",
    ):  # fmt: skip
        assert groups[table] == (False, False), table
    assert len(groups) == len(names)

    # A stack moves as its matrices do alone.
    experts = nn.Parameter(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)))
    alone = [nn.Parameter(matrix.clone()) for matrix in experts.detach()]
    stack = with_muon(by_decay([experts], config), config, {experts: "mlp.experts.down"})
    single = with_muon(by_decay(alone, config), config)
    for i in range(3):
        experts.grad = torch.randn(experts.shape, generator=torch.Generator().manual_seed(i + 1))
        for p, gradient in zip(alone, experts.grad, strict=True):
            p.grad = gradient.clone()
        stack.step()
        single.step()
    torch.testing.assert_close(experts.detach(), torch.stack([p.detach() for p in alone]))


def test_muon_keeps_no_moments_in_8_bits() -> None:
    with pytest.raises(ValueError, match=r"optim\.states=int8 is AdamW's"):
        OptimConfig(matrices="muon", states="int8")
