"""Samples of the validation data in Weights & Biases: what went in, what the model answers, what it should."""

from __future__ import annotations

import io
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from omnitrain.data.batch import PackedBatch
from omnitrain.data.inspect import Shown, has_medium, show
from omnitrain.data.media import MediaLimits, decode_audio
from omnitrain.data.sample import BadSample
from omnitrain.evaluation.heldout import draw, prompt_text
from omnitrain.evaluation.media_swap import Drawn
from omnitrain.training.losses import gather_objects
from omnitrain.training.thinker import ThinkerModule

COLUMNS = ("id", "modality", "task", "picture", "recording", "video", "prompt", "prediction", "reference")


class MediaPanels(Callback):
    """After each validation a table of the same few samples of every modality: picture or spectrogram, player, prompt,
    prediction, reference. Does nothing without a `WandbLogger`.

    Args:
        samples_per_modality: rows of the table per modality.
        max_new_tokens: length of a prediction; decoding is greedy.
    """

    def __init__(self, samples_per_modality: int = 3, max_new_tokens: int = 48) -> None:
        self.samples_per_modality = samples_per_modality
        self.max_new_tokens = max_new_tokens
        self._drawn: list[Drawn] | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logger = next((x for x in trainer.loggers if isinstance(x, WandbLogger)), None)
        if logger is None or trainer.sanity_checking:
            return
        assert isinstance(pl_module, ThinkerModule)
        if trainer.is_global_zero:
            import wandb

            table = wandb.Table(columns=list(COLUMNS))
            for row in self.rows(pl_module):
                table.add_data(*row)
            logger.experiment.log({"samples": table, "trainer/global_step": trainer.global_step})
        gather_objects(None)  # the other ranks wait, so that their next step's time is not this table's

    def rows(self, pl_module: ThinkerModule) -> list[list[Any]]:
        """The rows of the table, media as W&B objects. A sample that cannot be read is left out."""
        from omnitrain.generation.text import generate

        data = pl_module.datamodule
        if self._drawn is None:
            groups = draw(data.opened("validation_sources"), self.samples_per_modality)
            self._drawn = [drawn for group in groups.values() for drawn in group]
        table = []
        for drawn in self._drawn:
            sample = drawn.sample
            try:
                prompt = data.encoder.encode_prompt(sample, drawn.source.media_bytes)
            except BadSample:
                continue
            batch = PackedBatch.pack([prompt]).to(pl_module.device)
            with torch.no_grad():
                answer = generate(
                    pl_module.model, batch, max_new_tokens=self.max_new_tokens, stop_ids=data.tokenizer.stop_ids
                )[0]
            shown = [
                show(segment, drawn.source.media_bytes, data.limits)
                for message in sample.messages
                for segment in message.segments
                if has_medium(segment)
            ]
            table.append(
                [
                    sample.id,
                    sample.modality,
                    sample.task,
                    _picture(shown),
                    _recording(shown, data.limits),
                    _video(shown),
                    prompt_text(sample),
                    data.tokenizer.decode(answer),
                    sample.reference,
                ]
            )
        return table


def _picture(shown: list[Shown]) -> Any:
    """The first picture, contact strip or spectrogram."""
    import wandb

    return next((wandb.Image(part.picture, caption=part.line) for part in shown if part.picture is not None), None)


def _recording(shown: list[Shown], limits: MediaLimits) -> Any:
    """A player of the first recording (as WAV at 16 kHz, which every browser plays)."""
    import wandb

    data = next((part.data for part in shown if part.type in ("audio", "speech") and not part.bad), None)
    return None if data is None else wandb.Audio(decode_audio(data, 16000, limits), sample_rate=16000)


def _video(shown: list[Shown]) -> Any:
    """A player of the first video."""
    import wandb

    data = next((part.data for part in shown if part.type == "video" and not part.bad), None)
    return None if data is None else wandb.Video(io.BytesIO(data), format="mp4")
