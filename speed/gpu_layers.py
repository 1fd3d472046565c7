"""Speed and memory of one layer of each kind, at the sizes of the public model: omnitrain against transformers.

    python -m speed.gpu_layers                                          # on an H100 or H200: 8k and 32k tokens
    python -m speed.gpu_layers --device cpu --preset tiny --tokens 64   # that both sides compute the same

Layers of the Thinker (128 experts), the Talker (128 and a shared one), the vision encoder and AuT, forward and backward
pass, on the same numbers and weights: bf16 on a GPU, fp32 on a processor. The decoders read one document of all tokens,
the vision encoder frames of 32 x 32 patches, AuT windows of 8 s. Rows:

    omnitrain       as the layer is written
    compiled        the same under module.compile=layers
    transformers    its layer with `grouped_mm` experts and flash attention, if `flash_attn` is installed, else SDPA

Columns. tokens/s: the fastest of the passes after a warm-up. peak: operations that the equations ask for (`operations`;
nothing computed again) per second, over the dense bf16 peak that the maker states (`parallel/gpus.py`); `-` where the
device is not known. GB: most memory at once, weights, gradients and activations of the one layer. difference: of
outputs and gradients of the input from those of transformers, relative norm; too large a one ends with an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omnitrain.interop.public_config import public_config
from omnitrain.interop.public_format import public_tensors
from omnitrain.models.aut import AuTLayer
from omnitrain.models.layers.compiling import compile_layers
from omnitrain.models.layers.decoder import DecoderLayer
from omnitrain.models.layers.rope import tm_rope
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import PRESETS, SPEECH_PRESETS, OmniConfig
from omnitrain.models.vision import VisionBlock
from omnitrain.parallel.gpus import GPUS

KINDS = ("thinker", "talker", "vision", "aut")
WINDOW = 104  # features in 8 s
FRAME = 1024  # patches of a frame of 512 x 512 pixels
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-4}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation: `compute` makes x [N, D] into y [N, D]."""

    name: str
    layer: nn.Module
    compute: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a side: seconds of both passes, bytes at the peak (0 where they are not counted), relative
    difference from transformers."""

    kind: str
    side: str
    tokens: int
    operations: float
    seconds: float
    memory: int
    difference: float


def model_of(preset: str) -> OmniModel:
    """A model of this size, with one layer in each stack, on `meta`."""
    sizes, (talker, _) = PRESETS[preset], SPEECH_PRESETS[preset]
    config: OmniConfig = replace(
        sizes,
        thinker=replace(sizes.thinker, layers=1, accept_hidden_layer=0),
        talker=replace(talker, layers=1, accept_hidden_layer=0),
        vision=replace(sizes.vision, layers=1, deepstack_layers=()),
        aut=replace(sizes.aut, layers=1),
    )
    with torch.device("meta"):
        return OmniModel(config)


def lengths_of(kind: str, tokens: int) -> list[int]:
    """Of the documents, frames or windows that attention stays in."""
    most = {"vision": FRAME, "aut": WINDOW}.get(kind, tokens)
    return [most] * (tokens // most) + [tokens % most] * (tokens % most > 0)


def operations(kind: str, config: OmniConfig, lengths: Sequence[int]) -> float:
    """Multiplications and additions of a forward and a backward pass (twice as many), products and attention."""
    n = float(sum(lengths))
    if kind in ("thinker", "talker"):
        c: Any = config.thinker if kind == "thinker" else config.talker
        shared = getattr(c, "shared_expert_width", 0)
        width = c.heads * c.head_dim
        matrices = c.d_model * (2 * width + 2 * c.kv_heads * c.head_dim) + c.d_model * c.n_experts
        matrices += 3 * c.d_model * (c.top_k * c.expert_width + shared) + (c.d_model if shared else 0)
        pairs = sum(m * (m + 1) / 2 for m in lengths)
    else:
        c = config.vision if kind == "vision" else config.aut
        width, matrices = c.d_model, 4 * c.d_model**2 + 2 * c.d_model * c.ffn
        pairs = sum(float(m) ** 2 for m in lengths)
    return 3 * (2 * n * matrices + 4 * width * pairs)


def sides(kind: str, preset: str, lengths: Sequence[int], device: torch.device, compiled: bool) -> Iterator[Side]:
    """Ours, ours compiled, and the reference, on the same weights."""
    model = model_of(preset)
    stacks = {
        "thinker": (model.thinker.layers, "thinker.model.layers.0."),
        "talker": (model.talker and model.talker.layers, "talker.model.layers.0."),
        "vision": (model.visual.blocks, "thinker.visual.blocks.0."),
        "aut": (model.aut.layers, "thinker.audio_tower.layers.0."),
    }
    stack, prefix = stacks[kind]
    assert isinstance(stack, nn.ModuleList)
    layer = stack[0].to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for p in layer.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
        else:
            nn.init.uniform_(p, 0.5, 1.5, generator=generator)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer.to(dtype)
    borders = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    rope = _rotation(kind, model.config, sum(lengths), device)

    def ours(x: Tensor) -> Tensor:
        if kind == "aut":
            return layer(x, borders, max(lengths))
        if kind == "vision":
            return layer(x, tuple(part[:, None] for part in rope), borders, max(lengths))
        return layer(x, rope, borders, max(lengths), None)[0]

    yield Side(name="omnitrain", layer=layer, compute=ours)
    if compiled:
        compile_layers(stack, (DecoderLayer, VisionBlock, AuTLayer))
        yield Side(name="compiled", layer=layer, compute=ours)
        del vars(layer)["forward"]
    tensors = {key.removeprefix(prefix): t for key, t in public_tensors(model, "full") if key.startswith(prefix)}
    yield _reference(kind, model.config, layer, tensors, borders, rope)


def _rotation(kind: str, config: OmniConfig, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [N, head_dim / 2]; of the vision encoder, any."""
    if kind in ("thinker", "talker"):
        c: Any = config.thinker if kind == "thinker" else config.talker
        return tm_rope(torch.arange(n, device=device).expand(3, -1), c.mrope_sections, c.rope_theta)
    half = config.vision.d_model // config.vision.heads // 2
    angle = torch.arange(n, device=device)[:, None] * torch.linspace(0.01, 1, half, device=device)
    return angle.cos(), angle.sin()


