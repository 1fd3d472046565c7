"""Milliseconds for one 80-ms frame of a spoken answer, by component: omnitrain against transformers.

    python -m speed.speech_frame                        # the small preset; two minutes on a CPU
    python -m speed.speech_frame --preset tiny --frames 60

Both read the same random weights from one folder in the public format and make the same greedy answer in the same
process, in turn; the first answer of each is a warm-up. The codes of both are compared at the end.

What a row is:
  Thinker, Talker   one step (one token, one position), its head included
  MTP               all codebooks of one frame but the first
  Code2Wav          samples of one frame. omnitrain decodes each frame as it comes and reads all weights each time, or
                    from the second on so many together as --frames-per-piece says; transformers decodes once, when
                    everything is there, and its time is divided by the frames
  frame             the whole answer over its frames: the Thinker's steps, prompts and everything between the parts
  first             from the question to the first sound that can be played
  of N answers      N answers side by side (`speak_batch`): time over the frames of all, to compare with `frame`
RTF: time of the answer over the duration of its sound. Below 1 a voice can be streamed without a gap.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

FRAME_SECONDS = 0.08
WORDS = ["system\n", "user\n", "assistant\n"] * 50
TOGETHER = (4, 8)
CLASSES = ("Thinker", "Talker", "MTP", "Code2Wav")


def write_model(preset: str, folder: Path) -> tuple[Any, Any]:
    """A random speaking model in the public format, with Code2Wav as transformers computes it. Returns its tokenizer,
    and the model's configuration."""
    import torch

    from omnitrain.data.chat import train_bpe
    from omnitrain.interop.public_format import save_pretrained
    from omnitrain.models.presets import build, init_weights

    tokenizer = train_bpe(WORDS, 320)
    ids = {**tokenizer.special_ids, **{role: tokenizer.encode(role)[0] for role in ("system", "user", "assistant")}}
    model = build(preset, vocab_size=320, special_tokens=ids, speech=True, code2wav={"trim": "public"})
    init_weights(model, seed=0)
    with torch.no_grad():  # heads that are sure of something: no ties for the two implementations to break apart
        model.thinker.lm_head.weight.mul_(20)
        model.talker.codec_head.weight.mul_(20)
        model.talker.codec_head.weight[model.config.talker.codec_eos] = 0  # the answer does not end
        model.talker.mtp.code_head.mul_(20)
        for stop in tokenizer.stop_ids:
            model.thinker.lm_head.weight[stop] = 0
    save_pretrained(model, folder)
    return tokenizer, model.config


