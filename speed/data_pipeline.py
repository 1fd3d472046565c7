"""The data pipeline: one core against the reference; samples/s and packed tokens/s by workers; how long training waits.

    python -m speed.data_pipeline                        # a few minutes on two cores
    python -m speed.data_pipeline --media 0 --workers 0 2 --batches 60 --steps 0
    python -m speed.data_pipeline --workers              # the first table alone

First table: from the bytes of a file to patches and mel frames, with omnitrain and with transformers, whose Qwen2-VL
processors (those of Qwen3-Omni) and Whisper extractor get what Pillow and PyAV decode, or torchcodec where it is
installed; by turns, on one thread. Times are medians over `--media` rounds; *differs* is the mean absolute difference
of the features (patches lie within -1 and 1).

Second table: the training stream of the embedded pack (pictures, speech, sounds, video and text, mixed, decoded,
packed) alone, nothing trained. *samples/s* and *tokens/s* are counted over `--batches` packs after a warm-up. *packing*
is the mean filling of those packs by the budget that is nearest to its end (tokens, mel frames or patches); a pack is
closed when the next samples fit into none of its budgets.

Third table: a short real `fit` of the tiny preset (`+recipe=quickstart`), each with its own number of workers. *wait*
is the share of a step that the training process spends waiting for its next batch, from the run's own `throughput.csv`.

Figures of all tables come from one run on one machine; nothing else should run on it meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

TOKENS, MEL_FRAMES, PATCHES = 2048, 6000, 8192  # of a pack, as conf/data/shards.yaml


RATE, FPS, SHOWN = 16_000, 24, 2  # Hz; frames per second of the file, and of what is sampled of it


def media_files() -> dict[str, tuple[str, bytes]]:
    """What is read: kind and bytes, by name. Smooth noise compresses about as well as photographs do."""
    import torch

    from omnitrain.data.media import encode_audio, encode_image, encode_video

    torch.manual_seed(0)

    def smooth(n: int, height: int, width: int) -> np.ndarray:
        coarse = torch.rand(n, 3, height // 40, width // 40)
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") + torch.rand(height, width) / 20
        return (fine.permute(0, 2, 3, 1).clamp(0, 1) * 255).byte().numpy()

    still = np.tile(smooth(1, 360, 1280)[0], (1, 2, 1))
    pan = np.stack([still[:, 4 * k : 4 * k + 640] for k in range(10 * FPS)])

    def tone(rate: int) -> np.ndarray:
        time = np.arange(10 * rate) / rate
        return (0.5 * np.sin(2 * np.pi * (200 + 300 * time) * time)).astype(np.float32)

    return {
        "picture: JPEG, 1600 x 1200": ("image", encode_image(smooth(1, 1200, 1600)[0], "jpeg")),
        "sound: 10 s, FLAC, 16 kHz": ("audio", encode_audio(tone(RATE), RATE, "flac")),
        "sound: 10 s, MP3, 44.1 kHz": ("audio", encode_audio(tone(44_100), 44_100, "mp3", 128_000)),
        "video: 10 s, H.264, 640 x 360": ("video", encode_video(pan, FPS, tone(44_100), 44_100)),
    }


Steps = dict[str, tuple[Callable[[bytes], Any], Callable[[Any], tuple[np.ndarray, ...]]]]
"""By kind of medium: bytes to arrays, and arrays to features."""


def our_steps() -> Steps:
    from omnitrain.data.features import image_patches, log_mel, video_patches
    from omnitrain.data.media import decode_audio, decode_image, decode_video

    return {
        "image": (decode_image, lambda image: image_patches(image)[:1]),
        "audio": (decode_audio, lambda wave: (log_mel(wave),)),
        "video": (
            lambda data: decode_video(data, SHOWN),
            lambda video: (video_patches(video.frames)[0], log_mel(video.audio)),
        ),
    }


def reference_steps(torchcodec: bool) -> Steps:
    """The public processors behind Pillow and PyAV, or behind torchcodec (which may be missing)."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, WhisperFeatureExtractor

    from omnitrain.data.settings import VisionGeometry

    g = VisionGeometry()
    grey: dict[str, Any] = {"patch_size": g.patch, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(size={"shortest_edge": g.min_pixels, "longest_edge": g.max_pixels}, **grey)
    size = {"shortest_edge": g.video_min_pixels, "longest_edge": g.video_max_pixels}
    videos = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=True, max_video_tokens=128_000, **grey)
    extractor = WhisperFeatureExtractor(feature_size=128, sampling_rate=RATE)

    def mel(wave: np.ndarray) -> np.ndarray:
        options: dict[str, Any] = {"sampling_rate": RATE, "padding": False, "truncation": False}
        return extractor(wave, return_tensors="np", **options)["input_features"][0].T

    def patches(frames: Any) -> np.ndarray:
        return videos(frames, return_tensors="np", do_sample_frames=False)["pixel_values_videos"]

    features = {
        "image": lambda image: (images(image, return_tensors="np")["pixel_values"],),
        "audio": lambda wave: (mel(wave),),
        "video": lambda video: (patches(video[0]), mel(video[1])),
    }
    decoders = _torchcodec_decoders() if torchcodec else _pyav_decoders()
    return {kind: (decoders[kind], features[kind]) for kind in features}


