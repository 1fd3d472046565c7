"""The layers of the decoder against autograd through their plain equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.layers.moe import Routing, SwiGLUExperts, TopKRouter
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.rope import NormRotate, rotate, tm_rope
from omnitrain.models.sizes import axis_of_frequency


def gradients_agree(actual: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rms_norm_is_its_equation() -> None:
    norm = RMSNorm(24)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 24, requires_grad=True)
    expected = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    gradients_agree(norm(x), expected, [x, norm.weight])


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    """And rounded once, at the end: to the nearest number of 8 bits, forward and backward."""
    torch.manual_seed(0)
    norm = RMSNorm(24)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 24, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(7, 24, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(norm(x), x, upstream)
    exact = x.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(norm(exact), exact, upstream.float())
    assert norm(x).dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float(), norm(exact), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(gradient.float(), expected, rtol=2**-8, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(norm(x).float(), norm(exact), rtol=2**-8, atol=1e-6)


def test_axes_are_dealt_out_in_turn() -> None:
    assert axis_of_frequency((4, 2, 2)) == [0, 1, 2, 0, 1, 2, 0, 0]
    assert [axis_of_frequency((24, 20, 20)).count(a) for a in range(3)] == [24, 20, 20]
    with pytest.raises(ValueError, match="mrope_sections"):
        axis_of_frequency((1, 4, 3))


def test_rotation_is_complex_multiplication() -> None:
    ids = torch.randint(0, 100, (3, 5))
    cos, sin = tm_rope(ids, (4, 2, 2), 1e4)
    x = torch.randn(5, 3, 16)
    angle = torch.stack([ids[a] * 1e4 ** (-i / 8) for i, a in enumerate(axis_of_frequency((4, 2, 2)))], -1)
    z = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    torch.testing.assert_close(
        rotate(x, cos[:, None], sin[:, None]), torch.cat([z.real, z.imag], -1), rtol=1e-5, atol=1e-5
    )


def test_norm_rotate_is_norm_then_rotation() -> None:
    cos, sin = tm_rope(torch.randint(0, 100, (3, 5)), (4, 2, 2), 1e4)
    qkv = torch.randn(5, 6, 16)
    x = qkv[:, :5].requires_grad_()  # four query heads and a key head, not contiguous
    weight_q, weight_k = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = torch.cat([normed[:, :4] * weight_q, normed[:, 4:] * weight_k], 1)
    a, b = normed.chunk(2, -1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    expected = torch.cat([a * c - b * s, b * c + a * s], -1)
    gradients_agree(NormRotate.apply(x, weight_q, weight_k, cos, sin, 4, 1e-6), expected, [x, weight_q, weight_k])


def expert_sum(x: Tensor, experts: SwiGLUExperts, routing: Routing) -> Tensor:
    """The equation, token by token."""
    rows = []
    for n in range(len(x)):
        row = torch.zeros_like(x[n])
        for j, e in enumerate(routing.experts[n].tolist()):
            gate, up = (experts.gate_up[e] @ x[n]).chunk(2)
            row = row + routing.weights[n, j] * (experts.down[e] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(("n", "n_experts", "top_k"), [(9, 5, 2), (1, 16, 4), (20, 3, 3)])
def test_experts_are_the_weighted_sum(n: int, n_experts: int, top_k: int) -> None:
    router, experts = TopKRouter(12, n_experts, top_k), SwiGLUExperts(12, 7, n_experts)
    for p in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(n, 12, requires_grad=True)
    routing = router(x)
    gradients_agree(
        experts(x, routing), expert_sum(x, experts, routing), [x, experts.gate_up, experts.down, router.weight]
    )
    assert routing.counts.sum() == n * top_k
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(n))
    torch.testing.assert_close(routing.prob_sums, (x @ router.weight.T).softmax(-1).sum(0))


def test_grouped_experts_are_the_same() -> None:
    """The path of GPUs in 16 bit, here in fp32: sorted by expert and back, one gather each way."""
    router, experts = TopKRouter(12, 5, 2), SwiGLUExperts(12, 8, 5)
    for p in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(9, 12, requires_grad=True)
    routing = router(x)
    of = [x, experts.gate_up, experts.down, router.weight]
    gradients_agree(experts._grouped(x, routing, torch.float32), expert_sum(x, experts, routing), of)


def test_a_frozen_router_is_not_balanced() -> None:
    router = TopKRouter(12, 5, 2)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(9, 12, requires_grad=True)
    assert router(x).prob_sums.requires_grad
    router.requires_grad_(False)
    routing = router(x)
    assert not routing.prob_sums.requires_grad
    assert routing.weights.requires_grad  # what stands before it still learns through the mixing weights


def test_frozen_experts_pass_the_gradient_on() -> None:
    router, experts = TopKRouter(12, 4, 2), SwiGLUExperts(12, 7, 4)
    for p in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(p, std=0.5)
    experts.requires_grad_(False)
    x = torch.randn(6, 12, requires_grad=True)
    routing = router(x)
    gradients_agree(experts(x, routing), expert_sum(x, experts, routing), [x, router.weight])
    assert experts.gate_up.grad is None


def test_router_without_normalisation_keeps_the_softmax() -> None:
    router = TopKRouter(12, 4, 2, normalise=False)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(3, 12)
    torch.testing.assert_close(router(x).weights, (x @ router.weight.T).softmax(-1).topk(2).values)


@pytest.mark.parametrize("weighting", ["uniform", "per position"])
@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 12])
def test_cross_entropy_and_its_gradients(weighting: str, chunk: int) -> None:
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 20, (11,))
    labels[[0, 4, 10]] = -100
    scale = torch.full((11,), 0.3) if weighting == "uniform" else torch.rand(11)
    total, nll = chunked_cross_entropy(hidden, weight, labels, scale, chunk=chunk)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    assert nll.dtype == torch.float32
    assert nll[[0, 4, 10]].eq(0).all()
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(total, (expected * scale).sum())
    for a, b in zip(
        torch.autograd.grad(total, [hidden, weight], retain_graph=True),
        torch.autograd.grad((expected * scale).sum(), [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    again = torch.autograd.grad(total * 2, weight)[0]  # a second backward pass through the same graph
    torch.testing.assert_close(again, 2 * b)


def test_cross_entropy_with_a_frozen_head_or_without_labels() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    labels = torch.tensor([1, -100, 3, 19])
    chunked_cross_entropy(hidden, weight, labels).total.backward()
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    hidden.grad = None
    nothing = chunked_cross_entropy(hidden, weight.requires_grad_(), torch.full((4,), -100))
    nothing.total.backward()
    assert nothing.nll.eq(0).all()
    with torch.no_grad():
        loud = chunked_cross_entropy(1000 * hidden, weight, labels).nll  # exp(logits) is beyond fp32
        torch.testing.assert_close(loud, F.cross_entropy(1000 * hidden @ weight.T, labels, reduction="none"))
    empty = chunked_cross_entropy(hidden[:0], weight, labels[:0])
    empty.total.backward()
    assert empty.nll.shape == (0,)
    assert weight.grad.eq(0).all()
    assert hidden.grad.eq(0).all()


def test_cross_entropy_never_builds_the_logits_of_the_batch() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Largest():
        chunked_cross_entropy(hidden, weight, torch.randint(0, 1000, (256,)), chunk=16).total.backward()
    assert largest == 16 * 1000


def test_a_label_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[0, 20\).*found 3 to 20"):
        chunked_cross_entropy(torch.randn(2, 8), torch.randn(20, 8), torch.tensor([3, 20]))
