"""AdamW over named parts of the model, and the learning rate by step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from omnitrain.config.run_config import PARTS, OptimConfig


def part_of(name: str) -> str:
    """The part that the parameter called `name` in an `OmniModel` belongs to. ValueError if no pattern of `PARTS`
    matches."""
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    raise ValueError(f"parameter {name!r} belongs to no part; add its pattern to omnitrain/config/run_config.py: PARTS")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Trained parameters grouped by part and by whether they are decayed. Each group has `name`, `lr`, `weight_decay`.
    ValueError if nothing is trained."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(part_of(name), []).append(parameter)
    if not parts:
        raise ValueError("module.train: no parameter is trained; name at least one part of the model")
    return [
        group | {"name": part + group["name"], "lr": config.lr * config.lr_scale.get(part, 1.0)}
        for part, parameters in parts.items()
        for group in by_decay(parameters, config)
    ]


def by_decay(parameters: Iterable[nn.Parameter], config: OptimConfig) -> list[dict]:
    """Parameters that are decayed, group `""`, and those that never are, `".no_decay"`: norms, biases and other
    vectors, also those of several dimensions (the lengths [C, 1, 1] of weight normalisation). Parameters that are
    spread over another mesh are in another group, of the same name: a fused step takes those of one mesh."""
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in parameters:
        decay = parameter.ndim >= 2 and parameter.numel() > len(parameter)
        groups.setdefault((decay, getattr(parameter, "device_mesh", None)), []).append(parameter)
    return [
        {
            "name": "" if decay else ".no_decay",
            "params": group,
            "lr": config.lr,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for (decay, _), group in groups.items()
    ]


def adamw(groups: list[dict], config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). ImportError as `check_states`; ValueError for moments in 8
    bits of parameters that are spread."""
    betas = config.betas[0], config.betas[1]
    if config.states == "float32":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=config.fused)
    check_states(config)
    from omnitrain.training.low_bit import AdamW8bit

    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise ValueError(
            "optim.states=int8 is not there for a model that processes share, whose shards are small already; set "
            "optim.states=float32, or parallel=ddp"
        )
    return AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)


def check_states(config: OptimConfig) -> None:
    """ImportError, with the extra, if `config` wants moments that nothing here can keep."""
    if config.states == "float32":
        return
    try:
        import_module("torchao.optim")
    except ImportError as error:
        raise ImportError(
            "optim.states=int8 needs torchao: pip install 'omnitrain[low_bit]', or set optim.states=float32"
        ) from error


def schedule_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate over its peak, as a function of the number of optimizer steps already taken.

    WSD: Hu et al. 2024, arXiv 2404.06395 (a constant rate can be continued or decayed at any time). Cosine: Loshchilov
    & Hutter 2017, arXiv 1608.03983. ValueError if a decaying schedule has no positive `total_steps`.
    """
    if config.schedule != "constant" and total_steps <= 0:
        raise ValueError(f"optim.schedule={config.schedule} needs a length: set trainer.max_steps or optim.total_steps")
    floor = config.min_lr_ratio
    decay_steps = max(1, round(total_steps * config.decay_fraction))

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "wsd":
            left = (total_steps - step) / decay_steps
            return floor + (1 - floor) * min(1.0, max(0.0, left))
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
