"""The codec: its quantizer against explicit sums, its streams against whole signals, its decoder as a Code2Wav."""

from __future__ import annotations

import copy
import os
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from omnitrain.models.code2wav import Code2Wav, Code2WavConfig
from omnitrain.models.codec import CausalLogMel, Codebooks, Codec, CodecConfig, CodecEncoder, ResidualVectorQuantizer
from omnitrain.training.codec_losses import rvq_commitment_loss

DECODER = Code2WavConfig(
    quantizers=4,
    codebook_size=16,
    d_model=24,
    layers=1,
    heads=2,
    kv_heads=2,
    ffn=32,
    window=6,
    layer_scale=0.5,
    upsampling_ratios=(2,),
    decoder_dim=16,
    upsample_rates=(5, 4),
    trim="causal",
)
CONFIG = CodecConfig(
    encoder_dim=4,
    downsample_rates=(4, 5),
    downsampling_ratios=(2,),
    layers=1,
    heads=2,
    kv_heads=2,
    ffn=32,
    window=6,
    layer_scale=0.5,
    codebook_dim=8,
    decay=0.9,
    decoder=DECODER,
)
FRAME = 40


def trained(config: CodecConfig = CONFIG, seed: int = 0) -> Codec:
    """A codec whose codebooks have seen a few batches, in eval mode."""
    torch.manual_seed(seed)
    codec = Codec(config).train()
    with torch.no_grad():
        for _ in range(3):
            codec(torch.randn(4, 20 * FRAME))
            codec.quantizer.update()
    return codec.eval()


# ------------------------------------------------------------------------------------------------------------ quantizer


