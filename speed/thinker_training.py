"""Training speed and memory of the Thinker with its encoders: omnitrain against transformers.

    python -m speed.thinker_training                                   # two minutes on two cores
    python -m speed.thinker_training --device cuda --dtype bfloat16

One step is forward, backward and fused AdamW on the same batch: documents of very different lengths, some with a
picture or a recording. All variants start from the same weights (a random model of 28 M parameters, written once in
the public format). Each runs in its own process, so that peak memory is its own. transformers runs on the padded
batch and also one document at a time (no padding; gradients accumulated), both with each of its expert
implementations. One by one is another computation than the batch's in one respect: its balance loss is that of each
document alone. All variants keep freed memory in the process (`speed.allocator`), which helps them alike.

Columns. tokens/s: *real* tokens (padding is not counted) over the fastest of the steps after a warm-up. memory:
growth of the process's peak resident memory (`ru_maxrss`; on CUDA `max_memory_allocated`) from after the imports, so
weights, gradients, optimizer state and activations. peak: FLOPs that the step needs (formula in `needed_flops`;
nothing recomputed, nothing padded) per second, over the best rate that a large fp32 (on CUDA: --dtype) matrix product
reaches in this very process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = {"<|audio_start|>": 1, "<|audio_pad|>": 2, "<|audio_end|>": 3}
TOKENS |= {"<|vision_start|>": 4, "<|vision_end|>": 5, "<|image_pad|>": 6, "<|video_pad|>": 7, "user": 8}
FIRST_WORD, VOCABULARY = 16, 4096
SIZES: dict[str, Any] = dict(
    thinker=dict(
        vocab_size=VOCABULARY, d_model=384, layers=6, heads=6, kv_heads=2, head_dim=64, ffn=1024, n_experts=16, top_k=4,
        expert_width=192, mrope_sections=(12, 10, 10), accept_hidden_layer=3,
    ),
    aut=dict(d_model=128, layers=2, heads=4, ffn=512, conv_hidden=32),
    vision=dict(d_model=128, layers=3, heads=4, ffn=512, grid_side=16, deepstack_layers=(0, 1)),
)  # fmt: skip


@dataclass
class Document:
    """`words` is text; of a picture (grid in patches) or a recording (mel frames) before it nothing is predicted."""

    words: np.ndarray
    mel: np.ndarray | None = None
    patches: np.ndarray | None = None
    grid: tuple[int, int, int] | None = None


def documents(seed: int = 0, n: int = 24) -> list[Document]:
    """Half plain text of log-normal lengths (17 to 512), a quarter captioned pictures, a quarter transcribed speech."""
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> np.ndarray:
        length = int(np.clip(np.exp(rng.normal(5.0, 0.9)), low, high))
        return rng.integers(FIRST_WORD, VOCABULARY, length)

    found = []
    for i in range(n):
        match i % 4:
            case 0 | 1:
                found.append(Document(words(17, 512)))
            case 2:
                h, w = (2 * int(rng.integers(4, 10)) for _ in range(2))
                patches = rng.standard_normal((h * w, 3 * 2 * 16 * 16), dtype=np.float32)
                found.append(Document(words(8, 64), patches=patches, grid=(1, h, w)))
            case _:
                mel = rng.standard_normal((int(rng.integers(100, 900)), 128), dtype=np.float32)
                found.append(Document(words(8, 64), mel=mel))
    return found


def encode(document: Document) -> Any:
    """An `EncodedSample`."""
    from omnitrain.data import positions as tm
    from omnitrain.data.batch import IGNORE, EncodedSample
    from omnitrain.vocabulary import AUDIO, IMAGE, TEXT

    ids, types, spans = [], [], []
    if document.grid is not None:
        n = tm.vision_tokens(document.grid)
        ids = [TOKENS["<|vision_start|>"], *[TOKENS["<|image_pad|>"]] * n, TOKENS["<|vision_end|>"]]
        types = [TEXT, *[IMAGE] * n, TEXT]
        spans = [tm.TextSpan(1), tm.ImageSpan(document.grid), tm.TextSpan(1)]
    elif document.mel is not None:
        n = tm.audio_tokens(len(document.mel))
        ids = [TOKENS["<|audio_start|>"], *[TOKENS["<|audio_pad|>"]] * n, TOKENS["<|audio_end|>"]]
        types = [TEXT, *[AUDIO] * n, TEXT]
        spans = [tm.TextSpan(1), tm.AudioSpan(n), tm.TextSpan(1)]
    input_ids = np.concatenate([np.array(ids, dtype=np.int64), document.words])
    labels = np.append(np.where(input_ids[1:] >= FIRST_WORD, input_ids[1:], IGNORE), IGNORE)
    return EncodedSample(
        id="", source="", task="", modality="", languages=(), input_ids=input_ids, labels=labels,
        token_types=np.array([*types, *[TEXT] * len(document.words)], dtype=np.uint8),
        position_ids=tm.tm_rope_positions([*spans, tm.TextSpan(len(document.words))]),
        mel=() if document.mel is None else (document.mel,),
        patches=() if document.patches is None else (document.patches,),
        grid_thw=np.array([document.grid] if document.grid else [], dtype=np.int64).reshape(-1, 3),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- variants


def omnitrain_step(folder: Path, device: str, dtype: str, checkpointing: bool) -> tuple[Callable[[], float], Any]:
    import torch

    from omnitrain.data.batch import PackedBatch
    from omnitrain.interop.public_format import load_pretrained
    from omnitrain.models.layers.cross_entropy import chunked_cross_entropy

    model = load_pretrained(folder, dtype=getattr(torch, dtype), device=device, speech=False)
    model.set_activation_checkpointing(["aut", "visual", "thinker"] if checkpointing else [])
    batch = PackedBatch.pack([encode(d) for d in documents()]).to(device)
    inputs, coefficient = batch.model_inputs(), 0.001  # the reference's `router_aux_loss_coef`
    targets = int((batch.labels >= 0).sum())

    def loss() -> Any:
        output = model(**inputs)
        nll = chunked_cross_entropy(output.hidden, model.thinker.lm_head.weight, batch.labels).total
        rows = batch.n_tokens * len(output.router_counts)
        share, probability = output.router_counts.sum(0) / rows, output.router_prob_sums.sum(0) / rows
        return nll / targets + coefficient * len(share) * (share * probability).sum()

    return optimised([loss], model), model


def transformers_step(
    folder: Path, device: str, dtype: str, experts: str, padded: bool, checkpointing: bool
) -> tuple[Callable[[], float], Any]:
    import torch
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation=experts
    ).to(device)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    samples = [encode(d) for d in documents()]
    batches = [collate(samples)] if padded else [collate([s]) for s in samples]
    batches = [{k: v.to(device) for k, v in b.items()} for b in batches]
    targets = [int((b["labels"][:, 1:] >= 0).sum()) for b in batches]

    def loss(batch: dict[str, Any], weight: float) -> Any:
        return model(**batch, use_cache=False, output_router_logits=True).loss * weight

    total = sum(targets)
    closures = [lambda b=b, n=n: loss(b, n / total) for b, n in zip(batches, targets, strict=True) if n]
    return optimised(closures, model), model


def collate(samples: list[Any]) -> dict[str, Any]:
    """What the transformers Thinker reads: right-padded ids and mel frames."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.from_numpy(s.input_ids) for s in samples]
    labels = [torch.where(i >= FIRST_WORD, i, -100) for i in ids]
    mel = [torch.from_numpy(m) for s in samples for m in s.mel]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    if mel:
        batch["input_features"] = pad_sequence(mel, batch_first=True).transpose(1, 2).contiguous()
        masks = [torch.ones(len(m), dtype=torch.long) for m in mel]
        batch["feature_attention_mask"] = pad_sequence(masks, batch_first=True)
    if any(s.patches for s in samples):
        batch["pixel_values"] = torch.from_numpy(np.concatenate([p for s in samples for p in s.patches]))
        batch["image_grid_thw"] = torch.from_numpy(np.concatenate([s.grid_thw for s in samples]))
    return batch


