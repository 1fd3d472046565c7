"""The codec's training: what the losses measure, both optimizers, and resume to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchaudio
from torch.nn import functional as F

from omnitrain.config.run_config import CheckpointConfig, CodecLossConfig, CodecModuleConfig, OptimConfig
from omnitrain.config.typed import typed
from omnitrain.data.media import encode_audio
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.settings import WaveformsConfig
from omnitrain.data.shards import write_shards
from omnitrain.data.waveforms import WaveformDataModule
from omnitrain.interop.public_format import load_pretrained
from omnitrain.models.codec import Codec
from omnitrain.models.discriminators import Discriminators
from omnitrain.models.presets import build_codec, init_codec_weights
from omnitrain.models.sizes import DiscriminatorConfig
from omnitrain.training import codec as of_codec
from omnitrain.training.callbacks import AtomicCheckpoint, SpikeGuard
from omnitrain.training.codec import CodecModule, codebook_use
from omnitrain.training.codec_losses import (
    ContentHead,
    MelDistance,
    feature_matching_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    si_sdr,
)
from omnitrain.training.logging import ExactCsvLogger
from tests.interop.public_models import save_public_model

TOKENIZER = Path(__file__).parents[2] / "omnitrain/pack/tokenizer.json"
WORDS = ("one red cat", "two blue dogs", "three old birds")


MIRROR = {"mel_bands": 0, "downsample_rates": (3, 4, 5, 8), "downsampling_ratios": (2, 2), "blocks": 1}
"""An encoder that reads samples, as that of the public size."""


def tiny_codec(seed: int = 0, trim: str = "causal", **changes: Any) -> Codec:
    """Reads samples and rounds them all, but for `changes` (`CodecConfig`)."""
    codec = build_codec(
        "tiny",
        **({"unquantized": 0.0} | MIRROR | changes),
        encoder_dim=2,
        layers=1,
        heads=2,
        kv_heads=2,
        ffn=16,
        codebook_dim=4,
        decoder={
            "quantizers": 3,
            "codebook_size": 8,
            "d_model": 16,
            "layers": 1,
            "heads": 2,
            "kv_heads": 2,
            "ffn": 16,
            "decoder_dim": 16,
            "trim": trim,
        },
    )
    init_codec_weights(codec, seed)
    return codec


def tone(hertz: float, seconds: float) -> np.ndarray:
    t = np.arange(int(seconds * 24_000)) / 24_000
    return (0.4 * np.sin(2 * np.pi * hertz * t) * np.minimum(1, 20 * t)).astype(np.float32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine tones of 0.3 to 0.9 s, and a silent recording."""
    samples = [
        Sample(
            id=f"tone/{i}",
            source="tones",
            task="tts",
            languages=("en",),
            meta={"voice": "flute"},
            messages=(
                Message(role="user", segments=(Segment(type="text", text="Say it."),)),
                Message(
                    role="assistant",
                    segments=(
                        Segment(
                            type="speech",
                            text=WORDS[i % 3],
                            media=encode_audio(tone(150 + 40 * i, 0.3 + 0.075 * i) * (i < 9), 24_000, "flac"),
                        ),
                    ),
                ),
            ),
        )
        for i in range(10)
    ]
    folder = tmp_path_factory.mktemp("tones")
    write_shards(samples, folder, "tones")
    return folder


SMALL_DISCRIMINATORS = DiscriminatorConfig(periods=(2, 3), period_width=2, stft_windows=(256,), stft_width=2)


def data(shards: Path, **changes: object) -> WaveformDataModule:
    options: dict = {"sources": {"tones": {"path": shards}}, "tokenizer": TOKENIZER, "rows": 2, "row_seconds": 0.96}
    options |= {"validation_sources": {"tones": {"path": shards}}, "max_bad_fraction": 0.5} | changes
    run_dir = options.pop("run_dir", None)
    return WaveformDataModule(typed(WaveformsConfig, {"num_workers": 0, **options}, "data"), run_dir=run_dir)


# ----------------------------------------------------------------------------------------------------------- the rows


