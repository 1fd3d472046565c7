"""``generate``: answer prompts with a trained run, or with weights in the public Qwen3-Omni format."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

    from omnitrain.data.batch import EncodedSample
    from omnitrain.data.chat import ChatTokenizer
    from omnitrain.data.encode import SampleEncoder
    from omnitrain.data.sample import Segment
    from omnitrain.models.omni import OmniModel

EXAMPLES = """\
examples:
  omnitrain generate runs/quickstart --image cat.png "What is in the picture?"
  omnitrain generate runs/quickstart --audio speech.ogg "Write down what you hear." "Which language is this?"
  omnitrain generate Qwen3-Omni-30B-A3B-Instruct/ --video clip.mp4 --temperature 0.7 --stream "What happens?"
"""


class GenerateError(Exception):
    """Something the user can mend; the message says how."""


def main(arguments: list[str]) -> int:
    """Run the verb. Returns the exit status."""
    return explained(lambda: _generate(_parser().parse_intermixed_args(arguments)))


def explained(verb: Callable[[], None]) -> int:
    """Run what a verb does. What the user can mend is printed, without a traceback. Returns the exit status."""
    try:
        verb()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        if not is_explained(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omnitrain generate",
        description="Answer prompts with a model. Every prompt is a conversation of its own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the name of a media option is its kind
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="a run folder, or a folder in the public format")
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what is asked, after the media")
    add_media_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt (persona)")
    parser.add_argument("--plain", action="store_true", help="continue each prompt as plain text, without chat markup")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 (default): always the most probable token"
    )
    sampling.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="only the K most probable tokens; 0 (default): all"
    )
    sampling.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="only the most probable tokens that hold P; 1 (default): all",
    )
    sampling.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: repeat less; 1 (default): nothing"
    )
    sampling.add_argument(
        "--seed", metavar="S", type=int, default=0, help="prompt i (from 0) draws with S + i; default: 0"
    )
    sampling.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="default: 256")
    running = parser.add_argument_group("running")
    running.add_argument("--stream", action="store_true", help="print words as they come")
    running.add_argument("--prefill-chunk", type=int, metavar="N", help="read prompts N tokens at a time (less memory)")
    add_device_options(running)
    return parser


def _generate(options: argparse.Namespace) -> None:
    media = media_segments(options.media, options.mute)

    from omnitrain.data.batch import PackedBatch
    from omnitrain.generation.text import generate

    device, dtype = device_and_dtype(options.device, options.dtype)
    model, encoder = load(options.model, device=device, dtype=dtype)
    batch = PackedBatch.pack(_encoded_prompts(options, media, encoder))
    stop_ids = encoder.tokenizer.stop_ids
    output = _OrderedOutput(encoder.tokenizer, options.prompts, stop_ids, options.max_new_tokens, sys.stdout)
    answers = generate(
        model,
        batch,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop_ids=stop_ids,
        on_token=output if options.stream else None,
        prefill_chunk=options.prefill_chunk,
    )
    if not options.stream:
        for document, tokens in enumerate(answers):
            for token in tokens:
                output(document, token)


def _encoded_prompts(
    options: argparse.Namespace, media: tuple[Segment, ...], encoder: SampleEncoder
) -> list[EncodedSample]:
    from omnitrain.data.sample import BadSample, Message, Sample, Segment

    reading: list[str] = []  # files opened so far: the last one is at fault when a medium cannot be used

    def media_bytes(segment: Segment) -> bytes:
        reading.append(str(segment.path))
        return Path(reading[-1]).read_bytes()

    encoded = []
    for i, prompt in enumerate(options.prompts):
        text = Segment(type="text", text=prompt)
        messages = [Message(role="document" if options.plain else "user", segments=(*media, text))]
        if options.system is not None:
            messages.insert(0, Message(role="system", segments=(Segment(type="text", text=options.system),)))
        sample = Sample(id=f"prompt-{i}", source="prompt", messages=tuple(messages))
        try:
            encoded.append(encoder.encode_prompt(sample, media_bytes))
        except BadSample as error:
            raise GenerateError(f"{reading[-1]}: {error}" if reading else str(error)) from error
    return encoded


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


# --- shared with `talk` ----------------------------------------------------------------------------------------------


class MediaOption(argparse.Action):
    """Collects (kind, file) of all media options in one list, so that their order is kept."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.media = [*namespace.media, ((option_string or "").removeprefix("--"), values)]


def add_media_options(parser: argparse.ArgumentParser) -> None:
    """``--image``, ``--audio``, ``--video`` and ``--mute``."""
    media = parser.add_argument_group("media, which stand before the text in the order given; each can be repeated")
    for kind, what in (("image", "a picture"), ("audio", "a recording"), ("video", "a video, with its sound")):
        media.add_argument(
            f"--{kind}", metavar="FILE", type=Path, action=MediaOption, dest="media", default=[], help=what
        )
    media.add_argument("--mute", action="store_true", help="look at videos without hearing their sound")


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """``--device`` and ``--dtype``."""
    group.add_argument(
        "--device", metavar="D", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one"
    )
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: float32 on CPU, else bfloat16"
    )