def _reference(
    kind: str, config: OmniConfig, ours: nn.Module, tensors: dict[str, Tensor], borders: Tensor, rope: Any
) -> Side:
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as public
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig

    whole = Qwen3OmniMoeConfig(**public_config(config, "full"))
    flash = borders.is_cuda and importlib.util.find_spec("flash_attn") is not None
    parts = {
        "thinker": (whole.thinker_config.text_config, public.Qwen3OmniMoeThinkerTextDecoderLayer),
        "talker": (whole.talker_config.text_config, public.Qwen3OmniMoeTalkerDecoderLayer),
        "vision": (whole.thinker_config.vision_config, public.Qwen3OmniMoeVisionBlock),
        "aut": (whole.thinker_config.audio_config, public.Qwen3OmniMoeAudioEncoderLayer),
    }
    sizes, build = parts[kind]
    sizes._attn_implementation = "flash_attention_2" if flash else "sdpa"
    sizes._experts_implementation = "grouped_mm"
    decoder = kind in ("thinker", "talker")
    with torch.device("meta"):
        layer = build(sizes, 0) if decoder else build(sizes)
    state = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    if decoder:
        experts: Any = ours.get_submodule("mlp.experts")
        state |= {"mlp.experts.gate_up_proj": experts.gate_up, "mlp.experts.down_proj": experts.down}
    layer.load_state_dict({key: value.detach().clone() for key, value in state.items()}, assign=True)
    layer.train()
    for p in layer.parameters():
        p.requires_grad_()
    whole_rope = tuple(torch.cat([part, part], dim=-1).to(next(layer.parameters()).dtype) for part in rope)

    def compute(x: Tensor) -> Tensor:
        if kind == "aut":
            return layer(x, borders)[0]
        if kind == "vision":
            return layer(x, cu_seqlens=borders, position_embeddings=whole_rope)
        return layer(x[None], position_embeddings=tuple(part[None] for part in whole_rope))[0]

    return Side(name=f"transformers ({'flash' if flash else 'sdpa'})", layer=layer, compute=compute)


