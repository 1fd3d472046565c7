"""Long recordings: time and memory of reading and encoding 1 to 40 minutes, against transformers.

    python -m speed.long_audio                       # ten minutes on one idle core
    python -m speed.long_audio --minutes 1 4         # fewer

A mono FLAC file of 16 kHz becomes mel frames and then AuT's features, by omnitrain (blocks of the file, segments of a
minute, windows of 8 s) and by transformers (libsndfile, `WhisperFeatureExtractor`, `Qwen3OmniMoeAudioEncoder`), with
the same random weights: 4 layers of 256. Each figure comes from a process of its own.

Columns. read, forward: seconds from the file's bytes to mel frames, and from these to features, without gradients.
fwd + bwd: of the encoder on the same frames, the gradient of the features' sum with respect to all weights, with
activation checkpointing (ours by segments, theirs by layers). Seconds are those of the processor, on one thread: what
else runs on the machine hardly counts. whole: growth of the process's peak resident memory over what it has before
the file is read. encoder: the same of the encoder alone, in a process that has the mel frames before, less the features
that it gives: what must grow with the recording is not counted. There, what is freed goes back to the system at once
(the C library's MALLOC_MMAP_THRESHOLD_), or the figure would be how it cuts up what it keeps.

The line fitted is seconds = a + b * minutes. The backward pass of transformers, which takes some 270 MiB a minute, is
left out above 20 minutes (--reference-backward).
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
SIZES: dict[str, Any] = dict(d_model=256, layers=4, heads=4, ffn=1024, out_dim=256, conv_hidden=64)


def write_recordings(minutes: int, folder: Path) -> None:
    """Tones that come and go, as FLAC, and frames of noise: what is heard does not change the time it takes."""
    import soundfile

    rng, seconds = np.random.default_rng(minutes), np.arange(60 * RATE) / RATE
    with soundfile.SoundFile(folder / f"{minutes}.flac", "w", RATE, 1, "PCM_16", format="FLAC") as file:
        for k in range(minutes):
            tone = np.sin(2 * np.pi * (200 + 10 * k) * seconds) * np.sin(2 * np.pi * 2 * seconds)
            file.write((0.3 * tone + 0.01 * rng.standard_normal(len(seconds))).astype(np.float32))
    np.save(folder / f"{minutes}.npy", rng.standard_normal((6000 * minutes, 128), dtype=np.float32))


# ------------------------------------------------------------------------------------------------------------- variants

Read = Callable[[bytes], Any]
"""A file's bytes -> mel frames, as the encoder takes them."""


def omnitrain() -> tuple[Read, Any, Callable[[Any], Any]]:
    """Reading, the encoder, and the encoder's call."""
    import torch

    from omnitrain.data.features import log_mel_of_blocks
    from omnitrain.data.media import audio_blocks

    encoder = _ours()
    return (
        lambda data: torch.from_numpy(log_mel_of_blocks(audio_blocks(data))),
        encoder,
        lambda mel: encoder(mel, torch.tensor([len(mel)])),
    )


def transformers() -> tuple[Read, Any, Callable[[Any], Any]]:
    import soundfile
    import torch
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=128, sampling_rate=RATE)
    encoder = _theirs()

    def read(data: bytes) -> Any:
        wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        found = extractor(wave, sampling_rate=RATE, padding=False, truncation=False, return_tensors="pt")
        return found["input_features"][0].T

    return read, encoder, lambda mel: encoder(mel.T, feature_lens=torch.tensor([len(mel)])).last_hidden_state


def _ours() -> Any:
    import torch

    from omnitrain.models.aut import AuTEncoder
    from omnitrain.models.sizes import AuTConfig

    torch.manual_seed(0)
    encoder = AuTEncoder(AuTConfig(**SIZES))
    encoder.activation_checkpointing = True
    return encoder


