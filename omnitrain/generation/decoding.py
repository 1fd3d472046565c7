"""Weights laid out for decoding on a CPU, once, after loading and before the first token.

    model, encoder = omnitrain.load("runs/talker", speech=True)
    for_decoding(model)                    # or for_decoding(model, int8=True)

A step multiplies one row by every matrix, and costs what the matrices cost to read: see docs/streaming.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from omnitrain.models.layers.int8 import Int8Experts, Int8Linear, Int8Matrices
from omnitrain.models.layers.moe import SwiGLUExperts
from omnitrain.models.omni import OmniModel

NARROW = 8
"""A matrix of fewer outputs (the shared expert's gate) stays as it is."""


@torch.no_grad()
def for_decoding(model: OmniModel, *, int8: bool = False) -> None:
    """Lay out the matrices of Thinker, Talker and MTP for decoding, in place. Encoders and Code2Wav stay as they are.

    On the CPU a matrix is then stored column by column, under the same name and in the same shape: the same products
    up to rounding, in half to two thirds of the time for one row. Elsewhere nothing is done.

    Args:
        int8: keep them in 8 bits, one scale for each output (`models.layers.int8`): a quarter of the memory and of the
            reading, other numbers. The model can then neither be trained nor saved.

    Raises ValueError: int8 on another device than the CPU, or the model was laid out in 8 bits before.
    """
    if any(isinstance(module, Int8Matrices) for module in model.modules()):
        raise ValueError("the model's weights are in 8 bits already; load it anew")
    device = model.thinker.lm_head.weight.device
    if int8 and device.type != "cpu":
        raise ValueError(f"the model is on {device}: int8 is for decoding on the CPU (device=cpu)")
    if device.type != "cpu":
        return
    for parent, name, child in list(_matrices(model)):
        if isinstance(child, nn.Linear):
            if int8:
                setattr(parent, name, Int8Linear(child))
            else:
                _by_columns(child.weight)
        elif int8:
            setattr(parent, name, Int8Experts(child))
        else:
            _by_columns(child.gate_up, child.down)
    if model.talker is None:
        return
    if int8:
        model.talker.mtp.heads_in_int8()
    else:
        _by_columns(model.talker.mtp.code_head)


def _matrices(model: OmniModel) -> Iterator[tuple[nn.Module, str, nn.Linear | SwiGLUExperts]]:
    """What holds the matrices of Thinker and Talker, each with the module that it is in and its name there."""
    for part in (model.thinker, model.talker):
        for parent in [] if part is None else part.modules():
            for name, child in parent.named_children():
                wide = isinstance(child, nn.Linear) and child.out_features >= NARROW
                if wide or isinstance(child, SwiGLUExperts):
                    yield parent, name, child


def _by_columns(*matrices: Tensor) -> None:
    """The same numbers and shapes [..., O, I], with the outputs of one input next to each other."""
    for matrix in matrices:
        matrix.data = matrix.data.mT.contiguous().mT
