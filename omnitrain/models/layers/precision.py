"""What stays in 32 bits under autocast: sums over layers, choices, and sound."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of x. On `meta`, where there is none, nothing."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def residual(x: Tensor, norm: nn.Module) -> Tensor:
    """x as the start of a residual stream that `norm`, one of the stream's, reads: under autocast convolutions and
    projections give 16 bits, too few for a sum over layers, where the weights have 32."""
    return x.to(torch.promote_types(x.dtype, cast(Tensor, norm.weight).dtype))
