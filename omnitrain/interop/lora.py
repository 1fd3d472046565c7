"""Low-rank adapters added to the matrices that they stand beside: weights that need no adapters any more.

The names are those of `peft`: beside `X.base_layer.weight` there are `X.lora_A.default.weight` [r, in] and
`X.lora_B.default.weight` [out, r]. A stack of experts, a parameter `X.gate_up` [E, out, in], becomes
`X.base_layer.gate_up` with `X.lora_A` [E r, in] (expert by expert) and `X.lora_B` [out, r E] (the expert running
fastest). Both stacks of a layer nest, so that a shape, not a name, tells which of them a pair belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale B A for every matrix that has adapters, in its dtype, all under the names of the model without
    adapters; `scale` is alpha / rank (Hu et al. 2021, arXiv 2106.09685)."""
    plain = {name.replace(_BASE, ""): x for name, x in state.items() if ".lora_" not in name}
    for name, a in state.items():
        if name.endswith(_A):
            wrapped = name.removesuffix(_A)
            b = state[wrapped + _B]
            target = _target(plain, wrapped.replace(_BASE, ""), a, b)
            delta = _product(a.float(), b.float(), plain[target].shape)
            plain[target] = torch.add(plain[target].float(), delta, alpha=scale).to(plain[target].dtype)
    return plain


def _target(plain: Mapping[str, Tensor], module: str, a: Tensor, b: Tensor) -> str:
    if f"{module}.weight" in plain:
        return f"{module}.weight"
    stacks = (f"{module}.gate_up", f"{module}.down")
    return next(name for name in stacks if plain[name].shape[1:] == (len(b), a.shape[1]))


def _product(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """B A of the `shape` [out, in], or [E, out, in] of a stack."""
    if len(shape) == 2:
        return b @ a
    experts = shape[0]
    return rearrange(b, "o (r e) -> e o r", e=experts) @ rearrange(a, "(e r) i -> e r i", e=experts)
