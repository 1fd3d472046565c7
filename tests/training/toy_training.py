"""A whole training run in a second: a tiny OmniModel on synthetic samples of every modality, in any number of ranks.

`python toy_training.py '{"out": DIR, ...}'` runs `train` and writes the final weights to DIR/final.pt; tests run it as
a process of its own, to start several ranks or to be killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from omnitrain.config.run_config import (
    THINKER_PARTS,
    CheckpointConfig,
    LossConfig,
    OptimConfig,
    SpikeGuardConfig,
    ThinkerModuleConfig,
    ThroughputConfig,
)
from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
from omnitrain.data.positions import AudioSpan, ImageSpan, TextSpan, audio_tokens, tm_rope_positions
from omnitrain.data.sample import MODALITIES
from omnitrain.data.stream import TooManyBadSamples
from omnitrain.models.aut import AuTConfig
from omnitrain.models.layers import compiling
from omnitrain.models.omni import OmniConfig, OmniModel
from omnitrain.models.presets import init_weights
from omnitrain.models.thinker import ThinkerConfig
from omnitrain.models.vision import VisionConfig
from omnitrain.training.callbacks import AtomicCheckpoint, RunRecord, SpikeGuard, Throughput, Watchdog
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.mesh_strategy import MeshStrategy
from omnitrain.training.thinker import ThinkerModule
from omnitrain.vocabulary import AUDIO, IMAGE, TEXT

VOCAB = 64
# What the samples of each step are; the halves of a step go to different ranks. Steps 1 and 2 leave one rank without
# audio or without pictures, step 3 all of them.
STEPS = [
    ("audio", "text", "image", "text", "audio", "image", "text", "text"),
    ("audio", "text", "audio", "text", "text", "text", "text", "text"),
    ("text", "text", "text", "text", "image", "text", "image", "text"),
    ("text",) * 8,
]


def toy_model(seed: int = 0) -> OmniModel:
    model = OmniModel(
        OmniConfig(
            thinker=ThinkerConfig(
                vocab_size=VOCAB, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=32, n_experts=4, top_k=2,
                expert_width=16, mrope_sections=(2, 1, 1), accept_hidden_layer=1,
            ),
            aut=AuTConfig(d_model=16, layers=1, heads=2, ffn=32, out_dim=32, conv_hidden=4, n_mels=16),
            vision=VisionConfig(
                d_model=16, layers=1, heads=2, ffn=32, out_dim=32, patch=4, grid_side=4, deepstack_layers=(0,)
            ),
        )
    )  # fmt: skip
    init_weights(model, seed)
    return model


def toy_sample(kind: str, number: int) -> EncodedSample:
    rng = np.random.default_rng(number)
    n_text = int(rng.integers(4, 12))
    spans: list[Any] = [TextSpan(2)]
    types = [TEXT] * 2
    mel: tuple[np.ndarray, ...] = ()
    patches: tuple[np.ndarray, ...] = ()
    grid = np.zeros((0, 3), dtype=np.int64)
    if kind == "audio":
        frames = int(rng.integers(80, 260))
        mel = (rng.standard_normal((frames, 16)).astype(np.float32),)
        spans.append(AudioSpan(audio_tokens(frames)))
        types += [AUDIO] * audio_tokens(frames)
    elif kind == "image":
        grid = np.array([[1, 4, 6]])
        patches = (rng.standard_normal((24, 3 * 2 * 4 * 4)).astype(np.float32),)
        spans.append(ImageSpan((1, 4, 6)))
        types += [IMAGE] * 6
    spans.append(TextSpan(n_text))
    types += [TEXT] * n_text
    n = len(types)
    labels = np.full(n, IGNORE, dtype=np.int64)
    labels[-n_text:-1] = rng.integers(0, VOCAB, n_text - 1)
    return EncodedSample(
        id=f"{kind}-{number}",
        source="toy",
        task={"audio": "asr", "image": "caption", "text": "text"}[kind],
        modality=kind,
        languages=("en",),
        input_ids=rng.integers(0, VOCAB, n),
        labels=labels,
        token_types=np.array(types, dtype=np.uint8),
        position_ids=tm_rope_positions(spans),
        mel=mel,
        patches=patches,
        grid_thw=grid,
        target_bytes=2 * (n_text - 1),
    )


def step_samples(step: int) -> list[EncodedSample]:
    kinds = STEPS[step % len(STEPS)]
    return [toy_sample(kind, 100 * step + i) for i, kind in enumerate(kinds)]


class ToyData(L.LightningDataModule):
    """Step g's eight samples, dealt to micro-batches and ranks in order; reads ahead like the real one and keeps the
    position of the last trained batch."""

    def __init__(
        self, poison: tuple[int, ...] = (), delay: float = 0.0, stage_at: int = 10**9, uneven: bool = False
    ) -> None:
        super().__init__()
        self.uneven, self.fails_at, self.hangs_at = uneven, -1, -1
        self.position = 0
        self.poison, self.delay, self.stage_at = poison, delay, stage_at

    def share(self) -> tuple[int, int]:
        """Which of how many parts of a step's samples this process reads."""
        strategy = self.trainer.strategy if self.trainer else None
        found = getattr(strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return found["rank"], found["num_replicas"]

    def train_dataloader(self) -> Any:
        return _Endless(self)

    def batches(self) -> Iterator[PackedBatch]:
        trainer = self.trainer
        assert trainer is not None
        accumulate, (rank, world) = trainer.accumulate_grad_batches, self.share()
        size = 8 // (accumulate * world)
        position = self.position
        while True:
            step, micro = divmod(position, accumulate)
            if step == self.fails_at:
                raise TooManyBadSamples("this rank's data are damaged")
            if step == self.hangs_at:
                time.sleep(600)
            start = (micro * world + rank) * size
            batch = PackedBatch.pack(
                step_samples(step)[start : start + size],
                stream_state={
                    "position": position + 1,
                    "filling": 0.5 * (position + 1),
                    "batches": position + 1,
                    "stage": int(step >= self.stage_at),
                },
                skipped={"too_long": position // 3},
            )
            if step in self.poison:
                if batch.mel is not None:
                    batch.mel.fill_(float("nan"))
                elif batch.patches is not None:
                    batch.patches.fill_(float("nan"))
            position += 1
            time.sleep(self.delay)
            yield batch

    def val_dataloader(self) -> Any:
        rank, world = self.share()
        if self.uneven:  # rank 0 has three packs, rank 1 one, rank 2 none, rank 3 two; one process has them all
            of_rank = {0: (1000, 1001, 1002), 1: (1003,), 2: (), 3: (1004, 1005)}
            steps = (
                of_rank[rank] if world == 4 else of_rank[rank] + of_rank[rank + 2] if world == 2 else range(1000, 1006)
            )
            return _Endless(self, [PackedBatch.pack(step_samples(s)) for s in steps])
        return _Fixed([PackedBatch.pack(step_samples(s)[rank::world]) for s in (1000, 1002)])

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def mark_trained(self, batch: PackedBatch) -> None:
        assert batch.stream_state is not None
        self.position = batch.stream_state["position"]

    def opened(self, which: str) -> dict[str, Any]:
        return {}  # no shards

    def planned_mixture(self) -> list[dict[str, Any]]:
        return [{"until_tokens": None, "shares": {"toy": 1.0}}]

    def seen_mixture(self) -> dict[str, Any]:
        return {"seen": {"source": {"samples": {"toy": self.position * 8}}}, "stage": 0, "packing_efficiency": 0.5}

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"position": self.position, "accumulate": self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        steps, rest = divmod(state_dict["position"], state_dict["accumulate"])
        assert not rest
        self.position = steps * self.trainer.accumulate_grad_batches


class _Fixed:
    def __init__(self, batches: list[PackedBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Endless:
    """A loader without a length, as the real ones."""

    def __init__(self, data: ToyData, batches: list[PackedBatch] | None = None) -> None:
        self.data, self.given = data, batches

    def __iter__(self) -> Iterator[PackedBatch]:
        return self.data.batches() if self.given is None else iter(self.given)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Arguments of a toy run."""

    out: str
    steps: int = 6
    devices: int = 1
    mesh: dict[str, int] | None = None  # sizes of it, where the model is spread
    accumulate: int = 1
    val_every: int = 0
    checkpoint_every: int = 1000
    launcher: bool = False  # somebody waits for SIGUSR2, as submitit does in a job of Slurm
    log_every: int = 1
    max_steps_of_schedule: int = 20
    balance: float = 0.01
    weight: float = 1.0  # of every target
    clip: float | None = 1.0
    poison: tuple[int, ...] = ()
    stage_at: int = 10**9  # from this step on the data are of another stage
    max_in_a_row: int = 5
    ema: bool = False
    uneven: bool = False  # ranks have unequally many packs to validate on
    fail: tuple[int, int] | None = None  # (rank, step): what reads the data raises there
    hang: tuple[int, int] | None = None  # (rank, step): what reads the data does not come back from there
    timeout: float | None = None  # seconds that the ranks wait for one another
    word_dropout: float = 0.0
    precision: str = "32-true"
    weights: str = "float32"  # what a public folder holds
    lr: float = 3e-3
    delay: float = 0.0
    resume: bool = True
    train: tuple[str, ...] | None = None
    recomputed: tuple[str, ...] = ()
    rests: tuple[float, ...] = ()  # seconds that each rank rests in the Thinker's last layer, in each pass
    rests_hearing: tuple[float, ...] = ()  # and in that of the audio encoder
    kept: tuple[str, ...] = ()
    compile: str | None = None  # a backend of torch.compile


def train(toy: Toy) -> tuple[L.Trainer, ThinkerModule, ToyData]:
    """Run (or continue, where `out` holds a checkpoint) a toy training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if toy.launcher:  # rank 0 queues the job again and exits, the others return
        signal.signal(signal.SIGUSR2, lambda *_: os.environ.get("LOCAL_RANK", "0") == "0" and sys.exit(7))
    out = Path(toy.out)
    compiling.BACKEND = toy.compile or compiling.BACKEND
    module = ThinkerModule(
        toy_model().to(getattr(torch, toy.weights)),
        ThinkerModuleConfig(
            train=list(toy.train or THINKER_PARTS),
            word_dropout=toy.word_dropout,
            activation_checkpointing=list(toy.recomputed),
            kept_activations=list(toy.kept),
            compile="layers" if toy.compile else False,
            loss=LossConfig(
                balance_coefficient=toy.balance, chunk=16, modality_weights=dict.fromkeys(MODALITIES, toy.weight)
            ),
        ),
        # eps well above rounding: AdamW would turn a gradient that is only rounding noise into a full step.
        OptimConfig(lr=toy.lr, warmup_steps=2, total_steps=toy.max_steps_of_schedule, eps=1e-4, decay_fraction=0.2),
    )
    for layers, rests in ((module.model.thinker.layers, toy.rests), (module.model.aut.layers, toy.rests_hearing)):
        if rests:
            seconds, inside = rests[int(os.environ.get("LOCAL_RANK", "0"))], next(layers[-1].children())
            inside.register_forward_pre_hook(lambda *_, seconds=seconds: time.sleep(seconds))
    data = ToyData(poison=tuple(toy.poison), delay=toy.delay, stage_at=toy.stage_at, uneven=toy.uneven)
    if toy.fail is not None and toy.fail[0] == int(os.environ.get("LOCAL_RANK", "0")):
        data.fails_at = toy.fail[1]
    if toy.hang is not None and toy.hang[0] == int(os.environ.get("LOCAL_RANK", "0")):
        data.hangs_at = toy.hang[1]
    callbacks: list[L.Callback] = [
        AtomicCheckpoint(CheckpointConfig(every_n_steps=toy.checkpoint_every), run_dir=out),
        SpikeGuard(SpikeGuardConfig(min_steps=4, max_in_a_row=toy.max_in_a_row), run_dir=out),
        Throughput(ThroughputConfig(peak_tflops=0.1)),
        RunRecord(run_dir=out),
    ]
    if toy.timeout is not None:
        callbacks.append(Watchdog(timeout_seconds=toy.timeout))
    if toy.ema:
        from lightning.pytorch.callbacks import EMAWeightAveraging

        callbacks.append(EMAWeightAveraging(decay=0.9))
    strategy: Any = "auto"
    if toy.devices > 1:
        strategy = L.pytorch.strategies.DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")
    if toy.mesh is not None:
        strategy = MeshStrategy(**toy.mesh, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=toy.devices,
        precision=toy.precision,
        strategy=strategy,
        max_steps=toy.steps,
        max_epochs=-1,
        accumulate_grad_batches=toy.accumulate,
        log_every_n_steps=toy.log_every,
        val_check_interval=toy.val_every * toy.accumulate or None,
        limit_val_batches=1.0 if toy.val_every else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        gradient_clip_val=toy.clip,
        default_root_dir=out,
        callbacks=callbacks,
        logger=ExactCsvLogger(run_dir=out),
    )
    last = out / "checkpoints" / "last.ckpt"
    ckpt = last if toy.resume and last.exists() else None
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    strategy = trainer.strategy
    state = strategy.whole_state() if toy.mesh is not None else strategy.lightning_module_state_dict()
    if trainer.is_global_zero:
        torch.save({name.removeprefix("model."): value for name, value in state.items()}, out / "final.pt")
    return trainer, module, data


if __name__ == "__main__":
    train(Toy(**json.loads(sys.argv[1])))
