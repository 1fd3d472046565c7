"""Training of the codec: encoder, quantizer and Code2Wav against spectrograms, discriminators and the spoken text.

Two optimizers take turns, so the optimisation is manual. A step is counted once (the generator's), `trainer.max_steps`
and schedules count the same thing as everywhere else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from rich.table import Table
from torch import Tensor

from omnitrain.config.run_config import CODEC_PARTS, CodecModuleConfig, OptimConfig
from omnitrain.data.waveforms import WaveBatch
from omnitrain.interop.start_from import start_codec_from
from omnitrain.models.code2wav import DecoderBlock
from omnitrain.models.codec import Codec, CodecOutput, EncoderBlock
from omnitrain.models.discriminators import Discriminators
from omnitrain.models.layers.compiling import compile_layers
from omnitrain.training.codec_losses import (
    ContentHead,
    MelDistance,
    Opinions,
    codebook_users,
    feature_magnitudes,
    feature_matching_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    rvq_commitment_loss,
    si_sdr,
)
from omnitrain.training.module import TrainingModule
from omnitrain.training.optim import adamw, by_decay, check_states, with_muon
from omnitrain.training.ranks import gather_objects, sum_over_ranks
from omnitrain.training.sums import add_pairs, means

COMPILED = (EncoderBlock, DecoderBlock)
"""Blocks that `module.compile=layers` compiles: nearly all of the work."""


class CodecModule(TrainingModule):
    """Trains a `Codec`.

    Args:
        config: weights of the terms, and when the discriminators come in.
        optim: of the codec. The discriminators have their own AdamW at the same rate and schedule.
        sample_rate: Hz.
    """

    def __init__(
        self,
        model: Codec,
        config: CodecModuleConfig | None = None,
        optim: OptimConfig | None = None,
        *,
        sample_rate: int = 24_000,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config or CodecModuleConfig()
        self.model = model
        model.set_activation_checkpointing(self.config.activation_checkpointing)
        if self.config.compile:
            compile_layers(model, COMPILED)
        self.optim_config = optim or OptimConfig()
        check_states(self.optim_config)
        if self.optim_config.lr_scale:
            raise ValueError("optim.lr_scale: a codec learns as a whole, at optim.lr; remove it")
        self.loss_config = self.config.loss
        self.discriminators = Discriminators(self.config.discriminator)
        self.content = ContentHead(model.config.decoder.d_model)
        self.mel = MelDistance(
            sample_rate, self.loss_config.windows, self.loss_config.n_mels, self.loss_config.mel_floor
        )
        if self.config.init_from is not None:
            start_codec_from(self, self.config.init_from)
        if "quantizer" not in self.config.train and not model.quantizer.semantic.initialised:
            raise ValueError(
                "module.train: the codebooks are empty, so that encoder and quantizer must learn; add them, or start "
                "from a codec that has learnt (module.init_from=builtin, or a codec's run)"
            )
        for part in CODEC_PARTS:
            if part not in self.config.train:
                model.get_submodule(part).requires_grad_(False)
        self.clip = self.config.clip
        self._sums: dict[str, tuple[float, float]] = {}
        """Since the last row: (sum, count) by name."""
        self._histogram: Tensor | None = None
        self._seen = {"frames": 0, "samples": 0}
        self._skipped: dict[str, int] = {}
        self._evaluation: list[dict[str, tuple[float, float]]] = []
        self.evaluation: dict[str, float] = {}
        """Means of the last evaluation."""

    def training_step(self, batch: WaveBatch, batch_idx: int) -> None:
        optimizers, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizers, list)
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        adversarial = self.global_step >= self.loss_config.adversarial_after
        self.samples_in_step = list(batch.sample_ids)

        output = self.model(batch.wav)
        wav = _heard(output, batch)
        terms = self._reconstruction(output, wav, batch, of_all_ranks=True)
        loss = self._weighted(terms)
        total, values = loss.detach(), {}
        discriminators_norm = torch.zeros(())
        if adversarial:
            judged = self._judged(wav.shape[1])
            # The discriminators hear both once, for both sides: what the codec minimises comes back as a gradient at
            # its output, so that neither graph reaches the other's parameters.
            answer = output.wav[:, judged].detach().requires_grad_()
            real, fake = self.discriminators(wav[:, judged]), self.discriminators(answer)
            magnitudes = self._mean_over_ranks(feature_magnitudes(real))
            opinions = {
                "adversarial": gan_generator_loss(fake),
                "features": feature_matching_loss(real, fake, magnitudes),
            }
            opinion = self._weighted(opinions)
            (gradient,) = torch.autograd.grad(opinion, answer, retain_graph=True)
            if self.loss_config.balance is not None:
                of_mel = self.loss_config.mel * terms["mel"]
                (beside,) = torch.autograd.grad(of_mel, output.wav, retain_graph=True)
                factor = self._opinion_factor(gradient, beside[:, judged], self.loss_config.balance)
                gradient, opinion, values["opinion_factor"] = gradient * factor, opinion * factor, float(factor)
            values["discriminators"], discriminators_norm = self._discriminator_gradient(real, fake, optimizers[1])
            loss, total = loss + (output.wav[:, judged] * gradient).sum(), total + opinion.detach()
            terms |= opinions
        optimizers[0].zero_grad()
        self.manual_backward(loss)
        parameters = [p for p in (*self.model.parameters(), *self.content.parameters()) if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.gradient_norm = float(norm if discriminators_norm.isfinite() else discriminators_norm)
        # Of all ranks, so that each comes to the same decision about a spike.
        self.step_loss = float(self._mean_over_ranks(total))
        optimizers[0].step()
        if not self._discarded:  # the spike guard has let the step pass: all that learns moves, or nothing does
            if "quantizer" in self.config.train:
                self.model.quantizer.update()
            if adversarial:
                for group in optimizers[1].optimizer.param_groups:  # one schedule for both
                    group["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
                # Past Lightning's wrapper, which would count this as a second step of training.
                optimizers[1].optimizer.step()
            values |= {name: float(term.detach()) for name, term in terms.items()} | {"loss": self.step_loss}
            add_pairs(self._sums, {name: (value, 1.0) for name, value in values.items()})
            counts = sum_over_ranks(output.histogram.double())
            self._histogram = counts if self._histogram is None else self._histogram + counts
            self.last_loss = self.step_loss
        schedule.step()
        self._discarded = False
        self._seen["frames"] += batch.frames
        self._seen["samples"] += len(batch)
        self._skipped = dict(batch.skipped)
        self.mark_trained(batch)
        if self.row_is_due(self.global_step):
            self._log_row(self.global_step)

    def _reconstruction(
        self, output: CodecOutput, wav: Tensor, batch: WaveBatch, *, of_all_ranks: bool = False
    ) -> dict[str, Tensor]:
        """The terms that need no discriminator. `of_all_ranks`: divided so that the mean over ranks, whose rows are
        equally long but use unequally many codebooks and say unequally much, is the term of all their rows; that is a
        collective."""
        users = codebook_users(output.n_used, len(output.given))
        nats, n_bytes = self.content(output.semantic, batch.spans) if self.loss_config.content else (None, 0)
        counts = torch.cat([users, users.new_tensor([n_bytes])])
        *users, n_bytes = (self._mean_over_ranks(counts) if of_all_ranks else counts).unbind()
        terms = {
            "mel": self.mel(output.wav, wav),
            "waveform": (output.wav - wav).abs().mean(),
            "commitment": rvq_commitment_loss(output.given, output.chosen, output.n_used, torch.stack(users)).mean(),
        }
        return terms if nats is None or not n_bytes else terms | {"content": nats / n_bytes}

    def _mean_over_ranks(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor) / self.trainer.world_size

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([getattr(self.loss_config, name) * term for name, term in terms.items()]).sum()

    def _judged(self, samples: int) -> slice:
        """What the discriminators hear of rows of `samples`: a function of the step, the same on all ranks."""
        heard = min(self.loss_config.adversarial_samples or samples, samples)
        start = random.Random(f"judged/{self.global_step}").randint(0, samples - heard)
        return slice(start, start + heard)

    def _opinion_factor(self, opinion: Tensor, mel: Tensor, balance: float) -> Tensor:
        """What the gradient of `opinion` at the waveform [B, S] is multiplied by, so that over all ranks its norm is
        `balance` times that of the mel distance's at the same samples (Esser et al. 2021, arXiv 2012.09841, eq. 7;
        EnCodec, arXiv 2210.13438, section 3.4, balances so too, over a moving average)."""
        squares = sum_over_ranks(torch.stack([mel.square().sum(), opinion.square().sum()]).double())
        return balance * (squares[0] / squares[1].clamp(min=1e-24)).sqrt().float()

    def _discriminator_gradient(
        self, real: Opinions, fake: Opinions, optimizer: LightningOptimizer
    ) -> tuple[float, Tensor]:
        """Leaves the discriminators' gradients, clipped, where `optimizer` finds them; returns loss and norm."""
        loss = gan_discriminator_loss(real, fake)
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.discriminators.parameters(), self.clip)
        return float(loss.detach()), norm

    def _log_row(self, step: int) -> None:
        ranks = gather_objects((self._sums, self._seen, self._skipped))
        row = {f"train/{name}": mean for name, mean in means(sums for sums, _, _ in ranks).items()}
        row["gradient_norm"] = self.gradient_norm
        row["lr/codec"] = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        if self._histogram is not None:
            row |= codebook_use(self._histogram)
        self.log_row(row | self.data_row((seen, skipped) for _, seen, skipped in ranks), step)
        self._sums, self._histogram = {}, None

    def configure_optimizers(self) -> Any:
        config = self.optim_config
        groups = by_decay(
            [p for p in (*self.model.parameters(), *self.content.parameters()) if p.requires_grad], config
        )
        codec = with_muon(groups, config) if config.matrices == "muon" else adamw(groups, config)
        discriminators = adamw(by_decay(self.discriminators.parameters(), config), replace(config, matrices="adamw"))
        return [codec, discriminators], [self.schedule(config, codec, discriminators)]

    def validation_step(self, batch: WaveBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.ending:
            return
        output = self.model(batch.wav)
        wav = _heard(output, batch)
        terms = {name: float(term) for name, term in self._reconstruction(output, wav, batch).items()}
        terms["si_sdr"] = float(si_sdr(output.wav, wav).mean())
        self._evaluation.append({name: (value, 1.0) for name, value in terms.items()})

    def on_validation_epoch_end(self) -> None:
        self.evaluation = means(row for rank in gather_objects(self._evaluation) for row in rank)
        self._evaluation = []
        row = {f"validation/{name}": value for name, value in self.evaluation.items()}
        if "mel" in self.evaluation:
            row["validation/loss"] = self.evaluation["mel"]  # what sweepers minimise
        self.log_dict(row, logger=False, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.log_row(row, self.global_step)

    def validation_losses(self) -> dict[str, float]:
        return self.evaluation

    def validation_tables(self, step: int) -> list[Table]:
        table = Table("measure", "validation", title=f"codec, step {step}")
        for name, value in self.evaluation.items():
            table.add_row(name, f"{value:.4f}")
        return [table]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model.fold_codebooks()  # Code2Wav's own embedding says what the quantizer has learnt
        checkpoint["state_dict"].update(self.model.state_dict(prefix="model."))
        super().on_save_checkpoint(checkpoint)

    def extra_state(self) -> dict[str, Any]:
        return {
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "histogram": None if self._histogram is None else self._histogram.cpu(),
            "seen": dict(self._seen),
            "skipped": dict(self._skipped),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self._sums = {name: (value, count) for name, (value, count) in state["sums"].items()}
        self._histogram = None if state["histogram"] is None else state["histogram"].to(self.device)
        self._seen, self._skipped = dict(state["seen"]), dict(state["skipped"])


def _heard(output: CodecOutput, batch: WaveBatch) -> Tensor:
    """What `output.wav` is compared with. A decoder that trims as the public one gives fewer samples than it was given:
    its sample i is still to be sample i of the recording."""
    return batch.wav[:, : output.wav.shape[1]]


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Of every codebook: `codebook/use/Q`, the share of its codes that occurred, and `codebook/perplexity/Q`, the
    exponential of the entropy of their frequencies (as many codes if all were equally frequent), from `counts` [Q, K],
    how often each code was chosen."""
    row: dict[str, float] = {}
    for q, used in enumerate(counts.double()):
        if used.any():
            row[f"codebook/use/{q}"] = float((used > 0).double().mean())
            row[f"codebook/perplexity/{q}"] = float(torch.special.entr(used / used.sum()).sum().exp())
    return row