def _theirs() -> Any:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

    config = Qwen3OmniMoeAudioEncoderConfig(
        num_mel_bins=128, encoder_layers=SIZES["layers"], encoder_attention_heads=SIZES["heads"],
        encoder_ffn_dim=SIZES["ffn"], d_model=SIZES["d_model"], n_window=50, n_window_infer=800,
        output_dim=SIZES["out_dim"], downsample_hidden_size=SIZES["conv_hidden"],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    encoder = Qwen3OmniMoeAudioEncoder(config)
    encoder.load_state_dict(_ours().state_dict())
    encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return encoder.train()  # it has no dropout; only in training does it checkpoint


MEASURED = ("whole", "forward", "backward")
VARIANTS = {"omnitrain": omnitrain, "transformers": transformers}


# ------------------------------------------------------------------------------------------------------------ processes


def measure(variant: str, what: str, minutes: int, folder: Path) -> dict[str, float]:
    """One of `MEASURED`, in this process."""
    import torch

    torch.set_num_threads(1)
    read, encoder, encode = VARIANTS[variant]()
    _features(encode, torch.zeros(300, 128), what)  # what libraries load with their first call
    encoder.zero_grad(set_to_none=True)
    data, mel = b"", None
    if what == "whole":
        data = (folder / f"{minutes}.flac").read_bytes()
    else:
        mel = torch.from_numpy(np.load(folder / f"{minutes}.npy"))
    gc.collect()
    before, begin = _status("VmRSS"), time.process_time()
    if mel is None:
        mel = read(data)
    was_read = time.process_time()
    features = _features(encode, mel, what)
    end, peak = time.process_time(), _status("VmHWM")
    kept = 0 if what == "whole" else features.numel() * features.element_size()
    return {
        "read": was_read - begin,
        "encode": end - was_read,
        "mib": (peak - before - kept) / 2**20,
        "sum": float(features.detach().double().abs().mean()),
    }


def _features(encode: Callable[[Any], Any], mel: Any, what: str) -> Any:
    import torch

    with torch.set_grad_enabled(what == "backward"):
        features = encode(mel)
    if what == "backward":
        features.sum().backward()
    return features


def _status(key: str) -> int:
    """Bytes that Linux has written down about this process: VmRSS, its memory now, or VmHWM, the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_a_process(variant: str, what: str, minutes: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "speed.long_audio", "--measure", variant, what, str(minutes), str(folder)]
    freed = {} if what == "whole" else {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | freed)
    if done.returncode:
        raise RuntimeError(f"{variant} {what} {minutes} min: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _line(
    variant: str,
    minutes: int,
    whole: dict[str, float],
    forward: dict[str, float],
    backward: dict[str, float] | None = None,
) -> str:
    last = f"{backward['encode']:9.2f} s{backward['mib']:7.0f} MiB" if backward else f"{'-':>11}{'-':>11}"
    return (
        f"{variant:13}{minutes:4} min{whole['read']:6.2f} s{whole['encode']:7.2f} s{whole['mib']:7.0f} MiB"
        f"{forward['mib']:7.0f} MiB{last}"
    )


def r_squared(minutes: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """The line seconds = a + b * minutes of least squares: a, b and the share of the variance that it explains."""
    b, a = np.polyfit(minutes, seconds, 1)
    rest = np.asarray(seconds) - (a + b * np.asarray(minutes))
    return float(a), float(b), float(1 - rest.var() / np.var(seconds))


def report(rows: dict[str, dict[int, dict[str, dict[str, float]]]]) -> None:
    """Lines fitted, flatness and ratios."""
    for variant, found in rows.items():
        for name, what, parts in (
            ("read + forward", "whole", ("read", "encode")),
            ("forward + backward", "backward", ("encode",)),
        ):
            minutes = [m for m in sorted(found) if what in found[m]]
            if len(minutes) > 2:
                a, b, r2 = r_squared(minutes, [sum(found[m][what][part] for part in parts) for m in minutes])
                print(f"{variant}, {name}: {a:+.2f} s {b:+.3f} s a minute, R2 {r2:.4f}")
        for what in MEASURED[1:]:
            long = [m for m in sorted(found) if m >= 4 and what in found[m]]
            if len(long) > 1:
                memory = [found[m][what]["mib"] for m in long]
                span, spread = f"{long[0]} to {long[-1]} minutes", max(memory) / min(memory) - 1
                print(f"{variant}, memory of the encoder {what}: {spread:.1%} apart from {span}")
    if len(rows) == 2:
        for what, parts in (("whole", ("read", "encode")), ("backward", ("encode",))):
            longest = max(m for m, found in rows["transformers"].items() if what in found)
            ours, theirs = (rows[name][longest][what] for name in ("omnitrain", "transformers"))
            time, memory = sum(theirs[p] for p in parts) / sum(ours[p] for p in parts), theirs["mib"] / ours["mib"]
            print(f"{longest} minutes, {what}: transformers takes {time:.2f} x the time, {memory:.1f} x the memory")
            apart = abs(ours["sum"] / theirs["sum"] - 1)
            print(f"{longest} minutes, {what}: mean magnitudes of the features are {apart:.0e} apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, nargs="+", default=[1, 2, 4, 10, 20, 40])
    parser.add_argument("--only", choices=list(VARIANTS), help="one of the two")
    up_to = "the backward pass of transformers up to so many minutes (default 20; 40 take 11 GB)"
    parser.add_argument("--reference-backward", type=int, default=20, metavar="MINUTES", help=up_to)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        variant, what, minutes, folder = args.measure
        print(json.dumps(measure(variant, what, int(minutes), Path(folder))))
        return
    rows: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    print(f"{'':13}{'':>8}{'read':>8}{'forward':>9}{'whole':>11}{'encoder':>11}{'fwd + bwd':>11}{'encoder':>11}")
    with tempfile.TemporaryDirectory() as name:
        for minutes in args.minutes:
            write_recordings(minutes, Path(name))
            for variant in [args.only] if args.only else VARIANTS:
                measured = MEASURED
                if variant == "transformers" and minutes > args.reference_backward:
                    measured = MEASURED[:2]
                found = {what: in_a_process(variant, what, minutes, Path(name)) for what in measured}
                rows.setdefault(variant, {})[minutes] = found
                print(_line(variant, minutes, **found), flush=True)
    report(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
