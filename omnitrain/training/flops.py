"""Floating-point operations of a training step, counted, and the rate that the device can reach.

Counted are the multiply-adds (2 operations each) of matrix products, convolutions and attention that the model's
equations ask for; recomputation under activation checkpointing is not (so the quotient is the *model* FLOPs
utilisation, MFU, Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.work import Work
from omnitrain.models.aut import AuTEncoder
from omnitrain.models.aut_decoder import AuT, AuTDecoderLayer, text_of
from omnitrain.models.layers.moe import SwiGLUExperts
from omnitrain.models.omni import OmniModel
from omnitrain.models.talker import Talker
from omnitrain.parallel.gpus import GPUS

STATED_PEAKS = {name: gpu.peak for name, gpu in GPUS.items()} | {"L40S": 362e12, "4090": 165e12}
"""Dense bf16 peaks as stated by the manufacturer, in operations per second."""


LORA = ".lora_"
"""In the names of low-rank adapters' parameters."""


def _matrices(*modules: nn.Module) -> int:
    named = (pair for module in modules for pair in module.named_parameters())
    return sum(p.numel() for name, p in named if p.ndim >= 2 and LORA not in f".{name}")


def _working(layers: nn.Module, top_k: int) -> int:
    """Of the matrices of decoder layers, those that work on one position: of a layer's experts top_k, wherever they
    are."""
    experts = [part for part in layers.modules() if isinstance(part, SwiGLUExperts)]
    working = top_k * sum(math.prod(p.shape[1:]) for part in experts for p in (part.gate_up, part.down))
    return _matrices(layers) - _matrices(*experts) + working


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
    # Causal attention: half of n^2 pairs, two products (scores, values).
    pairs = float(sum(n * (n + 1) // 2 for n in sizes.lengths))
    flops = {
        "thinker": 2.0 * sum(sizes.lengths) * _working(thinker.layers, config.top_k)
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
    assert batch.mel_lengths is not None
    found = _decoder_flops(model, text, batch.cu_seqlens.diff() - text, int((batch.labels != IGNORE).sum()))
    return {"aut": encoder_flops(model.aut, batch.mel_lengths.tolist(), window_frames), **found}


def _decoder_flops(model: AuT, text: Tensor, heard: Tensor, targets: int) -> dict[str, float]:
    """Of an AuT's heads: fp64 positions of text and of sound of each sample, and how many predict something."""
    decoder, width = model.decoder, model.config.decoder.d_model
    layers = cast(Sequence[AuTDecoderLayer], decoder.layers)
    listening = sum(_matrices(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in layers)
    pairs = float((text * (text + 1) / 2 + text * heard).sum())  # self-attention is causal, listening is not
    found = {
        "decoder": 2.0 * float(text.sum()) * (_matrices(decoder.layers) - listening)
        + 2.0 * float(heard.sum()) * listening
        + 2.0 * targets * _matrices(decoder.embed_tokens)
        + 4.0 * pairs * width * len(layers),
    }
    return found | ({} if model.ctc is None else {"ctc": 2.0 * float(heard.sum()) * _matrices(model.ctc)})


def aut_training_flops_by_part(model: AuT, batch: PackedBatch, window_frames: int | None = None) -> dict[str, float]:
    """Operations of forward and backward pass of an AuT; the backward pass is counted as in `training_flops_by_part`,
    gradients reaching every part below which something learns."""
    return _aut_training(model, aut_forward_flops(model, batch, window_frames))


def _aut_training(model: AuT, forward: Mapping[str, float]) -> dict[str, float]:
    learns = {part: any(p.requires_grad for p in getattr(model, part).parameters()) for part in ("aut", "decoder")}
    learns["ctc"] = model.ctc is not None and any(p.requires_grad for p in model.ctc.parameters())
    return {part: flops * (3 if learns[part] else 2 if learns["aut"] else 1) for part, flops in forward.items()}


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


def thinker_work(model: OmniModel) -> Work:
    """What training on a sample costs; sums of it over a pack are `training_flops`, but for recordings that end amid a
    window of the encoder's attention, which cost less."""

    def cost(*lengths: int, targets: int = 0, **media: Any) -> float:
        return training_flops(model, BatchSizes(lengths=lengths, targets=targets, **media))

    # Read off sizes of which what they cost is known to consist: n tokens, n (n + 1) / 2 pairs.
    pair = cost(2) - 2 * cost(1)
    merge, frames = model.config.vision.merge, 10 * model.config.aut.window_frames
    square, double = (cost(grid_thw=[(1, merge, side)]) for side in (merge, 2 * merge))
    patch_pair = (double - 2 * square) / (2 * merge**4)
    return Work(
        token=cost(1) - pair,
        pair=pair,
        target=cost(targets=1),
        mel_frame=cost(mel_lengths=[frames]) / frames,
        patch=(square - patch_pair * merge**4) / merge**2,
        patch_pair=patch_pair,
    )


def talker_work(model: OmniModel, talker: Talker, *, joint: bool, listens: bool) -> Work:
    """The same where the Talker learns. `joint`: the Thinker's text is learnt too; `listens`: else it still runs, for
    what the Talker reads of it. Attention of the Talker is left out, and so are its projections."""
    thinker = thinker_work(model)
    if not joint:
        thinker = replace(thinker, target=0.0) if listens else Work(token=0.0)
    config, mtp = talker.config, talker.mtp
    flops = {
        # Codebook 0 of a frame from one position; the others from as many positions as there are codebooks.
        talker.layers: 2.0 * (_working(talker.layers, config.top_k) + _matrices(talker.codec_head)),
        mtp: 2.0 * config.codebooks * _matrices(mtp.layers) + 2.0 * mtp.code_head.numel(),
    }
    learning = {part: any(p.requires_grad for p in part.parameters()) for part in flops}
    return replace(thinker, frame=sum(n * (3 if learning[part] else 2) for part, n in flops.items()))


def aut_work(model: AuT) -> Work:
    """The same of an AuT. Its decoder's attention, small beside the rest in texts as long as a transcript, is left
    out."""

    def decoding(text: int, heard: int, targets: int = 0) -> float:
        positions = (torch.tensor([n], dtype=torch.float64) for n in (text, heard))
        return sum(_aut_training(model, _decoder_flops(model, *positions, targets)).values())

    frames = 10 * model.aut.config.window_frames
    features = float(model.aut.output_lengths(torch.tensor([frames], device="cpu"))[0]) / frames
    token, heard = 3 * decoding(1, 0) - decoding(2, 0), decoding(0, 1)  # without the pairs, of which 2 tokens have 3
    encoding = _aut_training(model, {"aut": encoder_flops(model.aut, [frames])})["aut"] / frames
    # The decoder does not run at the positions of a recording, which count as tokens: it reads them.
    return Work(token=token, target=decoding(0, 0, 1), mel_frame=encoding + features * (heard - token))


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