def _pyav_decoders() -> dict[str, Callable[[bytes], Any]]:
    import av
    import torch
    from PIL import Image

    def sound(data: bytes) -> np.ndarray:
        with av.open(io.BytesIO(data), "r") as container:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
            frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
            return np.concatenate([f.to_ndarray()[0] for f in (*frames, *resampler.resample(None))])

    def pictures(data: bytes) -> Any:
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            shown = islice(container.decode(video=0), 0, None, FPS // SHOWN)
            return torch.from_numpy(np.stack([f.to_ndarray(format="rgb24") for f in shown])).permute(0, 3, 1, 2)

    return {
        "image": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "audio": sound,
        "video": lambda data: (pictures(data), sound(data)),
    }


def _torchcodec_decoders() -> dict[str, Callable[[bytes], Any]]:
    from torchcodec.decoders import AudioDecoder, VideoDecoder, decode_image  # ty: ignore[import-not-found]

    def sound(data: bytes) -> np.ndarray:
        return AudioDecoder(data, sample_rate=RATE, num_channels=1).get_all_samples().data[0].numpy()

    def pictures(data: bytes) -> Any:
        decoder = VideoDecoder(data, num_ffmpeg_threads=1)
        return decoder.get_frames_at(list(range(0, len(decoder), FPS // SHOWN))).data

    return {"image": decode_image, "audio": sound, "video": lambda data: (pictures(data), sound(data))}


def compare_media(rounds: int) -> None:
    """Print the first table."""
    import torch

    torch.set_num_threads(1)
    ways: dict[str, Steps] = {"omnitrain": our_steps(), "transformers": reference_steps(torchcodec=False)}
    try:
        ways["with torchcodec"] = reference_steps(torchcodec=True)
    except (ImportError, OSError, RuntimeError) as error:  # it is there, but not the FFmpeg or torch that it needs
        print(f"torchcodec is left out: {str(error).splitlines()[0]}\n")
    print(f"{'one core, ms':<31} {'decoding':>9} {'features':>9} {'samples/s':>10} {'ours/its':>9} {'differs':>8}")
    for name, (kind, data) in media_files().items():
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        found = {}
        for turn in range(rounds + 1):
            for way, steps in ways.items():
                decode, features = steps[kind]
                begin = time.perf_counter()
                decoded = decode(data)
                middle = time.perf_counter()
                found[way] = features(decoded)
                if turn:  # the first is a warm-up
                    times[way].append((middle - begin, time.perf_counter() - middle))
        print(name)
        rates = {way: 1 / median(map(sum, rows)) for way, rows in times.items()}
        for way, rows in times.items():
            decoding, extraction = (1000 * median(column) for column in zip(*rows, strict=True))
            n = [min(len(a), len(b)) for a, b in zip(found["omnitrain"], found[way], strict=True)]
            pairs = zip(found["omnitrain"], found[way], n, strict=True)
            differs = max(float(np.abs(a[:k] - b[:k]).mean()) for a, b, k in pairs)
            print(
                f"  {way:<29} {decoding:>9.2f} {extraction:>9.2f} {rates[way]:>10.1f} "
                f"{rates['omnitrain'] / rates[way]:>9.2f} {differs:>8.4f}",
                flush=True,
            )
    print()


def measure_stream(pack: Path, workers: int, batches: int, warm_up: int) -> dict[str, float]:
    """Rates of the packed stream with `workers` processes (0: in this one)."""
    from omnitrain.data.datamodule import OmniDataModule
    from omnitrain.data.settings import DataConfig, SourceConfig

    data = OmniDataModule(
        DataConfig(
            sources={"pack": SourceConfig(path=pack, split="train")},
            tokenizer=str(pack / "tokenizer.json"),
            num_workers=workers,
            max_tokens=TOKENS,
            max_mel_frames=MEL_FRAMES,
            max_patches=PATCHES,
        )
    )
    data.setup("fit")
    stream = data.stream()
    try:
        for _ in islice(stream, warm_up):
            pass
        samples = tokens = 0
        filling = []
        begin = time.perf_counter()
        for batch in islice(stream, batches):
            samples += len(batch)
            tokens += batch.n_tokens
            mel = 0 if batch.mel is None else len(batch.mel)
            patches = 0 if batch.patches is None else len(batch.patches)
            filling.append(
                max(
                    batch.n_tokens / TOKENS,
                    mel / MEL_FRAMES,
                    patches / PATCHES,
                )
            )
        seconds = time.perf_counter() - begin
    finally:
        data.teardown("fit")
    return {"samples": samples / seconds, "tokens": tokens / seconds, "packing": mean(filling)}


def measure_fit(workers: int, steps: int) -> dict[str, float]:
    """Seconds per step and the share of them spent waiting, from a real run of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "omnitrain", "fit", "+recipe=quickstart"),
            *(f"trainer.max_steps={steps}", "trainer.limit_val_batches=0", "evaluation.after_fit=false"),
            *(f"data.num_workers={workers}", f"paths.run_dir={folder}/run"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                output, _ = process.communicate()
            finally:  # an interrupted benchmark leaves no training behind
                process.terminate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{output[-4000:]}")
        with open(f"{folder}/run/throughput.csv", newline="") as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    rows = rows[len(rows) // 4 :]  # while workers start and fill their buffers, training waits
    seconds = sum(row["seconds_per_step"] for row in rows)
    return {
        "seconds": seconds / len(rows),
        "tokens": sum(row["tokens_per_second"] * row["seconds_per_step"] for row in rows) / seconds,
        "wait": sum(row["data_wait"] * row["seconds_per_step"] for row in rows) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=int, default=20, help="rounds of the first table; 0: none of it (20)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="numbers of worker processes (0 1 2)")
    parser.add_argument("--batches", type=int, default=100, help="packs measured in the second table (100)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each fit; 0: no third table (40)")
    parser.add_argument("--pack", type=Path, help="folder of shards with a tokenizer.json; default: the embedded pack")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    import omnitrain

    if options.media:
        import torch

        threads = torch.get_num_threads()
        compare_media(options.media)
        torch.set_num_threads(threads)
    if not options.workers:
        return
    pack = options.pack or Path(omnitrain.__file__).parent / "pack"
    print(
        f"{os.cpu_count()} cores, {pack.name}, packs of {TOKENS} tokens, {MEL_FRAMES} mel frames, {PATCHES} patches\n"
    )
    print(f"{'workers':>7} {'samples/s':>10} {'tokens/s':>10} {'packing':>8}")
    for workers in options.workers:
        row = measure_stream(pack, workers, options.batches, warm_up=10)
        print(f"{workers:>7} {row['samples']:>10,.0f} {row['tokens']:>10,.0f} {row['packing']:>8.2%}", flush=True)
    if options.steps:
        print(f"\nfit of the tiny preset, {options.steps} steps")
        print(f"{'workers':>7} {'s/step':>10} {'tokens/s':>10} {'wait':>8}")
        for workers in options.workers:
            row = measure_fit(workers, options.steps)
            print(f"{workers:>7} {row['seconds']:>10.2f} {row['tokens']:>10,.0f} {row['wait']:>8.2%}", flush=True)


if __name__ == "__main__":
    main()
