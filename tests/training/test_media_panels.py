"""Weights & Biases without a network: metrics and media land in the offline folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest

from omnitrain.config.run_config import MediaPanelsConfig
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.settings import DataConfig, SourceConfig
from omnitrain.models.presets import build, init_weights
from omnitrain.training.callbacks.media_panels import MediaPanels
from omnitrain.training.thinker import ThinkerModule

PACK = Path(__file__).parents[2] / "omnitrain/pack"


def test_offline_run_has_pictures_and_players(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    data = OmniDataModule(
        DataConfig(
            tokenizer=str(PACK / "tokenizer.json"),
            sources={"pack": SourceConfig(path=PACK, split="train")},
            validation_sources={"pack": SourceConfig(path=PACK, split="validation", limit=60)},
            max_tokens=256,
            num_workers=0,
        )
    )
    model = build(
        "tiny", vocab_size=data.tokenizer.vocab_size, special_tokens=data.tokenizer.special_ids, thinker={"layers": 2}
    )
    init_weights(model, 0)
    module = ThinkerModule(model)
    panels = MediaPanels(MediaPanelsConfig(samples_per_modality=1, max_new_tokens=2))
    trainer = L.Trainer(
        accelerator="cpu",
        logger=WandbLogger(project="test", save_dir=tmp_path, offline=True),
        callbacks=[panels],
        limit_val_batches=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(module, datamodule=data, verbose=False)
    import wandb

    wandb.finish()
    media = tmp_path / "wandb/latest-run/files/media"
    kinds = {path.suffix for path in media.rglob("*") if path.is_file()}
    assert {".png", ".wav", ".mp4", ".json"} <= kinds
    answered = panels.answered(module)
    assert {item.sample.modality for item in answered} >= {"image", "audio", "video", "text"}
    assert all(item.row[-1] and item.row[-1] in item.caption for item in answered)
