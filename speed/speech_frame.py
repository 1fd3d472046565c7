"""Milliseconds for one 80-ms frame of a spoken answer, by component: omnitrain against transformers.

    python -m speed.speech_frame                        # the small preset; two minutes on a CPU
    python -m speed.speech_frame --preset tiny --frames 60
    python -m speed.speech_frame --preset tiny --profile    # where the time goes

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
--profile prints for one step of each component (Code2Wav: for one frame) how much of it passes in products (matrices,
convolutions, attention), in other kernels, and between kernels (Python, dispatch, views, and the profiler itself), how
many kernels and views there are, and the weights that are read.
RTF: time of the answer over the duration of its sound. Below 1 a voice can be streamed without a gap.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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


class Answering:
    """Streams one answer with omnitrain, again and again; `args` are those of the command."""

    def __init__(self, folder: Path, tokenizer: Any, args: argparse.Namespace) -> None:
        from omnitrain.data.encode import SampleEncoder
        from omnitrain.data.features import AudioGeometry, VisionGeometry
        from omnitrain.data.media import MediaLimits
        from omnitrain.data.sample import Message, Segment
        from omnitrain.generation.decoding import for_decoding
        from omnitrain.generation.sampling import Sampling
        from omnitrain.generation.speech import Speaker, SpeechOptions
        from omnitrain.interop.public_format import load_pretrained

        self.model = load_pretrained(folder).eval()
        for_decoding(self.model, int8=args.int8)
        self.encoder = SampleEncoder(
            tokenizer=tokenizer, audio=AudioGeometry(), vision=VisionGeometry(), limits=MediaLimits(), vocab_size=320
        )
        self.speaker = Speaker(self.model, tokenizer, compile=args.compile)
        self.options = SpeechOptions(
            voice="ethan",
            codes=Sampling(repetition_penalty=1.05),
            residuals=Sampling(),
            max_new_tokens=args.tokens + 1,  # the last one is not spoken
            max_frames=args.frames,
            frames_per_piece=args.frames_per_piece,
        )
        self.question = Message(role="user", segments=(Segment(type="text", text="what is red?"),))
        self.answer()
        self.side_by_side = {} if args.profile else {n: min(self.together(n) for _ in range(2)) for n in TOGETHER}
        self.clock = Clock()
        self.parts = {
            "Thinker": (self.speaker, "write"),
            "Talker": (self.speaker, "advance"),
            "MTP": (self.model.talker.mtp, "generate"),
            "Code2Wav": (self.speaker, "sound"),
        }
        for name, (owner, attribute) in self.parts.items():
            self.clock.wrap(name, owner, attribute)

    def answer(self) -> tuple[float, float, Any]:
        """Seconds, seconds to the first sound, and the codes."""
        import numpy as np

        from omnitrain.generation.speech import AudioPiece, SpeechSession

        session = SpeechSession(self.model, self.encoder, self.options, speaker=self.speaker)
        start, first, codes = time.perf_counter(), 0.0, []
        for event in session.answer(self.question):
            if isinstance(event, AudioPiece):
                first = first or event.seconds
                codes.append(event.codes)
        return time.perf_counter() - start, first, np.array(codes)

    def together(self, n: int) -> float:
        """Milliseconds for a frame of one of n answers side by side."""
        from omnitrain.generation.speech import AudioPiece, SpeechSession, speak_batch

        sessions = [SpeechSession(self.model, self.encoder, self.options, speaker=self.speaker) for _ in range(n)]
        start = time.perf_counter()
        made = sum(isinstance(event, AudioPiece) for _, event in speak_batch(sessions, [[self.question]] * n))
        return 1000 * (time.perf_counter() - start) / made

    def timed(self) -> dict[str, Any]:
        """Milliseconds by component, and the codes."""
        self.clock.reset()
        seconds, first, codes = self.answer()
        return {
            **{name: self.clock.milliseconds(name) for name in CLASSES},
            "Code2Wav": 1000 * self.clock.seconds["Code2Wav"] / len(codes),
            "frame": 1000 * seconds / len(codes),
            "first": 1000 * first,
            "together": self.side_by_side,
            "codes": codes,
        }

    def profile(self) -> None:
        """Print where the time of a frame goes."""
        from torch.profiler import ProfilerActivity, profile, record_function

        clocked = min((self.timed() for _ in range(3)), key=lambda run: run["frame"])
        for name, (owner, attribute) in self.parts.items():
            setattr(owner, attribute, record_function(name)(getattr(owner, attribute)))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            frames = len(self.answer()[2])
        weights = self.weights_read()
        print(f"{'':10}{'ms':>8}{'products':>10}{'other':>7}{'between':>9}{'kernels':>9}{'views':>7}{'MB read':>9}")
        for name in CLASSES:
            spans = [e for e in profiled.events() if e.name == name]
            steps = frames if name == "Code2Wav" else len(spans)
            inside = [e for span in spans for e in _below(span)]
            views = [e for e in inside if e.name.endswith(VIEWS)]
            kernels = [e for e in inside if not e.name.endswith(VIEWS) and e.self_cpu_time_total > 0]
            total = sum(span.cpu_time_total for span in spans)
            products = sum(e.self_cpu_time_total for e in kernels if any(word in e.name for word in PRODUCTS))
            other = sum(e.self_cpu_time_total for e in kernels) - products
            p, o, b = (f"{100 * part / total:.0f} %" for part in (products, other, total - products - other))
            print(
                f"{name:10}{clocked[name]:8.2f}{p:>10}{o:>7}{b:>9}{len(kernels) / steps:9.0f}"
                f"{len(views) / steps:7.0f}{weights[name] / 1e6:9.1f}"
            )
        print(f"{'frame':10}{clocked['frame']:8.2f}   one thread reads {read_speed() / 1e9:.0f} GB/s of memory")

    def weights_read(self) -> dict[str, float]:
        """Bytes of weights that a step of each component reads (of embeddings, next to nothing)."""
        talker, wave = self.model.talker, self.model.code2wav
        mtp = talker.mtp
        return {
            "Thinker": _bytes(self.model.thinker.layers) + _bytes(self.model.thinker.lm_head),
            "Talker": _bytes(talker.layers) + _bytes(talker.codec_head) + _bytes(talker.text_projection),
            "MTP": (mtp.config.codebooks - 2) * _bytes(mtp.layers) + _bytes(mtp) - mtp.code_embedding.nbytes,
            "Code2Wav": (_bytes(wave) - _bytes(wave.code_embedding)) / self.options.later_pieces[-1],
        }


PRODUCTS = ("mm", "mv", "linear", "convolution", "attention")
"""What the names of those kernels contain that multiply by weights, or attend."""

VIEWS = (
    "::view", "::as_strided", "::t", "::transpose", "::slice", "::select", "::expand", "::unsqueeze", "::detach",
    "::reshape", "::_unsafe_view", "::permute", "::unbind", "::alias", "::resolve_conj", "::lift_fresh", "::empty",
    "::empty_strided", "::empty_like", "::is_nonzero", "::narrow", "::split_with_sizes", "::result_type",
)  # fmt: skip
"""How the names of operations end that compute nothing."""


def _below(event: Any) -> Iterator[Any]:
    """All that was recorded within `event`."""
    for child in event.cpu_children:
        yield child
        yield from _below(child)


def _bytes(part: Any) -> float:
    """Of the weights that one token reads; of experts, those that it is sent to."""
    from omnitrain.models.layers.decoder import SparseMLP

    total = sum(weight.nbytes for weight in (*part.parameters(), *part.buffers()))
    for mlp in part.modules():
        if isinstance(mlp, SparseMLP):
            total -= (1 - mlp.router.top_k / len(mlp.router.weight)) * _bytes(mlp.experts)
    return total


def read_speed() -> float:
    """Bytes of memory that are read in a second, by a sum over 256 MB."""
    import torch

    numbers = torch.ones(2**26)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


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
    sizes = lambda text: tuple(int(n) for n in text.split(","))  # noqa: E731
    pieces = "frames that omnitrain decodes together after the first, as 4 or 2,4"
    parser.add_argument("--frames-per-piece", type=sizes, default=(1,), help=pieces)
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many answers counts")
    parser.add_argument("--compile", action="store_true", help="torch.compile MTP and Code2Wav")
    parser.add_argument("--int8", action="store_true", help="omnitrain's weights in 8 bits (its codes are then others)")
    parser.add_argument("--profile", action="store_true", help="where the time of a frame goes, instead")
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
        ours = Answering(Path(folder), tokenizer, args)
        if args.profile:
            ours.profile()
            return
        variants = [ours.timed]
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
        pairs = zip(ours["codes"], theirs["codes"], strict=False)
        other = (i for i, (a, b) in enumerate(pairs) if not np.array_equal(a, b))
        same = next(other, min(len(ours["codes"]), len(theirs["codes"])))
        print(f"codes of both: the same in {same} of {args.frames} frames")
        print(f"transformers / omnitrain per frame: {theirs['frame'] / ours['frame']:.1f} x")
    if args.json:
        figures = {
            k: {n: x for n, x in v.items() if n != "codes"} for k, v in (("ours", ours), ("theirs", theirs)) if v
        }
        args.json.write_text(json.dumps({"preset": args.preset, "rtf": rtf, **figures}, indent=2))


if __name__ == "__main__":
    main()
