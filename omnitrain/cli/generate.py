"""``generate``: answer prompts with a trained run, or with weights in the public Qwen3-Omni format."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from omnitrain.config.errors import explains_errors
from omnitrain.files import printable

if TYPE_CHECKING:
    from omnitrain.data.batch import EncodedSample, PackedBatch
    from omnitrain.data.chat import ChatTokenizer
    from omnitrain.data.encode import SampleEncoder
    from omnitrain.data.sample import Message, Segment
    from omnitrain.generation.sampling import Decoding
    from omnitrain.generation.tool_loop import ToolLimits
    from omnitrain.generation.transcribe_stream import StreamingTranscriber
    from omnitrain.models.aut_decoder import AuT
    from omnitrain.models.omni import OmniModel

EXAMPLES = """\
examples:
  omnitrain generate runs/quickstart --image cat.png "What is in the picture?"
  omnitrain generate runs/quickstart --audio speech.ogg "Write down what you hear." "Which language is this?"
  omnitrain generate runs/quickstart --audio forty_minutes.flac --stream "Write down what you hear."
  omnitrain generate Qwen3-Omni-30B-A3B-Instruct/ --video clip.mp4 --temperature 0.7 --stream "What happens?"
  omnitrain generate runs/sft --tools tools.py --constrained-calls --thinking-budget 64 "How many cats are there?"
"""
THINKING_BUDGET = "at most N tokens of thoughts, then their end; default: no limit"


@explains_errors
def main(arguments: list[str]) -> None:
    """Run the verb. Returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    media = media_segments(options.media, options.mute)

    from omnitrain.data.batch import PackedBatch
    from omnitrain.generation.guides import AnswerGuide
    from omnitrain.generation.sampling import Decoding
    from omnitrain.generation.text import generate
    from omnitrain.models.aut_decoder import AuT
    from omnitrain.runs.load import load_writer

    decoding = Decoding(**{field.name: getattr(options, field.name) for field in fields(Decoding)})
    limits = _tool_limits(options)
    model, encoder = load_writer(options.model, device=options.device, dtype=options.dtype)
    encoder = replace(encoder, skip_thoughts=options.no_thinking)
    if limits is not None:
        if isinstance(model, AuT):
            raise ValueError("an AuT calls no functions: leave --tools away")
        _answer_with_tools(options, media, (model, encoder), decoding, limits)
        return
    prompts = _encoded_prompts(options, media, encoder)
    stop_ids = encoder.tokenizer.stop_ids
    output = _OrderedOutput(encoder.tokenizer, options.prompts, stop_ids, options.max_new_tokens, sys.stdout)
    if isinstance(model, AuT):
        _transcribe(model, prompts, decoding, encoder.tokenizer, stream=options.stream)
        return
    batch = PackedBatch.pack(prompts)
    with _ReadingBar(model, batch, options.max_new_tokens) as bar:

        def on_token(document: int, token: int) -> None:
            bar.wrote(streamed=options.stream)
            if options.stream:
                output(document, token)

        reading: dict[str, Any] = {"prefill_chunk": options.prefill_chunk, "on_read": bar.read}
        guides = [AnswerGuide(encoder.tokenizer, thinking_budget=options.thinking_budget) for _ in prompts]
        answers = generate(model, batch, decoding, stop_ids=stop_ids, on_token=on_token, guides=guides, **reading)
    if not options.stream:
        for document, tokens in enumerate(answers):
            for token in tokens:
                output(document, token)


