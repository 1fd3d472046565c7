"""Code2Wav against that of transformers, with the same random weights, and streams against whole signals."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from omnitrain.models.code2wav import Code2Wav, Code2WavConfig, SnakeBeta
from omnitrain.models.layers.causal_conv import CausalConv1d, CausalConvTranspose1d

CONFIGS = {
    "the public ratios": Code2WavConfig(
        quantizers=4,
        codebook_size=32,
        d_model=32,
        layers=2,
        heads=4,
        kv_heads=4,
        ffn=48,
        window=7,
        decoder_dim=48,
    ),
    "grouped heads, other ratios": Code2WavConfig(
        quantizers=3,
        codebook_size=11,
        d_model=24,
        layers=3,
        heads=4,
        kv_heads=2,
        ffn=40,
        window=20,
        rope_theta=500.0,
        upsampling_ratios=(3,),
        decoder_dim=32,
        upsample_rates=(2, 5, 3),
    ),
}
LENGTHS = (1, 2, 20, 47)


def reference_of(config: Code2WavConfig):
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

    return Qwen3OmniMoeCode2Wav(
        Qwen3OmniMoeCode2WavConfig(
            codebook_size=config.codebook_size,
            hidden_size=config.d_model,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            sliding_window=config.window,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_quantizers=config.quantizers,
            upsample_rates=config.upsample_rates,
            upsampling_ratios=config.upsampling_ratios,
            decoder_dim=config.decoder_dim,
        )
    ).eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter: what starts at 0 or 1e-6 would hide its branch."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("alpha", "beta")):
            p.normal_(std=0.3)
        elif name.endswith(("gamma", "scale", "norm.weight", "layernorm.weight")):
            p.uniform_(0.3, 1.2)
        elif p.ndim == 1:
            p.normal_(std=0.1)
        elif "embedding" in name:
            p.normal_()
        else:  # quiet enough that few samples are clamped
            p.normal_(std=0.7 * p[0].numel() ** -0.5)


def random_codes(config: Code2WavConfig, frames: int, batch: int = 2) -> Tensor:
    return torch.randint(config.codebook_size, (batch, frames, config.quantizers))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    config = CONFIGS[request.param]
    reference = reference_of(config)
    randomise(reference)
    ours = Code2Wav(config).eval()
    ours.load_state_dict(reference.state_dict())  # strict: the names are the same
    return ours, reference


@pytest.fixture(scope="module", params=["public", "causal"])
def model(request):
    ours = Code2Wav(replace(CONFIGS["the public ratios"], trim=request.param)).eval()
    randomise(ours)
    return ours


@torch.no_grad()
@pytest.mark.parametrize("frames", LENGTHS)
def test_waveforms_equal_the_reference(pair, frames: int) -> None:
    ours, reference = pair
    codes = random_codes(ours.config, frames)
    wav, expected = ours(codes), reference(codes.transpose(1, 2))[:, 0]
    assert wav.shape == (2, ours.config.samples(frames))
    assert (expected.abs() < 1).float().mean() > 0.5  # not all clamped
    torch.testing.assert_close(wav, expected, atol=1e-4, rtol=0)


def test_gradients_equal_the_reference_with_and_without_checkpointing(pair) -> None:
    ours, reference = pair
    codes = random_codes(ours.config, 9)
    weight = torch.randn(2, ours.config.samples(9))

    def gradients(module, wav: Tensor) -> dict[str, Tensor]:
        module.zero_grad()
        (wav * weight).mean().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters()}

    expected = gradients(reference, reference(codes.transpose(1, 2))[:, 0])
    for ours.activation_checkpointing in (True, False):
        found = gradients(ours, ours(codes))
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp_min(1e-6)
            torch.testing.assert_close(
                found[name] / scale, gradient / scale, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


@torch.no_grad()
def test_a_stream_gives_the_same_samples_however_it_is_cut(model) -> None:
    config, rng = model.config, random.Random(0)
    for frames in (1, 2, 5, 40):
        codes = random_codes(config, frames)
        whole = model(codes)
        cuttings = [[1] * frames, [frames], [0, frames]]
        for _ in range(4):
            cuts = sorted(rng.choices(range(frames + 1), k=rng.randint(1, 8)))
            cuttings.append([b - a for a, b in zip([0, *cuts], [*cuts, frames], strict=True)])
        for pieces in cuttings:
            state = model.init_state(2)
            stream = torch.cat([model.step(piece, state) for piece in codes.split(pieces, dim=1)], dim=1)
            torch.testing.assert_close(stream, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_short_ratios_may_leave_the_first_pieces_without_samples() -> None:
    model = Code2Wav(replace(CONFIGS["the public ratios"], upsampling_ratios=(1,), upsample_rates=(3, 2)))
    randomise(model)
    codes = random_codes(model.config, 6)
    state = model.init_state(2)
    pieces = [model.step(frame, state) for frame in codes.split(1, dim=1)]
    assert [p.shape[1] for p in pieces] == [0, 4, 6, 6, 6, 6]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(codes), atol=1e-5, rtol=0)
    assert model(codes[:, :1]).shape == (2, 0)
    assert model.config.samples(1) == 0


@torch.no_grad()
def test_every_frame_gives_its_samples_at_once(model) -> None:
    config = model.config
    state = model.init_state(1)
    counts = [model.step(frame, state).shape[1] for frame in random_codes(config, 4, batch=1).split(1, dim=1)]
    cut = 555 if config.trim == "public" else 0
    assert config.samples_per_frame == 1920
    assert counts == [1920 - cut, 1920, 1920, 1920]
    assert config.samples(47) == 47 * 1920 - cut


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[301], [300, 1], [25] * 12 + [1], [1, 299, 1]])
def test_long_answers_lose_no_sample_at_a_joint(pieces: list[int]) -> None:
    """The public code decodes 300 frames at a time, and loses 555 samples at every joint."""
    model = Code2Wav(replace(CONFIGS["the public ratios"], d_model=8, layers=1, ffn=8, decoder_dim=16))
    randomise(model)
    codes = random_codes(model.config, 301, batch=1)
    state = model.init_state(1)
    stream = torch.cat([model.step(piece, state) for piece in codes.split(pieces, dim=1)], dim=1)
    assert stream.shape[1] == model.config.samples(301) == 577_365
    torch.testing.assert_close(stream, model(codes), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_past_does_not_know_the_future() -> None:
    model = Code2Wav(replace(CONFIGS["the public ratios"], trim="causal"))
    randomise(model)
    codes = random_codes(model.config, 12)
    changed = codes.clone()
    changed[:, 7:] = random_codes(model.config, 5)
    a, b = model(codes), model(changed)
    assert torch.equal(a[:, : 7 * 1920], b[:, : 7 * 1920])
    assert not torch.equal(a[:, 7 * 1920 : 8 * 1920], b[:, 7 * 1920 : 8 * 1920])


@torch.no_grad()
def test_the_public_trim_is_the_causal_one_555_samples_early() -> None:
    """So weights trained with one trim may be used with the other, but for the start."""
    models = [Code2Wav(replace(CONFIGS["the public ratios"], trim=trim)).eval() for trim in ("public", "causal")]
    for model in models:
        randomise(model)
    codes = random_codes(models[0].config, 12)
    public, causal = (model(codes) for model in models)
    torch.testing.assert_close(public[:, 9600:], causal[:, 555 + 9600 :], atol=1e-5, rtol=0)


def elements(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.untyped_storage().nbytes() // state.element_size()  # what is held, not what is shown
    if is_dataclass(state):
        return sum(elements(getattr(state, f.name)) for f in fields(state))
    return sum(elements(s) for s in state) if isinstance(state, list | tuple) else 0


@torch.no_grad()
def test_the_state_does_not_grow(model) -> None:
    state = model.init_state(1)
    sizes = []
    for frames, piece in ((10, 1), (290, 29)):
        for codes in random_codes(model.config, frames, batch=1).split(piece, dim=1):
            model.step(codes, state)
        sizes.append(elements(state))
    assert state.transformer.frames == 300
    assert sizes[0] == sizes[1] > 0


def test_public_size_has_the_public_shapes() -> None:
    with torch.device("meta"):
        ours, reference = Code2Wav(Code2WavConfig()), reference_of(Code2WavConfig())
    shapes = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert shapes == {name: tuple(p.shape) for name, p in reference.state_dict().items()}
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert count == 216_016_577  # of the public configuration
    assert reference.config.rope_parameters["rope_theta"] == Code2WavConfig().rope_theta
    assert reference.config.rms_norm_eps == Code2WavConfig().norm_eps


def test_constants_at_the_start_are_those_of_the_reference() -> None:
    config = CONFIGS["the public ratios"]
    theirs = dict(reference_of(config).named_parameters())
    for name, p in Code2Wav(config).named_parameters():
        if name.endswith(("alpha", "beta", "gamma", "scale")):
            assert torch.equal(p, theirs[name]), name


def test_the_gradient_of_snake_is_that_of_its_formula() -> None:
    snake = SnakeBeta(3)
    randomise(snake)
    x, weight = torch.randn(2, 3, 50, requires_grad=True), torch.randn(2, 3, 50)
    inputs = (x, snake.alpha, snake.beta)
    expected = x + (x * snake.alpha.exp()[:, None]).sin() ** 2 / (snake.beta.exp()[:, None] + 1e-9)
    torch.testing.assert_close(snake(x), expected)
    torch.testing.assert_close(
        torch.autograd.grad((snake(x) * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    )
    assert snake(x.bfloat16()).dtype == torch.bfloat16


def test_unclamped_samples_keep_their_gradient() -> None:
    model = Code2Wav(CONFIGS["the public ratios"])
    randomise(model)
    x = torch.randn(1, 3, 32, requires_grad=True)
    with torch.no_grad():
        model.decoder[-1].conv.bias.fill_(50.0)
    (gradient,) = torch.autograd.grad(model.decode(x).sum(), x)
    assert gradient.abs().max() == 0
    (gradient,) = torch.autograd.grad(model.decode(x, clamp=False).sum(), x)
    assert gradient.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 1, 1), (7, 1, 9), (1, 1, 1), (6, 3, 1), (5, 4, 2)])
def test_a_convolution_in_pieces(kernel: int, stride: int, dilation: int) -> None:
    convolution = CausalConv1d(3, 5, kernel, stride=stride, dilation=dilation)
    x = torch.randn(2, 3, 12 * stride)
    state = convolution.init_state(2)
    pieces = [convolution.step(p, state) for p in x.split([stride, 0, 4 * stride, 7 * stride], dim=-1)]
    torch.testing.assert_close(torch.cat(pieces, -1), convolution(x), atol=1e-6, rtol=0)
    assert convolution(x[..., :-1]).shape[-1] == (12 if stride > 1 else 11)  # rounded up
    if stride > 1:
        with pytest.raises(ValueError, match=f"stride {stride}"):
            convolution.step(x[..., :1], state)


@torch.no_grad()
@pytest.mark.parametrize("trim", ["public", "causal"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (6, 3), (5, 3), (9, 2)])
def test_a_transposed_convolution_in_pieces(kernel: int, stride: int, trim: str) -> None:
    convolution = CausalConvTranspose1d(3, 5, kernel, stride=stride, trim=trim)
    x = torch.randn(2, 3, 12)
    state = convolution.init_state(2)
    pieces = [convolution.step(p, state) for p in x.split([1, 1, 0, 4, 6], dim=-1)]
    full = convolution.conv(x)[..., : 12 * stride]
    expected = full[..., kernel - stride :] if trim == "public" else full
    torch.testing.assert_close(torch.cat(pieces, -1), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(convolution(x), expected, atol=1e-6, rtol=0)


def test_errors_name_what_is_wrong() -> None:
    model = Code2Wav(CONFIGS["the public ratios"])
    with pytest.raises(ValueError, match=r"\(1, 2, 3\); expected \[batch, frames, 4\]"):
        model(torch.zeros(1, 2, 3, dtype=torch.int64))
    for wrong in (32, -1):
        codes = torch.zeros(1, 2, 4, dtype=torch.int64)
        codes[0, 1, 2] = wrong
        with pytest.raises(ValueError, match=rf"codes\[0, 1, 2\] is {wrong}; codes of codebook 2 lie in 0..31"):
            model(codes)
    for change, named in (
        (dict(heads=3), "heads"),
        (dict(kv_heads=3), "kv_heads"),
        (dict(window=0), "window"),
        (dict(upsample_rates=(8, 0)), "upsample_rates"),
        (dict(decoder_dim=1000), "decoder_dim"),
        (dict(trim="left"), "trim"),
    ):
        with pytest.raises(ValueError, match=named):
            Code2WavConfig(**change)
