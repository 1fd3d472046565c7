"""AdamW or Muon over named parts of the model, and the learning rate by step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from omnitrain.config.run_config import PARTS, OptimConfig
from omnitrain.models.layers.precision import full_precision

TABLES = r"embed|head|router|lora_"
"""Parameters with two dimensions that hold a vector for each word, code or expert, and adapters: AdamW moves them, also
beside Muon."""

EXPERTS = r"\.experts\.(gate_up|down)$"
"""Parameters [E, n, m], a matrix for each expert."""


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


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal before they move a weight (Jordan et al. 2024, "Muon: an optimizer
    for hidden layers in neural networks"; steps of AdamW's size: Liu et al. 2025, arXiv 2502.16982, eq. 4). What is no
    matrix moves by AdamW. All directions of a layer learn at one pace, where AdamW's steps go in few of them.

        M <- m M + (1 - m) G,   W <- W - lr 0.2 sqrt(max(rows, columns)) O((1 - m) G + m M),   m = `momentum`

    As `torch.optim.Muon`, which takes matrices alone and computes in bf16. A convolution's weight is the matrix
    [out, in * kernel], a transposed one's [in, out * kernel]; experts are a stack of matrices. Everything here is in
    fp32.

    Args:
        groups: as of AdamW; a group with ``muon: True`` holds matrices, one with ``stacked: True`` too stacks of them.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, momentum: float = 0.95
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "muon": False, "stacked": False})
        self.betas, self.eps, self.momentum = betas, eps, momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = partial(self._muon, stacked=group["stacked"]) if group["muon"] else self._adamw
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(move(p.grad, self.state[p]), alpha=-group["lr"])
        return loss

    def _muon(self, gradient: Tensor, state: dict[str, Any], stacked: bool) -> Tensor:
        moment = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 1 - self.momentum)
        update = orthogonal(gradient.lerp(moment, self.momentum).flatten(2 if stacked else 1))
        return (0.2 * max(update.shape[-2:]) ** 0.5 * update).view_as(gradient)

    def _adamw(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        state["step"] = state.get("step", 0) + 1
        first = state.setdefault("exp_avg", torch.zeros_like(gradient)).lerp_(gradient, 1 - self.betas[0])
        second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
        second.lerp_(gradient.square(), 1 - self.betas[1])
        unbiased = (second / (1 - self.betas[1] ** state["step"])).sqrt_().add_(self.eps)
        return first / (1 - self.betas[0] ** state["step"]) / unbiased


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of x = U S V^T [..., n, m]: five Newton-Schulz steps with Jordan's coefficients, after which the
    singular values lie around 1 (0.7 to 1.2). In fp32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    with full_precision(x):
        x = x.float() / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        x = x if (wide := x.shape[-2] <= x.shape[-1]) else x.mT
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def with_muon(groups: list[dict], config: OptimConfig, names: Mapping[nn.Parameter, str] | None = None) -> Optimizer:
    """`Muon` for `groups` of `by_decay`; its matrices are those with two rows and two columns at least.

    Args:
        names: of the parameters of an `OmniModel` or `AuT`, in which `TABLES` are moved by AdamW and `EXPERTS` are
            stacks of matrices. None: of a codec, which has neither.

    Raises ValueError for parameters that are spread, of which no process has a whole matrix.
    """
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ValueError(
            "optim.matrices=muon is not there for a model that processes share; set optim.matrices=adamw, or "
            "parallel=ddp"
        )
    names = names or {}

    def kind(p: nn.Parameter) -> tuple[bool, bool]:
        name = names.get(p, "")
        matrix = p.ndim >= 2 and min(len(p), p[0].numel()) > 1 and not re.search(TABLES, name)
        return matrix, matrix and bool(re.search(EXPERTS, name))

    parted = [
        group | {"params": chosen, "muon": muon, "stacked": stacked}
        for group in groups
        for muon, stacked in ((True, False), (True, True), (False, False))
        if (chosen := [p for p in group["params"] if kind(p) == (muon, stacked)])
    ]
    return Muon(parted, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)


def optimizer_of(model: nn.Module, config: OptimConfig) -> Optimizer:
    """That which `optim.matrices` names, over `parameter_groups`. Raises as these, `adamw` and `with_muon`."""
    groups = parameter_groups(model, config)
    if config.matrices == "adamw":
        return adamw(groups, config)
    return with_muon(groups, config, {parameter: name for name, parameter in model.named_parameters()})


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
