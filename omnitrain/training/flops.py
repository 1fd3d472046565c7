"""Floating-point operations of a training step, counted, and the rate that the device can reach.

Counted are the multiply-adds (2 operations each) of matrix products, convolutions and attention that the model's
equations ask for; recomputation under activation checkpointing is not (so the quotient is the *model* FLOPs
utilisation, MFU, Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.models.aut import AuTEncoder
from omnitrain.models.aut_decoder import AuT, AuTDecoderLayer, text_of
from omnitrain.models.layers.moe import SwiGLUExperts
from omnitrain.models.omni import OmniModel

# Dense bf16 peaks as stated by the manufacturer, in operations per second.
STATED_PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


LORA = ".lora_"
"""In the names of low-rank adapters' parameters."""


def _matrices(*modules: nn.Module) -> int:
    named = (pair for module in modules for pair in module.named_parameters())
    return sum(p.numel() for name, p in named if p.ndim >= 2 and LORA not in f".{name}")


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """What the operations on a batch depend on: tokens of each sequence, within which attention stays; positions that
    predict something; frames of each recording; patches in time, height and width of each picture or video."""

    lengths: Sequence[int]
    targets: int
    mel_lengths: Sequence[int] = ()
    grid_thw: Sequence[Sequence[int]] = ()

    @staticmethod
    def of(batch: PackedBatch) -> BatchSizes:
        return BatchSizes(
            lengths=batch.cu_seqlens.diff().tolist(),
            targets=int((batch.labels != IGNORE).sum()),
            mel_lengths=[] if batch.mel_lengths is None else batch.mel_lengths.tolist(),
            grid_thw=[] if batch.grid_thw is None else batch.grid_thw.tolist(),
        )


