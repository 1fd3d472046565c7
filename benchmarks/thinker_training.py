"""Tokens per second and peak memory of one training step: omnitrain against the public reference implementation.

    python benchmarks/thinker_training.py                                   # two CPU cores, fp32
    python benchmarks/thinker_training.py --device cuda --dtype bfloat16    # one GPU

Both sides load the same random weights (public format, about 30 M parameters), read the same variable-length batch of
text, pictures and audio, and do forward + backward + AdamW. The reference pads the batch, as it must; it runs with
`sdpa` attention and with each of its expert implementations, and its best one counts. Every variant runs in a process
of its own. "Memory" is the peak of that process less what it held once the model was loaded and before the first step:
weights are the same on both sides; gradients, optimizer state and activations are what differs. "Share of peak" is
counted matmul operations (`torch.utils.flop_counter`) over time, as a share of this machine's own fastest matmul,
measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

IMAGE, VIDEO, AUDIO, AUDIO_START, AUDIO_END, VISION_START, VISION_END = 4001, 4002, 4003, 4004, 4005, 4006, 4007
VOCABULARY = 4096
VARIANTS = ("omnitrain", "reference eager", "reference grouped_mm")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One sample before it is laid out for either side."""

    input_ids: Tensor  # int64 [n]
    image: Tensor | None = None  # float32 [P, 3 * 2 * 16 * 16]
    grid_thw: Tensor | None = None  # int64 [1, 3]
    mel: Tensor | None = None  # float32 [F, 128]


