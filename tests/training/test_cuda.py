"""Whole training steps on a GPU: bf16-mixed there against fp32 on the processor; and that nothing is waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from test_codec_module import SMALL_DISCRIMINATORS, tiny_codec, tone
from test_talker_module import SPEECH, TOKENIZER, speech_sample, talking_model
from torch import Tensor
from toy_training import step_samples, toy_model

from omnitrain.config.run_config import (
    CodecLossConfig,
    CodecModuleConfig,
    OptimConfig,
    TalkerModuleConfig,
    ThinkerModuleConfig,
)
from omnitrain.data.batch import PackedBatch
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.settings import AudioGeometry, MediaLimits, VisionGeometry
from omnitrain.data.waveforms import FiniteRows, WaveBatch
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.talker import TalkerInputs
from omnitrain.training.codec import CodecModule
from omnitrain.training.losses import talker_loss
from omnitrain.training.module import TrainingModule
from omnitrain.training.talker import TalkerModule
from omnitrain.training.thinker import ThinkerModule
from omnitrain.training.transfer import SendAhead, arrived, for_training

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
OPTIM = OptimConfig(lr=1e-2, warmup_steps=1, total_steps=8, eps=1.0)  # so large that AdamW follows the gradient itself


class _Batches(L.LightningDataModule):
    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.batch, self.tokenizer = batch, TOKENIZER

    def train_dataloader(self) -> Any:
        return FiniteRows([self.batch])

    def mark_trained(self, batch: Any) -> None:
        pass


def speech_pack() -> PackedBatch:
    encoder = SampleEncoder(
        tokenizer=TOKENIZER, audio=AudioGeometry(), vision=VisionGeometry(), limits=MediaLimits(),
        vocab_size=TOKENIZER.vocab_size, speech=SPEECH,
    )  # fmt: skip
    samples = [encoder(speech_sample(i), lambda segment: segment.media or b"") for i in range(3)]
    return replace(PackedBatch.pack(samples), stream_state={})


def thinker() -> tuple[TrainingModule, Any]:
    batch = replace(PackedBatch.pack(step_samples(0)), stream_state={})
    return ThinkerModule(toy_model(), ThinkerModuleConfig(), OPTIM), batch


def compiled_thinker() -> tuple[TrainingModule, Any]:
    parts = {"activation_checkpointing": ["thinker", "visual"], "kept_activations": ["attention", "experts"]}
    config = ThinkerModuleConfig(compile="layers", **parts)
    return ThinkerModule(toy_model(), config, OPTIM), thinker()[1]


def talker() -> tuple[TrainingModule, Any]:
    config = TalkerModuleConfig(train=["thinker", "embeddings", "talker", "mtp"], frame_dropout=0.0)
    return TalkerModule(talking_model(), config, OPTIM), speech_pack()


def codec() -> tuple[TrainingModule, Any]:
    wave = torch.from_numpy(np.stack([tone(150, 0.96), tone(210, 0.96)]))
    batch = WaveBatch(wav=wave, spans=(), sample_ids=("a", "b"), sources=("t", "t"), frames=24, stream_state={})
    config = CodecModuleConfig(discriminator=SMALL_DISCRIMINATORS, loss=CodecLossConfig(adversarial_after=0, content=0))
    return CodecModule(tiny_codec(), config, OPTIM), batch


def one_step(
    make: Callable[[], tuple[TrainingModule, Any]], out: Path, accelerator: str, precision: Any
) -> tuple[float, float, Tensor]:
    """Loss, gradient norm, and how all weights have moved, fp32 [numbers]."""
    torch.manual_seed(0)
    module, batch = make()
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, precision=precision, max_steps=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False, default_root_dir=out,
    )  # fmt: skip
    trainer.fit(module, datamodule=_Batches(batch))
    after = torch.cat([p.detach().float().cpu().flatten() for p in module.parameters()])
    return module.step_loss, module.gradient_norm, after - before


@pytest.mark.parametrize(
    ("make", "accelerator"),
    [
        pytest.param(thinker, "cpu", id="thinker-cpu"),  # so that what follows is known to run
        *(pytest.param(make, "gpu", id=make.__name__, marks=needs_gpu) for make in (thinker, talker, codec)),
        pytest.param(compiled_thinker, "gpu", id="compiled_thinker", marks=needs_gpu),
    ],
)
def test_a_training_step_in_bf16_is_that_in_fp32_within_its_precision(
    make: Callable[[], tuple[TrainingModule, Any]], accelerator: str, tmp_path: Path
) -> None:
    expected = one_step(make, tmp_path / "fp32", "cpu", "32-true")
    found = one_step(make, tmp_path / "bf16", accelerator, "bf16-mixed")
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    assert found[1] == pytest.approx(expected[1], rel=0.1)
    assert expected[2].norm() > 0
    assert torch.cosine_similarity(found[2], expected[2], dim=0) > 0.97


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_waits_for_the_gpu() -> None:
    """From the pack to the gradients: encoders, Thinker, Talker, MTP and their losses, once the kernels are there."""
    device = torch.device("cuda")
    model = talking_model().to(device)
    sending = SendAhead(device)

    def step() -> None:
        batch = arrived(sending(speech_pack()))
        with torch.autocast("cuda", torch.bfloat16):
            output = model(**batch.model_inputs())
            text = chunked_cross_entropy(output.hidden, model.output_embedding, batch.labels)
            inputs = TalkerInputs(**batch.spoken.inputs())
            x = model.talker.embed(inputs, model.thinker.embed_tokens, output.accept_hidden)
            hidden = model.talker(x, inputs.position_ids, inputs.cu_seqlens).hidden
            speech, _ = talker_loss(model.talker, hidden, inputs)
        (text.total + speech).backward()

    def media() -> None:
        batch = for_training(PackedBatch.pack(step_samples(0)), device)
        with torch.autocast("cuda", torch.bfloat16):
            output = encoders(**batch.model_inputs())
        output.hidden.float().square().sum().backward()

    encoders = toy_model().to(device)
    step()
    media()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        media()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in encoders.parameters())
