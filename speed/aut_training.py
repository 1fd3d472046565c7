"""Training AuT against training Whisper of the same width and depth: speed, memory, loss and character error rate.

    python -m speed.aut_training --out runs/aut_training                # speed, then three seeds of 600 steps
    python -m speed.aut_training --out runs/aut_training --steps 0      # speed and memory alone

Both read the same batches of recordings with their transcripts (one pass over the sources, drawn and packed by
omnitrain's loader, then repeated in an order that the seed says), the same prompts and targets, from random weights:
each its own initial ones. Loss (cross-entropy of the targets, nothing else), AdamW, learning rate, schedule and
clipping are the same. Each variant runs in a process of its own. Nothing is augmented or dropped.

    omnitrain                  AuT, packed
    whisper sdpa, eager        `transformers.WhisperForConditionalGeneration`: padded, as it must be. Its input, 30 s by
                               default, is only as long as the longest recording here. The faster of its two kinds of
                               attention is the one that learns
    whisper, 12.5 a second     the same with four mel frames laid on top of each other as one, so that its encoder has
                               12.5 positions a second as AuT has, instead of 50: that AuT is faster than Whisper is in
                               part due to that; that it is faster than this is not

Columns. recordings/s and sound/s (seconds of sound per second): the fastest pass over the same batches, forward,
backward and optimizer; the batches are padded beforehand. memory: growth of the process's resident memory from before
the first step to its peak (Linux), so gradients, optimizer state and activations. loss: nats per target token on
held-out samples. CER: of greedy transcripts of them. seconds: of training alone. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

PACK = Path(__file__).parents[1] / "omnitrain/pack"
VARIANTS = ("omnitrain", "whisper sdpa", "whisper eager", "whisper sdpa, 12.5 a second")
SIZES: dict[str, Any] = dict(d_model=128, heads=4, ffn=512)
ENCODER_LAYERS, DECODER_LAYERS, N_MELS = 4, 3, 128


@dataclass(frozen=True, kw_only=True)
class Data:
    """What all variants read: packed batches for training, and held-out ones with their references.

    frames: mel frames of the longest recording.  tokens: of the longest text.
    """

    train: list[Any]
    heldout: list[Any]
    tokenizer: str
    vocabulary: int
    stop_ids: tuple[int, ...]
    frames: int
    tokens: int


class Variant(Protocol):
    """A model with its own form of a batch."""

    model: Any

    def prepared(self, batch: Any) -> Any:
        """A `PackedBatch` as the model reads it."""
        ...

    def loss(self, prepared: Any) -> Any:
        """Sum over targets of -log p."""
        ...

    def write(self, prompts: Any, longest: int) -> list[list[int]]:
        """Greedy continuations of a `PackedBatch` of prompts, at most `longest` tokens each."""
        ...


# --- data -------------------------------------------------------------------------------------------------------------


def read_data(args: argparse.Namespace) -> Data:
    """One pass over the training recordings, and the held-out ones."""
    from omnitrain.data.datamodule import OmniDataModule
    from omnitrain.data.settings import DataConfig, SourceConfig

    source = SourceConfig(path=str(args.data), where={"task": ["asr"]})
    config = DataConfig(
        tokenizer=str(args.tokenizer),
        sources={"train": replace(source, split="train", limit=args.recordings)},
        validation_sources={"heldout": replace(source, split=args.heldout_split, limit=args.heldout)},
        max_tokens=args.tokens,
        max_mel_frames=args.mel_frames,
        num_workers=0,
    )
    module = OmniDataModule(config, rank=0, world_size=1)
    module.setup("fit")
    total = sum(len(source) for source in module.opened("sources").values())
    train, seen = [], 0
    for batch in module.train_dataloader():
        train.append(replace(batch, stream_state=None))
        seen += len(batch)
        if seen >= total:
            break
    heldout = list(module.val_dataloader())
    both = (*train, *heldout)
    return Data(
        train=train,
        heldout=heldout,
        tokenizer=str(args.tokenizer),
        vocabulary=module.tokenizer.vocab_size,
        stop_ids=module.tokenizer.stop_ids,
        frames=max(int(batch.mel_lengths.max()) for batch in both),
        tokens=max(int(padded_text(batch)["lengths"].max()) for batch in both),
    )


def padded_text(batch: Any) -> dict[str, Any]:
    """Text of a packed batch, recordings left out, padded on the right: `ids` and `labels` [B, L], `lengths` [B]."""
    from torch.nn.utils.rnn import pad_sequence

    from omnitrain.models.aut_decoder import text_of

    rows, _, borders = text_of(batch.cu_seqlens, batch.token_types)
    lengths = borders.diff()
    ids, labels = (
        pad_sequence(list(x[rows].split(lengths.tolist())), batch_first=True, padding_value=padding)
        for x, padding in ((batch.input_ids, 0), (batch.labels, -100))
    )
    return {"ids": ids, "labels": labels, "lengths": lengths}


def padded_mel(batch: Any, frames: int, stacked: int = 1) -> Any:
    """Recordings of a packed batch as Whisper reads them: [B, n_mels * stacked, frames / stacked], silence behind them
    (which Whisper's scaling puts 8 decades below the recording's loudest)."""
    import torch
    from einops import rearrange

    parts = batch.mel.split(batch.mel_lengths.tolist())
    out = torch.stack([torch.cat([p, (p.max() - 2.0).expand(frames - len(p), p.shape[1])]) for p in parts])
    return rearrange(out, "b (t s) m -> b (s m) t", s=stacked).contiguous()


# --- variants ---------------------------------------------------------------------------------------------------------


class OursAuT:
    """AuT on packed batches."""

    def __init__(self, data: Data, seed: int) -> None:
        from omnitrain.models.aut_decoder import AuT
        from omnitrain.models.presets import init_weights
        from omnitrain.models.sizes import AuTConfig, AuTDecoderConfig, AuTModelConfig

        encoder = AuTConfig(**SIZES, layers=ENCODER_LAYERS, conv_hidden=32, n_mels=N_MELS)
        decoder = AuTDecoderConfig(**SIZES, layers=DECODER_LAYERS, vocab_size=data.vocabulary)
        self.model, self.stop_ids = AuT(AuTModelConfig(encoder=encoder, decoder=decoder)), data.stop_ids
        init_weights(self.model, seed)

    def prepared(self, batch: Any) -> Any:
        return batch.model_inputs(), batch.labels

    def loss(self, prepared: Any) -> Any:
        from omnitrain.models.layers.cross_entropy import chunked_cross_entropy

        inputs, labels = prepared
        return chunked_cross_entropy(self.model(**inputs).hidden, self.model.output_embedding, labels).total

    def write(self, prompts: Any, longest: int) -> list[list[int]]:
        from omnitrain.generation.sampling import Decoding
        from omnitrain.generation.transcribe import transcribe

        return transcribe(self.model, prompts, Decoding(max_new_tokens=longest), stop_ids=self.stop_ids)


class Whisper:
    """Whisper on padded batches. `stacked`: mel frames that are laid on top of each other."""

    def __init__(self, data: Data, seed: int, attention: str, stacked: int) -> None:
        import torch
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        step = 2 * stacked  # the second convolution halves
        self.frames, self.stacked, self.stop_ids = -(-data.frames // step) * step, stacked, data.stop_ids
        torch.manual_seed(seed)
        self.model = WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=data.vocabulary, num_mel_bins=N_MELS * stacked, d_model=SIZES["d_model"],
                encoder_layers=ENCODER_LAYERS, encoder_attention_heads=SIZES["heads"], encoder_ffn_dim=SIZES["ffn"],
                decoder_layers=DECODER_LAYERS, decoder_attention_heads=SIZES["heads"], decoder_ffn_dim=SIZES["ffn"],
                max_source_positions=self.frames // step, max_target_positions=3 * data.tokens + 8,
                pad_token_id=data.stop_ids[-1], bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                attn_implementation=attention,
            )
        )  # fmt: skip

    def prepared(self, batch: Any) -> Any:
        return padded_mel(batch, self.frames, self.stacked), padded_text(batch)

    def loss(self, prepared: Any) -> Any:
        mel, text = prepared
        targets = int((text["labels"] != -100).sum())
        out = self.model(input_features=mel, decoder_input_ids=text["ids"], labels=text["labels"], use_cache=False)
        return out.loss * targets  # it is their mean

    def write(self, prompts: Any, longest: int) -> list[list[int]]:
        """Greedily, all texts padded on the right and read anew for each token: slow, but nothing to be tuned."""
        import torch

        mel, text = self.prepared(prompts)
        ids, ends = torch.nn.functional.pad(text["ids"], (0, longest)), text["lengths"].long()
        rows, new, going = torch.arange(len(ids)), [[] for _ in ids], torch.ones(len(ids), dtype=torch.bool)
        with torch.no_grad():
            encoded = self.model.model.encoder(mel).last_hidden_state
            for _ in range(longest):
                read = ids[:, : int(ends.max())]
                hidden = self.model.model.decoder(read, encoder_hidden_states=encoded, use_cache=False)[0]
                token = self.model.proj_out(hidden[rows, ends - 1]).argmax(dim=-1)
                ids[rows, ends] = token
                for row in going.nonzero().squeeze(1).tolist():
                    new[row].append(int(token[row]))
                    going[row] = new[row][-1] not in self.stop_ids
                ends = ends + 1
                if not going.any():
                    break
        return new


def build(name: str, data: Data, seed: int) -> Variant:
    if name == "omnitrain":
        return OursAuT(data, seed)
    return Whisper(data, seed, "eager" if "eager" in name else "sdpa", stacked=4 if "12.5" in name else 1)


# --- speed and memory -------------------------------------------------------------------------------------------------


def stepper(variant: Variant, args: argparse.Namespace, steps: int) -> Callable[[Any, int], None]:
    """One optimizer step on a prepared batch with so many targets."""
    import torch

    parameters = list(variant.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    decay = max(1, int(0.3 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / args.warmup, max(0, steps - i) / decay)
    )

    def step(prepared: Any, targets: int) -> None:
        (variant.loss(prepared) / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def targets_of(batch: Any) -> int:
    return int((batch.labels != -100).sum())


def measure_speed(name: str, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Of this process: recordings and seconds of sound per second, and memory."""
    import torch

    from speed.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    batches, variant = data.train[: args.speed_batches], build(name, data, 0)
    variant.model.train()
    prepared = [(variant.prepared(batch), targets_of(batch)) for batch in batches]
    step, seconds = stepper(variant, args, 10_000), []
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step(*prepared[0])
    for _ in range(args.passes):
        start = time.perf_counter()
        for each in prepared:
            step(*each)
        seconds.append(time.perf_counter() - start)
    return {
        "recordings_per_s": sum(len(batch) for batch in batches) / min(seconds),
        "sound_per_s": sum(int(batch.mel_lengths.sum()) for batch in batches) / 100 / min(seconds),
        "tokens_per_s": sum(targets_of(batch) for batch in batches) / min(seconds),
        "gib": (resident("VmHWM") - before) / 2**30,
        "parameters": sum(p.numel() for p in variant.model.parameters()),
    }


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# --- learning ---------------------------------------------------------------------------------------------------------