def make_documents(seed: int = 0) -> list[Document]:
    """24 samples: 8 texts of 20 to 800 tokens (log-uniform), 8 pictures with captions, 8 recordings with transcripts."""
    rng = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    def words(n: int) -> Tensor:
        return torch.randint(0, 4000, (n,), generator=rng)

    documents = [Document(input_ids=words(int(20 * 40 ** float(torch.rand((), generator=rng))))) for _ in range(8)]
    for _ in range(8):
        h, w = 2 * integer(3, 9), 2 * integer(3, 9)
        ids = [words(8), torch.tensor([VISION_START] + [IMAGE] * (h * w // 4) + [VISION_END]), words(integer(5, 60))]
        patches = torch.randn(h * w, 3 * 2 * 16 * 16, generator=rng)
        documents.append(Document(input_ids=torch.cat(ids), image=patches, grid_thw=torch.tensor([[1, h, w]])))
    for _ in range(8):
        frames = integer(100, 800)
        ids = [
            words(8),
            torch.tensor([AUDIO_START] + [AUDIO] * audio_token_count(frames) + [AUDIO_END]),
            words(integer(5, 60)),
        ]
        documents.append(Document(input_ids=torch.cat(ids), mel=torch.randn(frames, 128, generator=rng)))
    order = torch.randperm(len(documents), generator=rng).tolist()
    return [documents[i] for i in order]


def audio_token_count(frames: int) -> int:
    """Three stride-2 convolutions over chunks of 100 mel frames: 13 tokens a full chunk."""
    rest = frames % 100
    for _ in range(3):
        rest = (rest + 1) // 2
    return frames // 100 * 13 + rest


def build_reference(folder: Path) -> int:
    """Write a random model in the public format; returns its number of parameters."""
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen3OmniMoeThinkerConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "moe_intermediate_size": 192,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "router_aux_loss_coef": 0.001,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
        },
        audio_config={
            "d_model": 192,
            "encoder_layers": 3,
            "encoder_attention_heads": 6,
            "encoder_ffn_dim": 768,
            "downsample_hidden_size": 48,
            "output_dim": 384,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 192,
            "num_heads": 6,
            "intermediate_size": 768,
            "out_hidden_size": 384,
            "deepstack_visual_indexes": [1, 2, 3],
        },
        position_id_per_seconds=13,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        audio_start_token_id=AUDIO_START,
        vision_start_token_id=VISION_START,
    )
    for name, value in (("vision_end_token_id", VISION_END), ("audio_end_token_id", AUDIO_END)):
        setattr(config, name, value)
    model = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def omnitrain_step(folder: Path, documents: list[Document], device: str, dtype: torch.dtype):
    """A function that does one training step with omnitrain on the packed batch, and the model."""
    import numpy as np
    from omnitrain.interop.public_format import load_pretrained

    from omnitrain.data.batch import AUDIO as AUDIO_TYPE
    from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
    from omnitrain.data.batch import IMAGE as IMAGE_TYPE
    from omnitrain.data.positions import AudioSpan, ImageSpan, TextSpan, tm_rope_positions
    from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
    from omnitrain.training.losses import balance_loss

    model = load_pretrained(folder).to(device).train()
    samples = []
    for i, document in enumerate(documents):
        ids = document.input_ids
        media = (ids == IMAGE) | (ids == AUDIO)
        if media.any():
            start, count = int(media.nonzero()[0]), int(media.sum())
            span = AudioSpan(count) if document.image is None else ImageSpan(tuple(document.grid_thw[0].tolist()))
            spans = [TextSpan(start), span, TextSpan(len(ids) - start - count)]
        else:
            spans = [TextSpan(len(ids))]
        types = torch.where(ids == IMAGE, IMAGE_TYPE, torch.where(ids == AUDIO, AUDIO_TYPE, 0)).to(torch.uint8)
        samples.append(
            EncodedSample(
                id=str(i),
                source="benchmark",
                task="benchmark",
                modality="text",
                languages=(),
                input_ids=ids.numpy(),
                labels=torch.cat([ids[1:], torch.tensor([IGNORE])]).numpy(),
                token_types=types.numpy(),
                position_ids=tm_rope_positions(spans),
                mel=(document.mel.numpy(),) if document.mel is not None else (),
                patches=(document.image.numpy(),) if document.image is not None else (),
                grid_thw=document.grid_thw.numpy() if document.grid_thw is not None else np.zeros((0, 3), np.int64),
            )
        )
    batch = PackedBatch.pack(samples).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            output = model(**batch.model_inputs())
            nll = chunked_cross_entropy(output.hidden, model.thinker.lm_head.weight, batch.labels)
        loss = nll.sum() / (batch.labels != IGNORE).sum() + 0.001 * balance_loss(
            output.router_counts, output.router_prob_sums, n_tokens=batch.n_tokens, pool_layers=True
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step, model


def reference_step(folder: Path, documents: list[Document], device: str, dtype: torch.dtype, experts: str):
    """The same with the reference: right-padded, as its collators do."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    model = model.to(device).train()
    longest = max(len(d.input_ids) for d in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document.input_ids)] = document.input_ids
        mask[row, : len(document.input_ids)] = 1
    mels = [d.mel for d in documents if d.mel is not None]
    features = torch.zeros(len(mels), 128, max(len(m) for m in mels))
    features_mask = torch.zeros(len(mels), features.shape[-1], dtype=torch.long)
    for row, mel in enumerate(mels):
        features[row, :, : len(mel)] = mel.T
        features_mask[row, : len(mel)] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "input_features": features,
        "feature_attention_mask": features_mask,
        "pixel_values": torch.cat([d.image for d in documents if d.image is not None]),
        "image_grid_thw": torch.cat([d.grid_thw for d in documents if d.grid_thw is not None]),
    }
    inputs = {name: value.to(device) for name, value in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**inputs, output_router_logits=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step, model


def resident_bytes() -> int:
    """Memory this process holds now, from /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_variant(variant: str, folder: Path, *, device: str, dtype: torch.dtype, steps: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    documents = make_documents()
    if variant == "omnitrain":
        step, _ = omnitrain_step(folder, documents, device, dtype)
    else:
        step, _ = reference_step(folder, documents, device, dtype, variant.split()[1])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_bytes()
    losses, times = [step()], []
    for _ in range(steps):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())  # float(loss) waits for the device
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return {
        "loss": losses[0],
        "seconds": statistics.median(times),
        "memory": peak - before,
        "flops": counter.get_total_flops(),
    }


def matmul_peak(device: str, dtype: torch.dtype, threads: int) -> float:
    """The fastest of several square matmuls, operations per second."""
    torch.set_num_threads(threads)
    best = 0.0
    for n in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(6):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=VARIANTS, help="one variant (used for the processes)")
    parser.add_argument("--folder", type=Path, help="a model written before (used for the processes)")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.only:
        result = run_variant(
            args.only, args.folder, device=args.device, dtype=dtype, steps=args.steps, threads=args.threads
        )
        print("RESULT " + json.dumps(result))
        return

    console = Console()
    documents = make_documents()
    tokens = sum(len(d.input_ids) for d in documents)
    with tempfile.TemporaryDirectory() as folder:
        parameters = build_reference(Path(folder))
        console.print(
            f"{parameters / 1e6:.1f} M parameters, {len(documents)} samples, {tokens} tokens "
            f"({min(len(d.input_ids) for d in documents)} to {max(len(d.input_ids) for d in documents)}), "
            f"{args.device} {args.dtype}, {args.threads} threads"
        )
        results = {}
        for variant in VARIANTS:
            with console.status(f"{variant} ..."):
                command = [sys.executable, __file__, "--only", variant, "--folder", folder]
                command += ["--device", args.device, "--dtype", args.dtype]
                command += ["--steps", str(args.steps), "--threads", str(args.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                reason = done.stderr.strip().splitlines()
                console.print(f"{variant}: cannot run here ({reason[-1][:200] if reason else 'no output'})")
                continue
            results[variant] = json.loads(lines[0].removeprefix("RESULT "))
        peak = matmul_peak(args.device, dtype, args.threads)

    table = Table(title="forward + backward + AdamW, median step")
    for column in ("", "loss", "tokens/s", "memory MB", "share of matmul peak"):
        table.add_column(column, justify="left" if not column else "right")
    for variant, r in results.items():
        share = r["flops"] / r["seconds"] / peak
        table.add_row(
            variant, f"{r['loss']:.4f}", f"{tokens / r['seconds']:.0f}", f"{r['memory'] / 1e6:.0f}", f"{share:.0%}"
        )
    console.print(table)
    console.print(f"matmul peak of this machine: {peak / 1e9:.0f} GFLOP/s")
    references = {v: r for v, r in results.items() if v != "omnitrain"}
    if "omnitrain" in results and references:
        best = min(references, key=lambda v: references[v]["seconds"])
        ours, theirs = results["omnitrain"], references[best]
        least = min(r["memory"] for r in references.values())
        console.print(
            f"ratio to the fastest ({best}): {theirs['seconds'] / ours['seconds']:.2f} x the tokens/s, "
            f"{ours['memory'] / theirs['memory']:.2f} x its memory ({ours['memory'] / least:.2f} x the leanest)"
        )


if __name__ == "__main__":
    main()