def _parser() -> argparse.ArgumentParser:
    what = "Answer prompts with a model. Every prompt is a conversation of its own."
    parser = model_parser("generate", what, EXAMPLES)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what is asked, after the media")
    add_media_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt (persona)")
    parser.add_argument("--plain", action="store_true", help="continue each prompt as plain text, without chat markup")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", metavar="T", type=float, default=0.0, help="0 (default): always the most probable token")
    add("--top-k", metavar="K", type=int, default=0, help="only the K most probable tokens; 0 (default): all")
    most_probable = "only the most probable tokens that hold P; 1 (default): all"
    add("--top-p", metavar="P", type=float, default=1.0, help=most_probable)
    repeat_less = "above 1: repeat less; 1 (default): nothing"
    add("--repetition-penalty", metavar="R", type=float, default=1.0, help=repeat_less)
    add("--seed", metavar="S", type=int, default=0, help="prompt i (from 0) draws with S + i; default: 0")
    add("--max-new-tokens", metavar="N", type=int, default=256, help="default: 256")
    add("--thinking-budget", metavar="N", type=int, help=THINKING_BUDGET)
    no_thoughts = "the answer begins with empty thoughts, for a model that would think first"
    add("--no-thinking", action="store_true", help=no_thoughts)
    tools = parser.add_argument_group("functions, which run on this machine with your rights")
    add = tools.add_argument
    add("--tools", metavar="FILE", type=Path, help="a Python file, whose public functions the model may call")
    add("--tool-rounds", metavar="N", type=int, default=5, help="answers with calls that are followed; default: 5")
    add("--tool-seconds", metavar="S", type=float, default=30.0, help="a call that takes longer is ended; default: 30")
    add("--constrained-calls", action="store_true", help="only calls that fit the functions' schemas can be written")
    running = parser.add_argument_group("running")
    running.add_argument("--stream", action="store_true", help="print words as they come")
    pieces = "read prompts N tokens at a time: less needs less memory; default: 4096"
    running.add_argument("--prefill-chunk", type=int, metavar="N", default=4096, help=pieces)
    add_device_options(running)
    return parser


def _encoded_prompts(
    options: argparse.Namespace, media: tuple[Segment, ...], encoder: SampleEncoder
) -> list[EncodedSample]:
    return [_encoded(_chat(options, media, prompt), encoder, {}) for prompt in options.prompts]


def _chat(options: argparse.Namespace, media: tuple[Segment, ...], prompt: str) -> list[Message]:
    from omnitrain.data.sample import Message, Segment

    text = Segment(type="text", text=prompt)
    messages = [Message(role="document" if options.plain else "user", segments=(*media, text))]
    if options.system is not None:
        messages.insert(0, Message(role="system", segments=(Segment(type="text", text=options.system),)))
    return messages


def _encoded(messages: Sequence[Message], encoder: SampleEncoder, meta: dict[str, str]) -> EncodedSample:
    from omnitrain.data.sample import BadSample, Sample

    reading: list[str] = []  # files opened so far: the last one is at fault when a medium cannot be used

    def media_bytes(segment: Segment) -> bytes:
        reading.append(str(segment.path))
        return Path(reading[-1]).read_bytes()

    try:
        return encoder.encode_prompt(
            Sample(id="prompt", source="prompt", messages=tuple(messages), meta=meta), media_bytes
        )
    except BadSample as error:
        raise ValueError(f"{reading[-1]}: {error}" if reading else str(error)) from error


def _tool_limits(options: argparse.Namespace) -> ToolLimits | None:
    """None without ``--tools``. Raises ValueError for options that do not go with each other."""
    from omnitrain.generation.tool_loop import ToolLimits

    if options.thinking_budget is not None and options.thinking_budget < 0:
        raise ValueError(f"--thinking-budget {options.thinking_budget}: it is a number of tokens, at least 0")
    if options.tools is None:
        if options.constrained_calls:
            raise ValueError("--constrained-calls are those of functions: give --tools FILE")
        return None
    if options.plain:
        raise ValueError("--plain knows no turns, and so no functions: leave it or --tools away")
    return ToolLimits(rounds=options.tool_rounds, seconds=options.tool_seconds)


