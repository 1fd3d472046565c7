"""GSPO: what is sampled, what is learnt from it, and that a run goes on amid a phase as if nothing had been."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from toy_training import ToyData, step_samples, toy_model

from omnitrain.config.run_config import CheckpointConfig, GspoModuleConfig, LossConfig, OptimConfig, RolloutConfig
from omnitrain.data.answers import last_answers, last_prompts, repeated, with_answers
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.evaluation.rollouts import Rollout
from omnitrain.generation.rollouts import sample_answers
from omnitrain.training.callbacks import AtomicCheckpoint
from omnitrain.training.gspo import GspoModule, _Phase, recording, replay
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.post_losses import kl_to_reference

STOP = 0
TOKENIZER = SimpleNamespace(stop_ids=(STOP,), decode=lambda ids: " ".join(map(str, ids)), special_ids={})
ROLLOUT = RolloutConfig(max_new_tokens=6)


class Small:
    """The share of tokens below 32."""

    weight = 1.0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [sum(int(t) < 32 for t in r.text.split()) / len(r.text.split()) for r in rollouts]


class Data(ToyData):
    tokenizer = TOKENIZER


def module(seed: int = 0, lr: float = 3e-3, **options: Any) -> GspoModule:
    options = {"answers": 4, "steps_per_rollout": 3, "rollout": ROLLOUT, "clip": (0.2, 0.2), **options}
    config = GspoModuleConfig(**options, loss=LossConfig(chunk=16, balance_coefficient=0.0))
    optim = OptimConfig(lr=lr, warmup_steps=1, total_steps=40, eps=1e-4, weight_decay=0.0)
    return GspoModule(toy_model(), config, optim, seed=seed, rewards={"small": Small()})


def fit(
    out: Path, steps: int, accumulate: int = 1, lr: float = 3e-3, precision: Any = "32-true", **options: Any
) -> GspoModule:
    torch.manual_seed(0)
    trained = module(lr=lr, **options)
    trainer = L.Trainer(
        accelerator="cpu", precision=precision, max_steps=steps, max_epochs=-1, log_every_n_steps=1,
        limit_val_batches=0, accumulate_grad_batches=accumulate, use_distributed_sampler=False,
        enable_model_summary=False, enable_progress_bar=False, gradient_clip_val=1.0, default_root_dir=out,
        logger=ExactCsvLogger(run_dir=out),
        callbacks=[AtomicCheckpoint(CheckpointConfig(every_n_steps=1000), run_dir=out)],
    )  # fmt: skip
    last = out / "checkpoints/last.ckpt"
    trainer.fit(trained, Data(), ckpt_path=last if last.exists() else None, weights_only=True)
    return trained


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()]


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------ packs


def test_packs_of_answers() -> None:
    """The same answers put back give the same pack, as far as it predicts; copies are read as the pack itself is."""
    batch = PackedBatch.pack(step_samples(0))
    batch.input_ids[1:] = torch.where(batch.labels[:-1] != IGNORE, batch.labels[:-1], batch.input_ids[1:])
    prompts, answers = last_prompts(batch), last_answers(batch)
    again = with_answers(prompts, answers)
    for name in ("input_ids", "labels", "token_types", "cu_seqlens"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name
    torch.testing.assert_close(again.position_ids, batch.position_ids)
    twice = repeated(prompts, 2)
    model = toy_model()
    with torch.no_grad():
        once, both = (model(**pack.model_inputs()).hidden for pack in (prompts, twice))
    torch.testing.assert_close(both, torch.cat([once, once]))
    assert twice.sample_ids == batch.sample_ids * 2
    with pytest.raises(ValueError, match=r"sample 'audio-0' has no answer"):
        last_prompts(prompts)


def test_what_was_sampled_has_the_probability_that_is_told() -> None:
    """By a cache and token by token, or in one pass: the same; and an answer does not depend on its neighbours."""
    model, prompts, n = toy_model().eval(), last_prompts(PackedBatch.pack(step_samples(0))), 3
    options: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 5, "stop_ids": [STOP]}
    seeds = list(range(n * len(prompts)))
    answers = sample_answers(model, prompts, n=n, seeds=seeds, **options)
    batch = with_answers(repeated(prompts, n), [a.tokens for a in answers])
    with torch.no_grad():
        logits = model.thinker.logits(model(**batch.model_inputs()).hidden) / 0.7
    kept = batch.labels != IGNORE
    expected = logits[kept].log_softmax(-1).gather(1, batch.labels[kept][:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor([p for a in answers for p in a.log_probs]), expected, atol=1e-5, rtol=0)
    assert len({tuple(a.tokens) for a in answers}) > len(prompts)
    alone = last_prompts(PackedBatch.pack(step_samples(0)[2:3]))
    again = sample_answers(model, alone, n=1, seeds=[seeds[len(prompts) + 2]], **options)
    assert again[0].tokens == answers[len(prompts) + 2].tokens


# ------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_gradient_is_that_of_the_loss_written_out(level: str) -> None:
    trained = module(level=level, kl=0.1, truncate=1.05)
    trained._trainer = SimpleNamespace(global_step=0)  # type: ignore[assignment]
    written = [[5, 40, 7], [3], [9, 9], [1, 2, 3, 4], [50], [60, 2], [8], [6, 0]]
    batch = with_answers(last_prompts(PackedBatch.pack(step_samples(0))), written)
    kept = batch.labels != IGNORE
    lengths = torch.tensor([3, 1, 2, 4, 1, 2, 1, 2])
    generator = torch.Generator().manual_seed(0)

    def plain() -> torch.Tensor:
        logits = trained.model.thinker.logits(trained.model(**batch.model_inputs()).hidden)
        return logits[kept].log_softmax(-1).gather(1, batch.labels[kept][:, None]).squeeze(1)

    log_probs = plain()
    noise = [0.15 * torch.randn(int(lengths.sum()), generator=generator) for _ in range(3)]
    old, sampled, reference = (log_probs.detach() + n for n in noise)
    advantages = torch.randn(len(lengths), generator=generator)
    owner = torch.repeat_interleave(lengths)
    trained._phase = _Phase(old=old, sampled=sampled, reference=reference, advantages=advantages, owner=owner)
    trained.train()
    trained._phase.rows.extend({} for _ in lengths)
    found = trained.losses(batch).total
    weights = (old - sampled).exp().clamp(max=1.05)
    losses = []
    for i in range(len(lengths)):
        mine = owner == i
        log_ratio, a, w = (log_probs - old)[mine], advantages[i], weights[mine]
        if level == "sequence":
            ratio = log_ratio.mean().exp()
            losses.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * w.mean())
        else:
            ratio = log_ratio.exp()
            losses.append(-(torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * w).mean())
        losses[-1] = losses[-1] + 0.1 * kl_to_reference(log_probs[mine], reference[mine]).mean()
    expected = torch.stack(losses).sum()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    parameters = [p for p in trained.model.thinker.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (found, expected))
    assert max(float(g.abs().max()) for g in theirs) > 1e-2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_routing_replay() -> None:
    """Moved weights send tokens elsewhere; replayed, they go where they went, and their weights still learn."""
    model, batch = toy_model(), PackedBatch.pack(step_samples(0))
    with torch.no_grad(), recording(model) as before:
        model(**batch.model_inputs())
        for router in (layer.mlp.router for layer in model.thinker.layers):
            router.weight += 0.05 * torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1))
    with recording(model) as moved:
        model(**batch.model_inputs())
    assert any(not torch.equal(a.sort(-1)[0], b.sort(-1)[0]) for a, b in zip(before, moved, strict=True))
    replay(model, before)
    with recording(model) as replayed:
        model(**batch.model_inputs()).hidden.square().sum().backward()
    assert all(map(torch.equal, before, replayed))
    assert all(float(layer.mlp.router.weight.grad.abs().sum()) > 0 for layer in model.thinker.layers)
    replay(model, [])
    with recording(model) as again:
        model(**batch.model_inputs())
    assert all(map(torch.equal, moved, again))


# -------------------------------------------------------------------------------------------------------------- runs


def test_a_run_and_its_records(tmp_path: Path) -> None:
    """Ratios are 1 in the first step of a phase and differ after it; all that was sampled is in the tables."""
    fit(tmp_path, 4, kl=0.01)
    found = rows(tmp_path)
    assert len(found) == 4 * 8 * 4
    ratios = {step: [row["ratio"] for row in found if row["step"] == step] for step in (1, 2, 3, 4)}
    for step in (1, 4):
        assert ratios[step] == pytest.approx([1.0] * 32, abs=1e-5)
    assert max(abs(r - 1) for r in ratios[2]) > 1e-3
    assert {row["tokens"] for row in found} <= set(range(1, 7))
    assert all(row["ended"] == (row["answer"].split()[-1] == "0") for row in found)
    for row in metrics(tmp_path):
        mine = [r for r in found if r["step"] == int(row["step"])]
        assert float(row["rollout/reward"]) == pytest.approx(sum(r["reward"] for r in mine) / len(mine))
        assert float(row["rollout/length"]) == pytest.approx(sum(r["tokens"] for r in mine) / len(mine))
        assert float(row["rollout/mismatch"]) < 1e-5
        assert 0 < float(row["rollout/entropy"]) < 4.2
        assert float(row["rollout/truncated"]) == 0
        for sample in {r["sample"] for r in mine}:
            advantages = [r["advantage"] for r in mine if r["sample"] == sample]
            assert sum(advantages) == pytest.approx(0, abs=1e-5)
    assert float(metrics(tmp_path)[1]["rollout/kl"]) > 0


def test_a_ratio_is_1_while_the_weights_are_the_same_in_bf16_too(tmp_path: Path) -> None:
    fit(tmp_path, 2, precision="bf16-mixed")
    found = rows(tmp_path)
    assert [row["ratio"] for row in found if row["step"] == 1] == pytest.approx([1.0] * 32, abs=1e-5)
    assert max(abs(row["ratio"] - 1) for row in found if row["step"] == 2) > 1e-3


def test_it_learns(tmp_path: Path) -> None:
    fit(tmp_path, 24, lr=1e-2, steps_per_rollout=2)
    rewards = [float(row["rollout/reward"]) for row in metrics(tmp_path)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


@pytest.mark.parametrize("options", [{"kl": 0.1}, {"routing_replay": True, "accumulate": 2}], ids=str)
def test_resume_amid_a_phase_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    fit(tmp_path / "whole", 7, **options)
    for steps in (1, 2, 5, 7):  # a phase has three steps
        fit(tmp_path / "pieces", steps, **options)
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "pieces")]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "pieces/metrics.csv").read_bytes()
    assert rows(tmp_path / "whole") == rows(tmp_path / "pieces")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a reward"):
        GspoModule(toy_model(), GspoModuleConfig())
    for wrong, key in (({"answers": 1}, "answers=1"), ({"clip": (1.0, 0.1)}, "clip"), ({"truncate": 0.5}, "truncate"),
                       ({"word_dropout": 0.1}, "word_dropout")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"module\.{key}"):
            GspoModuleConfig(**wrong)
