"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. A copy from the host's pageable memory would wait until the GPU has done all that it was
    given; one from pinned memory takes its turn there."""
    if values.device.type == device.type:
        return values
    if device.type == "cuda" and values.device.type == "cpu" and torch.cuda.is_available():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