def optimised(losses: list[Callable[[], Any]], model: Any) -> Callable[[], float]:
    """One training step: every loss forward and backward, then AdamW."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        total = 0.0
        for loss in losses:
            value = loss()
            value.backward()
            total += float(value.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


# ---------------------------------------------------------------------------------------------------------------- FLOPs


def needed_flops(config: Any, samples: list[Any]) -> float:
    """Multiply-adds of one step, times two: every matrix product once forward and twice backward (with respect to its
    input and its weight), only real tokens, only labelled positions at the head, half of each attention square where
    it is causal."""
    t, a, v = config.thinker, config.aut, config.vision
    lengths = [len(s) for s in samples]
    tokens, labelled = sum(lengths), sum(int((s.labels >= 0).sum()) for s in samples)
    experts = 3 * t.d_model * t.expert_width * t.top_k + t.d_model * t.n_experts
    attention = t.d_model * t.head_dim * (2 * t.heads + 2 * t.kv_heads)
    decoder = tokens * t.layers * (attention + experts) + labelled * t.vocab_size * t.d_model
    decoder += t.layers * t.heads * t.head_dim * sum(n * n for n in lengths)  # q k^T and p v, causal half each

    mel = [len(m) for s in samples for m in s.mel]
    chunks = sum(-(-n // a.chunk_frames) for n in mel)
    audio = 0.0
    bands, frames, channels = a.n_mels, a.chunk_frames, 1
    for _ in range(3):
        bands, frames = -(-bands // 2), -(-frames // 2)
        audio += chunks * bands * frames * 9 * channels * a.conv_hidden
        channels = a.conv_hidden
    audio_tokens = sum(-(-n // 8) for n in mel)
    audio += chunks * frames * bands * a.conv_hidden * a.d_model
    audio += audio_tokens * (
        a.layers * (4 * a.d_model**2 + 2 * a.d_model * a.ffn) + a.d_model * (a.d_model + a.out_dim)
    )
    audio += 2 * a.layers * a.d_model * sum((-(-n // 8)) ** 2 for n in mel)

    grids = [g for s in samples for g in s.grid_thw.tolist()]
    patches = sum(g[0] * g[1] * g[2] for g in grids)
    joined = v.d_model * v.merge**2
    vision = patches * (v.patch_dim * v.d_model + v.layers * (4 * v.d_model**2 + 2 * v.d_model * v.ffn))
    vision += patches / v.merge**2 * (1 + len(v.deepstack_layers)) * joined * (joined + v.out_dim)
    vision += 2 * v.layers * v.d_model * sum(g[0] * (g[1] * g[2]) ** 2 for g in grids)
    return 2 * 3 * (decoder + audio + vision)


def matmul_peak(device: str, dtype: str, seconds: float = 1.0) -> float:
    """Best FLOP/s of a square matrix product, tried for `seconds`."""
    import torch

    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    out, best, end = torch.empty_like(a), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronise(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------ processes

VARIANTS: dict[str, Callable[..., tuple[Callable[[], float], Any]]] = {
    "omnitrain": omnitrain_step,
    "transformers padded, eager experts": lambda *a: transformers_step(*a[:3], "eager", True, a[3]),
    "transformers padded, grouped_mm": lambda *a: transformers_step(*a[:3], "grouped_mm", True, a[3]),
    "transformers one by one, eager experts": lambda *a: transformers_step(*a[:3], "eager", False, a[3]),
    "transformers one by one, grouped_mm": lambda *a: transformers_step(*a[:3], "grouped_mm", False, a[3]),
}


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one variant in this process."""
    import torch

    from omnitrain.interop.public_format import read_config

    if not name.startswith("omnitrain"):
        # Imported before the baseline is taken: the library itself is no memory of the step.
        import transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe  # noqa: F401

    if args.device == "cpu":
        from speed.allocator import keep_freed_memory

        keep_freed_memory()
    torch.manual_seed(0)
    peak = matmul_peak(args.device, args.dtype)
    base = peak_memory(args.device)
    step, _ = VARIANTS[name](folder, args.device, args.dtype, args.checkpointing)
    losses, times = [], []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        losses.append(step())
        synchronise(args.device)
        times.append(time.perf_counter() - start)
    memory = peak_memory(args.device)
    peak = max(peak, matmul_peak(args.device, args.dtype))
    samples = [encode(d) for d in documents()]
    seconds = min(times[1:])
    return {
        "tokens_per_s": sum(len(s) for s in samples) / seconds,
        "seconds": seconds,
        "gib": (memory - base) / 2**30,
        "gib_whole": memory / 2**30,
        "peak_flops": peak,
        "share": needed_flops(read_config(folder)[0], samples) / seconds / peak,
        "loss": losses[0],
    }


