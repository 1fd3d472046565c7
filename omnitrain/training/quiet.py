"""What libraries say to their own developers, hidden in one place. What a user has to know is said by omnitrain."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning about torch
    r"Total length of `\w+` across ranks is zero",  # a run may well have nothing to validate on
    r"The `srun` command is available on your system but is not used",  # a single process needs none
    r"The '\w+' does not have many workers",
    r"Checkpoint directory .* exists and is not empty",
    r"No device id is provided via `init_process_group`",
    r"You have overridden `transfer_batch_to_device`",  # so we have
    r"barrier\(\): using the device under current context",
)
_LOGGERS = {
    "lightning.pytorch": logging.WARNING,  # without notes on hardware that is not there
    "lightning.fabric": logging.WARNING,
    "matplotlib.font_manager": logging.ERROR,  # it builds its cache, once
    "absl": logging.ERROR,  # Grain has found no JAX, and needs none
}


def quiet_libraries() -> None:
    """Hide the notes and warnings of libraries that are not meant for whoever trains. Errors are never hidden."""
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
