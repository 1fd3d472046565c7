"""What weights, gradients and optimizer of a run will take, before anything is loaded.

The model is built on `meta`, where it takes nothing. Activations are not counted: they depend on the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from omnitrain.config.run_config import (
    CodecModuleConfig,
    LoraConfig,
    PretrainedConfig,
    RunConfig,
    ThinkerModuleConfig,
    TrainerConfig,
)
from omnitrain.config.typed import ConfigError
from omnitrain.interop.public_config import FILE, read_config, stored_dtype
from omnitrain.interop.public_format import empty_model
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.codec import Codec
from omnitrain.models.discriminators import Discriminators
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import AuTModelConfig, CodecConfig, OmniConfig
from omnitrain.parallel.mesh import MeshSizes
from omnitrain.runs.experiment import precision
from omnitrain.training.lora import lora_targets
from omnitrain.training.optim import part_of

FP32 = 4
"""Bytes of a number that is trained: of its weight, its gradient, and each of AdamW's two moments."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one device. `sums`: sums of experts and their adapters, which `peft` makes in the forward pass and the
    backward pass needs.  `by_part`: all of it, by the names of `module.train` (with adapters of its layers).
    `beginning`: on the host beside the weights, while a process that shares the model draws or reads one tensor after
    the other; no part of `total`."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    sums: int = 0
    beginning: int = 0
    by_part: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.sums

    def __str__(self) -> str:
        kinds = {name: getattr(self, name) for name in ("weights", "gradients", "optimizer")}
        kinds |= {"experts with their adapters": self.sums} if self.sums else {}
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in kinds.items())


@dataclass(frozen=True)
class Numbers:
    """So many numbers of a part, each stored in so many bytes until it is trained, and whether it is."""

    part: str
    count: int
    stored: int
    trained: bool


def training_memory(config: RunConfig) -> TrainingMemory | None:
    """What `config` will take on each of its devices; None for a model or module of the user's own. Raises
    CheckpointError if the folder of a pretrained model cannot be read, ValueError for adapters that it has no place
    for, ConfigError for a mesh that the devices do not make."""
    module, sizes = config.module.config, config.model.config
    counted, sums = list[Numbers](), 0
    if isinstance(sizes, CodecConfig) and isinstance(module, CodecModuleConfig):
        with torch.device("meta"):
            parts = {"codec": Codec(sizes), "discriminators": Discriminators(module.discriminator)}
        counted = [Numbers(name, _count(part), FP32, True) for name, part in parts.items()]
    elif isinstance(sizes, OmniConfig | AuTModelConfig | PretrainedConfig) and isinstance(module, ThinkerModuleConfig):
        model, stored = _on_meta(sizes)
        frozen = FP32 if precision(config.trainer) == "32-true" else stored
        counted = list(_numbers(model, module, frozen))
        sums = 0 if module.lora is None else _sums(model, module.lora, module.activation_checkpointing, frozen)
    else:
        return None
    shared_by = _shared_by(config)
    # DDP reduces gradients in buckets of its own, beside them.
    copies = config.parallel.engine == "ddp" and _devices(config.trainer) * config.trainer.num_nodes > 1
    per_gradient = FP32 * (2 if copies else 1)
    moment = FP32 if config.optim.states == "float32" else 1
    by_part = Counter[str]()
    for x in counted:
        by_part[x.part] += x.count * (FP32 + per_gradient + 2 * moment if x.trained else x.stored) // shared_by
    trained = sum(x.count for x in counted if x.trained)
    return TrainingMemory(
        weights=sum(x.count * (FP32 if x.trained else x.stored) for x in counted) // shared_by,
        gradients=trained * per_gradient // shared_by,
        optimizer=trained * 2 * moment // shared_by,
        sums=sums,
        beginning=2 * FP32 * max((x.count for x in counted), default=0) if config.parallel.engine == "fsdp" else 0,
        by_part=by_part,
    )


def _shared_by(config: RunConfig) -> int:
    """Processes that hold the shards of one copy of the model."""
    parallel = config.parallel
    if parallel.engine == "ddp":
        return 1
    world = _devices(config.trainer) * config.trainer.num_nodes
    asked = partial(MeshSizes.of, world, data=parallel.data, shard=parallel.shard, context=parallel.context)
    try:
        return asked(expert=parallel.expert, experts=_experts(config.model.config)).copy
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _experts(sizes: object) -> list[int]:
    """How many experts the layers have that have any."""
    if isinstance(sizes, PretrainedConfig):
        sizes = read_config(sizes.folder, speech=sizes.speech)[0]
    decoders = [sizes.thinker, sizes.talker] if isinstance(sizes, OmniConfig) else []
    return [decoder.n_experts for decoder in decoders if decoder is not None and decoder.n_experts]