def peak_memory(device: str) -> float:
    """Peak bytes of this process so far."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=4, help="timed steps after one warm-up")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all variants")
    parser.add_argument("--only", default="", help="run the variants whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.variant:
        print(json.dumps(measure(args.variant, args.folder, args)))
        return
    import torch

    from omnitrain.interop.public_format import save_pretrained
    from omnitrain.models.presets import build, count_parameters, init_weights

    samples = [encode(d) for d in documents()]
    lengths = [len(s) for s in samples]
    with tempfile.TemporaryDirectory() as folder:
        model = build("tiny", special_tokens=TOKENS, **SIZES)
        init_weights(model, seed=0)
        save_pretrained(model, folder)
        print(
            f"{count_parameters(model) / 1e6:.1f} M parameters; {len(samples)} documents, {sum(lengths)} tokens "
            f"(padded {len(samples) * max(lengths)}), {sum(int((s.labels >= 0).sum()) for s in samples)} targets; "
            f"{needed_flops(model.config, samples) / 1e9:.0f} GFLOP a step; {args.device}, {args.dtype}, "
            f"{torch.get_num_threads()} threads"
        )
        del model
        results: dict[str, dict[str, Any]] = {}
        print(f"{'':42}{'tokens/s':>10}{'s/step':>9}{'memory':>11}{'(whole)':>11}{'of peak':>9}{'loss':>10}")
        for name in VARIANTS:
            if args.only not in name:
                continue
            command = [sys.executable, "-m", "speed.thinker_training", *sys.argv[1:]]
            done = subprocess.run(
                [*command, "--variant", name, "--folder", folder], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{name:42}failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            r = results[name] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name:42}{r['tokens_per_s']:10.0f}{r['seconds']:9.3f}{r['gib']:7.2f} GiB{r['gib_whole']:7.2f} GiB"
                f"{r['share']:9.0%}{r['loss']:10.5f}",
                flush=True,
            )
    for kind in ("padded", "one by one"):
        theirs = {k: v for k, v in results.items() if kind in k}
        if "omnitrain" in results and theirs:
            fastest = max(theirs, key=lambda k: theirs[k]["tokens_per_s"])
            ours, best = results["omnitrain"], theirs[fastest]
            print(
                f"omnitrain / {fastest}: {ours['tokens_per_s'] / best['tokens_per_s']:.2f} x tokens/s, "
                f"{ours['gib'] / best['gib']:.2f} x memory "
                f"({ours['gib_whole'] / best['gib_whole']:.2f} x whole process)"
            )
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": str(args.json)}, **results}, indent=2))


if __name__ == "__main__":
    main()