def test_rows_are_full_and_texts_stand_where_they_say(shards: Path) -> None:
    module = data(shards)
    module.setup("fit")
    batches = iter(module.train_dataloader())
    waves = {s.id: tone(150 + 40 * i, 0.3 + 0.075 * i) for i, s in enumerate(module.opened("sources")["tones"])}
    found = 0
    for _ in range(8):
        batch = next(batches)
        assert batch.wav.shape == (2, 23_040)
        assert batch.frames == batch.n_tokens == 24
        assert (batch.wav.abs() > 1e-3).float().mean() > 0.9  # nothing is padded
        for row, first, end, text in batch.spans:
            assert 0 <= first < end <= 12
            assert text in WORDS
            found += 1
            piece = batch.wav[row, first * 1920 : end * 1920].numpy()
            likeness = max(  # the tone of an utterance with this text is in that place
                float(np.abs(np.correlate(piece, wave[:2000], "valid")).max())
                for i, wave in enumerate(waves.values())
                if i < 9 and WORDS[i % 3] == text
            )
            assert likeness > 0.5 * float(np.abs(np.correlate(wave_of(piece), wave_of(piece), "valid")).max())
    assert found > 10


def wave_of(piece: np.ndarray) -> np.ndarray:
    return piece[:2000]


def test_silence_is_skipped_and_counted(shards: Path, tmp_path: Path) -> None:
    module = data(shards, run_dir=tmp_path)
    module.setup("fit")
    batches = iter(module.train_dataloader())
    for _ in range(12):
        batch = next(batches)
    assert batch.skipped["audio_silent"] > 0
    assert "tone/9" in (tmp_path / "bad_samples.jsonl").read_text()


def test_a_row_that_is_no_whole_number_of_frames_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"multiple of 0\.08 s"):
        data(shards, row_seconds=1.0)


def test_the_stream_goes_on_where_it_was(shards: Path) -> None:
    first = data(shards)
    first.setup("fit")
    batches = iter(first.train_dataloader())
    for _ in range(3):
        batch = next(batches)
    first.mark_trained(batch)
    expected = [next(batches).wav for _ in range(3)]
    second = data(shards)
    second.setup("fit")
    second.load_state_dict(first.state_dict())
    again = iter(second.train_dataloader())
    for wav in expected:
        assert torch.equal(next(again).wav, wav)


# --------------------------------------------------------------------------------------------------------- the losses


def test_mel_distance_is_that_of_torchaudio() -> None:
    a, b = torch.randn(2, 2, 8000).unbind(0)
    distance = MelDistance(24_000, (512,), (40,))
    assert float(distance(a, a)) == 0.0
    mel = torchaudio.transforms.MelSpectrogram(
        24_000, 512, hop_length=128, n_mels=40, power=1.0, norm="slaney", mel_scale="slaney", pad_mode="constant"
    )
    for loudness in (1.0, 1e-3, 1e-5):  # the quiet ones lie partly below the floor, where the bank's scale matters
        x, y = loudness * a, loudness * b
        expected = (mel(x).clamp(min=1e-5).log10() - mel(y).clamp(min=1e-5).log10()).abs().mean()
        assert float(distance(x, y)) == pytest.approx(float(expected), rel=1e-4)


def test_mel_distance_of_silence_has_a_gradient() -> None:
    wav = torch.zeros(1, 4000, requires_grad=True)
    MelDistance(24_000, (256,), (20,))(wav, torch.randn(1, 4000)).backward()
    assert wav.grad is not None
    assert torch.isfinite(wav.grad).all()


