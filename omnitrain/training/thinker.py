"""Training of the Thinker with its encoders: which parts learn, from which loss.

Gradients are exact over the global batch. `training_step` back-propagates un-normalised sums; once the last micro-batch
of an optimizer step has been back-propagated (and DDP has reduced the gradients), they are divided by the number of
target tokens of all ranks and all accumulation steps. Clipping, the spike guard and AdamW see that gradient.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from omnitrain.config.run_config import OptimConfig, ThinkerModuleConfig
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.work import Work
from omnitrain.interop.start_from import start_from
from omnitrain.models.aut import AuTLayer
from omnitrain.models.aut_decoder import AuT, AuTOutput
from omnitrain.models.layers.compiling import compile_layers
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.layers.decoder import DecoderLayer
from omnitrain.models.layers.transfer import sent
from omnitrain.models.mtp import MTPLayer
from omnitrain.models.omni import OmniModel
from omnitrain.models.thinker import ThinkerOutput
from omnitrain.models.vision import VisionBlock
from omnitrain.parallel.sharding import within
from omnitrain.parallel.state import local
from omnitrain.training.flops import BatchSizes, thinker_work, training_flops_by_part
from omnitrain.training.lora import add_lora
from omnitrain.training.losses import BatchLosses, RouterUse, SampleSums, balance_loss, token_weights
from omnitrain.training.module import TrainingModule
from omnitrain.training.optim import check_states, optimizer_of, part_of
from omnitrain.training.ranks import gather_objects, sum_over_ranks
from omnitrain.training.sums import LossSums, expert_load, loss_table, sample_groups
from omnitrain.training.transfer import for_training

COMPILED = (DecoderLayer, MTPLayer, AuTLayer, VisionBlock)
"""Layers that `module.compile=layers` compiles."""


def hide_words(batch: PackedBatch, share: float) -> PackedBatch:
    """`batch` with `share` of the words in answers of samples with media replaced by the token that opens their sample
    (``<|im_start|>``, which never stands in an answer). What is to be predicted stays the same. Text is left alone."""
    lengths, device = batch.cu_seqlens.diff().long(), batch.input_ids.device
    has_media = torch.tensor([modality != "text" for modality in batch.modalities], device=lengths.device)
    opening = sent(batch.cu_seqlens[:-1].long().repeat_interleave(lengths), device)
    answers = F.pad(batch.labels[:-1] != IGNORE, (1, 0)) & has_media.repeat_interleave(lengths)
    hidden = answers & (torch.rand(batch.n_tokens, device=lengths.device) < share)
    return replace(batch, input_ids=torch.where(sent(hidden, device), batch.input_ids[opening], batch.input_ids))


class _JoinTheOthers(L.Callback):
    """Ranks may have unequally many batches to be evaluated on, and each of a spread model needs all ranks: who has no
    more computes along. The first of what happens at the end, before any other collective."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ThinkerModule)
        while pl_module.evaluates_together and float(sum_over_ranks(torch.zeros((), device=pl_module.device))):
            pl_module.computed(for_training(PackedBatch.nothing(), pl_module.device))

    on_test_epoch_end = on_validation_epoch_end