def _on_meta(sizes: OmniConfig | AuTModelConfig | PretrainedConfig) -> tuple[OmniModel | AuT, int]:
    """The model without memory, and the bytes in which one of its numbers is stored."""
    if not isinstance(sizes, PretrainedConfig):
        with torch.device("meta"):
            return (OmniModel(sizes) if isinstance(sizes, OmniConfig) else AuT(sizes)), FP32
    folder = Path(sizes.folder)
    model = empty_model(read_config(folder, speech=sizes.speech)[0], folder / FILE)
    return model, (stored_dtype(folder) or torch.float32).itemsize


def _numbers(model: OmniModel | AuT, module: ThinkerModuleConfig, frozen: int) -> Iterator[Numbers]:
    for name, p in model.named_parameters():
        yield Numbers(part := part_of(name), p.numel(), frozen, part in module.whole_parts)
    if module.lora is not None:
        for target in lora_targets(model, module.lora):
            yield Numbers(part_of(target.name), target.parameters(module.lora.rank), FP32, True)


def _sums(model: OmniModel | AuT, lora: LoraConfig, checkpointed: list[str], size: int) -> int:
    """Bytes of the experts' stacks with the adapters added. Kept for each layer, or, where activations are computed
    again, of one layer at a time; beside the gradient of one stack."""
    stacks = Counter[str]()
    for target in lora_targets(model, lora):
        if target.experts > 1:
            stacks[target.name.rpartition(".")[0]] += target.experts * target.out_dim * target.in_dim * size
    again = {layer for layer in stacks if part_of(layer + ".") in checkpointed}
    kept = sum(bytes_ for layer, bytes_ in stacks.items() if layer not in again)
    return kept + max(stacks.values(), default=0) * (2 if again else 1)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_memory(config: RunConfig) -> None:
    """Say what a run will take, and stop it where that cannot fit. Raises ConfigError, which says what to change."""
    memory = training_memory(config)
    if memory is None:
        return
    cuda = _on_cuda(config.trainer)
    devices = _devices(config.trainer)
    # On processors each process has a model of its own, or its shards, in the memory of one machine.
    needed = memory.total if cuda else max(memory.total, memory.weights + memory.beginning) * devices
    free = torch.cuda.get_device_properties(0).total_memory if cuda else available_memory()
    where = "of the GPU" if cuda else "free here"
    of = "" if free is None else f" of {gigabytes(free)} {where}"
    each = "" if cuda or devices == 1 else f", {devices} times"
    rank_zero_only(print)(f"memory before activations: {gigabytes(needed)}{of} ({memory}{each})", flush=True)
    if free is not None and needed > free:
        largest = ", ".join(f"{part} {gigabytes(size)}" for part, size in memory.by_part.most_common(3))
        raise ConfigError(
            f"this run cannot fit: before activations it takes {gigabytes(needed)} ({memory}{each}; most of it "
            f"{largest}), and there are {gigabytes(free)} {where}; train less of it (module.train=[PART, ...], or "
            "adapters: module.lora={rank: 16}), or on a device with more memory"
        )


def _on_cuda(trainer: TrainerConfig) -> bool:
    return trainer.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()


def _devices(trainer: TrainerConfig) -> int:
    """Processes of one machine."""
    if isinstance(trainer.devices, list):
        return len(trainer.devices)
    asked = str(trainer.devices)
    if asked in ("auto", "-1"):
        return torch.cuda.device_count() if _on_cuda(trainer) else 1
    return int(asked) if asked.isdigit() else asked.count(",") + 1


def available_memory(proc: Path = Path("/proc"), control: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take: what the system has, or what is left of the limit of its control group
    (of a container, or a job of Slurm), whose pages of files count as free. None where the system does not say it."""
    found = _numbers_in(proc / "meminfo")
    if "MemAvailable" not in found:
        return None
    left = [found["MemAvailable"] * 1024]
    for folder, limit, used, of_files in _LIMITS:
        try:
            group = control / folder
            taken = int((group / used).read_text()) - _numbers_in(group / "memory.stat").get(of_files, 0)
            left.append(int((group / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
    return min(left)


_LIMITS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Control groups of version 2 and 1: folder, files of limit and use, and what memory.stat calls pages of files."""


def _numbers_in(path: Path) -> dict[str, int]:
    """The numbers of a file of lines ``name[:] number ...``; none if there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def gigabytes(size: int) -> str:
    """In units of 1e9 bytes, or smaller ones."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= 0.95 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1000:,.0f} kB"