def test_content_loss_is_ctc_over_the_frames_of_the_utterance() -> None:
    torch.manual_seed(0)
    head = ContentHead(8)
    semantic = torch.randn(2, 10, 8)
    nats, n_bytes = head(semantic, [(1, 2, 9, "Hello")])
    log_probs = head.log_probs(semantic)[1, 6:27]
    expected = F.ctc_loss(
        log_probs[:, None], torch.tensor([list(b"hello")]), torch.tensor([21]), torch.tensor([5]), 256, reduction="sum"
    )
    assert float(nats) == pytest.approx(float(expected), rel=1e-5)
    assert n_bytes == 5
    assert head(semantic, [(0, 0, 1, "far too long for one frame")])[1] == 0
    assert head(semantic, [(0, 0, 2, "aabbcc")])[1] == 0  # six slots; between equal bytes stands a blank
    assert head(semantic, [(0, 0, 3, "aabbcc")])[1] == 6
    assert head(semantic, []) == (0, 0)


def test_adversarial_losses() -> None:
    real = [(torch.full((2, 3), 2.0), [torch.ones(2, 4)])]
    fake = [(torch.full((2, 3), -2.0), [torch.full((2, 4), 1.5)])]
    assert float(gan_discriminator_loss(real, fake)) == 0.0  # both told apart, beyond the margin
    assert float(gan_discriminator_loss(fake, real)) == 6.0  # relu(1 + 2) twice
    assert float(gan_generator_loss(fake)) == 2.0
    assert float(feature_matching_loss(real, fake)) == pytest.approx(0.5)
    loud = [[(verdict, [10 * layer for layer in layers]) for verdict, layers in opinions] for opinions in (real, fake)]
    assert float(feature_matching_loss(*loud)) == pytest.approx(0.5)  # of the layer's own size
    ours, theirs = torch.ones(2, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    feature_matching_loss([(real[0][0], [theirs])], [(fake[0][0], [ours])]).backward()
    assert ours.grad is not None
    assert theirs.grad is None  # the discriminator does not learn from it


def test_new_discriminators_keep_the_size_of_what_they_hear() -> None:
    torch.manual_seed(0)
    wav = 0.05 * torch.randn(2, 15360)  # as loud as speech
    for score, features in Discriminators(DiscriminatorConfig(stft_width=12, period_width=16))(wav):
        assert 0.01 < float(score.detach().std()) < 0.5
        assert all(0.01 < float(layer.detach().std()) < 0.5 for layer in features)


def test_si_sdr_ignores_scale_and_is_the_ratio_in_decibels() -> None:
    torch.manual_seed(0)
    sound, noise = torch.randn(2, 1, 4_800, dtype=torch.float64)
    sound, noise = sound - sound.mean(), noise - noise.mean()
    noise -= (noise * sound).sum() / sound.square().sum() * sound  # a part of the target in it would be no noise
    noise *= 0.1 * sound.norm() / noise.norm()
    target = sound + 2
    assert float(si_sdr(3 * (target + noise), target)) == pytest.approx(20.0, abs=1e-6)
    assert float(si_sdr(target + noise + 5, target)) == pytest.approx(20.0, abs=1e-6)  # a constant is not heard


def test_codebook_use() -> None:
    use = codebook_use(torch.tensor([[5, 5, 0, 0], [1, 1, 1, 1], [7, 0, 0, 0]]))
    assert use["codebook/use/0"] == 0.5
    assert use["codebook/perplexity/0"] == pytest.approx(2.0)
    assert use["codebook/perplexity/1"] == pytest.approx(4.0)
    assert use["codebook/perplexity/2"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------- the training


def fit(
    folder: Path, shards: Path, steps: int, *, resume: bool = False, after: int = 3, precision: str = "32-true",
    callbacks: Sequence[L.Callback] = (), codec: Codec | None = None, recomputed: Sequence[str] = (),
    balance: float | None = None, **optim: Any,
) -> CodecModule:  # fmt: skip
    L.seed_everything(1, verbose=False)
    module = CodecModule(
        codec or tiny_codec(),
        CodecModuleConfig(
            activation_checkpointing=list(recomputed),
            loss=CodecLossConfig(adversarial_after=after, windows=(512, 128), n_mels=(20, 10), balance=balance),
            discriminator=SMALL_DISCRIMINATORS,
        ),
        OptimConfig(lr=1e-3, warmup_steps=2, schedule="wsd", total_steps=8, decay_fraction=0.2, **optim),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=steps,
        max_epochs=-1,
        log_every_n_steps=2,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=2,
        logger=[ExactCsvLogger(run_dir=folder)],
        callbacks=[AtomicCheckpoint(CheckpointConfig(every_n_steps=1), run_dir=folder), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "checkpoints/last.ckpt" if resume else None
    trainer.fit(module, data(shards, validation_rows=2), ckpt_path=last, weights_only=True)
    assert trainer.global_step == steps
    return module


SPECTRAL = {"mel_bands": 10, "downsample_rates": (480,), "downsampling_ratios": (2, 2), "blocks": 2, "unquantized": 0.5}


@pytest.mark.parametrize("changes", [{}, SPECTRAL], ids=["samples", "spectrogram"])
def test_an_interrupted_run_ends_bit_equal(changes: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    def run(name: str, steps: int, resume: bool = False) -> CodecModule:
        options = {"balance": 0.5, "matrices": "muon"} if changes else {}
        return fit(tmp_path / name, shards, steps, resume=resume, codec=tiny_codec(**changes), **options)

    whole = run("whole", 8)
    run("parts", 3)
    run("parts", 5, resume=True)
    parts = run("parts", 8, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(whole.trainer.optimizers, parts.trainer.optimizers, strict=True):
        for x, y in zip(a.state.values(), b.state.values(), strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(torch.as_tensor(x[key]), torch.as_tensor(y[key])) for key in x)
    rows = (tmp_path / "whole/metrics.csv").read_text().splitlines()
    again = (tmp_path / "parts/metrics.csv").read_text().splitlines()
    steps = {line.split(",")[0]: line for line in again}
    assert rows[-1] == steps[rows[-1].split(",")[0]] or rows == again


def test_discriminators_learn_only_once_they_come_in(shards: Path, tmp_path: Path) -> None:
    untouched = fit(tmp_path / "before", shards, 2, after=10).discriminators
    learnt = fit(tmp_path / "after", shards, 4, after=2).discriminators
    L.seed_everything(1, verbose=False)
    fresh = CodecModule(tiny_codec(), CodecModuleConfig(discriminator=SMALL_DISCRIMINATORS)).discriminators
    pairs = list(zip(fresh.parameters(), untouched.parameters(), learnt.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    # A bias before the hinge has no gradient while both its sides are active: one pulls it up, the other down.
    assert all(not torch.equal(a, c) for a, _, c in pairs if a.ndim > 1)
    text = (tmp_path / "after/metrics.csv").read_text()
    assert "train/discriminators" in text
    assert "train/features" in text
    assert "train/discriminators" not in (tmp_path / "before/metrics.csv").read_text()


def state(module: CodecModule) -> dict[str, torch.Tensor]:
    """Weights, codebooks and moments of all that learns."""
    found = dict(module.state_dict())
    for i, optimizer in enumerate(module.trainer.optimizers):
        for j, moments in enumerate(optimizer.state.values()):
            found |= {f"{i}/{j}/{name}": value for name, value in moments.items()}
    return {name: value.clone() for name, value in found.items()}


class Poisoned(L.Callback):
    """From the fourth step on, the recordings of a batch, or what the discriminators say of them, are not finite."""

    def __init__(self, what: str, patch: pytest.MonkeyPatch) -> None:
        self.what, self.patch = what, patch
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, batch_idx: int) -> None:
        assert isinstance(module, CodecModule)
        if batch_idx == 3:
            self.before = state(module)
        if batch_idx >= 3 and self.what == "recording":
            batch.wav[0, 100] = torch.nan
        if batch_idx == 3 and self.what == "discriminator":
            module.discriminators.register_forward_hook(lambda *seen: [(score * torch.nan, f) for score, f in seen[2]])
        if batch_idx == 3 and self.what == "discriminators' own loss":
            self.patch.setattr(of_codec, "gan_discriminator_loss", lambda *o: gan_discriminator_loss(*o) * torch.nan)


@pytest.mark.parametrize("what", ["recording", "discriminator", "discriminators' own loss"])
def test_a_step_that_is_skipped_moves_nothing(
    shards: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poisoned(what, monkeypatch)
    module = fit(tmp_path, shards, 5, after=2, callbacks=[SpikeGuard(run_dir=tmp_path), poison])
    after = state(module)
    assert module.skipped_steps == 2
    assert "1/0/exp_avg" in after
    assert after.keys() == poison.before.keys()
    for name, value in after.items():
        if not name.endswith("decoder.code_embedding.weight"):  # made from the codebooks when a checkpoint is written
            assert torch.equal(value, poison.before[name]), name


class DirectGradients(L.Callback):
    """In the fourth step, which has discriminators: the codec's gradients as autograd makes them of the whole loss."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, batch_idx: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer) -> None:
        assert isinstance(module, CodecModule)
        if module.global_step != 3 or self.pairs:
            return
        output, weights = module.model(self.batch.wav), module.loss_config
        terms = module._reconstruction(output, self.batch.wav, self.batch)
        real, fake = module.discriminators(self.batch.wav), module.discriminators(output.wav)
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        opinion = weights.adversarial * gan_generator_loss(fake) + weights.features * feature_matching_loss(real, fake)
        if weights.balance is not None:
            steepness = [
                torch.autograd.grad(term, output.wav, retain_graph=True)[0].norm()
                for term in (weights.mel * terms["mel"], opinion)
            ]
            opinion = opinion * weights.balance * steepness[0] / steepness[1]
        loss = loss + opinion
        assert float(loss) == pytest.approx(module.step_loss, rel=1e-5)
        named = [(n, p) for n, p in module.named_parameters() if p.grad is not None and "discriminators" not in n]
        direct = torch.autograd.grad(loss, [p for _, p in named])
        norm = torch.stack([g.norm() for g in direct]).norm()
        self.pairs = [
            (name, p.grad.clone(), g * min(1.0, module.clip / float(norm)))
            for (name, p), g in zip(named, direct, strict=True)
            if p.grad is not None
        ]


@pytest.mark.parametrize("balance", [None, 2.0])
def test_the_codec_has_the_gradients_of_the_whole_loss(balance: float | None, shards: Path, tmp_path: Path) -> None:
    codec = tiny_codec()
    codec.quantizer.config = replace(codec.config, dropout=0.0)
    direct = DirectGradients()
    fit(tmp_path, shards, 4, after=2, callbacks=[direct], codec=codec, balance=balance)
    assert len(direct.pairs) > 50
    for name, ours, theirs in direct.pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_discriminators_hear_the_same_piece_on_every_rank() -> None:
    config = CodecModuleConfig(discriminator=SMALL_DISCRIMINATORS, loss=CodecLossConfig(adversarial_samples=1000))
    one, other = (CodecModule(tiny_codec(seed), config) for seed in (0, 1))
    assert one._judged(7680) == other._judged(7680)
    assert one._judged(7680).stop - one._judged(7680).start == 1000
    assert one._judged(500) == slice(0, 500)
    with pytest.raises(ValueError, match=r"adversarial_samples is 0; it must be positive"):
        CodecLossConfig(adversarial_samples=0)


class Rates(L.Callback):
    """Learning rates of both optimizers, step by step."""

    def __init__(self) -> None:
        self.codec: list[float] = []
        self.discriminators: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer, found in zip(trainer.optimizers, (self.codec, self.discriminators), strict=True):
            optimizer.register_step_pre_hook(lambda o, *_, f=found: f.append(o.param_groups[0]["lr"]))


def test_both_optimizers_step_at_the_rate_of_the_step(shards: Path, tmp_path: Path) -> None:
    rates = Rates()
    fit(tmp_path, shards, 8, after=1, callbacks=[rates])
    assert rates.discriminators == rates.codec[1:]
    assert len(set(rates.codec)) >= 3  # warm-up, stable, decay


def test_what_is_decayed(shards: Path, tmp_path: Path) -> None:
    """Matrices alone: no bias, no snake's frequency, no length of weight normalisation [C, 1, 1]."""
    module = fit(tmp_path, shards, 1)
    groups = [group for optimizer in module.trainer.optimizers for group in optimizer.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in module.named_parameters():
        if p.requires_grad:
            matrix = p.ndim >= 2 and p.numel() > 1 and not name.endswith("original0")  # of weight normalisation
            assert decay[id(p)] == (0.1 if matrix else 0.0), name
    with pytest.raises(ValueError, match=r"optim\.lr_scale: a codec learns as a whole"):
        CodecModule(tiny_codec(), optim=OptimConfig(lr_scale={"code2wav": 0.5}))


def test_a_decoder_that_trims_as_the_public_one_trains(shards: Path, tmp_path: Path) -> None:
    codec = tiny_codec(trim="public")
    module = fit(tmp_path, shards, 4, after=2, codec=codec)
    assert module.skipped_steps == 0
    assert np.isfinite(module.last_loss)
    assert np.isfinite(module.evaluation["si_sdr"])
    wav = torch.from_numpy(tone(200, 0.96))[None]
    assert codec.eval()(wav).wav.shape[1] == codec.config.decoder.samples(12) < 12 * 1920


def test_the_decoder_starts_from_a_public_code2wav(shards: Path, tmp_path: Path) -> None:
    reference = save_public_model(tmp_path / "public", kind="full")
    sizes = load_pretrained(tmp_path / "public").config.code2wav
    assert sizes is not None
    codec = Codec(replace(tiny_codec().config, decoder=sizes, downsample_rates=(2, 2), downsampling_ratios=(2,)))
    init_codec_weights(codec, 0)
    config = CodecModuleConfig(init_from=str(tmp_path / "public"), discriminator=SMALL_DISCRIMINATORS)
    CodecModule(codec, config)
    codes = torch.randint(0, sizes.codebook_size, (1, 9, sizes.quantizers))
    with torch.no_grad():
        expected = reference.code2wav(codes.transpose(1, 2))[:, 0]
        torch.testing.assert_close(codec.decoder.eval()(codes), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="does not fit the model of its configuration"):
        CodecModule(tiny_codec(), config)
    save_public_model(tmp_path / "thinker")
    with pytest.raises(ValueError, match="describes no code2wav"):
        CodecModule(codec, CodecModuleConfig(init_from=str(tmp_path / "thinker")))
    with pytest.raises(ValueError, match="give the folder of a codec's run, or one in the public format"):
        CodecModule(codec, CodecModuleConfig(init_from=str(tmp_path)))


def test_recomputed_activations_change_no_step(shards: Path, tmp_path: Path) -> None:
    plain = fit(tmp_path / "kept", shards, 3, after=1)
    again = fit(tmp_path / "recomputed", shards, 3, after=1, recomputed=["encoder", "decoder"])
    assert again.model.encoder.activation_checkpointing
    for (name, a), b in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
    with pytest.raises(ValueError, match=r"module\.activation_checkpointing: no part 'thinker'.*encoder, decoder"):
        CodecModuleConfig(activation_checkpointing=["thinker"])


def test_mixed_precision(shards: Path, tmp_path: Path) -> None:
    """The same losses as in fp32, to what bf16 products leave of them, and weights in fp32."""
    plain, mixed = (
        fit(tmp_path / precision, shards, 4, after=2, precision=precision) for precision in ("32-true", "bf16-mixed")
    )
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert mixed.evaluation["mel"] == pytest.approx(plain.evaluation["mel"], rel=5e-3)
    assert mixed.evaluation["mel"] != plain.evaluation["mel"]


def test_the_checkpoint_holds_a_code2wav_that_decodes_codes(shards: Path, tmp_path: Path) -> None:
    fit(tmp_path, shards, 3)
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    codec = tiny_codec(seed=5)
    codec.load_state_dict({n.removeprefix("model."): x for n, x in state.items() if n.startswith("model.")})
    codec.eval()
    codes = codec.encode(torch.from_numpy(tone(200, 0.8))[None])
    torch.testing.assert_close(codec.decoder(codes), codec.decode(codes), atol=1e-5, rtol=0)