def nearest_by_hand(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    return ((x[:, None] - codebook[None]) ** 2).sum(-1).argmin(-1)


def test_the_moving_averages_against_explicit_sums() -> None:
    torch.manual_seed(0)
    books = Codebooks(replace(CONFIG, revive_below=0.0), n=3)
    books.train()(torch.randn(2, 40, 24), torch.full((2,), 3), None)  # initialises
    books.update()
    before = {name: buffer.clone().double().numpy() for name, buffer in books.named_buffers()}
    latent = torch.randn(2, 30, 24)
    n_used = torch.tensor([3, 1])
    _, codes, given, chosen_vectors, histogram = books(latent, n_used, None)
    assert all(np.array_equal(buffer.numpy(), before[name]) for name, buffer in books.named_buffers())
    books.update()
    commitment = rvq_commitment_loss(given, chosen_vectors, n_used)

    x = books.input_proj(latent).detach().double().numpy().reshape(60, 8)
    sample = np.repeat([0, 1], 30)
    for i in range(3):
        chosen = nearest_by_hand(x, before["codebooks"][i])
        assert np.array_equal(codes.reshape(60, 3)[:, i].numpy(), chosen)
        assert np.array_equal(histogram[i].numpy(), np.bincount(chosen, minlength=16))
        counts, sums = 0.9 * before["counts"][i], 0.9 * before["sums"][i]
        for row, code in zip(x, chosen, strict=True):
            counts[code] += 0.1
            sums[code] += 0.1 * row
        total = counts.sum()
        expected = sums / ((counts + 1e-5) / (total + 16 * 1e-5) * total)[:, None]
        np.testing.assert_allclose(books.counts[i].numpy(), counts, atol=1e-5)
        np.testing.assert_allclose(books.sums[i].numpy(), sums, atol=1e-5)
        np.testing.assert_allclose(books.codebooks[i].numpy(), expected, atol=1e-4)
        rest = x - before["codebooks"][i][chosen]
        using = (sample == 0) if i > 0 else np.full(60, True)  # the second sample uses one codebook
        np.testing.assert_allclose(commitment[i].item(), (rest[using] ** 2).mean(), rtol=1e-5)
        x = rest


def test_outputs_are_sums_of_the_codebooks_in_use() -> None:
    quantizer = trained().quantizer
    latent = torch.randn(3, 7, 24)
    for n in (1, 2, 4):
        out = quantizer(latent, n_quantizers=n)
        assert torch.equal(out.codes, quantizer.encode(latent))
        torch.testing.assert_close(out.quantized, quantizer.decode(out.codes[..., :n]), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.semantic, quantizer.decode(out.codes[..., :1]), atol=1e-6, rtol=1e-5)
        assert out.n_used.tolist() == [n] * 3
        assert (rvq_commitment_loss(out.given, out.chosen, out.n_used) > 0).tolist() == [True] * n + [False] * (4 - n)
    # Codebook 1 reads the latent, not what codebook 0 left of it.
    z = quantizer.acoustic.input_proj(latent).reshape(21, 8)
    first = nearest_by_hand(z.detach().numpy(), quantizer.acoustic.codebooks[0].numpy())
    assert np.array_equal(out.codes.reshape(21, 4)[:, 1].numpy(), first)


def test_the_gradient_passes_straight_through() -> None:
    quantizer = trained().quantizer.eval()
    latent = torch.randn(2, 5, 24, requires_grad=True)
    weight = torch.randn(2, 5, 24)
    (gradient,) = torch.autograd.grad((quantizer(latent).quantized * weight).sum(), latent)
    expected = sum(
        weight @ part.output_proj.weight @ part.input_proj.weight for part in (quantizer.semantic, quantizer.acoustic)
    )
    torch.testing.assert_close(gradient, expected)
    (gradient,) = torch.autograd.grad((quantizer(latent, n_quantizers=1).quantized * weight).sum(), latent)
    semantic = quantizer.semantic  # codebooks out of use pass nothing
    torch.testing.assert_close(gradient, weight @ semantic.output_proj.weight @ semantic.input_proj.weight)

    out = quantizer(latent)
    (gradient,) = torch.autograd.grad(rvq_commitment_loss(out.given, out.chosen, out.n_used)[0], latent)
    z = quantizer.semantic.input_proj(latent)
    rest = z - F.embedding(quantizer.encode(latent)[..., 0], quantizer.semantic.codebooks[0])
    torch.testing.assert_close(gradient, (2 * rest / rest.numel()) @ quantizer.semantic.input_proj.weight)


def test_dropout_draws_the_codebooks_in_use_per_sample() -> None:
    quantizer = trained(replace(CONFIG, dropout=0.5)).quantizer.train()
    latent = torch.randn(4000, 1, 24)
    out = quantizer(latent, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(out.n_used, minlength=5) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 0.125, 0.125, 0.125, 0.625]), atol=0.03, rtol=0)
    assert quantizer.eval()(latent).n_used.unique().tolist() == [4]
    again = trained(replace(CONFIG, dropout=0.5)).quantizer.train()
    repeated = again(latent, generator=torch.Generator().manual_seed(0))
    assert torch.equal(repeated.n_used, out.n_used)
    assert torch.equal(repeated.codes, out.codes)


def test_unquantized_samples_are_what_nothing_rounded() -> None:
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(replace(CONFIG, unquantized=0.5, dropout=0.0)).train()
    latent = torch.randn(64, 5, 24)
    quantizer(latent)
    quantizer.update()
    out = quantizer(latent)
    semantic, acoustic = quantizer.semantic, quantizer.acoustic
    exact = semantic.output_proj(semantic.input_proj(latent)) + acoustic.output_proj(acoustic.input_proj(latent))
    rounded = semantic.decode(out.codes[..., :1]) + acoustic.decode(out.codes[..., 1:])
    is_exact = torch.isclose(out.quantized, exact, atol=1e-5).all(dim=(1, 2))
    is_rounded = torch.isclose(out.quantized, rounded, atol=1e-5).all(dim=(1, 2))
    assert torch.equal(is_exact, ~is_rounded)
    assert 16 < int(is_exact.sum()) < 48
    for untouched in (quantizer(latent, n_quantizers=4), quantizer.eval()(latent)):
        again = semantic.decode(untouched.codes[..., :1]) + acoustic.decode(untouched.codes[..., 1:])
        torch.testing.assert_close(untouched.quantized, again, atol=1e-5, rtol=0)