def _answer_with_tools(
    options: argparse.Namespace,
    media: tuple[Segment, ...],
    loaded: tuple[OmniModel, SampleEncoder],
    decoding: Decoding,
    limits: ToolLimits,
) -> None:
    """Answer one prompt after the other, running what is called. The last answers are printed as answers are, calls and
    results on the standard error."""
    from omnitrain.data.batch import PackedBatch
    from omnitrain.generation.guides import AnswerGuide, CallGrammar
    from omnitrain.generation.text import generate
    from omnitrain.generation.tool_loop import Call, answer_with_tools
    from omnitrain.runs.user_functions import UserFunctions

    model, encoder = loaded
    tokenizer = encoder.tokenizer

    def report(call: Call, result: str) -> None:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        print(printable(f"{call.name or '?'}({arguments}) -> {result}"), file=sys.stderr, flush=True)

    with UserFunctions(options.tools) as functions:
        meta = {"tools": json.dumps(functions.signatures, ensure_ascii=False)}
        grammar = None
        if options.constrained_calls:
            grammar = CallGrammar(tokenizer, functions.signatures, model.config.thinker.vocab_size)

        for i, prompt in enumerate(options.prompts):
            if len(options.prompts) > 1:
                print(f"[{i + 1}] {prompt}", flush=True)

            def write(chat: Sequence[Message], seed: int = decoding.seed + i) -> list[int]:
                batch = PackedBatch.pack([_encoded(chat, encoder, meta)])
                guide = AnswerGuide(tokenizer, thinking_budget=options.thinking_budget, calls=grammar)
                (ids,) = generate(
                    model, batch, decoding, seeds=[seed], stop_ids=tokenizer.stop_ids, guides=[guide],
                    prefill_chunk=options.prefill_chunk,
                )  # fmt: skip
                return ids

            asked = _chat(options, media, prompt)
            found = answer_with_tools(write, tokenizer, asked, functions, limits, report)
            print("".join(segment.text or "" for segment in found.messages[-1].segments), flush=True)
            if found.ended == "rounds":
                print(f"not followed: calls of the last answer, behind --tool-rounds {limits.rounds}", file=sys.stderr)


def _transcribe(
    model: AuT, prompts: Sequence[EncodedSample], decoding: Decoding, tokenizer: ChatTokenizer, *, stream: bool
) -> None:
    """Print what an AuT writes about the recording of each prompt, window by window, in memory that does not grow with
    its length; with `stream` as soon as it is final, else at the end. Raises ValueError for options that it does not
    know, and prompts without one recording."""
    import torch

    from omnitrain.evaluation.progress import progress_bar
    from omnitrain.generation.sampling import Decoding
    from omnitrain.generation.transcribe_stream import StreamingOptions, StreamingTranscriber
    from omnitrain.vocabulary import TEXT

    if decoding != Decoding(max_new_tokens=decoding.max_new_tokens, seed=decoding.seed):
        raise ValueError("an AuT writes the most probable token here: leave the options of sampling away")
    for prompt in prompts:
        if len(prompt.mel) != 1 or len(prompt.grid_thw):
            raise ValueError("an AuT answers about one recording, and no pictures: give one --audio FILE")
        mel, window = torch.from_numpy(prompt.mel[0]), model.aut.config.window_frames
        options = StreamingOptions(window_frames=window, segment_windows=2, max_new_tokens=decoding.max_new_tokens)
        ids = prompt.input_ids[prompt.token_types == TEXT].tolist()
        live = StreamingTranscriber(model, ids, stop_ids=tokenizer.stop_ids, options=options)
        plain, printed = f"hearing {len(mel) // 6000}:{len(mel) // 100 % 60:02} of sound", 0
        with progress_bar(len(mel) > 6000 and not stream, plain) as bar:
            heard = bar.add_task("hearing", total=len(mel))
            for piece in mel.split(window):
                live.push(piece)
                bar.advance(heard, len(piece))
                if stream:
                    printed = _print_from(printed, live, tokenizer)
            live.finish()
        _print_from(printed, live, tokenizer)
        print(flush=True)


def _print_from(printed: int, live: StreamingTranscriber, tokenizer: ChatTokenizer) -> int:
    """Print what is final behind the first `printed` characters; returns how many there are now. The bytes of half a
    character wait."""
    parts = (tokenizer.decode(part).strip() for part in live.segments)
    text = " ".join(filter(None, parts)).rstrip("\ufffd ")
    print(text[printed:], end="", flush=True)
    return len(text)