def forward_flops(model: OmniModel, sizes: BatchSizes) -> dict[str, float]:
    """Operations of one forward pass over a batch of these sizes, by part: `thinker`, `aut`, `visual`. An encoder that
    has nothing to encode does not run. Only the shapes of the model's weights matter (it may be on `meta`)."""
    thinker, config = model.thinker, model.config.thinker
    experts = [part for part in thinker.layers.modules() if isinstance(part, SwiGLUExperts)]
    # Of a layer's experts, top_k work on a token, wherever they are.
    working = config.top_k * sum(math.prod(p.shape[1:]) for part in experts for p in (part.gate_up, part.down))
    dense = _matrices(thinker.layers) - _matrices(*experts) + working
    # Causal attention: half of n^2 pairs, two products (scores, values).
    pairs = float(sum(n * (n + 1) // 2 for n in sizes.lengths))
    flops = {
        "thinker": 2.0 * sum(sizes.lengths) * dense
        + 2.0 * sizes.targets * _matrices(thinker.lm_head)
        + 4.0 * pairs * config.heads * config.head_dim * len(thinker.layers)
    }
    if len(sizes.mel_lengths):
        flops["aut"] = encoder_flops(model.aut, sizes.mel_lengths)
    if len(sizes.grid_thw):
        visual = model.visual
        patches = float(sum(t * h * w for t, h, w in sizes.grid_thw))
        pairs = float(sum(t * (h * w) ** 2 for t, h, w in sizes.grid_thw))  # attention within each frame
        merged = patches / model.config.vision.merge**2
        flops["visual"] = (
            2.0 * patches * _matrices(visual.patch_embed, visual.blocks)
            + 2.0 * merged * _matrices(visual.merger, visual.merger_list)
            + 4.0 * pairs * model.config.vision.d_model * len(visual.blocks)
        )
    return flops


def encoder_flops(aut: AuTEncoder, mel_lengths: Sequence[int], window_frames: int | None = None) -> float:
    """Operations of one forward pass of the audio encoder over recordings of so many frames, its projection included
    where it has one. `window_frames`: of its attention; default the configuration's."""
    config, c = aut.config, aut.config.conv_hidden
    # Each convolution halves time and frequency: positions out x 3 x 3 x channels in x channels out.
    convolutions = 2 * 9 * float(sum(mel_lengths)) * config.n_mels * c * (1 / 4 + c / 16 + c / 64)
    outputs = aut.output_lengths(torch.tensor(mel_lengths, device="cpu")).double()
    per_window = aut.output_lengths(torch.tensor([window_frames or config.window_frames], device="cpu")).item()
    whole, rest = outputs // per_window, outputs % per_window
    pairs = float((whole * per_window**2 + rest**2).sum())
    linear = sum(_matrices(part) for name, part in aut.named_children() if not name.startswith("conv2d"))
    return convolutions + 2.0 * float(outputs.sum()) * linear + 4.0 * pairs * config.d_model * len(aut.layers)


def aut_forward_flops(model: AuT, batch: PackedBatch, window_frames: int | None = None) -> dict[str, float]:
    """Operations of one forward pass of an AuT, by part: `aut`, `decoder`, `ctc`."""
    text = text_of(batch.cu_seqlens, batch.token_types)[2].diff().double()
    heard = batch.cu_seqlens.diff() - text
    assert batch.mel_lengths is not None
    decoder, width = model.decoder, model.config.decoder.d_model
    layers = cast(Sequence[AuTDecoderLayer], decoder.layers)
    listening = sum(_matrices(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in layers)
    pairs = float((text * (text + 1) / 2 + text * heard).sum())  # self-attention is causal, listening is not
    targets = int((batch.labels != IGNORE).sum())
    found = {
        "aut": encoder_flops(model.aut, batch.mel_lengths.tolist(), window_frames),
        "decoder": 2.0 * float(text.sum()) * (_matrices(decoder.layers) - listening)
        + 2.0 * float(heard.sum()) * listening
        + 2.0 * targets * _matrices(decoder.embed_tokens)
        + 4.0 * pairs * width * len(layers),
    }
    return found | ({} if model.ctc is None else {"ctc": 2.0 * float(heard.sum()) * _matrices(model.ctc)})


def aut_training_flops(model: AuT, batch: PackedBatch, window_frames: int | None = None) -> float:
    """Operations of forward and backward pass of an AuT; the backward pass is counted as in `training_flops_by_part`,
    gradients reaching every part below which something learns."""
    learns = {part: any(p.requires_grad for p in getattr(model, part).parameters()) for part in ("aut", "decoder")}
    learns["ctc"] = model.ctc is not None and any(p.requires_grad for p in model.ctc.parameters())
    forward = aut_forward_flops(model, batch, window_frames)
    return sum(flops * (3 if learns[part] else 2 if learns["aut"] else 1) for part, flops in forward.items())


def training_flops_by_part(model: OmniModel, sizes: BatchSizes) -> dict[str, float]:
    """Operations of forward and backward pass. The backward pass of a part costs twice its forward pass if its weights
    learn, once if gradients only pass through it, to low-rank adapters or to a part below, and nothing otherwise. The
    adapters themselves are not counted."""
    encoders_learn = any(p.requires_grad for m in (model.aut, model.visual) for p in m.parameters())
    total = {}
    for part, flops in forward_flops(model, sizes).items():
        learning = [name for name, p in getattr(model, part).named_parameters() if p.requires_grad]
        learns = any(LORA not in name for name in learning)
        passes_through = bool(learning) or (part == "thinker" and encoders_learn)
        total[part] = flops * (3 if learns else 2 if passes_through else 1)
    return total


def training_flops(model: OmniModel, sizes: BatchSizes) -> float:
    """The sum of `training_flops_by_part`."""
    return sum(training_flops_by_part(model, sizes).values())


def peak_flops(device: torch.device, seconds: float = 0.3) -> tuple[float, str]:
    """Operations per second that `device` can reach, and where the number is from: ``"stated"`` (manufacturer, dense
    bf16) for known GPUs, else ``"measured"``: the best of several fp32 products of 1024 x 1024 matrices."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in STATED_PEAKS.items():
            if key in name:
                return peak, "stated"
    n = 1024
    a = torch.ones(n, n, device=device)
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best, "measured"
