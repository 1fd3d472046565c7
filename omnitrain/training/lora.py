"""Low-rank adapters in a model that knows nothing of them, by `peft` (Hu et al. 2021, arXiv 2106.09685).

Linear layers get A and B beside them. A stack of experts stays one tensor: `peft` adds the product B A of all experts
to it in each forward pass, so that the experts' own code runs as it is. `interop.lora` takes adapters into the weights.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from omnitrain.config.run_config import LoraConfig
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.deferred import part_of_whole, put
from omnitrain.models.layers.moe import SwiGLUExperts
from omnitrain.models.omni import OmniModel

LAYERS = {
    "aut": r"aut\.layers\.\d+\.", "visual": r"visual\.blocks\.\d+\.", "thinker": r"thinker\.layers\.\d+\.",
    "talker": r"talker\.layers\.\d+\.", "mtp": r"talker\.mtp\.layers\.\d+\.",
}  # fmt: skip
"""Part -> how the names of its layers' modules start."""
MODULES = {
    "attention": r"attention\.(qkv|out)|self_attn\.(q|k|v|out)_proj|attn\.(qkv|proj)",
    "mlp": r"mlp\.(shared_expert\.)?(gate_up|down)|fc[12]|mlp\.linear_fc[12]",
    "experts": r"mlp\.experts",
}
"""Target -> the modules of a layer that it means: of decoders, of AuT, of the vision encoder."""


class Target(NamedTuple):
    """A matrix that gets adapters: the name of its parameter, its shape [out, in] and how many lie in its stack."""

    name: str
    out_dim: int
    in_dim: int
    experts: int = 1

    def parameters(self, rank: int) -> int:
        """Numbers in its A and B."""
        return self.experts * rank * (self.out_dim + self.in_dim)


def lora_targets(model: OmniModel | AuT, config: LoraConfig) -> list[Target]:
    """What `config` means in `model`, which may lie on `meta`. Raises ValueError if a part has none of the targets."""
    found: dict[str, list[Target]] = {part: [] for part in config.parts}
    inner = "|".join(MODULES[target] for target in config.targets)
    for name, module in model.named_modules():
        part = next((part for part in found if re.fullmatch(f"{LAYERS[part]}({inner})", name)), None)
        if part is not None:
            found[part] += _of_module(name, module)
    if empty := [part for part, targets in found.items() if not targets]:
        raise ValueError(
            f"module.lora: {empty[0]} has no {' and no '.join(config.targets)} in this model; choose other "
            "module.lora.targets, or leave it out of module.lora.parts"
        )
    return [target for targets in found.values() for target in targets]


def _of_module(name: str, module: nn.Module) -> Iterator[Target]:
    if isinstance(module, SwiGLUExperts):
        for stack in ("gate_up", "down"):
            experts, out_dim, in_dim = getattr(module, stack).shape
            yield Target(f"{name}.{stack}", out_dim, in_dim, experts)
    elif isinstance(module, nn.Linear):
        yield Target(f"{name}.weight", *module.weight.shape)


def _drawn(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Of an A [r, in]."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return (torch.rand(shape, generator=generator) * 2 - 1).mul_(shape[1] ** -0.5)


def add_lora(model: OmniModel | AuT, config: LoraConfig, seed: int) -> None:
    """Give `model` its adapters, in fp32, which alone learn of what they stand beside. A is drawn from `seed`, each
    from its own random stream, as `peft` draws it (uniform within 1 / sqrt(in)); B is zero. Raises ImportError without
    `peft`; ValueError as `lora_targets`."""
    targets = lora_targets(model, config)
    try:
        import peft
    except ImportError as error:
        raise ImportError("module.lora needs peft: pip install 'omnitrain[lora]', or set module.lora=null") from error

    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = [target.name.removesuffix(".weight") for target in targets if target.experts == 1]
    adapters = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
        target_modules="|".join(map(re.escape, linear)) or None,
        target_parameters=[target.name for target in targets if target.experts > 1] or None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # what it draws is drawn again
        peft.inject_adapter_in_model(adapters, model)
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            p.data = p.data.float()
            put(p, part_of_whole(partial(_drawn, name, p.shape, seed)))
        elif ".lora_B." in name:
            p.data = p.data.float()
            put(p, part_of_whole(partial(torch.zeros, p.shape)))
        p.requires_grad_(".lora_" in name or name in learning)