class Clock:
    """Seconds and calls of functions that are wrapped while it runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def wrap(self, name: str, owner: Any, attribute: str, counts: Callable[..., bool] = lambda *a, **k: True) -> None:
        inner = getattr(owner, attribute)

        @wraps(inner)  # transformers reads the signature of a model's forward
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            if counts(*args, **kwargs):
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1
            return result

        setattr(owner, attribute, timed)

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def milliseconds(self, name: str) -> float:
        return 1000 * self.seconds[name] / max(self.calls[name], 1)


def omnitrain_answer(
    folder: Path, tokenizer: Any, frames: int, tokens: int, compile: bool, frames_per_piece: int
) -> Callable[[], dict[str, Any]]:
    """What streams one answer and gives milliseconds by component, and its codes."""
    import numpy as np

    from omnitrain.data.encode import SampleEncoder
    from omnitrain.data.features import AudioGeometry, VisionGeometry
    from omnitrain.data.media import MediaLimits
    from omnitrain.data.sample import Message, Segment
    from omnitrain.generation.sampling import Sampling
    from omnitrain.generation.speech import AudioPiece, Speaker, SpeechOptions, SpeechSession, speak_batch
    from omnitrain.interop.public_format import load_pretrained

    model = load_pretrained(folder).eval()
    encoder = SampleEncoder(
        tokenizer=tokenizer, audio=AudioGeometry(), vision=VisionGeometry(), limits=MediaLimits(), vocab_size=320
    )
    speaker = Speaker(model, tokenizer, compile=compile)
    options = SpeechOptions(
        voice="ethan",
        codes=Sampling(repetition_penalty=1.05),
        residuals=Sampling(),
        max_new_tokens=tokens,
        frames_per_piece=frames_per_piece,
    )

    question = Message(role="user", segments=(Segment(type="text", text="what is red?"),))

    def answer(n: int) -> tuple[float, float, Any]:
        session = SpeechSession(model, encoder, replace(options, max_frames=n), speaker=speaker)
        start, first, codes = time.perf_counter(), 0.0, []
        for event in session.answer(question):
            if isinstance(event, AudioPiece):
                first = first or event.seconds
                codes.append(event.codes)
        return time.perf_counter() - start, first, np.array(codes)

    def together(n: int) -> float:
        each = replace(options, max_frames=frames)
        sessions = [SpeechSession(model, encoder, each, speaker=speaker) for _ in range(n)]
        start = time.perf_counter()
        made = sum(isinstance(event, AudioPiece) for _, event in speak_batch(sessions, [[question]] * n))
        return 1000 * (time.perf_counter() - start) / made

    answer(frames)
    side_by_side = {n: min(together(n) for _ in range(2)) for n in TOGETHER}
    clock = Clock()
    clock.wrap("Thinker", speaker, "write")
    clock.wrap("Talker", speaker, "advance")
    clock.wrap("MTP", model.talker.mtp, "generate")
    clock.wrap("Code2Wav", speaker, "sound")

    def timed() -> dict[str, Any]:
        clock.reset()
        seconds, first, codes = answer(frames)
        return {
            **{name: clock.milliseconds(name) for name in CLASSES},
            "Code2Wav": 1000 * clock.seconds["Code2Wav"] / len(codes),
            "frame": 1000 * seconds / len(codes),
            "first": 1000 * first,
            "together": side_by_side,
            "codes": codes,
        }

    return timed


def transformers_answer(folder: Path, tokenizer: Any, frames: int, tokens: int) -> Callable[[], dict[str, Any]]:
    """The same answer by `generate`."""
    import torch
    from transformers import Qwen3OmniMoeForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.talker.config.audio_config = model.config.thinker_config.audio_config
    ids = [*tokenizer.encode("user\nwhat is red?"), tokenizer.id_of("<|im_end|>"), *tokenizer.encode("\n")]
    start_token = tokenizer.id_of("<|im_start|>")
    input_ids = torch.tensor([[start_token, *ids, start_token, *tokenizer.encode("assistant\n")]])
    found: list[Any] = []
    generate = model.talker.generate

    def spy(**arguments: Any) -> Any:
        found.append(generate(**arguments))
        return found[-1]

    model.talker.generate = spy

    def answer(n: int) -> float:
        start = time.perf_counter()
        # One token more of text and of speech: the last of each is not spoken.
        model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), speaker="ethan", return_audio=True,
            thinker_do_sample=False, talker_do_sample=False, thinker_max_new_tokens=tokens + 1,
            thinker_eos_token_id=list(tokenizer.stop_ids), talker_max_new_tokens=n + 1,
        )  # fmt: skip
        return time.perf_counter() - start

    answer(4)
    clock = Clock()
    one_position = lambda *args, inputs_embeds=None, input_ids=None, **_: (  # noqa: E731
        (inputs_embeds if inputs_embeds is not None else input_ids).shape[1] == 1
    )
    clock.wrap("Thinker", model.thinker, "forward", one_position)
    clock.wrap("Talker", model.talker, "forward", one_position)
    clock.wrap("MTP", model.talker.code_predictor, "generate")
    clock.wrap("Code2Wav", model.code2wav, "chunked_decode")

    def timed() -> dict[str, Any]:
        clock.reset()
        seconds = answer(frames)
        codes = torch.cat([states[-1] for states in found[-1].hidden_states if states[-1] is not None]).numpy()
        return {
            **{name: clock.milliseconds(name) for name in CLASSES},
            "Code2Wav": 1000 * clock.seconds["Code2Wav"] / len(codes),
            "frame": 1000 * seconds / len(codes),
            "first": 1000 * seconds,  # nothing is heard before everything is there
            "codes": codes,
        }

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=["tiny", "small"])
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=20, help="text tokens of the answer")
    parser.add_argument("--frames-per-piece", type=int, default=1, help="frames that omnitrain decodes together")
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many answers counts")
    parser.add_argument("--compile", action="store_true", help="torch.compile MTP and Code2Wav")
    parser.add_argument("--ours", action="store_true", help="without transformers")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    import numpy as np
    import torch

    with tempfile.TemporaryDirectory() as folder:
        tokenizer, config = write_model(args.preset, Path(folder))
        c = config.talker
        print(
            f"{args.preset}: {args.frames} frames of {c.codebooks} codes, {args.tokens} words; "
            f"float32, {torch.get_num_threads()} threads"
        )
        variants = [
            omnitrain_answer(Path(folder), tokenizer, args.frames, args.tokens, args.compile, args.frames_per_piece)
        ]
        if not args.ours:
            variants.append(transformers_answer(Path(folder), tokenizer, args.frames, args.tokens))
    tries = [[variant() for variant in variants] for _ in range(args.repeat)]  # in turn: a busy machine is so to both
    ours, theirs = ([min(runs, key=lambda run: run["frame"]) for runs in zip(*tries, strict=True)] + [None])[:2]
    print(f"{'ms':12}{'omnitrain':>12}{'transformers':>14}{'ratio':>8}")
    for name in (*CLASSES, "frame", "first"):
        row = f"{name:12}{ours[name]:12.2f}"
        if theirs is not None:
            row += f"{theirs[name]:14.2f}{theirs[name] / ours[name]:8.1f}"
        print(row)
    for n, ms in ours["together"].items():
        print(f"{f'of {n} answers':12}{ms:12.2f}")
    rtf = {k: v["frame"] / 1000 / FRAME_SECONDS for k, v in (("omnitrain", ours), ("transformers", theirs)) if v}
    print("RTF         " + "".join(f"{value:12.2f}  " for value in rtf.values()))
    if theirs is not None:
        same = len(ours["codes"]) == len(theirs["codes"]) and bool(np.array_equal(ours["codes"], theirs["codes"]))
        print(f"codes of both: {'the same' if same else 'DIFFERENT'}")
        print(f"transformers / omnitrain per frame: {theirs['frame'] / ours['frame']:.1f} x")
    if args.json:
        figures = {
            k: {n: x for n, x in v.items() if n != "codes"} for k, v in (("ours", ours), ("theirs", theirs)) if v
        }
        args.json.write_text(json.dumps({"preset": args.preset, "rtf": rtf, **figures}, indent=2))


if __name__ == "__main__":
    main()