def measured(kind: str, preset: str, tokens: int, device: torch.device, repeats: int, compiled: bool) -> list[Row]:
    """Each side on the same x, one after the other."""
    lengths, found = lengths_of(kind, tokens), []
    config = model_of(preset).config
    work = operations(kind, config, lengths)
    for side in sides(kind, preset, lengths, device, compiled):
        dtype = next(side.layer.parameters()).dtype
        generator = torch.Generator(device).manual_seed(1)
        width = {"thinker": config.thinker, "talker": config.talker, "vision": config.vision, "aut": config.aut}[kind]
        x, upstream = (
            torch.randn(tokens, width.d_model, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        x.requires_grad_()

        def both(side: Side = side, x: Tensor = x, upstream: Tensor = upstream) -> Tensor:
            y = side.compute(x)
            y.backward(upstream)
            return y.detach()

        for _ in range(3 if device.type == "cuda" else 1):
            _forget(side, x)
            y = both()
        result = torch.cat([y.float(), x.grad.float()])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = min(_seconds(side, x, both, device) for _ in range(repeats))
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        found.append((side.name, seconds, memory, result))
        _forget(side, x)
    expected = found[-1][-1]
    return [
        Row(
            kind=kind, side=name, tokens=tokens, operations=work, seconds=seconds, memory=memory,
            difference=float((result - expected).norm() / expected.norm()),
        )
        for name, seconds, memory, result in found
    ]  # fmt: skip


def _forget(side: Side, x: Tensor) -> None:
    side.layer.zero_grad(set_to_none=True)
    x.grad = None


def _seconds(side: Side, x: Tensor, both: Callable[[], Tensor], device: torch.device) -> float:
    _forget(side, x)
    if device.type != "cuda":
        start = time.perf_counter()
        both()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    both()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def peak_of(device: torch.device) -> float:
    """Stated operations per second in bf16; NaN if the device is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.peak for key, gpu in GPUS.items() if key in name), math.nan)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--preset", default="qwen3_omni_30b_a3b", choices=list(SPEECH_PRESETS))
    parser.add_argument("--layers", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true", help="without the compiled row")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --preset tiny --tokens 64 checks that both sides agree")
    device = torch.device(options.device)
    peak, rows = peak_of(device), list[Row]()
    print(f"{'layer':8} {'':22} {'tokens':>7} {'tokens/s':>11} {'peak':>6} {'GB':>6} {'difference':>10}")
    for kind in options.layers:
        for tokens in options.tokens:
            for row in measured(kind, options.preset, tokens, device, options.repeats, not options.no_compile):
                rows.append(row)
                share = row.operations / row.seconds / peak
                print(
                    f"{kind:8} {row.side:22} {tokens:7,} {tokens / row.seconds:11,.0f} "
                    f"{'-' if math.isnan(share) else f'{share:.0%}':>6} "
                    f"{f'{row.memory / 1e9:.2f}' if row.memory else '-':>6} {row.difference:10.1e}",
                    flush=True,
                )
    limit = TOLERANCE[torch.bfloat16 if device.type == "cuda" else torch.float32]
    if wrong := [row for row in rows if not row.difference < limit]:
        raise SystemExit(f"{wrong[0].side} is {wrong[0].difference:.1e} from transformers in {wrong[0].kind}: no claim")
    return rows


if __name__ == "__main__":
    main()
