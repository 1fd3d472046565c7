"""Training of AuT from scratch: the audio encoder with a decoder of its own (report section 2.2, stage "AuT").

    L = nll of the answer's tokens  +  ctc * nll of the transcript from the encoder alone

Tasks are told apart by the prompts in the data. The attention window of the encoder is drawn for each step, 1 to 8 s,
and everything else (normalisation, clipping, the spike guard, resume) is `ThinkerModule`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchaudio.functional import mask_along_axis

from omnitrain.config.run_config import AuTLossConfig, AuTModuleConfig, OptimConfig, SpecAugmentConfig
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.work import Work
from omnitrain.evaluation.metrics import ERROR_RATE_TASKS, edits, normalise
from omnitrain.generation.rescore import Rescoring, rescored
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.timestamps import word_times
from omnitrain.generation.transcribe import BeamSearch, ctc_transcribe, transcribe
from omnitrain.models.aut_decoder import AuT, AuTOutput
from omnitrain.models.layers.ctc import ctc_losses
from omnitrain.parallel.sharding import gather_all, shard_again
from omnitrain.training.flops import aut_training_flops_by_part, aut_work
from omnitrain.training.losses import BatchLosses
from omnitrain.training.ranks import gather_objects
from omnitrain.training.thinker import ThinkerModule


def spec_augment(mel: Tensor, lengths: Sequence[int], config: SpecAugmentConfig) -> Tensor:
    """mel [F, n_mels] of recordings end to end, with stripes of each set to its mean (arXiv 1904.08779)."""
    recordings, parts = mel.split(list(lengths)), []
    means = torch.stack([part.mean() for part in recordings]).tolist()
    for part, mean in zip(recordings, means, strict=True):
        image = part.T[None]  # [1, n_mels, frames]
        for _ in range(config.frequency_stripes):
            image = mask_along_axis(image, config.frequency_width, mean, axis=1)
        for _ in range(config.time_stripes):
            image = mask_along_axis(image, config.time_width, mean, axis=2, p=config.time_share)
        parts.append(image[0].T)
    return torch.cat(parts)


class AuTModule(ThinkerModule[AuT]):
    """Trains an `AuT`; arguments as of `ThinkerModule`. Raises ValueError where the configuration wants a CTC loss, or
    timestamps by CTC, of a model without that head."""

    config: AuTModuleConfig
    loss_config: AuTLossConfig

    def __init__(
        self, model: AuT, config: AuTModuleConfig | None = None, optim: OptimConfig | None = None, *, seed: int = 0
    ) -> None:
        config = config or AuTModuleConfig()
        if config.loss.ctc and model.ctc is None:
            raise ValueError("module.loss.ctc needs a head: set model.ctc_slots=4, or module.loss.ctc=0")
        if config.generation.timestamps == "ctc" and model.ctc is None:
            raise ValueError("module.generation.timestamps=ctc needs model.ctc_slots=4; take attention instead")
        if config.generation.ctc_weight is not None and model.ctc is None:
            raise ValueError("module.generation.ctc_weight needs model.ctc_slots=4; null: the decoder alone")
        super().__init__(model, config, optim, seed=seed)
        self._transcripts: list[tuple[str, str, str]] = []
        """Of this validation: language, reference and what the decoder wrote."""
        self._heard: list[tuple[str, str, str]] = []
        """The same, but what the CTC head heard."""

    def losses(self, batch: PackedBatch, window: int | None = None) -> BatchLosses:
        if self.training and self.config.spec_augment is not None and batch.mel is not None:
            assert batch.mel_lengths is not None
            batch = replace(batch, mel=spec_augment(batch.mel, batch.mel_lengths.tolist(), self.config.spec_augment))
        output = self.output_of(batch, window)
        text = self.text_losses(batch, output)
        if not self.loss_config.ctc:
            return text
        found, n_bytes = self.ctc_losses(batch, output)
        ctc = torch.stack(found).sum() if found else output.encoded.sum() * 0.0
        group = (("ctc", "ctc"), (float(ctc.detach()), float(n_bytes), float(n_bytes), float(len(found))))
        return replace(text, total=text.total + self.loss_config.ctc * ctc, groups=[*text.groups, group])

    def ctc_losses(self, batch: PackedBatch, output: AuTOutput) -> tuple[list[Tensor], int]:
        """CTC of the transcripts in `batch`, and how many bytes they have; those that are too long for their recording
        are left out."""
        tokenizer = self.datamodule.tokenizer
        texts = [
            list(tokenizer.decode(target).encode()) if task in ERROR_RATE_TASKS else []
            for task, target in zip(batch.tasks, self._targets(batch), strict=True)
        ]
        found = ctc_losses(self.model.ctc_log_probs(output.encoded, output.cu_seqlens_audio), texts)
        losses = [loss for loss in found if loss is not None]
        return losses, sum(len(text) for text, loss in zip(texts, found, strict=True) if loss is not None)

    def _targets(self, batch: PackedBatch) -> list[list[int]]:
        """The tokens of each sample's answers, without those that end one."""
        stop: Collection[int] = self.datamodule.tokenizer.stop_ids
        parts = batch.labels.split(batch.cu_seqlens.diff().tolist())
        return [[t for t in part.tolist() if t != IGNORE and t not in stop] for part in parts]

    def batch_flops(self, batch: PackedBatch) -> dict[str, float]:
        return aut_training_flops_by_part(self.model, batch, self._aut_window_frames())

    def work(self) -> Work:
        return aut_work(self.model)

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        wanted = self.config.validation_transcripts - len(self._transcripts)
        if wanted > 0 and not self.ending:
            tokenizer, prompts = self.datamodule.tokenizer, batch.prompts()
            longest = Decoding(max_new_tokens=2 * max(map(len, self._targets(batch))) + 4)
            written = transcribe(self.model, prompts, longest, stop_ids=tokenizer.stop_ids)
            self._transcripts += self._transcripts_of(batch, map(tokenizer.decode, written))[:wanted]
            if self.model.ctc is not None:
                self._heard += self._transcripts_of(batch, ctc_transcribe(self.model, prompts))[:wanted]

    evaluates_together = False

    def on_validation_start(self) -> None:
        if self.mesh is not None:  # to write, each rank runs the decoder as often as its recordings need
            gather_all(self.model)

    def on_validation_end(self) -> None:
        if self.mesh is not None:
            shard_again(self.model)

    def _transcripts_of(self, batch: PackedBatch, texts: Iterable[str]) -> list[tuple[str, str, str]]:
        rows = zip(batch.tasks, batch.languages, self._targets(batch), texts, strict=True)
        return [
            (languages[0] if languages else "", self.datamodule.tokenizer.decode(target), text)
            for task, languages, target, text in rows
            if task in ERROR_RATE_TASKS
        ]

    def write(self, batch: PackedBatch) -> list[list[int]]:
        wanted = self.config.generation
        decoding: Decoding | BeamSearch = Decoding(max_new_tokens=wanted.max_new_tokens, temperature=wanted.temperature)
        if wanted.beam > 1:
            decoding = BeamSearch(
                width=wanted.beam,
                length_penalty=wanted.length_penalty,
                max_new_tokens=wanted.max_new_tokens,
            )
        tokenizer = self.datamodule.tokenizer
        spoken = [task in ERROR_RATE_TASKS for task in batch.tasks]
        written: list[list[int]] = [[] for _ in spoken]
        if wanted.ctc_weight is None or not all(spoken):
            written = transcribe(self.model, batch, decoding, stop_ids=tokenizer.stop_ids)
        if wanted.ctc_weight is not None and any(spoken):
            rescoring = Rescoring(ctc_weight=wanted.ctc_weight, width=wanted.beam if wanted.beam > 1 else 8)
            texts = rescored(self.model, batch, tokenizer.encode, tokenizer.stop_ids[0], rescoring)
            heard = map(tokenizer.encode, texts)
            written = [own if of_ctc else ids for own, ids, of_ctc in zip(heard, written, spoken, strict=True)]
        return written

    def predict_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """What was heard in a batch of recordings: `id`, `source`, `task`, `languages` and `text` of each; with
        timestamps also `words`, of which each has `text`, `start` and `end` in seconds (None: CTC cannot align it)."""
        tokenizer, by = self.datamodule.tokenizer, self.config.generation.timestamps
        silent = set(tokenizer.special_ids.values())
        texts = [[token for token in ids if token not in silent] for ids in self.write(batch)]
        rows: list[dict[str, Any]] = [
            {"id": name, "source": source, "task": task, "languages": list(languages), "text": tokenizer.decode(text)}
            for name, source, task, languages, text in zip(
                batch.sample_ids, batch.sources, batch.tasks, batch.languages, texts, strict=True
            )
        ]
        if by != "none":
            for row, words in zip(rows, word_times(self.model, batch, texts, tokenizer.decode, by=by), strict=True):
                row["words"] = None if words is None else [vars(word) for word in words]
        return rows

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        rates: dict[str, float] = {}
        for name, texts in (("cer", self._transcripts), ("cer_ctc", self._heard)):
            rates |= error_rates([row for rank in gather_objects(texts) for row in rank], name)
        self._transcripts, self._heard = [], []
        self.log_dict(rates, logger=False, sync_dist=True)
        if rates and not self.trainer.sanity_checking:
            self.log_row(rates, self.global_step)

    def validation_losses(self) -> dict[str, float]:
        found = {name: self.trainer.callback_metrics.get(f"validation/{name}") for name in ("cer", "cer_ctc")}
        return super().validation_losses() | {n: float(rate) for n, rate in found.items() if rate is not None}


def error_rates(rows: Sequence[tuple[str, str, str]], measure: str = "cer") -> dict[str, float]:
    """`validation/cer` and `validation/cer/LANGUAGE` of (language, reference, hypothesis): characters that are wrong,
    over the references' length. `measure`: another name for it."""
    rates: dict[str, Any] = {}
    for name in ("", *sorted({language for language, _, _ in rows})):
        counts = [
            edits(normalise(reference), normalise(hypothesis), characters=True)
            for language, reference, hypothesis in rows
            if name in ("", language)
        ]
        length = sum(n for _, n in counts)
        if length:
            rates["/".join(filter(None, (f"validation/{measure}", name)))] = sum(wrong for wrong, _ in counts) / length
    return rates
