"""The same model with other weights for a moment: those that training began with, or that sampled."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def instead(model: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """`model` with these `weights`, in evaluation mode and without gradients; none: as it stands."""
    parameters = dict(model.named_parameters()) if weights else {}
    own = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value
        torch.clear_autocast_cache()  # which holds rounded copies of the weights
        with writing(model):
            yield
    finally:
        for name, value in own.items():
            parameters[name].data = value
        torch.clear_autocast_cache()


@contextmanager
def writing(model: nn.Module) -> Generator[None]:
    """`model` in evaluation mode, without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