def test_dead_codes_become_vectors_of_the_batch() -> None:
    torch.manual_seed(0)
    books = Codebooks(CONFIG, n=1).train()
    books(torch.randn(2, 40, 24), torch.ones(2, dtype=torch.int64), None)
    books.update()
    books.codebooks[0, 3:9] = 100.0  # nothing is near them
    books.counts[0, 3:9] = 1e-3
    books.sums[0, 3:9] = 0.1
    latent = torch.randn(2, 40, 24)
    twin = copy.deepcopy(books)
    for each in (books, twin):
        each(latent, torch.ones(2, dtype=torch.int64), None)
        each.update(torch.Generator().manual_seed(1))
    assert torch.equal(books.codebooks, twin.codebooks)
    vectors = books.input_proj(latent).reshape(80, 8)
    distance = torch.cdist(books.codebooks[0, 3:9], vectors).min(dim=1)
    assert distance.values.max() < 1e-3
    assert len(distance.indices.unique()) == 6
    assert (books.counts[0, 3:9] > 1).all()
    torch.testing.assert_close(books.sums[0, 3:9], books.codebooks[0, 3:9] * books.counts[0, 3:9, None])


def test_the_first_batch_sets_the_codebooks_by_k_means() -> None:
    books = Codebooks(replace(CONFIG, kmeans_steps=3), n=2)
    x = torch.randn(60, 8)
    books._initialise(x, torch.Generator().manual_seed(3))
    generator, rest = torch.Generator().manual_seed(3), x.numpy()
    for i in range(2):
        codebook = rest[torch.randperm(60, generator=generator)[:16].numpy()]
        for _ in range(3):
            code = nearest_by_hand(rest, codebook)
            codebook = np.stack([rest[code == k].mean(0) if (code == k).any() else codebook[k] for k in range(16)])
        np.testing.assert_allclose(books.codebooks[i].numpy(), codebook, atol=1e-5)
        code = nearest_by_hand(rest, codebook)
        np.testing.assert_allclose(books.counts[i].numpy(), np.bincount(code, minlength=16))
        np.testing.assert_allclose(books.sums[i].numpy()[3], rest[code == 3].sum(0), atol=1e-5)
        rest = rest - codebook[code]


def test_a_batch_that_is_not_learned_leaves_no_trace() -> None:
    """The spike guard calls no `update`: the codebooks stay, and a first batch does not set them."""
    torch.manual_seed(0)
    books, ones = Codebooks(CONFIG, n=1).train(), torch.ones(2, dtype=torch.int64)
    books(torch.full((2, 40, 24), torch.nan), ones, None)
    good = torch.randn(2, 40, 24)
    books(good, ones, None)
    books.update()
    assert books.codebooks.isfinite().all()
    before = {name: buffer.clone() for name, buffer in books.named_buffers()}
    books(torch.full((2, 40, 24), torch.nan), ones, None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in books.named_buffers())
    with pytest.raises(RuntimeError, match="no forward pass"):
        Codebooks(CONFIG, n=1).update()


def test_a_short_first_batch_is_made_up_for_by_later_ones() -> None:
    torch.manual_seed(0)
    books = Codebooks(CONFIG, n=1).train()
    one = torch.ones(1, dtype=torch.int64)
    for _ in range(10):
        books(torch.randn(1, 8, 24), one, None)  # 8 vectors, 16 codes
        books.update()
    _, codes, *_ = books.eval()(torch.randn(1, 500, 24), one, None)
    assert len(codes.unique()) >= 14


def test_the_histogram_counts_the_codes() -> None:
    out = trained().quantizer(torch.randn(2, 50, 24))
    assert out.histogram.sum(1).tolist() == [100] * 4
    for q in range(4):
        assert (out.histogram[q] > 0).sum() == len(out.codes[..., q].unique())


