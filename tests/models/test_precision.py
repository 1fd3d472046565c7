"""Under bf16 autocast: sums over layers, choices among experts and codes, and sound stay in fp32; products do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.layers.moe import TopKRouter
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights
from omnitrain.training.codec_losses import MelDistance, si_sdr
from tests.models.test_codec import FRAME, trained


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def read_by(modules: list[nn.Module]) -> list[torch.dtype]:
    """A list that fills with the type of what `modules` read."""
    found: list[torch.dtype] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
    return found


@pytest.fixture(scope="module")
def model() -> OmniModel:
    model = build("tiny", speech=True)
    init_weights(model, 0)
    return model


def test_residual_streams_are_fp32(model: OmniModel) -> None:
    talker = model.talker
    assert talker is not None
    towers = {"aut": model.aut.layers, "visual": model.visual.blocks, "thinker": model.thinker.layers}
    towers |= {"talker": talker.layers, "mtp": talker.mtp.layers}
    found = {name: read_by(list(layers)) for name, layers in towers.items()}
    products = {name: read_by([layers[0].get_submodule(inner)]) for name, layers, inner in (
        ("aut", model.aut.layers, "self_attn.out_proj"), ("visual", model.visual.blocks, "attn.proj"))}  # fmt: skip
    ids = torch.arange(12) % 4
    frames = torch.randint(0, talker.mtp.config.codebook_size, (3, talker.mtp.config.codebooks))
    with torch.no_grad(), autocast():
        model.aut(torch.randn(150, model.config.aut.n_mels), torch.tensor([150]))
        model.visual(torch.randn(16, model.config.vision.patch_dim), torch.tensor([[1, 4, 4]]))
        model.thinker(model.thinker.embed_tokens(ids).bfloat16(), ids.expand(3, -1), torch.tensor([0, 12]).int())
        talker(torch.randn(12, talker.config.d_model).bfloat16(), ids.expand(3, -1), torch.tensor([0, 12]).int())
        talker.mtp(torch.randn(3, talker.config.d_model), talker.codec_embedding(frames[:, 0]), frames)
    assert {name: set(dtypes) for name, dtypes in found.items()} == {name: {torch.float32} for name in towers}
    assert {name: set(dtypes) for name, dtypes in products.items()} == {n: {torch.bfloat16} for n in products}


def test_the_router_chooses_in_fp32() -> None:
    torch.manual_seed(0)
    router = TopKRouter(64, 8, 2)
    # Experts that differ by less than a bf16 logit can say.
    router.weight.data = torch.randn(64).repeat(8, 1) + 1e-3 * torch.randn(8, 64)
    x = torch.randn(500, 64)
    expected = router(x)
    with autocast():
        routing = router(x)
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.prob_sums, expected.prob_sums)
    in_16_bit = F.linear(x.bfloat16(), router.weight.bfloat16()).float().softmax(-1).topk(2).indices
    assert (in_16_bit != expected.experts).float().mean() > 0.2  # the test can fail


@pytest.mark.parametrize("weighting", ["uniform", "per position"])
def test_the_head_multiplies_in_bf16_and_adds_in_fp32(weighting: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64, requires_grad=True), torch.randn(200, 64, requires_grad=True)
    labels = torch.randint(0, 200, (40,))
    scale = torch.full((40,), 0.3) if weighting == "uniform" else torch.rand(40)
    with autocast():
        total, nll = chunked_cross_entropy(hidden, weight, labels, scale, chunk=16)
    rounded = hidden.detach().bfloat16().double(), weight.detach().bfloat16().double()
    expected = F.cross_entropy(rounded[0] @ rounded[1].T, labels, reduction="none").float()
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)  # rounded logits would be 0.05 off
    in_fp32 = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    assert (nll - in_fp32).abs().max() > 1e-3
    gradients = torch.autograd.grad(total, [hidden, weight])
    for ours, theirs in zip(gradients, torch.autograd.grad((in_fp32 * scale).sum(), [hidden, weight]), strict=True):
        assert ours.dtype == torch.float32
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9995


def test_a_codec_hears_quantizes_and_speaks_in_fp32() -> None:
    codec = trained()
    ends = read_by([codec.encoder.stages[0].conv, codec.decoder.decoder[-1].conv])
    books = [codec.quantizer.semantic, codec.quantizer.acoustic]
    projections = read_by([projection for b in books for projection in (b.input_proj, b.output_proj)])
    inner = read_by([codec.decoder.decoder[0].conv])
    wav = 0.3 * torch.randn(2, 6 * FRAME)
    latents: list[Tensor] = []
    codec.quantizer.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].detach()))
    with torch.no_grad(), autocast():
        out = codec(wav)
        codes = codec.encode(wav)
        spoken = codec.decode(codes)
    assert {*ends, *projections, out.wav.dtype, spoken.dtype} == {torch.float32}
    assert torch.equal(out.codes, codec.quantizer.encode(latents[0]))
    assert torch.equal(out.given[0], codec.quantizer.semantic.input_proj(latents[0]))  # nothing was rounded
    assert torch.equal(codes, out.codes)
    assert inner  # between the ends, convolutions take what autocast gives them
    assert out.wav.unique().numel() > 0.9 * out.wav.numel()  # 16 bit would have few hundred values


def test_distances_of_sound_are_fp32_whatever_they_are_given() -> None:
    torch.manual_seed(0)
    distance = MelDistance(24_000, (256, 128), (20, 10))
    wav, target = 0.1 * torch.randn(2, 2, 4800)
    with autocast():
        assert torch.equal(distance(wav, target), MelDistance(24_000, (256, 128), (20, 10))(wav, target))
        measured = distance(wav, target), si_sdr(wav, target)
    torch.testing.assert_close(measured, (distance(wav, target), si_sdr(wav, target)), atol=0, rtol=0)