def _streams_in(state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Those of an `extra_state`; older ones have one, under another name."""
    return state["streams"] if "streams" in state else {0: state["stream"]}


M = TypeVar("M", bound=OmniModel | AuT)


class ThinkerModule(TrainingModule, Generic[M]):
    """Trains an `OmniModel` (or, as `AuTModule`, an `AuT`) to predict text. `seed` is that of the window draws, where
    `config` has none of its own. ValueError if the weights to start from do not fit."""

    def __init__(
        self,
        model: M,
        config: ThinkerModuleConfig | None = None,
        optim: OptimConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config or ThinkerModuleConfig()
        self.model: M = model
        model.set_activation_checkpointing(self.config.activation_checkpointing, self.config.kept_activations)
        self.optim_config = optim or OptimConfig()
        check_states(self.optim_config)
        self.loss_config = self.config.loss
        self.seed = seed if self.config.seed is None else self.config.seed
        if self.config.init_from is not None:
            for notice in start_from(model, self.config.init_from):
                rank_zero_warn(notice)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in self.config.whole_parts)
        if self.config.lora is not None:
            add_lora(model, self.config.lora, self.seed)
        if self.config.compile:
            compile_layers(model, COMPILED)

        # One optimizer step: (weighted nats, weight) of all ranks, positions and [L, E] expert counts of all ranks by
        # decoder, and this rank's sums by modality.
        self._window = torch.zeros(2, dtype=torch.float64)
        self._window_routers: dict[str, tuple[float, Tensor]] = {}
        self._window_sums = LossSums()
        self._window_media = {"aut": 0.0, "visual": 0.0}  # mel frames and patches of all ranks
        # Since the last logged row; since the start.
        self._row_sums = LossSums()
        self._row_counts: dict[str, Tensor] = {}
        self._seen = {"tokens": 0, "samples": 0, "target_tokens": 0}
        self._streams: dict[int, dict[str, Any]] = {}  # of packs: what was skipped, and how full they were
        self._part_norms: dict[str, float] = {}
        self._evaluation: dict[int, LossSums] = {}
        self.evaluation_sums: dict[str, LossSums] = {}
        """Sums of the last evaluation by the name of its loader, over all ranks; for tables and reports."""

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        seen = self.prepared(batch)
        losses = self.computed(seen, self._aut_window_frames())
        loss, routers = losses.total, losses.routers
        # One message to the other ranks: nats, weights, the data's stage, what there is to hear and to see, and
        # positions and counts of every router.
        stage = (batch.stream_state or {}).get("stage", 0)
        media = [0 if part is None else len(part) for part in (batch.mel, batch.patches)]
        known = [float(losses.weight), stage, *media, *(use.positions for use in routers.values())]
        known = torch.tensor(known, dtype=torch.float64)
        step = [loss.detach().double()[None], sent(known, loss.device)]
        step += [use.counts.double().flatten() for use in routers.values()]
        flat = sum_over_ranks(torch.cat(step))
        _, _, *all_counts = flat.split([len(part) for part in step])
        sums = flat[: 1 + len(known)].cpu()
        self._window += sums[:2]
        nats, weights = self._window.tolist()
        self.step_loss = nats / weights if weights else 0.0  # without the balance term
        weight, self.data_stage, mel, patches, *positions = sums[1:].tolist()
        self._window_media = {"aut": self._window_media["aut"] + mel, "visual": self._window_media["visual"] + patches}
        self._window_sums.add(losses.groups)

        for (name, use), n, flat_counts in zip(routers.items(), positions, all_counts, strict=True):
            counts = flat_counts.view_as(use.counts)
            so_far, total = self._window_routers.get(name, (0.0, torch.zeros_like(counts)))
            so_far, total = so_far + n, total + counts
            self._window_routers[name] = (so_far, total)
            if self.loss_config.balance_coefficient and counts.numel() and n:
                # f over what the global batch has brought so far, P over this micro-batch of all ranks; weighted by its
                # target tokens, because every gradient is divided by those in the end.
                balance = balance_loss(
                    (total / so_far).to(use.prob_sums.dtype),
                    use.prob_sums / n,
                    pool_layers=self.loss_config.balance_pools_layers,
                )
                loss = loss + self.loss_config.balance_coefficient * weight * balance
        self._count(seen)
        self.mark_trained(batch)
        # Lightning divides by the accumulation steps and DDP by the ranks: undo both, so that gradients are plain sums.
        ranks = self.trainer.world_size if self.mesh is None else 1
        return loss * (self.trainer.accumulate_grad_batches * ranks)

    def prepared(self, batch: PackedBatch) -> PackedBatch:
        """What is trained on where the loader gives `batch`."""
        return hide_words(batch, self.config.word_dropout) if self.config.word_dropout else batch

    def computed(self, batch: PackedBatch, window: int | None = None) -> BatchLosses:
        """`losses`, of a model that may be spread; where processes share packs, of this one's part of it."""
        slices = None if self.mesh is None else self.mesh.slices
        if slices is not None:
            labels = torch.full_like(batch.labels, IGNORE)
            labels[slices.mine(len(labels))] = batch.labels[slices.mine(len(labels))]
            batch = replace(batch, labels=labels, spoken=None if slices.rank else batch.spoken)

        def compute() -> tuple[Tensor, list[Tensor], BatchLosses]:
            with self.own_time.running(self.device):
                losses = self.losses(batch, window)
            return losses.total, [use.prob_sums for use in losses.routers.values()], losses

        losses = within(self.model, compute)[-1]
        if slices is not None and slices.rank:  # who shares a pack counts its samples and their bytes once
            losses = replace(losses, groups=[(key, (nll, n, 0.0, 0.0)) for key, (nll, n, _, _) in losses.groups])
        return losses

    def _count(self, batch: PackedBatch) -> None:
        self.samples_in_step += batch.sample_ids
        if not self.counts_pack:
            return
        self._seen["tokens"] += batch.n_tokens
        self._seen["samples"] += len(batch)
        self._seen["target_tokens"] += int((batch.labels != IGNORE).sum())
        state = batch.stream_state or {}
        filled = [state["filling"] / state["batches"]] if state.get("batches") else []
        self._streams[state.get("rank", 0)] = {"skipped": dict(batch.skipped), "packing": filled}

    def losses(self, batch: PackedBatch, window: int | None = None) -> BatchLosses:
        """Loss of the text in `batch`; `window`: of the audio encoder's attention, frames of 10 ms (None: its own)."""
        return self.text_losses(batch, self.output_of(batch, window))

    def output_of(self, batch: PackedBatch, window: int | None) -> Any:
        """What the model makes of `batch`; not by a call, see `within`."""
        forward: Any = self.model.forward
        return forward(**batch.model_inputs(), aut_window_frames=window)

    def text_losses(self, batch: PackedBatch, output: ThinkerOutput | AuTOutput) -> BatchLosses:
        """Loss of the text in `batch`, from the model's output."""
        head = self.model.output_embedding
        weights = token_weights(batch, self.loss_config.modality_weights)
        total, nll = chunked_cross_entropy(
            output.hidden, head, batch.labels, weights,
            chunk=self.loss_config.chunk, compiled=bool(self.config.compile) and self.training,
        )  # fmt: skip
        routers = {}
        if isinstance(output, ThinkerOutput):
            slices = None if self.mesh is None else self.mesh.slices
            n = batch.n_tokens if slices is None else slices.sizes(batch.n_tokens)[slices.rank]
            routers["thinker"] = RouterUse(output.router_counts, output.router_prob_sums, n)
        return BatchLosses(
            total=total,
            weight=weights.sum(),
            routers=routers,
            groups=sample_groups(batch, SampleSums.of(batch, nll)),
        )

    def _aut_window_frames(self) -> int | None:
        """Frames (10 ms) of this step's audio attention window; a function of seed and step, so resume repeats it."""
        if self.config.aut_window_seconds is None:
            return None
        return 100 * random.Random(f"{self.seed}/{self.global_step}").randint(*self.config.aut_window_seconds)

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        by_part: dict[str, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if not self._window_media.get(name.split(".")[0], 1):
                parameter.grad = None  # of a spread encoder that had nothing to read: a gradient of zeros
            if parameter.grad is not None:
                by_part.setdefault(part_of(name), []).append(local(parameter.grad))
        gradients = [g for part in by_part.values() for g in part]
        if not gradients or not self._window[1]:  # no rank has a target: nothing is learnt, and nothing moves
            self.zero_grad()
            self._part_norms, self.gradient_norm = {}, 0.0
            return
        torch._foreach_div_(gradients, float(self._window[1]))
        if self.mesh is None:
            norms = torch.stack([torch.stack(torch._foreach_norm(g)).norm() for g in by_part.values()])
        else:
            squares = torch.stack([self.mesh.whole.squared_norm(g) for g in by_part.values()])
            norms = self.mesh.whole.add_up(squares.to(self.device)).sqrt()
        self._part_norms = dict(zip(by_part, norms.tolist(), strict=True))
        self.gradient_norm = float(norms.norm())

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # By the norm that is known already; Lightning's own clipping refuses fused optimizers under bf16-mixed.
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: only `norm` is supported")
        if gradient_clip_val and self.gradient_norm > gradient_clip_val and not self._discarded:
            gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, gradient_clip_val / self.gradient_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self._discarded:
            self._row_sums.merge(self._window_sums)
            for name, (_, counts) in self._window_routers.items():
                self._row_counts[name] = self._row_counts.get(name, 0) + counts
            self.last_loss = self.step_loss
        step = self.global_step + 1  # Lightning counts this step after the hook
        if self.row_is_due(step):
            self._log_row(step)
        self._window.zero_()
        self._window_routers, self._window_sums, self._discarded = {}, LossSums(), False
        self._window_media = dict.fromkeys(self._window_media, 0.0)
        self.samples_in_step = []

    def _log_row(self, step: int) -> None:
        ranks = gather_objects((self._row_sums, self._seen, self._streams))
        sums = LossSums()
        for row_sums, _, _ in ranks:
            sums.merge(row_sums)
        streams = [stream for _, _, of_rank in ranks for stream in of_rank.values()]
        packing = [share for stream in streams for share in stream["packing"]]
        row: dict[str, float] = sums.metrics("train") | {"gradient_norm": self.gradient_norm}
        row |= {f"gradient_norm/{part}": norm for part, norm in self._part_norms.items()}
        row |= {
            f"lr/{group['name']}": float(group["lr"])
            for group in self.trainer.optimizers[0].param_groups
            if not group["name"].endswith(".no_decay")
        }
        for name, counts in self._row_counts.items():
            row |= expert_load(counts, "experts" if name == "thinker" else f"experts/{name}")
        if packing:
            row["packing/efficiency"] = sum(packing) / len(packing)
        counts = [(seen, {}) for _, seen, _ in ranks] + [({}, stream["skipped"]) for stream in streams]
        self.log_row(row | self.own_row() | self.data_row(counts), step)
        self._row_sums, self._row_counts = LossSums(), {}

    def own_row(self) -> dict[str, float]:
        """What a subclass says in a row of metrics. A collective."""
        return {}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = optimizer_of(self.model, self.optim_config)
        schedule = self.schedule(self.optim_config, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def batch_flops(self, batch: PackedBatch) -> dict[str, float]:
        assert isinstance(self.model, OmniModel)
        return training_flops_by_part(self.model, BatchSizes.of(batch))

    def work(self) -> Work:
        assert isinstance(self.model, OmniModel)
        return thinker_work(self.model)

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.evaluates_together:
            sum_over_ranks(torch.ones((), device=self.device))  # for those that have none: `_JoinTheOthers`
        losses = self.computed(batch) if self.evaluates_together or not self.ending else None
        if losses is not None and not self.ending:
            self._evaluation.setdefault(dataloader_idx, LossSums()).add(losses.groups)

    def test_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    @property
    def evaluates_together(self) -> bool:
        """Whether each batch of an evaluation needs all ranks."""
        return self.mesh is not None

    def configure_callbacks(self) -> list[L.Callback]:
        return [_JoinTheOthers()]

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("validation", self.trainer.val_dataloaders)

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test", self.trainer.test_dataloaders)

    def _finish_evaluation(self, stage: str, loaders: Any) -> None:
        """Losses over all ranks. Several loaders are told apart by the keys of the datamodule's dictionary."""
        named = list(loaders) if isinstance(loaders, Mapping) else None
        self.evaluation_sums = {}
        row: dict[str, float] = {}
        merged = defaultdict[int, LossSums](LossSums)
        for index, sums in (entry for rank in gather_objects(self._evaluation) for entry in rank.items()):
            merged[index].merge(sums)
        for index, sums in sorted(merged.items()):
            name = stage if named is None or named[index] == stage else f"{stage}/{named[index]}"
            self.evaluation_sums[name] = sums
            row |= sums.metrics(name)
        self._evaluation = {}
        self.log_dict(row, logger=False, sync_dist=True)  # for callbacks; all ranks have the same values
        if not self.trainer.sanity_checking:
            self.log_row(row, self.global_step)

    def validation_losses(self) -> dict[str, float]:
        return {
            name.rsplit("/", 1)[1]: value
            for sums in self.evaluation_sums.values()
            for name, value in sums.metrics("validation").items()
            if name.startswith("validation/loss/") or name == "validation/loss_by_task/codebook_0"  # the Talker's own
        }

    def validation_tables(self, step: int) -> list[Table]:
        return [loss_table(f"{name}, step {step}", sums) for name, sums in self.evaluation_sums.items()]

    def predict_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answers to a batch of prompts: `id`, `source`, `task`, `modality` and `text` of each sample."""
        texts = map(self.datamodule.tokenizer.decode, self.write(batch))
        rows = zip(batch.sample_ids, batch.sources, batch.tasks, batch.modalities, texts, strict=True)
        return [dict(zip(("id", "source", "task", "modality", "text"), row, strict=True)) for row in rows]

    def write(self, batch: PackedBatch) -> list[list[int]]:
        """The tokens of an answer to each prompt of `batch`, as `module.generation` says."""
        from omnitrain.generation.sampling import Decoding
        from omnitrain.generation.text import generate

        assert isinstance(self.model, OmniModel)
        decoding = Decoding(**vars(self.config.generation))
        return generate(self.model, batch, decoding, stop_ids=self.datamodule.tokenizer.stop_ids)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.config.lora is not None:  # whoever reads the weights adds the adapters to them
            checkpoint["omnitrain"]["lora_scale"] = self.config.lora.alpha / self.config.lora.rank

    def extra_state(self) -> dict[str, Any]:
        return {
            "row_sums": self._row_sums.state_dict(),
            "row_counts": {name: counts.cpu() for name, counts in self._row_counts.items()},  # the same on every rank
            "seen": dict(self._seen),
            "streams": {number: dict(stream) for number, stream in self._streams.items()},
        }

    def dealt_out(self, states: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """The sums to the first, and to the others none; streams to who reads them."""
        sums, seen, streams = LossSums(), Counter[str](), dict[int, Any]()
        for state in states:
            part = LossSums()
            part.load_state_dict(state["row_sums"])
            sums.merge(part)
            seen.update(state["seen"])
            streams |= _streams_in(state)
        first = {"row_sums": sums.state_dict(), "seen": dict(seen)}
        none = {"row_sums": LossSums().state_dict(), "seen": dict.fromkeys(seen, 0)}
        parts = self.data_ranks
        return [
            {**states[rank % len(states)], **(none if rank else first)}
            | {"streams": {n: stream for n, stream in streams.items() if n % parts == rank}}
            for rank in range(ranks)
        ]

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self._row_sums.load_state_dict(state["row_sums"])
        self._seen, self._streams = dict(state["seen"]), dict(_streams_in(state))
        self._row_counts = {name: counts.to(self.device) for name, counts in state["row_counts"].items()}
