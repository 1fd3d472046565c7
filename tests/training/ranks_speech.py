"""Trainings of the Talker and of the codec in one rank of several, for `test_unequal_ranks.py`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from test_aut_module import recordings, tiny_aut
from test_codec_module import SMALL_DISCRIMINATORS, tiny_codec, tone
from test_talker_module import SPEECH, TOKENIZER, speech_sample, talking_model

from omnitrain.config.run_config import (
    AuTModuleConfig,
    CodecLossConfig,
    CodecModuleConfig,
    OptimConfig,
    TalkerModuleConfig,
)
from omnitrain.data.batch import PackedBatch
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.settings import AudioGeometry, MediaLimits, VisionGeometry
from omnitrain.data.waveforms import FiniteRows, WaveBatch
from omnitrain.training.aut import AuTModule
from omnitrain.training.codec import CodecModule
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.mesh_strategy import MeshStrategy
from omnitrain.training.talker import TalkerModule

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class _Given(L.LightningDataModule, Iterable[Any]):
    """Training batches of all ranks, step by step, and validation batches of each rank."""

    def __init__(self, steps: list[list[Any]], validation: list[list[Any]]) -> None:
        super().__init__()
        self.steps, self.validation = steps, validation

    def share(self) -> tuple[int, int]:
        """Which of how many parts of the data this process reads."""
        strategy = self.trainer.strategy if self.trainer else None
        found = getattr(strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return found["rank"], found["num_replicas"]

    def __iter__(self) -> Iterator[Any]:
        rank, parts = self.share()
        for step in self.steps:
            yield from step if parts == 1 else [step[rank]]

    def train_dataloader(self) -> Any:
        return _Loader(self)

    def val_dataloader(self) -> Any:
        rank, parts = self.share()
        return FiniteRows([b for rank in self.validation for b in rank] if parts == 1 else self.validation[rank])


class _Loader:
    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _fit(
    module: L.LightningModule, data: _Given, out: str, ranks: int, mesh: dict[str, int] | None = None, **options: Any
) -> None:
    torch.set_num_threads(1)
    strategy: Any = "ddp" if ranks > 1 else "auto"
    if mesh is not None:
        strategy = MeshStrategy(**mesh, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=len(data.steps),
        max_epochs=-1, log_every_n_steps=1, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        use_distributed_sampler=False, enable_model_summary=False, enable_progress_bar=False,
        enable_checkpointing=False, default_root_dir=out, logger=ExactCsvLogger(run_dir=out), **options,
    )  # fmt: skip
    for logger in trainer.loggers:
        assert isinstance(logger, ExactCsvLogger)
        logger.begin(None)
    trainer.fit(module, datamodule=data)
    strategy = trainer.strategy
    state = strategy.lightning_module_state_dict() if mesh is None else strategy.whole_state()
    torch.save(state, Path(out) / f"final.{RANK}.pt")


def talker(
    out: str,
    ranks: int,
    parts: int,
    train: list[str],
    *,
    silent: bool = False,
    mesh: dict[str, int] | None = None,
) -> None:
    """Steps of `parts` packs, each on its rank, or one after the other in one process: in the first, nobody speaks in
    the last pack; in the second, in the first one alone; in the third all speak; these three once more; and in the
    last, if `silent`, nobody speaks."""
    encoder = SampleEncoder(
        tokenizer=TOKENIZER, audio=AudioGeometry(), vision=VisionGeometry(), limits=MediaLimits(),
        vocab_size=TOKENIZER.vocab_size, speech=SPEECH,
    )  # fmt: skip
    number = iter(range(100))

    def pack(speaks: bool) -> PackedBatch:
        i = next(number)
        text = Message(role="document", segments=(Segment(type="text", text=f"the {i}. cat sleeps"),))
        samples = [Sample(id=f"text/{i}", source="test", messages=(text,))]
        samples += [speech_sample(i), speech_sample(i + 1)] if speaks else []
        packed = PackedBatch.pack([encoder(s, lambda segment: segment.media or b"") for s in samples])
        return replace(packed, stream_state={})

    three = [[pack(i < parts - 1) for i in range(parts)], [pack(i > 0) for i in range(parts)], [pack(True)] * parts]
    steps = three + three + ([[pack(False) for _ in range(parts)]] if silent else [])
    validation = [[pack(True), pack(False), pack(True)], [pack(False)], [], [pack(True)]][:parts]
    # eps above rounding, which AdamW would turn into full steps.
    optim = OptimConfig(lr=3e-3, warmup_steps=1, total_steps=8, eps=0.1)
    module = TalkerModule(talking_model(), TalkerModuleConfig(train=train, frame_dropout=0.0), optim)
    together = 1 if mesh is None else mesh.get("context", 1)
    accumulate = 1 if ranks > together else parts
    _fit(
        module, _Given(steps, validation), out, ranks, mesh, accumulate_grad_batches=accumulate,
        val_check_interval=3 * accumulate,
    )  # fmt: skip


def codec(out: str, ranks: int, parts: int) -> None:
    """Six steps of `parts` batches, each on its rank, or as one batch in one process: with discriminators from the
    second on. In each, the rows use unequally many codebooks, and the last part says nothing; in the third, nobody
    does. Ranks validate on unequally many rows."""
    loss = CodecLossConfig(adversarial_after=1, balance=0.002)  # a factor near 1
    config = CodecModuleConfig(discriminator=SMALL_DISCRIMINATORS, loss=loss, clip=0.5)
    rows = [
        WaveBatch(
            wav=torch.from_numpy(np.stack([tone(150 + 30 * i, 0.96)])), sample_ids=(f"{i}",), sources=("t",), frames=12,
            spans=((0, 2, 10 - i % 2, "word" * (1 + i % 2)),) if i // parts != 2 and (i + 1) % parts else (),
        )
        for i in range(6 * parts)
    ]  # fmt: skip
    steps = [rows[i * parts : (i + 1) * parts] for i in range(6)]
    if ranks == 1:
        steps = [[_together(step)] for step in steps]
    validation = [[*rows[:3]], [rows[0]], [], [rows[1]]][:parts]
    torch.manual_seed(0)  # of heads, discriminators and first codebooks
    os.environ.pop("PL_GLOBAL_SEED", None)  # from which several processes alone would begin anew
    model = tiny_codec(unquantized=0.5)  # steady tones have one spectrum, and so ties among codes
    quantizer, drawn = model.quantizer, model.quantizer._n_used

    def by_row(latent: torch.Tensor, *given: Any) -> torch.Tensor:
        return 1 + (torch.arange(len(latent)) + RANK) % 3 if quantizer.training else drawn(latent, *given)

    quantizer._n_used = by_row
    quantizer._spared = lambda latent, _: (torch.arange(len(latent)) + RANK) % 2 == 0
    module = CodecModule(model, config, OptimConfig(lr=1e-3, warmup_steps=1, total_steps=8, eps=1e-2))
    _fit(module, _Given(steps, validation), out, ranks, val_check_interval=3)


def _together(rows: list[WaveBatch]) -> WaveBatch:
    return WaveBatch(
        wav=torch.cat([r.wav for r in rows]),
        spans=tuple((i, *span[1:]) for i, r in enumerate(rows) for span in r.spans),
        sample_ids=tuple(x for r in rows for x in r.sample_ids),
        sources=tuple(x for r in rows for x in r.sources),
        frames=sum(r.frames for r in rows),
    )


def aut(out: str, ranks: int, mesh: dict[str, int] | None = None) -> None:
    """Six steps of two packs, which two processes have one of each, and unequally many recordings to validate on after
    four: later, a model that has learnt nothing writes what the last bit of a sum decides."""
    optim = OptimConfig(lr=3e-3, warmup_steps=1, total_steps=8, eps=1e-3)
    config = AuTModuleConfig(spec_augment=None, validation_transcripts=20)
    module = AuTModule(tiny_aut(), config, optim)
    data = recordings({}, streams=2)
    torch.set_num_threads(1)
    strategy: Any = "auto" if mesh is None else MeshStrategy(**mesh, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=6, max_epochs=-1, log_every_n_steps=1,
        num_sanity_val_steps=0, check_val_every_n_epoch=None, use_distributed_sampler=False,
        enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False, default_root_dir=out,
        logger=ExactCsvLogger(run_dir=out), accumulate_grad_batches=2 // ranks, val_check_interval=8 // ranks,
    )  # fmt: skip
    for logger in trainer.loggers:
        assert isinstance(logger, ExactCsvLogger)
        logger.begin(None)
    trainer.fit(module, datamodule=data)
    strategy = trainer.strategy
    state = strategy.lightning_module_state_dict() if mesh is None else strategy.whole_state()
    torch.save(state, Path(out) / f"final.{RANK}.pt")