def measure_learning(name: str, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Of this process: held-out loss and CER after every `eval_every` steps, against seconds of training."""
    import torch

    torch.set_num_threads(args.threads)
    variant = build(name, data, args.seed)
    step, spent, points = stepper(variant, args, args.steps), 0.0, [{"step": 0, "seconds": 0.0} | score(variant, data)]
    for index, batch in enumerate(islice(in_order(data.train, args.seed), args.steps), start=1):
        prepared, targets = variant.prepared(batch), targets_of(batch)
        variant.model.train()
        start = time.perf_counter()
        step(prepared, targets)
        spent += time.perf_counter() - start
        if index % args.eval_every == 0 or index == args.steps:
            points.append({"step": index, "seconds": spent} | score(variant, data))
            print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    return {"points": points}


def in_order(batches: Sequence[Any], seed: int) -> Iterator[Any]:
    """All batches again and again, in an order that the seed and the pass say."""
    epoch = 0
    while True:
        yield from random.Random(f"{seed}/{epoch}").sample(list(batches), len(batches))
        epoch += 1


def score(variant: Variant, data: Data) -> dict[str, float]:
    """Nats per target token, and character error rate, of the held-out samples."""
    import torch

    from omnitrain.data.chat import ChatTokenizer
    from omnitrain.evaluation.metrics import cer

    tokenizer = ChatTokenizer.from_file(data.tokenizer)
    variant.model.eval()
    nats, said, heard = 0.0, [], []
    with torch.no_grad():
        for batch in data.heldout:
            nats += float(variant.loss(variant.prepared(batch)))
            references = [
                [token for token in labels.tolist() if token != -100 and token not in data.stop_ids]
                for labels in batch.labels.split(batch.cu_seqlens.diff().tolist())
            ]
            written = variant.write(batch.prompts(), 2 * max(map(len, references)) + 4)
            said += map(tokenizer.decode, references)
            heard += map(tokenizer.decode, written)
    return {"loss": nats / sum(map(targets_of, data.heldout)), "cer": cer(heard, said)}


# --- the whole run ----------------------------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and curves.svg")
    parser.add_argument("--data", type=Path, default=PACK, help="folder of shards with recordings of task asr")
    parser.add_argument("--tokenizer", type=Path, default=PACK / "tokenizer_speech.json")
    parser.add_argument("--heldout-split", default="heldout_cell")
    parser.add_argument("--recordings", type=int, help="of the training split; default: all")
    parser.add_argument("--heldout", type=int, default=96, help="recordings that are scored")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, audio features among them")
    parser.add_argument("--mel-frames", type=int, default=3000, help="of a batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="for speed; the last also for learning")
    parser.add_argument("--speed-batches", type=int, default=6)
    parser.add_argument("--passes", type=int, default=3, help="over them; the fastest counts")
    parser.add_argument("--steps", type=int, default=600, help="of learning; 0: speed alone")
    parser.add_argument("--learn-stacked", action="store_true", help="Whisper at 12.5 positions a second learns too")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--child", nargs=4, metavar=("WHAT", "VARIANT", "THREADS", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args(given)


def child(args: argparse.Namespace) -> None:
    """One measurement, in this process; its result is the last line printed."""
    what, name, threads, seed = args.child
    args.threads, args.seed = int(threads), int(seed)
    with (args.out / "data.pickle").open("rb") as file:
        data = pickle.load(file)
    print(json.dumps({"speed": measure_speed, "learning": measure_learning}[what](name, data, args)))


def measured(results: dict[str, Any], args: argparse.Namespace, what: str, name: str, threads: int, seed: int) -> Any:
    """The result of a process of its own, kept in `results` and on disk; one that is there is not measured again."""
    key = f"{what}/{name}/{threads} threads" + (f"/seed {seed}" if what == "learning" else "")
    if key not in results:
        command = [sys.executable, "-m", "speed.aut_training", *sys.argv[1:], "--child", what, name]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*command, str(threads), str(seed)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        results[key] = json.loads(done.stdout.splitlines()[-1])
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
    return results[key]


def print_speed(results: dict[str, Any], args: argparse.Namespace) -> str:
    """Measure and print speed and memory. Returns the faster attention of Whisper."""
    print(f"{'':30}{'threads':>8}{'recordings/s':>14}{'sound/s':>9}{'memory':>11}{'parameters':>12}")
    for threads in args.threads:
        found = {name: measured(results, args, "speed", name, threads, 0) for name in VARIANTS}
        for name, r in found.items():
            print(
                f"{name:30}{threads:8}{r['recordings_per_s']:14.1f}{r['sound_per_s']:9.1f}{r['gib']:7.2f} GiB"
                f"{r['parameters'] / 1e6:10.2f} M",
                flush=True,
            )
        best = max(VARIANTS[1:3], key=lambda name: found[name]["recordings_per_s"])
        for other in (best, VARIANTS[3]):
            speed, memory = (found["omnitrain"][k] / found[other][k] for k in ("recordings_per_s", "gib"))
            print(f"omnitrain / {other}, {threads} threads: {speed:.2f} x recordings/s, {memory:.2f} x memory")
    return best


def print_learning(results: dict[str, Any], args: argparse.Namespace, best: str) -> dict[str, list[list[Any]]]:
    """Train all seeds and print the ends of their curves. Returns the points of each variant, seed by seed."""
    names, threads = ("omnitrain", best, *VARIANTS[3 : 3 + args.learn_stacked]), args.threads[-1]
    curves: dict[str, list[list[Any]]] = {name: [] for name in names}
    print(f"\n{'after ' + str(args.steps) + ' steps':30}{'seed':>5}{'loss':>8}{'CER':>8}{'seconds':>9}")
    for seed in args.seeds:
        for name in names:
            points = measured(results, args, "learning", name, threads, seed)["points"]
            curves[name].append(points)
            end = points[-1]
            print(f"{name:30}{seed:5}{end['loss']:8.3f}{end['cer']:8.1%}{end['seconds']:9.0f}", flush=True)
    for name in names[1:]:
        pairs = list(zip(curves["omnitrain"], curves[name], strict=True))
        cer = [a[-1]["cer"] - b[-1]["cer"] for a, b in pairs]
        loss = [a[-1]["loss"] - b[-1]["loss"] for a, b in pairs]
        seconds = mean(b[-1]["seconds"] / a[-1]["seconds"] for a, b in pairs)
        print(
            f"omnitrain - {name}: loss {mean(loss):+.3f} ({min(loss):+.3f} to {max(loss):+.3f}), CER {mean(cer):+.1%} "
            f"({min(cer):+.1%} to {max(cer):+.1%}); {seconds:.2f} x the steps per second"
        )
    return curves


def draw(curves: dict[str, list[list[Any]]], path: Path) -> None:
    """Held-out loss and CER over steps and over seconds of training; a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, (y, label) in enumerate((("loss", "nats per target token"), ("cer", "character error rate"))):
        for column, x in enumerate(("step", "seconds")):
            for colour, (name, seeds) in enumerate(curves.items()):
                for seed, points in enumerate(seeds):
                    xs, ys = [p[x] for p in points], [p[y] for p in points]
                    axes[row, column].plot(xs, ys, f"C{colour}", lw=1.2, label=None if seed else name)
            axes[row, column].grid(alpha=0.3)
        axes[row, 0].set_ylabel(f"{label}, held out")
    axes[1, 0].set_xlabel("optimizer steps on the same batches")
    axes[1, 1].set_xlabel("seconds of training")
    axes[0, 1].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    args = arguments()
    if args.child:
        return child(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    here = f"{Path(__file__).parents[1]}{os.sep}"  # what is inside the clone is told without where that lies
    asked = {
        name: str(value).removeprefix(here)
        for name, value in sorted(vars(args).items())
        if name not in ("out", "child")
    }
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("arguments", asked) != asked:
        sys.exit(f"{path} holds results of other arguments: {results['arguments']}; choose another --out")
    data = read_data(args)
    with (args.out / "data.pickle").open("wb") as file:
        pickle.dump(data, file)
    minutes = sum(int(batch.mel_lengths.sum()) for batch in data.train) / 6000
    about = f"{sum(map(len, data.train))} recordings in {len(data.train)} batches, {minutes:.1f} minutes"
    padded = sum(len(batch) for batch in data.train) * data.frames / 6000
    results |= {"arguments": asked, "data": f"{about}; padded to the longest, {data.frames / 100:.1f} s: {padded:.1f}"}
    print(results["data"], flush=True)
    best = print_speed(results, args)
    if args.steps:
        draw(print_learning(results, args, best), args.out / "curves.svg")
    (args.out / "data.pickle").unlink()


if __name__ == "__main__":
    main()
