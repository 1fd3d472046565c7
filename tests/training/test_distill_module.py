"""Distillation: from a folder's model and from a server, on the data's answers and on the student's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from toy_training import VOCAB, ToyData, step_samples, toy_model

from omnitrain.config.run_config import (
    CheckpointConfig,
    DistillModuleConfig,
    LossConfig,
    OptimConfig,
    RolloutConfig,
    TeacherConfig,
)
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.interop.openai_server import OpenAIServer, ServerError
from omnitrain.models.omni import OmniModel
from omnitrain.training.callbacks import AtomicCheckpoint
from omnitrain.training.distill import DistillModule
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.post_losses import generalized_jsd
from omnitrain.training.teachers import ModelTeacher, ServerTeacher, Teacher

TOKENIZER = SimpleNamespace(stop_ids=(0,), decode=lambda ids: " ".join(map(str, ids)), special_ids={})


class Data(ToyData):
    tokenizer = TOKENIZER


def distill(teacher: Teacher, **options: Any) -> DistillModule:
    config = DistillModuleConfig(
        **options, rollout=RolloutConfig(max_new_tokens=6), loss=LossConfig(chunk=7, balance_coefficient=0.0)
    )
    optim = OptimConfig(lr=1e-2, warmup_steps=1, total_steps=40, eps=1e-4)
    return DistillModule(toy_model(), config, optim, teacher=teacher)


def fit(out: Path, steps: int, **options: Any) -> list[float]:
    """The divergence of each step."""
    torch.manual_seed(0)
    module = distill(ModelTeacher(toy_model(seed=1), VOCAB), **options)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, log_every_n_steps=1, limit_val_batches=0,
        use_distributed_sampler=False, enable_model_summary=False, enable_progress_bar=False, gradient_clip_val=1.0,
        default_root_dir=out, logger=ExactCsvLogger(run_dir=out),
        callbacks=[AtomicCheckpoint(CheckpointConfig(every_n_steps=1000), run_dir=out)],
    )  # fmt: skip
    last = out / "checkpoints/last.ckpt"
    trainer.fit(module, Data(), ckpt_path=last if last.exists() else None, weights_only=True)
    lines = (out / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:]]


def logits(model: OmniModel, batch: PackedBatch) -> torch.Tensor:
    """At the target positions, all at once."""
    return model.thinker.logits(model(**batch.model_inputs()).hidden)[batch.labels != IGNORE]


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0)])
def test_the_loss_is_the_divergence_of_the_whole_vocabulary(beta: float, temperature: float) -> None:
    teacher = toy_model(seed=1)
    module = distill(ModelTeacher(teacher, VOCAB), beta=beta, temperature=temperature).train()
    batch = PackedBatch.pack(step_samples(0))
    found = module.losses(batch)
    student, known = (
        (logits(model, batch) / temperature).log_softmax(-1) for model in (module.model, teacher)
    )  # fmt: skip
    expected = generalized_jsd(student, known.detach(), beta).sum()
    torch.testing.assert_close(found.total, expected)
    assert float(found.weight) == len(student)
    parameters = [p for p in module.model.thinker.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (found.total, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(name.startswith("teacher") for name in module.state_dict())


def test_whoever_is_like_its_teacher_learns_nothing() -> None:
    for top_k in (None, 5):
        module = distill(ModelTeacher(toy_model(), VOCAB, top_k), beta=0.5).train()
        assert float(module.losses(PackedBatch.pack(step_samples(0))).total) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_it_learns(tmp_path: Path, on_policy: float) -> None:
    losses = fit(tmp_path, 14, on_policy=on_policy, beta=0.5)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_resume_is_exact_with_answers_of_its_own(tmp_path: Path) -> None:
    fit(tmp_path / "whole", 6, on_policy=0.5)
    for steps in (2, 3, 6):
        fit(tmp_path / "pieces", steps, on_policy=0.5)
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "pieces")]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "pieces/metrics.csv").read_bytes()


def test_the_share_of_steps_that_are_on_policy() -> None:
    module = distill(ModelTeacher(toy_model(), VOCAB), on_policy=0.3)
    batch, drawn = PackedBatch.pack(step_samples(0)), []
    for step in range(60):
        module._trainer = SimpleNamespace(global_step=step, datamodule=Data())  # type: ignore[assignment]
        drawn.append(module.prepared(batch) is not batch)
    assert 0.15 < sum(drawn) / len(drawn) < 0.45


# ------------------------------------------------------------------------------------------------------------ server


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """`toy_model(1)` behind the protocol: top log-probabilities of a prompt, as vLLM gives them."""
    model, asked = toy_model(seed=1).eval(), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((question, self.headers["Authorization"]))
            ids = torch.tensor(question["prompt"])
            with torch.no_grad():
                positions = torch.arange(len(ids)).float().expand(3, -1)
                borders = torch.tensor([0, len(ids)], dtype=torch.int32)
                hidden = model.thinker(model.thinker.embed_tokens(ids), positions, borders).hidden
                top = model.thinker.logits(hidden).log_softmax(-1).topk(question["logprobs"])
            rows: list[Any] = [None]
            for values, tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                rows.append({f"token_id:{t}": p for t, p in zip(tokens, values, strict=True)})
            log_probs = {"top_logprobs": rows, "tokens": [], "token_logprobs": [], "text_offset": []}
            choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": log_probs}
            body = json.dumps({"id": "", "object": "text_completion", "created": 0, "model": "", "choices": [choice]})
            if question["model"] != "toy":
                body = json.dumps({"error": "no such model"})
            self.send_response(200 if question["model"] == "toy" else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}/v1", asked=asked)
        http.shutdown()


def texts() -> PackedBatch:
    samples = [sample for sample in step_samples(3) if sample.modality == "text"]
    return PackedBatch.pack(samples)


def test_a_server_teaches_as_its_model_would(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OMNITRAIN_API_KEYS", "example.org=another, 127.0.0.1=mine")
    batch = texts()
    known = ServerTeacher(OpenAIServer(server.url, "toy"), {}, top_k=5)
    whole = ModelTeacher(toy_model(seed=1), VOCAB, top_k=5)
    found = [float(distill(teacher, beta=0.5).train().losses(batch).total.detach()) for teacher in (known, whole)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 0.01
    assert {key for _, key in server.asked} == {"Bearer mine"}
    assert all(question["echo"] for question, _ in server.asked)


def test_what_a_server_cannot_do_is_said(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    teacher = ServerTeacher(OpenAIServer(server.url, "toy"), {}, top_k=5)
    with pytest.raises(ValueError, match=r"module\.teacher\.server reads text alone.*data\.transcripts"):
        teacher.read(PackedBatch.pack(step_samples(0)), 1.0)
    with pytest.raises(ValueError, match=r"module\.temperature=2"):
        teacher.read(texts(), 2.0)
    with pytest.raises(ServerError, match=r"model 'other'"):
        ServerTeacher(OpenAIServer(server.url, "other"), {}, top_k=5).read(texts(), 1.0)
    assert {key for _, key in server.asked} == {"Bearer none"}  # the user's key is for no host that a recipe names
    with pytest.raises(ValueError, match="is no URL"):
        OpenAIServer("file:///etc/passwd", "toy")


def test_a_teacher_reads_what_the_student_hears() -> None:
    """Media in the student's pack, words in the teacher's: targets stand in the same order."""
    samples = step_samples(0)
    words = []
    for sample in samples:
        kept = sample.token_types == 0
        words.append(replace(
            sample, mel=(), patches=(), grid_thw=np.zeros((0, 3), np.int64), modality="text",
            input_ids=sample.input_ids[kept], labels=sample.labels[kept], token_types=sample.token_types[kept],
            position_ids=np.tile(np.arange(kept.sum(), dtype=np.float32), (3, 1)),
        ))  # fmt: skip
    heard = PackedBatch.pack([replace(s, read=w) for s, w in zip(samples, words, strict=True)])
    assert heard.read is not None
    teacher = toy_model(seed=1)
    module = distill(ModelTeacher(teacher, VOCAB), beta=0.0, on_policy=1.0)
    module._trainer = SimpleNamespace(global_step=0, datamodule=Data())  # type: ignore[assignment]
    for batch in (heard, module.prepared(heard)):
        assert batch.read is not None
        assert batch.read.mel is None
        assert batch.read.n_tokens < batch.n_tokens
        assert torch.equal(batch.labels[batch.labels != IGNORE], batch.read.labels[batch.read.labels != IGNORE])
        student, known = logits(module.model, batch), logits(teacher, batch.read).detach()
        expected = generalized_jsd(student.log_softmax(-1), known.log_softmax(-1), 0.0).sum()
        torch.testing.assert_close(module.train().losses(batch).total, expected)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a teacher: module\.teacher\.folder"):
        DistillModule(toy_model(), DistillModuleConfig())
    for wrong, key in (({"beta": 2.0}, "beta"), ({"on_policy": -0.1}, "on_policy"), ({"temperature": 0.0}, "temper")):
        with pytest.raises(ValueError, match=rf"module\.{key}"):
            DistillModuleConfig(**wrong)
    with pytest.raises(ValueError, match=r"module\.teacher\.server needs module\.teacher\.name"):
        TeacherConfig(server="http://localhost:8000/v1")
    with pytest.raises(ValueError, match="a folder and a server"):
        TeacherConfig(server="http://localhost:8000/v1", name="a", folder="b")
