"""Sizes, and the initial weights.

model = build("tiny", vocab_size=4096, special_tokens=tokenizer.special_ids, thinker={"layers": 4})
init_weights(model, seed=0)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from omnitrain.models.aut import AuTConfig
from omnitrain.models.omni import PUBLIC_SPECIAL_TOKENS, OmniConfig, OmniModel
from omnitrain.models.thinker import ThinkerConfig
from omnitrain.models.vision import VisionConfig

PRESETS: dict[str, OmniConfig] = {
    # Minutes on two CPU cores: 8.9 M parameters; of the Thinker's 6.5 M, 3.2 M work on a token.
    "tiny": OmniConfig(
        thinker=ThinkerConfig(
            vocab_size=4096,
            d_model=192,
            layers=5,
            heads=6,
            kv_heads=2,
            head_dim=32,
            ffn=512,
            n_experts=8,
            top_k=2,
            expert_width=192,
            mrope_sections=(6, 5, 5),
            rope_theta=10000.0,
            accept_hidden_layer=2,
            max_positions=8192,
        ),
        aut=AuTConfig(d_model=128, layers=2, heads=4, ffn=512, out_dim=192, conv_hidden=32),
        vision=VisionConfig(
            d_model=128, layers=3, heads=4, ffn=512, out_dim=192, grid_side=16, deepstack_layers=(0, 1)
        ),
    ),
    # One GPU, or a patient CPU.
    "small": OmniConfig(
        thinker=ThinkerConfig(
            vocab_size=4096,
            d_model=512,
            layers=12,
            heads=8,
            kv_heads=2,
            head_dim=64,
            ffn=1536,
            n_experts=32,
            top_k=4,
            expert_width=256,
            mrope_sections=(12, 10, 10),
            accept_hidden_layer=6,
            max_positions=32768,
        ),
        aut=AuTConfig(d_model=384, layers=6, heads=6, ffn=1536, out_dim=512, conv_hidden=96),
        vision=VisionConfig(
            d_model=384, layers=8, heads=6, ffn=1536, out_dim=512, grid_side=32, deepstack_layers=(2, 4, 6)
        ),
    ),
    # The public checkpoint's shapes.
    "qwen3_omni_30b_a3b": OmniConfig(
        thinker=ThinkerConfig(
            vocab_size=152064,
            d_model=2048,
            layers=48,
            heads=32,
            kv_heads=4,
            head_dim=128,
            ffn=768,
            n_experts=128,
            top_k=8,
            expert_width=768,
            mrope_sections=(24, 20, 20),
            rope_theta=1e6,
            accept_hidden_layer=24,
            max_positions=65536,
        ),
        aut=AuTConfig(),
        vision=VisionConfig(),
    ),
}


def build(
    preset: str = "tiny",
    *,
    vocab_size: int | None = None,
    special_tokens: Mapping[str, int] | None = None,
    position_id_per_seconds: int | None = None,
    thinker: Mapping[str, Any] | None = None,
    aut: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> OmniModel:
    """A model of a preset's size, its weights not yet drawn (`init_weights`). Under `torch.device("meta")` it costs no
    memory.

    Args:
        preset: a name in `PRESETS`.
        vocab_size, special_tokens: those of the tokenizer; None keeps the preset's (the public ids).
        thinker, aut, vision: fields to change, e.g. `thinker={"layers": 3}`. `out_dim` of the encoders follows
            `thinker.d_model`, `accept_hidden_layer` follows `thinker.layers`.

    Raises:
        ValueError: unknown preset or field; the message lists the valid ones.
    """
    if preset not in PRESETS:
        raise ValueError(f"model.preset={preset!r}: no such preset; use one of {', '.join(PRESETS)}")
    base = PRESETS[preset]
    changed = {**(thinker or {}), **({} if vocab_size is None else {"vocab_size": vocab_size})}
    if "layers" in changed:  # the Talker listens half-way up, as in the public model
        changed = {"accept_hidden_layer": changed["layers"] // 2, **changed}
    decoder = _replace(base.thinker, changed, "thinker")
    width = {"out_dim": decoder.d_model}
    if special_tokens is None:
        special_tokens = PUBLIC_SPECIAL_TOKENS
    return OmniModel(
        OmniConfig(
            thinker=decoder,
            aut=_replace(base.aut, {**width, **(aut or {})}, "aut"),
            vision=_replace(base.vision, {**width, **(vision or {})}, "vision"),
            special_tokens=dict(special_tokens),
            position_id_per_seconds=position_id_per_seconds or base.position_id_per_seconds,
        )
    )


def _replace(config: Any, changes: Mapping[str, Any], part: str) -> Any:
    names = [f.name for f in fields(config)]
    for name in changes:
        if name not in names:
            raise ValueError(f"model.{part}.{name}: no such field; the fields are {', '.join(names)}")
    # YAML has lists where the (hashable) configurations have tuples.
    plain = {k: tuple(v) if isinstance(getattr(config, k), tuple) else v for k, v in changes.items()}
    return replace(config, **plain)


RESIDUAL_WRITERS = (".self_attn.out_proj.weight", ".fc2.weight", ".attn.proj.weight", ".mlp.linear_fc2.weight")
"""Last matrices of the residual branches of AuT and of the vision encoder."""


def init_weights(model: OmniModel, seed: int) -> None:
    """Draw every parameter, each from its own random stream named by the parameter: the same values in whatever order
    and wherever they are drawn.

    Matrices are normal with variance 1 / fan_in (at width 2048 the usual 0.02), the head has 0.02, so that training
    starts near the uniform distribution. Norm weights are 1, biases 0. In the encoders the last matrix of every
    residual branch is divided by sqrt(2 * layers) (GPT-2).

    In the Thinker it is not, and token embeddings have 0.1, less than the encoders' features. So what attention fetches
    from a picture is, from the first step, loud in the residual stream of the word that is to be predicted. With quiet
    branches and embeddings of 0.5 it is 3 % there, and a small model first learns to guess well and only much later to
    look (309 pictures, 8,300 samples: the loss rises by 0.3 with another's picture there, by 0.5 here).
    """
    depth = {"aut": len(model.aut.layers), "visual": len(model.visual.blocks)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            fan_in = p.shape[-1] if ".experts." in name else p[0].numel()
            fixed = {"thinker.lm_head.weight": 0.02, "thinker.embed_tokens.weight": 0.1}
            std = fixed.get(name, fan_in**-0.5)
            if name.endswith(RESIDUAL_WRITERS):
                std /= (2 * depth[name.split(".")[0]]) ** 0.5
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            p.copy_(torch.randn(p.shape, generator=generator) * std)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, experts that rest included."""
    return sum(p.numel() for p in module.parameters())
