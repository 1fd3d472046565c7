"""The training step against a plain loop, checkpoints, guards and logs."""

from __future__ import annotations

import csv
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy_training import Toy, step_samples, toy_model, train

from omnitrain.config.run_config import THINKER_PARTS, LossConfig, OptimConfig, SpikeGuardConfig, ThinkerModuleConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.training.callbacks import SpikeGuard, TrainingDiverged
from omnitrain.training.flops import BatchSizes, training_flops
from omnitrain.training.losses import balance_loss, token_weights
from omnitrain.training.optim import adamw, parameter_groups, schedule_factor
from omnitrain.training.thinker import ThinkerModule, hide_words


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if atol == 0:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def plain_training(
    steps: int, accumulate: int, balance: float, *, clip: float = 1.0, mixed: bool = False
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training, written down without Lightning, without chunks and without running sums."""
    model = toy_model()
    config = OptimConfig(lr=3e-3, warmup_steps=2, total_steps=20, eps=1e-4, decay_fraction=0.2)
    optimizer = adamw(parameter_groups(model, config), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor(config, 20))
    losses = []
    for step in range(steps):
        samples = step_samples(step)
        size = len(samples) // accumulate
        micro = [PackedBatch.pack(samples[i : i + size]) for i in range(0, len(samples), size)]
        n_targets = sum(int((b.labels >= 0).sum()) for b in micro)
        nll, aux, counts, positions = torch.zeros(()), torch.zeros(()), 0.0, 0
        from random import Random

        window = 100 * Random(f"0/{step}").randint(1, 8)
        for batch in micro:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                out = model(**batch.model_inputs(), aut_window_frames=window)
                logits = out.hidden @ model.thinker.lm_head.weight.T
            nll = nll + F.cross_entropy(logits.float(), batch.labels, ignore_index=-100, reduction="sum")
            counts = counts + out.router_counts
            positions += batch.n_tokens
            share = (counts / positions).float()
            here = 4 * (share * out.router_prob_sums / batch.n_tokens).sum() / share.shape[0]
            aux = aux + here * (batch.labels >= 0).sum() / n_targets
        losses.append(nll.item() / n_targets)
        optimizer.zero_grad()
        (nll / n_targets + balance * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return model.state_dict(), losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_plain_loop(tmp_path: Path, accumulate: int) -> None:
    train(Toy(out=str(tmp_path), steps=5, accumulate=accumulate))
    weights, losses = plain_training(5, accumulate, 0.01)
    assert_same(torch.load(tmp_path / "final.pt"), weights, atol=2e-6)
    rows = read_csv(tmp_path / "metrics.csv")
    assert [float(r["train/loss"]) for r in rows] == pytest.approx(losses, abs=1e-5)


def test_accumulation_does_not_change_the_loss_gradient(tmp_path: Path) -> None:
    for accumulate in (1, 4):
        train(Toy(out=str(tmp_path / str(accumulate)), steps=4, accumulate=accumulate, balance=0.0))
    assert_same(torch.load(tmp_path / "1/final.pt"), torch.load(tmp_path / "4/final.pt"), atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"ema": True}, {"word_dropout": 0.5}], ids=str)
def test_resume_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    """Stopped and continued five times, with accumulation and with a validation due at some of the checkpoints."""
    common = {"val_every": 3, "accumulate": 2, **options}
    train(Toy(out=str(tmp_path / "whole"), steps=8, **common))
    for steps in (2, 3, 5, 6, 8):
        train(Toy(out=str(tmp_path / "pieces"), steps=steps, **common))
    assert_same(torch.load(tmp_path / "whole/final.pt"), torch.load(tmp_path / "pieces/final.pt"))
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "pieces/metrics.csv").read_text()


def test_checkpoint_holds_only_plain_values(tmp_path: Path) -> None:
    train(Toy(out=str(tmp_path), steps=3, val_every=2))
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["ToyData"] == {"position": 3, "accumulate": 1}  # trained, not fetched
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_signals_mean_after_training_what_they_meant_before(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    train(Toy(out=str(tmp_path), steps=2))
    assert {number: signal.getsignal(number) for number in before} == before


def test_logged_rows(tmp_path: Path) -> None:
    _, module, _ = train(Toy(out=str(tmp_path), steps=4, val_every=2))
    rows = read_csv(tmp_path / "metrics.csv")
    assert [(int(r["step"]), bool(r["train/loss"])) for r in rows] == [
        (1, True), (2, True), (2, False), (3, True), (4, True), (4, False),
    ]  # fmt: skip
    first = rows[0]
    for name in (
        "train/loss/audio", "train/loss/image", "train/loss/text", "train/loss_by_task/asr", "train/bits_per_byte",
        "gradient_norm", "gradient_norm/aut", "gradient_norm/aut_adapter", "gradient_norm/visual_adapter",
        "gradient_norm/router", "lr/thinker", "experts/entropy", "experts/max_over_mean", "packing/efficiency",
        "seen/tokens", "skipped_steps",
    ):  # fmt: skip
        assert math.isfinite(float(first[name])), name
    assert rows[3]["train/loss/audio"] == ""  # step 3 has no audio
    assert rows[-1]["skipped_samples/too_long"] == ""
    assert rows[-2]["skipped_samples/too_long"] == "1"
    by_modality = module.evaluation_sums["validation"]
    total = by_modality.total()
    assert float(rows[-1]["validation/loss"]) == pytest.approx(total[0] / total[1])
    assert float(rows[-1]["validation/bits_per_byte/text"]) > 0
    timing = read_csv(tmp_path / "throughput.csv")
    for measured in timing:
        batch = PackedBatch.pack(step_samples(int(measured["step"]) - 1))
        seconds = float(measured["seconds_per_step"])
        assert float(measured["tokens_per_second"]) * seconds == pytest.approx(batch.n_tokens)
        assert float(measured["samples_per_second"]) * seconds == pytest.approx(len(batch))
        flops = training_flops(module.model, BatchSizes.of(batch))
        assert float(measured["mfu"]) * seconds * 0.1e12 == pytest.approx(flops)  # the peak that the toy is told
        assert 0 <= float(measured["data_wait"]) < 1
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["planned"][0]["shares"] == {"toy": 1.0}
    assert data["seen"]["source"]["samples"] == {"toy": 32}
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"]


def test_a_bad_step_is_skipped_and_named(tmp_path: Path) -> None:
    trainer, module, _ = train(Toy(out=str(tmp_path), steps=6, poison=(4,)))
    assert module.skipped_steps == 1
    assert trainer.global_step == 6
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    record = json.loads((tmp_path / "skipped_steps.jsonl").read_text())
    assert record["step"] == 5
    assert record["reason"] == "loss is not finite"
    assert record["samples"] == [s.id for s in step_samples(4)]
    rows = read_csv(tmp_path / "metrics.csv")
    assert rows[4]["train/loss"] == ""
    assert rows[4]["skipped_steps"] == "1"
    assert math.isfinite(float(rows[5]["train/loss"]))


def test_too_many_bad_steps_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"2 optimizer steps in a row.*last\.ckpt \(step 3\)"):
        train(Toy(out=str(tmp_path), steps=9, poison=(4, 5, 6), max_in_a_row=2, checkpoint_every=3))


def test_the_guard_starts_anew_with_a_new_stage_of_the_data(tmp_path: Path) -> None:
    guard, module = SpikeGuard(SpikeGuardConfig(factor=2.0, min_steps=3), run_dir=tmp_path), ThinkerModule(toy_model())
    module.step_loss = 1.0

    def accept(guard: SpikeGuard, norm: float) -> None:
        module.gradient_norm = norm
        guard.on_before_optimizer_step(None, module, None)

    for norm in (1.0, 1.1, 0.9):
        accept(guard, norm)
    assert guard.bound == 2.0
    module.data_stage = 1.0
    continued = SpikeGuard(SpikeGuardConfig(factor=2.0, min_steps=3), run_dir=tmp_path)
    continued.load_state_dict(guard.state_dict())  # interrupted just there
    for each in (guard, continued):
        accept(each, 12.0)  # pictures after text: above the bound of before
        accept(each, 13.0)
        assert each.bound == math.inf
        accept(each, 14.0)
        assert each.bound == 26.0
    _, trained, _ = train(Toy(out=str(tmp_path / "run"), steps=3, stage_at=2))
    assert trained.data_stage == 1.0


def test_a_gradient_spike_is_skipped(tmp_path: Path) -> None:
    guard = SpikeGuard(SpikeGuardConfig(factor=3.0, window=4, min_steps=3), run_dir=tmp_path)
    guard.load_state_dict({"norms": [1.0, 2.0], "in_a_row": 0})
    assert guard.bound == math.inf
    guard.load_state_dict({"norms": [3.0], "in_a_row": 0})
    assert guard.bound == 6.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("part", [THINKER_PARTS, ("thinker",), ("router",), ("aut", "visual"), ("head", "embeddings")])
def test_weights_of_a_folder_in_bf16_move_by_small_steps(tmp_path: Path, part, precision: str) -> None:
    before = {name: p.bfloat16().float() for name, p in toy_model().named_parameters()}
    toy = Toy(out=str(tmp_path), steps=2, precision=precision, weights="bfloat16", lr=1e-5, train=tuple(part))
    _, module, _ = train(toy)
    for name, parameter in module.model.named_parameters():
        moved = float((parameter.float() != before[name]).float().mean())
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
        elif precision == "bf16-mixed":
            assert parameter.dtype == torch.bfloat16
        assert moved == 0 if not parameter.requires_grad else True, name
    trained = [(p.float() != before[n]).flatten() for n, p in module.model.named_parameters() if p.requires_grad]
    assert torch.cat(trained).float().mean() > 0.6  # rows of words and experts that nothing was about stay


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_are_refused_in_a_sentence(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.precision={precision}: use 32-true or bf16-mixed"):
        train(Toy(out=str(tmp_path), steps=1, precision=precision))


def test_mixed_precision(tmp_path: Path) -> None:
    """As a plain loop under autocast: without autocast the first loss is 4e-4 off and the weights go another way by
    0.045 of it, without clipping by 0.43."""
    _, module, _ = train(Toy(out=str(tmp_path), steps=3, precision="bf16-mixed", clip=0.1))
    losses = [float(r["train/loss"]) for r in read_csv(tmp_path / "metrics.csv")]
    weights, expected = plain_training(3, 1, 0.01, clip=0.1, mixed=True)
    assert losses[0] == pytest.approx(expected[0], abs=1e-4)
    assert losses == pytest.approx(expected, abs=5e-4)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    ours, plain, fresh = (
        torch.cat([w.flatten() for w in state.values()])
        for state in (module.model.state_dict(), weights, toy_model().state_dict())
    )
    assert (ours - plain).norm() < 0.03 * (plain - fresh).norm()


def test_recomputed_activations_change_no_step(tmp_path: Path) -> None:
    _, kept, _ = train(Toy(out=str(tmp_path / "kept"), steps=3))
    _, again, _ = train(Toy(out=str(tmp_path / "again"), steps=3, recomputed=("thinker", "visual")))
    parts = {name: part.activation_checkpointing for name, part in again.model.named_children()}
    assert parts == {"aut": False, "visual": True, "thinker": True}
    for (name, a), b in zip(kept.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
    with pytest.raises(ValueError, match=r"module\.activation_checkpointing: no part 'vision'.*aut, visual, thinker"):
        ThinkerModuleConfig(activation_checkpointing=["vision"])


def test_frozen_parts_stay(tmp_path: Path) -> None:
    _, module, _ = train(Toy(out=str(tmp_path), steps=2, train=("aut_adapter", "visual_adapter")))
    fresh = toy_model().state_dict()
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, fresh[name])}
    assert changed
    assert all(n.startswith(("aut.ln_post", "aut.proj", "visual.merger")) for n in changed)


def test_balance_loss_is_top_k_when_even() -> None:
    even = torch.full((3, 8), 2 / 8)
    probability = torch.full((3, 8), 1 / 8)
    assert balance_loss(even, probability).item() == pytest.approx(2.0)
    assert balance_loss(even, probability, pool_layers=True).item() == pytest.approx(2.0)
    collapsed = torch.zeros(3, 8)
    collapsed[:, :2] = 1.0
    assert balance_loss(collapsed, collapsed / 2).item() == pytest.approx(8.0)


def test_modality_weights() -> None:
    batch = PackedBatch.pack(step_samples(0))
    weights = token_weights(batch, {"image": 3.0, "text": 0.0})
    bounds = batch.cu_seqlens.tolist()
    for i, modality in enumerate(batch.modalities):
        part = slice(bounds[i], bounds[i + 1])
        expected = {"image": 3.0, "text": 0.0, "audio": 1.0}[modality] * (batch.labels[part] >= 0)
        assert torch.equal(weights[part], expected.float())


def test_weights_that_sum_below_one_normalise(tmp_path: Path) -> None:
    """What counts is how weights compare, not what they sum to."""
    _, plain, _ = train(Toy(out=str(tmp_path / "plain"), steps=2, clip=None))
    _, light, _ = train(Toy(out=str(tmp_path / "light"), steps=2, clip=None, weight=2**-12))
    assert [r["train/loss"] for r in read_csv(tmp_path / "light/metrics.csv")] == [
        r["train/loss"] for r in read_csv(tmp_path / "plain/metrics.csv")
    ]
    assert light.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-5)
    assert light.gradient_norm > 0.1


def test_word_dropout_hides_words_of_answers_about_media_alone() -> None:
    batch = PackedBatch.pack(step_samples(0) * 40)
    torch.manual_seed(0)
    hidden = hide_words(batch, 0.3)
    changed = hidden.input_ids != batch.input_ids
    bounds = batch.cu_seqlens.tolist()
    candidates = 0
    for i, modality in enumerate(batch.modalities):
        part = slice(bounds[i], bounds[i + 1])
        ids, opening = batch.input_ids[part], batch.input_ids[bounds[i]]
        answer = torch.zeros(len(ids), dtype=torch.bool)
        answer[1:] = batch.labels[part][:-1] >= 0  # words that were to be predicted a position earlier
        assert not (changed[part] & ~answer).any()
        assert bool((hidden.input_ids[part][changed[part]] == opening).all())
        if modality == "text":
            assert not changed[part].any()
        else:
            candidates += int((answer & (ids != opening)).sum())
    assert int(changed.sum()) / candidates == pytest.approx(0.3, abs=0.05)
    assert torch.equal(hidden.labels, batch.labels)


def test_word_dropout_is_of_training_alone(tmp_path: Path) -> None:
    batch = PackedBatch.pack(step_samples(0))
    with torch.no_grad():
        plain, dropping = (
            ThinkerModule(toy_model(), ThinkerModuleConfig(word_dropout=share)).losses(batch) for share in (0.0, 0.5)
        )
    assert torch.equal(plain.total, dropping.total)
    for share in (0.0, 0.5):
        train(Toy(out=str(tmp_path / str(share)), steps=1, word_dropout=share))
    first, second = (float(read_csv(tmp_path / name / "metrics.csv")[0]["train/loss"]) for name in ("0.0", "0.5"))
    assert abs(first - second) > 1e-3
    with pytest.raises(ValueError, match=r"module\.word_dropout=1"):
        ThinkerModuleConfig(word_dropout=1.0)


def test_misspelt_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.modality_weights\.pictures.*image"):
        LossConfig(modality_weights={"pictures": 1.0})
    with pytest.raises(ValueError, match=r"optim\.lr_scale.*no part 'vision'.*visual_adapter"):
        OptimConfig(lr_scale={"vision": 1.0})


def test_schedules() -> None:
    wsd = schedule_factor(OptimConfig(schedule="wsd", warmup_steps=4, decay_fraction=0.5, min_lr_ratio=0.1), 20)
    assert [wsd(s) for s in (0, 3, 4, 10)] == [0.25, 1.0, 1.0, 1.0]
    assert wsd(15) == pytest.approx(0.55)
    assert wsd(20) == pytest.approx(0.1)
    cosine = schedule_factor(OptimConfig(schedule="cosine", warmup_steps=0, min_lr_ratio=0.0), 10)
    assert cosine(0) == 1.0
    assert cosine(5) == pytest.approx(0.5)
    assert cosine(10) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="max_steps"):
        schedule_factor(OptimConfig(), -1)


def test_parameter_groups() -> None:
    model = toy_model()
    optimizer = adamw(parameter_groups(model, OptimConfig(lr=1.0, lr_scale={"aut": 0.5})), OptimConfig())
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert groups["aut"]["lr"] == 0.5
    assert groups["aut_adapter"]["lr"] == 1.0
    assert groups["aut.no_decay"]["weight_decay"] == 0
    assert groups["aut"]["weight_decay"] > 0
    assert all(p.ndim < 2 for n, g in groups.items() if n.endswith("no_decay") for p in g["params"])
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
