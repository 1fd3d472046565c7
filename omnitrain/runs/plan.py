"""What a training step would take on GPUs that are not here: memory, messages and time, by mesh.

Nothing is looked up in a formula. The run's model, spread by `MeshStrategy`, does one forward and backward pass and one
step of AdamW on a pack of the run's budget, in a pretended world of any size (`parallel.rehearsal`), and a `Ledger`
writes down what it does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from omnitrain.config.run_config import OptimConfig, ParallelConfig, PretrainedConfig, RunConfig, ThinkerModuleConfig
from omnitrain.config.typed import ConfigError
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.settings import DataConfig
from omnitrain.interop.public_config import read_config, stored_dtype
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import OmniConfig
from omnitrain.parallel.estimate import Estimate
from omnitrain.parallel.gpus import Gpu
from omnitrain.parallel.ledger import GRADIENTS, MOMENTS, WEIGHTS, Ledger
from omnitrain.parallel.mesh import Mesh, MeshSizes
from omnitrain.parallel.rehearsal import fake_numbers, pretended_world
from omnitrain.parallel.state import local
from omnitrain.training.flops import BatchSizes, training_flops
from omnitrain.training.losses import balance_loss
from omnitrain.training.mesh_strategy import MeshStrategy
from omnitrain.training.optim import optimizer_of
from omnitrain.training.thinker import ThinkerModule
from omnitrain.vocabulary import AUDIO, IMAGE, TEXT


@dataclass(frozen=True, kw_only=True)
class PackSizes:
    """A pack of equal documents: positions of the pack, and of each document; of those, positions of one recording and
    of one picture. The rest is text, all of which is predicted."""

    tokens: int
    document: int
    audio: int = 0
    picture: int = 0


def fake_pack(sizes: PackSizes, config: OmniConfig) -> PackedBatch:
    """A pack of these `sizes`; within `fake_numbers`, its mel frames and patches have no values."""
    count, rest = divmod(sizes.tokens, sizes.document)
    seconds, merge = sizes.audio // 13, config.vision.merge
    side = math.isqrt(sizes.picture)
    text = sizes.document - 13 * seconds - side**2
    types = torch.tensor(([AUDIO] * 13 * seconds + [IMAGE] * side**2 + [TEXT] * text) * count + [TEXT] * rest)
    ends = [sizes.document * i for i in range(count + 1)] + [sizes.tokens] * (rest > 0)
    documents = len(ends) - 1
    batch = PackedBatch(
        input_ids=torch.zeros(sizes.tokens, dtype=torch.int64),
        labels=torch.where(types == TEXT, 0, IGNORE),
        token_types=types.to(torch.uint8),
        position_ids=torch.empty(3, sizes.tokens),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        sample_ids=("",) * documents,
        tasks=("text",) * documents,
        modalities=("text",) * documents,
        target_bytes=torch.zeros(documents, dtype=torch.int64),
    )
    if seconds:
        mel, lengths = torch.empty(100 * seconds * count, config.aut.n_mels), torch.tensor([100 * seconds] * count)
        batch = replace(batch, mel=mel, mel_lengths=lengths)
    if side:
        patches = torch.empty((side * merge) ** 2 * count, config.vision.patch_dim)
        grids = torch.tensor([[1, side * merge, side * merge]] * count)
        batch = replace(batch, patches=patches, grid_thw=grids)
    return batch


def spread_module(module: ThinkerModule, mesh: Mesh, *, bf16: bool, offload: bool = False) -> None:
    """Spread the model of `module` over `mesh` as a Trainer with a `MeshStrategy` would."""
    strategy = MeshStrategy(offload=offload)
    strategy.connect(module)
    vars(strategy).update(_mesh=mesh, _precision_plugin=SimpleNamespace(precision="bf16-mixed" if bf16 else "32-true"))
    cast(Any, module).trainer = SimpleNamespace(strategy=strategy)
    strategy.spread()


def step(
    module: ThinkerModule, batch: PackedBatch, ledger: Ledger, *, passes: int = 1, bf16: bool = False
) -> Counter[str]:
    """Forward and backward pass, `passes` times, and the optimizer's first step on `batch`, in a module that is spread;
    what a training logs beside it (sums over processes of a few kB) is left out.

    Returns the peak of a later step, in which the moments are there from the beginning: bytes by what they are for.
    """
    model = module.model
    ledger.mark(WEIGHTS, map(local, model.parameters()))
    for parameter in model.parameters():
        if parameter.requires_grad:  # a sum over one process is no message, by which a ledger would know it
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.mark(GRADIENTS, [local(cast(Tensor, p.grad))])
            )
    optimizer = optimizer_of(model, module.optim_config)
    with ledger:
        for _ in range(passes):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = _loss(module, batch)
            loss.backward()
        del loss
        before, most = ledger.now.copy(), ledger.peak.copy()
        optimizer.step()
        kept = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
        ledger.mark(MOMENTS, map(local, kept))
    moments = Counter({MOMENTS: ledger.now[MOMENTS]})
    return max(most, before, key=lambda at: sum(at.values())) + moments


def _loss(module: ThinkerModule, batch: PackedBatch) -> Tensor:
    losses = module.computed(batch)
    loss, coefficient = losses.total, module.loss_config.balance_coefficient
    for use in losses.routers.values() if coefficient else ():
        share = (use.counts / use.positions).to(use.prob_sums.dtype)
        loss = loss + coefficient * losses.weight * balance_loss(share, use.prob_sums / use.positions)
    return loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What of a run's configuration a plan needs.

    Attributes:
        stored: of the weights that are not trained.
        passes: packs of each process in an optimizer step.
    """

    model: OmniConfig
    stored: torch.dtype
    module: ThinkerModuleConfig
    optim: OptimConfig
    parallel: ParallelConfig
    pack: PackSizes
    passes: int = 1

    @staticmethod
    def of(config: RunConfig, *, document: int = 4096, audio: float = 0.125, picture: float = 0.125) -> Recipe:
        """Packs of documents of `document` positions, of which so large shares are sound and picture, as far as the
        run's budgets go. Raises ConfigError for models and modules that cannot be planned: other than a Thinker."""
        module, data = config.module.config, config.data.config
        if type(module) is not ThinkerModuleConfig or not isinstance(data, DataConfig):
            raise ConfigError("plan: only training of a Thinker (module=thinker) can be planned")
        if config.optim.states != "float32":
            raise ConfigError("plan: moments in 8 bits cannot be rehearsed; plan with optim.states=float32")
        sizes, stored = _model(config.model.config)
        document = min(document, data.max_tokens)
        count = data.max_tokens // document
        frames = min(audio * document * 100 / 13, (data.max_mel_frames or math.inf) / count)
        merged = min(picture * document, (data.max_patches or math.inf) / sizes.vision.merge**2 / count)
        # What fused kernels leave where it is is the compiler's business: layers are counted as they are written.
        return Recipe(
            model=sizes, stored=stored, module=replace(module, compile=False), optim=config.optim,
            parallel=config.parallel,
            pack=PackSizes(
                tokens=data.max_tokens, document=document, audio=int(frames // 100) * 13, picture=int(merged)
            ),
            passes=config.trainer.accumulate_grad_batches,
        )  # fmt: skip


def _model(sizes: Any) -> tuple[OmniConfig, torch.dtype]:
    if isinstance(sizes, PretrainedConfig):
        found, _ = read_config(sizes.folder, speech=sizes.speech)
        return found, stored_dtype(Path(sizes.folder)) or torch.float32
    if not isinstance(sizes, OmniConfig):
        raise ConfigError("plan: only a model with a Thinker can be planned (model=tiny, ..., pretrained)")
    return sizes, torch.float32


def rehearse(recipe: Recipe, sizes: MeshSizes, gpu: Gpu, *, as_on_gpu: bool = True) -> Estimate:
    """One step on a mesh of these `sizes`. `as_on_gpu`: in bf16 with the kernels of CUDA; else in fp32 with those of
    processors. ValueError for a mesh that the model cannot be spread over."""
    ledger = Ledger(gpu)
    with pretended_world(sizes.world), fake_numbers(as_on_gpu=as_on_gpu):
        module = ThinkerModule(OmniModel(recipe.model), recipe.module, recipe.optim)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else recipe.stored)
        batch = fake_pack(recipe.pack, recipe.model)
        operations = training_flops(module.model, BatchSizes.of(batch))
        spread_module(module, Mesh.over(sizes, "cpu"), bf16=as_on_gpu, offload=recipe.parallel.offload)
        peak = step(module, batch, ledger, passes=recipe.passes, bf16=as_on_gpu)
    return Estimate(
        sizes=sizes,
        gpu=gpu,
        tokens=recipe.passes * recipe.pack.tokens,
        memory=peak,
        messages=ledger.messages,
        bytes=ledger.bytes,
        operations=ledger.operations,
        model_operations=recipe.passes * operations,
        compute=ledger.seconds,
    )


def meshes(recipe: Recipe, worlds: Sequence[int], contexts: Sequence[int] = ()) -> Iterator[MeshSizes]:
    """Those that the run's `parallel` makes of so many processes, 8 to a node, with each of `contexts` for its own; and
    beside one copy over all nodes, copies of 64. Without `parallel=` (a copy each) the experts are given out."""
    given = recipe.parallel
    expert = "auto" if given.engine == "ddp" else given.expert
    experts = [recipe.model.thinker.n_experts]
    for world, context in product(worlds, contexts or [given.context]):
        alone = (given.data, given.shard) == ("auto", "auto") and world > 64
        for shard in [given.shard, *([64 // context] if alone and 64 % context == 0 else [])]:
            yield MeshSizes.of(
                world, data=given.data, shard=shard, expert=expert, context=context, experts=experts, neighbours=8
            )