def media_segments(media: Sequence[tuple[str, Path]], mute: bool) -> tuple[Segment, ...]:
    """The segments of the media options.

    Raises:
        GenerateError: a file does not exist.
    """
    from omnitrain.data.sample import Segment

    for kind, path in media:
        if not path.is_file():
            raise GenerateError(f"--{kind} {path}: no such file")
    return tuple(
        Segment(type=kind, path=str(path), with_audio=kind == "video" and not mute)  # ty: ignore[invalid-argument-type]
        for kind, path in media
    )


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What ``--device`` and ``--dtype`` mean."""
    import torch

    chosen = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return chosen, torch.float32 if chosen.type == "cpu" else torch.bfloat16
    return chosen, torch.float32 if dtype == "float32" else torch.bfloat16


def is_explained(error: Exception) -> bool:
    """Whether the message alone tells the user what to do."""
    from omnitrain.config.targets import MissingTarget

    return isinstance(error, (GenerateError, OSError, ValueError, MissingTarget))


# --- models ----------------------------------------------------------------------------------------------------------


def load(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, speech: bool = False
) -> tuple[OmniModel, SampleEncoder]:
    """A model and the encoder of its prompts, from a run folder or a folder in the public format.

    Args:
        dtype: of the weights; None keeps the stored one.
        speech: also load what speaks from a folder in the public format. A run has what it was trained with.

    Raises:
        GenerateError: the folder is neither, or something in it is missing.
    """
    if (folder / "config.yaml").is_file():
        model, encoder = _load_run(folder)
    elif (folder / "config.json").is_file():
        model, encoder = _load_public(folder, device, dtype, speech)
    elif not folder.is_dir():
        raise GenerateError(f"{folder}: no such folder")
    else:
        raise GenerateError(
            f"{folder}: neither a run folder (no config.yaml) nor a folder in the public format (no config.json)"
        )
    return model.to(device=device, dtype=dtype).eval(), encoder


def _load_run(run_dir: Path) -> tuple[OmniModel, SampleEncoder]:
    """The last checkpoint of a run. The folder may have been moved: nothing outside it is read."""
    checkpoint, tokenizer = run_dir / "checkpoints" / "last.ckpt", run_dir / "tokenizer.json"
    if not checkpoint.is_file():
        raise GenerateError(f"{checkpoint} does not exist: this run has not written a checkpoint yet")
    if not tokenizer.is_file():
        raise GenerateError(f"{tokenizer} does not exist: copy the tokenizer that the run was trained with there")

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from omnitrain.config.targets import check_origins, check_targets
    from omnitrain.interop.start_from import model_weights
    from omnitrain.models.omni import OmniModel
    from omnitrain.runs.experiment import build_model

    cfg = OmegaConf.load(run_dir / "config.yaml")
    cfg = OmegaConf.create({"data": cfg.data, "model": cfg.model})
    cfg.data.tokenizer, cfg.data.bad_samples_path = str(tokenizer), None
    check_origins(check_targets(OmegaConf.to_container(cfg, resolve=True)))
    encoder: SampleEncoder = instantiate(cfg.data, _convert_="all").encoder
    model = build_model(cfg, encoder.tokenizer)
    if not isinstance(model, OmniModel):
        raise GenerateError(f"{run_dir} is the run of a codec, which has no language model to ask")
    try:
        model.load_state_dict(model_weights(checkpoint))
    except RuntimeError as error:
        raise GenerateError(f"{checkpoint} does not fit the model of {run_dir / 'config.yaml'}: {error}") from error
    return model, encoder


def _load_public(
    folder: Path, device: torch.device | str, dtype: torch.dtype | None, speech: bool
) -> tuple[OmniModel, SampleEncoder]:
    from omnitrain.data.chat import ChatTokenizer
    from omnitrain.data.encode import SampleEncoder
    from omnitrain.data.features import AudioGeometry, VisionGeometry
    from omnitrain.data.media import MediaLimits
    from omnitrain.interop.public_format import load_pretrained

    tokenizer = ChatTokenizer.from_dir(folder)
    model = load_pretrained(folder, dtype=dtype, device=device, speech=speech)
    config = model.config
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        audio=AudioGeometry(n_mels=config.aut.n_mels, chunk_frames=config.aut.chunk_frames),
        vision=VisionGeometry(
            patch=config.vision.patch,
            temporal_patch=config.vision.temporal_patch,
            merge=config.vision.merge,
            **_pixel_bounds(folder / "preprocessor_config.json"),
        ),
        limits=MediaLimits(),
        ids_per_second=config.position_id_per_seconds,
        vocab_size=config.thinker.vocab_size,
    )
    return model, encoder


def _pixel_bounds(path: Path) -> dict[str, int]:
    """`min_pixels` and `max_pixels` of the public preprocessor's configuration, where it states them."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    size = stored.get("size") or {}
    bounds = {
        "min_pixels": stored.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": stored.get("max_pixels") or size.get("longest_edge"),
    }
    return {name: int(value) for name, value in bounds.items() if value}