class _ReadingBar:
    """Shows on the standard error how far a prompt with more than a minute of sound is heard (features of the encoder),
    read (tokens) and answered; nothing for others."""

    def __init__(self, model: OmniModel, batch: PackedBatch, most: int) -> None:
        from omnitrain.evaluation.progress import progress_bar
        from omnitrain.vocabulary import AUDIO

        seconds = 0 if batch.mel_lengths is None else int(batch.mel_lengths.sum()) // 100
        plain = f"hearing {seconds // 60}:{seconds % 60:02} of sound, reading {batch.n_tokens:,} tokens"
        self.bar = progress_bar(seconds > 60, plain)
        self.heard = self.bar.add_task("hearing", total=int((batch.token_types == AUDIO).sum()))
        self.tokens = self.bar.add_task("reading", total=batch.n_tokens)
        self.written = self.bar.add_task("writing", total=most * (len(batch.cu_seqlens) - 1))
        norm = model.aut.ln_post  # is called once for each segment
        self.hook = norm.register_forward_hook(lambda _, __, features: self.bar.advance(self.heard, len(features)))

    def __enter__(self) -> _ReadingBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        self.hook.remove()

    def read(self, tokens: int) -> None:
        self.bar.advance(self.tokens, tokens)

    def wrote(self, *, streamed: bool) -> None:
        """One more token; where words are printed as they come, the bar makes room for them."""
        self.bar.advance(self.written)
        if streamed:
            self.bar.stop()


class _OrderedOutput:
    """Prints the answers of several prompts one below the other while they are written side by side: the first one
    that is not complete appears as it grows, those after it wait."""

    def __init__(
        self, tokenizer: ChatTokenizer, prompts: Sequence[str], stop_ids: Sequence[int], most: int, out: TextIO
    ) -> None:
        self.tokenizer, self.prompts, self.stop_ids, self.most, self.out = tokenizer, prompts, stop_ids, most, out
        self.waiting: list[list[int]] = [[] for _ in prompts]  # tokens not yet printed
        self.written = [0] * len(prompts)
        self.done = [False] * len(prompts)
        self.current = 0
        self._header()

    def __call__(self, document: int, token: int) -> None:
        self.waiting[document].append(token)
        self.written[document] += 1
        self.done[document] = token in self.stop_ids or self.written[document] >= self.most
        while self.current < len(self.prompts):
            self._print(self.current)
            if not self.done[self.current]:
                return
            print(file=self.out, flush=True)
            self.current += 1
            self._header()

    def _print(self, document: int) -> None:
        tokens = self.waiting[document]
        text = self.tokenizer.decode(tokens)
        # The bytes of one character may be spread over tokens: wait for the rest of it (a character has 4 at most).
        if text.endswith("\ufffd") and len(tokens) < 4 and not self.done[document]:
            return
        self.waiting[document] = []
        print(text, end="", file=self.out, flush=True)

    def _header(self) -> None:
        if len(self.prompts) > 1 and self.current < len(self.prompts):
            print(f"[{self.current + 1}] {self.prompts[self.current]}", file=self.out, flush=True)


def model_parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a verb whose first argument is the folder of a model."""
    parser = argparse.ArgumentParser(
        prog=f"omnitrain {verb}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="a run folder, or a folder in the public format")
    return parser


def _medium(kind: str, file: str) -> tuple[str, Path]:
    return kind, Path(file)


def add_media_options(parser: argparse.ArgumentParser) -> None:
    """``--image``, ``--audio`` and ``--video``, whose (kind, file) all go into one list, since their order counts, and
    ``--mute``."""
    group = parser.add_argument_group("media, which stand before the text in the order given; each can be repeated")
    add = group.add_argument
    for kind, what in (("image", "a picture"), ("audio", "a recording"), ("video", "a video, with its sound")):
        medium = partial(_medium, kind)
        add(f"--{kind}", metavar="FILE", type=medium, action="append", dest="media", default=[], help=what)
    add("--mute", action="store_true", help="look at videos without hearing their sound")


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """``--device`` and ``--dtype``."""
    gpu, dtypes = "cpu, cuda, cuda:1, ...; default: a GPU if there is one", ("auto", "float32", "bfloat16")
    group.add_argument("--device", metavar="D", default="auto", help=gpu)
    group.add_argument("--dtype", choices=dtypes, default="auto", help="auto: float32 on CPU, else bfloat16")


def media_segments(media: Sequence[tuple[str, Path]], mute: bool) -> tuple[Segment, ...]:
    """The segments of the media options. Raises ValueError if a file does not exist."""
    from omnitrain.data.sample import Segment

    for kind, path in media:
        if not path.is_file():
            raise ValueError(f"--{kind} {path}: no such file")
    return tuple(
        Segment(type=kind, path=str(path), with_audio=kind == "video" and not mute)  # ty: ignore[invalid-argument-type]
        for kind, path in media
    )
