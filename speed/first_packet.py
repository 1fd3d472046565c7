"""Time to the first 80 ms of a spoken answer, by component, as in the report's table 2.

    python -m speed.first_packet                        # the tiny preset on a CPU; half a minute
    python -m speed.first_packet --preset small --seconds 30
    python -m speed.first_packet --arriving             # one question of 5 s, 30 s and 5 min, read while it is asked

N answers are asked for at the same moment and made side by side; a row is the time until the last of the N is through
that component, so the total is what each of them waits. Random weights: the numbers depend on sizes, not on what is
said. Rows:
  pre-processing        decoding the media, mel frames or patches, tokens (one after the other, on the CPU)
  Thinker, first token  encoders, prefill, the first word
  Talker, first token   its prefill with the header and that word, and codebook 0 of the first frame
  MTP                   the frame's other codebooks
  Code2Wav              its samples
With --arriving a row is what is left to do when the last of the sound is there: for the whole of it, and with what came
before read already (`generation.arriving`), by windows of 8 s, as the encoder has them by default, and of 1 s.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from speed.speech_frame import Clock, write_model

ROWS = ("pre-processing", "Thinker, first token", "Talker, first token", "MTP", "Code2Wav")


def recording(seconds: float) -> bytes:
    """Noise as FLAC, 16 kHz."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).standard_normal(int(16_000 * seconds)) / 8, 16_000, format="FLAC")
    return file.getvalue()


def video(seconds: float) -> bytes:
    """Noise as MP4, 224 x 224 at 4 frames/s, with sound."""
    import av

    rng, file = np.random.default_rng(0), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        pictures: Any = container.add_stream("mpeg4", rate=4)
        pictures.width = pictures.height = 224
        sound: Any = container.add_stream("aac", rate=16_000, layout="mono")
        for _ in range(int(4 * seconds)):
            pixels = rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels)))
        samples = (rng.standard_normal((1, int(16_000 * seconds))) / 8).astype(np.float32)
        for start in range(0, samples.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(samples[:, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(sound.encode(frame))
        container.mux(pictures.encode())
        container.mux(sound.encode())
    return file.getvalue()


def first_packet(speaker: Any, encoder: Any, segment: Any, answers: int) -> dict[str, float]:
    """Milliseconds of each row for `answers` prompts side by side."""
    from omnitrain.data.sample import Message, Sample, Segment
    from omnitrain.generation.sampling import Sampling
    from omnitrain.generation.speech import SpeechOptions

    ms: dict[str, float] = defaultdict(float)
    last = time.perf_counter()

    def lap(row: str) -> None:
        nonlocal last
        now = time.perf_counter()
        ms[row] += 1000 * (now - last)
        last = now

    question = Message(role="user", segments=(segment, Segment(type="text", text="what is red?")))
    sample = Sample(id="", source="", messages=(question,))
    options = SpeechOptions(voice="ethan", codes=Sampling(), residuals=Sampling())
    made = [speaker.answer(options, encoder.encode_prompt(sample, lambda s: s.media)) for _ in range(answers)]
    lap(ROWS[0])
    speaker.listen(made)
    speaker.write(made)
    lap(ROWS[1])
    clock = Clock()
    mtp = speaker.talker.mtp
    inner = mtp.generate
    clock.wrap("MTP", mtp, "generate")
    speaker.start(made)
    speaker.frame(made)
    lap(ROWS[2])
    mtp.generate = inner
    ms["MTP"] = 1000 * clock.seconds["MTP"]
    ms[ROWS[2]] -= ms["MTP"]
    speaker.sound(made)
    lap(ROWS[4])
    return ms


def behind_the_sound(speaker: Any, encoder: Any, seconds: float) -> dict[str, float]:
    """Milliseconds from the last mel frame of a question to the first sound of its answer, by how it was read."""
    import torch

    from omnitrain.data.sample import Message, Sample, Segment
    from omnitrain.generation.arriving import ArrivingQuestion
    from omnitrain.generation.sampling import Sampling
    from omnitrain.generation.speech import AudioPiece, SpeechBatch, SpeechOptions

    segments = (Segment(type="audio", media=recording(seconds)), Segment(type="text", text="what is red?"))
    sample = Sample(id="", source="", messages=(Message(role="user", segments=segments),))
    prompt = encoder.encode_prompt(sample, lambda s: s.media)
    mel = torch.from_numpy(prompt.mel[0])
    options = SpeechOptions(voice="ethan", codes=Sampling(), residuals=Sampling())

    def first_sound(answer: Any, start: float) -> float:
        batch = SpeechBatch(speaker, [answer])
        while not any(isinstance(event, AudioPiece) for _, event in batch.round()):
            pass
        return 1000 * (time.perf_counter() - start)

    start = time.perf_counter()
    ms = {"at once": first_sound(speaker.answer(options, prompt), start)}
    for window in (800, 100):
        question = ArrivingQuestion(speaker, options, prompt, window_frames=window)
        *before, last = mel.split(10)
        for piece in before:
            question.push(piece)
        start = time.perf_counter()
        question.push(last)
        ms[f"behind, {window // 100} s"] = first_sound(question.finish(), start)
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the recording and of the video")
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many, after a warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arriving", action="store_true", help="read the question while it is asked, instead")
    args = parser.parse_args()

    import torch

    from omnitrain.data.encode import SampleEncoder
    from omnitrain.data.features import AudioGeometry, VisionGeometry
    from omnitrain.data.media import MediaLimits
    from omnitrain.data.sample import Segment
    from omnitrain.generation.speech import Speaker
    from omnitrain.interop.public_format import load_pretrained

    with tempfile.TemporaryDirectory() as folder:
        tokenizer, _ = write_model(args.preset, Path(folder))
        model = load_pretrained(folder, device=args.device).eval()
    speaker = Speaker(model, tokenizer)
    geometry = VisionGeometry(video_min_pixels=224 * 224, video_max_pixels=224 * 224)
    encoder = SampleEncoder(
        tokenizer=tokenizer, audio=AudioGeometry(), vision=geometry, limits=MediaLimits(), vocab_size=320
    )
    if args.arriving:
        print(f"{args.preset}, {args.device}, {torch.get_num_threads()} threads; ms from the last sound to the first")
        for seconds in (5.0, 30.0, 300.0):
            tries = [behind_the_sound(speaker, encoder, seconds) for _ in range(args.repeat)]
            least = {way: min(ms[way] for ms in tries) for way in tries[0]}
            print(f"{seconds:5.0f} s" + "".join(f"{way:>14}{ms:9.1f}" for way, ms in least.items()))
        return
    media = {
        "audio": Segment(type="audio", media=recording(args.seconds)),
        "video": Segment(type="video", media=video(args.seconds), with_audio=True),
    }
    columns = [(kind, n) for kind in media for n in (1, 4, 6)]
    print(f"{args.preset}, {args.seconds:.0f} s of media, {args.device}, {torch.get_num_threads()} threads; ms")
    print(f"{'':22}" + "".join(f"{f'{kind} x {n}':>12}" for kind, n in columns))
    found = {}
    for kind, n in columns:
        with torch.no_grad():
            tries = [first_packet(speaker, encoder, media[kind], n) for _ in range(args.repeat + 1)][1:]
        found[kind, n] = min(tries, key=lambda ms: sum(ms.values()))
    for row in ROWS:
        print(f"{row:22}" + "".join(f"{found[column][row]:12.1f}" for column in columns))
    print(f"{'total':22}" + "".join(f"{sum(found[column].values()):12.1f}" for column in columns))


if __name__ == "__main__":
    main()
