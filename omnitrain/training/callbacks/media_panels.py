"""Samples of the validation data in Weights & Biases: what went in, what the model answers, what it should."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from omnitrain.config.run_config import MediaPanelsConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.data.media import MediaLimits, decode_audio, sniff
from omnitrain.data.sample import BadSample, Sample, has_medium
from omnitrain.data.view import Shown, show
from omnitrain.evaluation.heldout import draw, prompt_text
from omnitrain.evaluation.media_swap import Drawn
from omnitrain.parallel.sharding import within
from omnitrain.training.ranks import gather_objects
from omnitrain.training.thinker import ThinkerModule

COLUMNS = ("id", "modality", "task", "prompt", "prediction", "reference")


@dataclass(frozen=True)
class Answered:
    """A sample, its media made ready to be looked at, and the model's answer."""

    sample: Sample
    shown: tuple[Shown, ...]
    prediction: str

    @property
    def row(self) -> tuple[str, ...]:
        """The values of `COLUMNS`."""
        sample = self.sample
        return (sample.id, sample.modality, sample.task, prompt_text(sample), self.prediction, sample.reference)

    @property
    def caption(self) -> str:
        return f"{prompt_text(self.sample)}\nmodel: {self.prediction}\nreference: {self.sample.reference}"


class MediaPanels(Callback):
    """After each validation, for the same few samples of every modality: panels of pictures, spectrograms, frames of
    videos and audio players, each captioned with prompt, (greedy) prediction and reference, and a table of the texts.
    Does nothing without a `WandbLogger`."""

    def __init__(self, config: MediaPanelsConfig | None = None) -> None:
        self.config = config or MediaPanelsConfig()
        self._drawn: list[Drawn] | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logger = next((x for x in trainer.loggers if isinstance(x, WandbLogger)), None)
        if logger is None or trainer.sanity_checking:
            return
        assert isinstance(pl_module, ThinkerModule)
        answered: list[Answered] = []
        if trainer.is_global_zero or pl_module.mesh is not None:  # for a spread model, all ranks write the same
            answered = within(pl_module.model, self.answered, pl_module)
        if trainer.is_global_zero:
            panels = self.panels(answered, pl_module.datamodule.config.limits)
            logger.experiment.log({**panels, "trainer/global_step": trainer.global_step})
        gather_objects(None)  # the other ranks wait here, and not in their next step's time

    def answered(self, pl_module: ThinkerModule) -> list[Answered]:
        """The samples with the model's answers. A sample that cannot be read is left out."""
        from omnitrain.generation.sampling import Decoding
        from omnitrain.generation.text import generate

        data = pl_module.datamodule
        if self._drawn is None:
            groups = draw(data.opened("validation_sources"), self.config.samples_per_modality)
            self._drawn = [drawn for group in groups.values() for drawn in group]
        decoding, found = Decoding(max_new_tokens=self.config.max_new_tokens), []
        for drawn in self._drawn:
            sample, media_bytes = drawn.sample, drawn.source.media_bytes
            try:
                prompt = data.encoder.encode_prompt(sample, media_bytes)
            except BadSample:
                continue
            batch = PackedBatch.pack([prompt]).to(pl_module.device)
            (answer,) = generate(pl_module.model, batch, decoding, stop_ids=data.tokenizer.stop_ids)
            segments = [s for message in sample.messages for s in message.segments if has_medium(s)]
            shown = tuple(show(segment, media_bytes, data.config.limits) for segment in segments)
            found.append(Answered(sample, shown, data.tokenizer.decode(answer)))
        return found

    def panels(self, answered: list[Answered], limits: MediaLimits) -> dict[str, Any]:
        """W&B objects by panel: `samples/image`, `samples/spectrogram`, `samples/audio`, `samples/video_frames`,
        `samples/video`, `samples/answers`."""
        import wandb

        panels: dict[str, list[Any]] = defaultdict(list)
        for item, part in [(answer, part) for answer in answered for part in answer.shown if part.picture is not None]:
            kind = {"image": "image", "video": "video_frames"}.get(part.type, "spectrogram")
            panels[f"samples/{kind}"].append(wandb.Image(part.picture, caption=item.caption))
            if kind == "spectrogram":  # as WAV, which every browser plays
                wave = decode_audio(part.data, 16000, limits)
                panels["samples/audio"].append(wandb.Audio(wave, sample_rate=16000, caption=item.caption))
            elif kind == "video_frames" and sniff(part.data)[0] == "mp4":
                player = wandb.Video(io.BytesIO(part.data), caption=item.caption, format="mp4")
                panels["samples/video"].append(player)
        return panels | {"samples/answers": wandb.Table(list(COLUMNS), [item.row for item in answered])}
