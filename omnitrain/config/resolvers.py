"""How a mix that is meant in tokens becomes the mixture's weights, which count samples (docs/mixing.md)."""

from __future__ import annotations

from omegaconf import OmegaConf


def sample_weight(tokens: float, per_sample: float) -> float:
    """A source's weight. Weights are relative, so only the ratios between the sources of a mix matter.

    Args:
        tokens: its share of the tokens, relative to the other sources'.
        per_sample: tokens of its average sample.

    Raises:
        ValueError: a share below zero, or samples of no length.
    """
    if tokens < 0 or per_sample <= 0:
        raise ValueError(f"mix: tokens ({tokens}) must not be negative, and per_sample ({per_sample}) must be positive")
    return round(1000 * tokens / per_sample, 4)


OmegaConf.register_new_resolver("omnitrain.sample_weight", sample_weight, replace=True)
