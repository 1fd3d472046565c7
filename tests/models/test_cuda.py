"""The kernels that only CUDA has (varlen attention, grouped products), against fp32 on the CPU path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.moe import SwiGLUExperts, TopKRouter
from omnitrain.models.presets import build, init_weights
from tests.interop.public_models import public_sample
from tests.models.test_omni import Geometry

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().float().cpu(), expected.detach().float().cpu()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-6))


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention_in_bfloat16(causal: bool) -> None:
    cu_seqlens = torch.tensor([0, 7, 8, 72, 200], dtype=torch.int32)
    q, k, v = (torch.randn(200, h, 32, requires_grad=True) for h in (6, 2, 2))
    expected = varlen_attention(q, k, v, cu_seqlens, causal=causal)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [q, k, v], upstream)
    half = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in (q, k, v)]
    actual = varlen_attention(*half, cu_seqlens.cuda(), causal=causal)
    grads = torch.autograd.grad(actual, half, upstream.to(actual))
    for a, b in zip((actual, *grads), (expected, *expected_grads), strict=True):
        assert relative_error(a, b) < 0.02


def test_a_cache_longer_than_the_queries() -> None:
    """Decoding: one query per document against all of its keys."""
    q, k, v = torch.randn(2, 4, 32), torch.randn(50, 2, 32), torch.randn(50, 2, 32)
    borders, keys = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 20, 50], dtype=torch.int32)
    expected = varlen_attention(q, k, v, borders, causal=True, cu_seqlens_key=keys)
    q, k, v = (t.to("cuda", torch.bfloat16) for t in (q, k, v))
    actual = varlen_attention(q, k, v, borders.cuda(), causal=True, cu_seqlens_key=keys.cuda())
    assert relative_error(actual, expected) < 0.02


@pytest.mark.parametrize("autocast", [False, True])
def test_grouped_experts_in_bfloat16(autocast: bool) -> None:
    router, experts = TopKRouter(64, 8, 2), SwiGLUExperts(64, 32, 8)
    for p in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(100, 64, requires_grad=True)
    routing = router(x)
    expected = experts(x, routing)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, experts.gate_up, experts.down], upstream, retain_graph=True)

    dtype = torch.float32 if autocast else torch.bfloat16
    on_gpu = copy.deepcopy(experts).to("cuda", dtype)
    y = x.detach().to("cuda", dtype).requires_grad_()
    moved = type(routing)(
        routing.experts.cuda(), routing.weights.detach().to("cuda", dtype), routing.counts.cuda(), routing.prob_sums
    )
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        actual = on_gpu(y, moved)
    grads = torch.autograd.grad(actual, [y, on_gpu.gate_up, on_gpu.down], upstream.to(actual))
    assert relative_error(actual, expected) < 0.02
    # x's gradient on the CPU also went through the router's weights; the experts' did not.
    for a, b in zip(grads[1:], wanted[1:], strict=True):
        assert relative_error(a, b) < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_whole_model(dtype: torch.dtype, tolerance: float) -> None:
    model = build("tiny", vocab_size=320, thinker={"layers": 3})
    init_weights(model, seed=0)
    pieces = [("text", 9), ("audio_video", (2, 4, 4), 1.0, 130), ("image", (1, 4, 6)), ("text", 12)]
    batch = PackedBatch.pack([public_sample(Geometry, pieces, seed).encoded for seed in range(3)])
    expected = model(**batch.model_inputs()).hidden
    on_gpu = copy.deepcopy(model).to("cuda", dtype)
    actual = on_gpu(**batch.to("cuda").model_inputs()).hidden
    assert relative_error(actual, expected) < tolerance
    actual.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in on_gpu.parameters())