def test_a_saved_quantizer_goes_on_exactly(tmp_path: Path) -> None:
    quantizer = trained().quantizer.train()
    torch.save(quantizer.state_dict(), tmp_path / "q.pt")
    restored = ResidualVectorQuantizer(CONFIG).train()
    restored.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    for step in range(3):
        latent = torch.randn(3, 20, 24) * (1 + step)
        outputs = [q(latent, generator=torch.Generator().manual_seed(step)) for q in (quantizer, restored)]
        for q in (quantizer, restored):
            q.update(torch.Generator().manual_seed(step))
        assert torch.equal(outputs[0].quantized, outputs[1].quantized)
        assert torch.equal(outputs[0].codes, outputs[1].codes)
    for (name, a), b in zip(quantizer.state_dict().items(), restored.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_eval_mode_leaves_the_codebooks_alone() -> None:
    codec = trained()
    before = {name: b.clone() for name, b in codec.named_buffers()}
    codec(torch.randn(2, 10 * FRAME))
    for name, buffer in codec.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_two_processes_have_the_codebooks_of_one(tmp_path: Path) -> None:
    """Rank 0 with 3 samples and rank 1 with 1, against all 4 in one process: initialisation, averages and revival."""

    def codebooks(latents: list[Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        quantizer = ResidualVectorQuantizer(replace(CONFIG, dropout=0.0, revive_below=0.5)).train()
        for latent in latents:
            quantizer(latent)
            quantizer.update()
        return [b.clone() for b in quantizer.buffers()]

    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(4, 25, 24, generator=generator) for _ in range(6)]
    expected = codebooks(batches)

    children = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:  # no imports to pay for, and no way back into pytest
            status = 1
            try:
                torch.set_num_threads(1)
                torch.distributed.init_process_group(
                    "gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2
                )
                found = codebooks([b[:3] if rank == 0 else b[3:] for b in batches])
                torch.save(found, tmp_path / f"{rank}.pt")
                torch.distributed.barrier()
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for one, first, second in zip(expected, *ranks, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, one, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- codec


SPECTRAL = replace(CONFIG, mel_bands=6, blocks=2)


@torch.no_grad()
def test_the_spectrogram_is_torchaudios_and_causal() -> None:
    torch.manual_seed(0)
    wav = torch.randn(2, 1, 3 * 480)
    mel = CausalLogMel(80, 240)(wav)
    assert mel.shape == (2, 80, 6)
    reference = torchaudio.transforms.MelSpectrogram(
        24_000, n_fft=960, hop_length=240, center=False, power=1.0, n_mels=80, norm="slaney", mel_scale="slaney"
    )
    expected = reference(F.pad(wav[:, 0], (720, 0))).clamp(min=1e-5).log10() + 2
    torch.testing.assert_close(mel, expected, atol=1e-5, rtol=1e-5)
    wav[..., 480:] = 0
    assert torch.equal(CausalLogMel(80, 240)(wav)[..., :2], mel[..., :2])
    assert (mel[..., 2:] != CausalLogMel(80, 240)(wav)[..., 2:]).any(dim=1).all()


@pytest.mark.parametrize("config", [CONFIG, SPECTRAL], ids=["samples", "spectrogram"])
@torch.no_grad()
def test_the_encoder_in_pieces(config: CodecConfig) -> None:
    torch.manual_seed(0)
    encoder = CodecEncoder(config).eval()
    with torch.device("meta"):
        assert CodecEncoder(config)(torch.empty(1, FRAME)).shape == (1, 1, 24)
    wav = torch.randn(2, 30 * FRAME)
    whole = encoder(wav)
    assert whole.shape == (2, 30, 24)
    for pieces in ([1] * 30, [30], [4, 0, 1, 20, 5]):
        state = encoder.init_state(2)
        stream = [encoder.step(p, state) for p in wav.split([FRAME * n for n in pieces], dim=1)]
        torch.testing.assert_close(torch.cat(stream, dim=1), whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="multiple of 40"):
        encoder(wav[:, :-1])


@torch.no_grad()
def test_codes_do_not_depend_on_what_follows() -> None:
    codec = trained()
    wav = torch.randn(2, 25 * FRAME)
    codes = codec.encode(wav)
    for frames in (1, 7, 24):
        assert torch.equal(codec.encode(wav[:, : frames * FRAME]), codes[:, :frames])
    assert len(codes.unique()) > 8
    padded = codec.encode(wav[:, : 7 * FRAME + 1])
    assert padded.shape == (2, 8, 4)
    assert torch.equal(padded[:, :7], codes[:, :7])


@torch.no_grad()
def test_folded_codebooks_make_the_decoder_a_code2wav() -> None:
    codec = trained()
    wav = 0.3 * torch.randn(2, 12 * FRAME)
    codes = codec.encode(wav)
    expected = codec.decode(codes)
    assert (codec.decoder(codes) - expected).abs().max() > 1e-3
    codec.fold_codebooks()
    torch.testing.assert_close(codec.decoder(codes), expected, atol=1e-5, rtol=0)
    out = codec(wav)
    torch.testing.assert_close(codec.decoder(out.codes), codec.decoder.decode(out.quantized), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.wav.clamp(-1, 1), expected, atol=1e-5, rtol=0)
    alone = Code2Wav(DECODER)  # it leaves without the quantizer
    alone.load_state_dict(codec.decoder.state_dict())
    torch.testing.assert_close(alone(codes), expected, atol=1e-5, rtol=0)


def test_shapes_and_lengths() -> None:
    codec = trained()
    wav = torch.randn(2, 5 * FRAME + 13)
    out = codec(wav, n_quantizers=2)
    assert out.wav.shape == wav.shape
    assert out.codes.shape == (2, 6, 4)
    assert out.latent.shape == out.quantized.shape == out.semantic.shape == (2, 6, 24)
    assert out.given.shape == out.chosen.shape == (4, 2, 6, 8)
    assert rvq_commitment_loss(out.given, out.chosen, out.n_used).shape == (4,)
    assert out.histogram.shape == (4, 16)
    assert codec.decode(out.codes[..., :2]).shape == (2, 6 * FRAME)
    public = trained(replace(CONFIG, decoder=replace(DECODER, trim="public")))
    assert public(wav[:, : 5 * FRAME]).wav.shape == (2, public.config.decoder.samples(5)) == (2, 5 * FRAME - 24)


def test_a_batch_is_learned() -> None:
    torch.manual_seed(0)
    codec = Codec(replace(CONFIG, dropout=0.0, encoder_dim=8, decoder=replace(DECODER, decoder_dim=32))).train()
    time = torch.arange(12 * FRAME) / 40
    wav = torch.stack([0.5 * torch.sin(time * f) for f in (1.0, 2.3, 3.1, 4.7)])
    parameters = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    errors = []
    for _ in range(80):
        out = codec(wav)
        loss = (out.wav - wav).square().mean()
        optimizer.zero_grad()
        (loss + 0.1 * rvq_commitment_loss(out.given, out.chosen, out.n_used).sum()).backward()
        assert all(p.grad is not None for p in parameters)  # in a process group each must have one
        optimizer.step()
        codec.quantizer.update()
        errors.append(loss.item())
    assert errors[-1] < 0.5 * min(errors[0], wav.square().mean().item())


def test_checkpointing_changes_no_gradient() -> None:
    codec = trained()
    wav = torch.randn(1, 6 * FRAME)
    gradients = []
    for codec.encoder.activation_checkpointing in (False, True):
        codec.decoder.activation_checkpointing = codec.encoder.activation_checkpointing
        codec.zero_grad()
        codec(wav).wav.square().mean().backward()
        gradients.append({name: p.grad for name, p in codec.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_public_size() -> None:
    config = CodecConfig()
    assert config.samples_per_frame == 1920
    assert (config.decoder.quantizers, config.decoder.codebook_size, config.decoder.trim) == (16, 2048, "causal")
    with torch.device("meta"):
        codec = Codec(config)
    assert codec.encoder(torch.empty(1, 3 * 1920, device="meta")).shape == (1, 3, 1024)
    with torch.device("meta"):
        public = Code2Wav(Code2WavConfig())
    assert codec.decoder.state_dict().keys() == public.state_dict().keys()


def test_errors_name_what_is_wrong() -> None:
    codec = trained()
    with pytest.raises(ValueError, match="at least one sample"):
        codec.encode(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="n_quantizers is 5; expected 1 to 4"):
        codec(torch.zeros(1, FRAME), n_quantizers=5)
    with pytest.raises(ValueError, match="1 to 4"):
        codec.decode(torch.zeros(1, 2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0\.\.15"):
        codec.decode(torch.full((1, 2, 4), 16))
    for change, named in (
        (dict(downsample_rates=(3, 5)), "downsample_rates"),
        (dict(heads=5), "heads"),
        (dict(dropout=1.5), "dropout"),
        (dict(codebook_dim=0), "codebook_dim"),
        (dict(unquantized=-0.1), "unquantized"),
        (dict(decoder=replace(DECODER, quantizers=1)), "quantizers"),
    ):
        with pytest.raises(ValueError, match=named):
            replace(CONFIG, **change)
