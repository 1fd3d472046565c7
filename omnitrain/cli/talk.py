"""``talk``: answer aloud, with a trained run or with weights in the public Qwen3-Omni format."""

from __future__ import annotations

import argparse
import json
import sys
import wave
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnitrain.cli.generate import (
    THINKING_BUDGET,
    add_device_options,
    add_media_options,
    media_segments,
    model_parser,
)
from omnitrain.config.errors import explains_errors
from omnitrain.files import printable

if TYPE_CHECKING:
    import numpy as np

    from omnitrain.generation.speech import Event, SpeechSession

EXAMPLES = """\
examples:
  omnitrain talk runs/talker --audio question.ogg --out answer.wav
  omnitrain talk runs/talker --voice slt --say "the red cat" --out cat.wav
  omnitrain talk Qwen3-Omni-30B-A3B-Instruct/ --image cat.png "What is in the picture?" --out answer.wav --json
"""

FRAMES_PER_SECOND = 12.5


@explains_errors
def main(arguments: list[str]) -> None:
    """Run the verb. Returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    media = media_segments(options.media, options.mute)
    if options.prompt is None and options.say is None and not media:
        raise ValueError('nothing is asked: give a PROMPT, media, or --say "text"')
    if options.max_seconds <= 0:
        raise ValueError(f"--max-seconds {options.max_seconds} is not positive")

    from omnitrain.runs.load import load, load_decoder

    model, encoder = load(options.model, device=options.device, dtype=options.dtype, speech=True)
    if model.talker is None:
        raise ValueError(f"{options.model} has no Talker and Code2Wav: it can only write (`omnitrain generate`)")
    decoder = load_decoder(model, options.model, options.codec)

    from omnitrain.data.sample import BadSample, Message, Segment
    from omnitrain.generation.decoding import for_decoding
    from omnitrain.generation.sampling import Sampling
    from omnitrain.generation.speech import CODES, RESIDUALS, Speaker, SpeechOptions, SpeechSession

    for_decoding(model, int8=options.int8)
    warmth = options.speech_temperature
    how = SpeechOptions(
        voice=options.voice or min(model.talker.config.speakers, default=""),
        text=Sampling(temperature=options.temperature),
        codes=replace(CODES, temperature=warmth),
        residuals=RESIDUALS if warmth else Sampling(),
        max_new_tokens=options.max_new_tokens,
        max_frames=max(int(options.max_seconds * FRAMES_PER_SECOND), 1),
        prefill_chunk=options.prefill_chunk,
        frames_per_piece=options.frames_per_piece,
        seed=options.seed,
        thinking_budget=options.thinking_budget,
    )
    speaker = Speaker(model, encoder.tokenizer, decoder=decoder)
    session = SpeechSession(model, encoder, how, system=options.system, speaker=speaker)
    asked = f"Say: {options.say}" if options.prompt is None and options.say is not None else options.prompt
    text = () if asked is None else (Segment(type="text", text=asked),)
    message = Message(role="user", segments=(*media, *text))
    events = session.answer(message, say=options.say)
    samples_per_second = int(speaker.samples_per_frame * FRAMES_PER_SECOND)
    try:
        with closing(events), GrowingWav(options.out, samples_per_second) as wav:
            _report(options, session, events, wav)
    except BadSample as error:
        raise ValueError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    what = "Answer one prompt aloud. The file is a playable WAV from the first frame on."
    parser = model_parser("talk", what, EXAMPLES)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what is asked, after the media")
    add("--out", metavar="FILE", type=Path, required=True, help="WAV file to write, 16 bit")
    add("--voice", metavar="NAME", help="default: the first of the model's voices by name")
    say = 'speak TEXT itself; the Thinker does not write. PROMPT is then what TEXT answers, by default "Say: TEXT"'
    add("--say", metavar="TEXT", help=say)
    add_media_options(parser)
    where = "where the Mimi lies now that a run without a Code2Wav speaks through; default: where it lay in training"
    add("--codec", metavar="DIR", help=where)
    add("--system", metavar="TEXT", help="system prompt (persona); the Talker does not read it")
    add = parser.add_argument_group("sampling").add_argument
    of_text = "of the text; 0 (default): the most probable token"
    add("--temperature", metavar="T", type=float, default=0.0, help=of_text)
    of_sound = "of the sound; default 0.9. 0 is reproducible on any machine, but may drone"
    add("--speech-temperature", metavar="T", type=float, default=0.9, help=of_sound)
    add("--seed", metavar="S", type=int, default=0, help="default: 0")
    add("--max-new-tokens", metavar="N", type=int, default=512, help="longest text; default: 512")
    add("--max-seconds", metavar="S", type=float, default=60.0, help="longest sound; default: 60")
    add("--thinking-budget", metavar="N", type=int, help=THINKING_BUDGET)
    running = parser.add_argument_group("running")
    add = running.add_argument
    add("--json", action="store_true", help="print events, one JSON object per line, instead of the text")
    add("--prefill-chunk", type=int, metavar="N", help="read the prompt N tokens at a time")
    piece = "after the first 80 ms, decode so many frames together, the last number from then on; default: 2,4"
    add("--frames-per-piece", type=_sizes, metavar="N[,N...]", default=(2, 4), help=piece)
    in_int8 = (
        "keep the weights of Thinker, Talker and MTP in 8 bits (CPU): a quarter of the memory, faster, other numbers"
    )
    add("--int8", action="store_true", help=in_int8)
    add_device_options(running)
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _report(options: argparse.Namespace, session: SpeechSession, events: Iterator[Event], wav: GrowingWav) -> None:
    """Write sound and print text, or events, as they come."""
    from omnitrain.generation.speech import AudioPiece, TextPiece

    first: float | None = None
    for event in events:
        if isinstance(event, TextPiece):
            shown: dict[str, Any] = {"event": "text", "text": event.text}
            if not options.json:
                print(event.text, end="", flush=True)
        elif isinstance(event, AudioPiece):
            wav.write(event.wav)
            first = event.seconds if first is None else first
            shown = {"event": "audio", "frame": event.frame, "samples": len(event.wav)}
        else:
            shown = {
                "event": "done",
                "reason": event.reason,
                "audio_seconds": round(wav.seconds, 4),
                "first_audio_seconds": None if first is None else round(first, 4),
                "rtf": round(event.seconds / wav.seconds, 4) if wav.seconds else None,
                "out": str(options.out),
            }
            if not options.json:
                print("" if options.say is None else options.say)
                limit = ", cut off by --max-seconds" if event.reason == "max_frames" else ""
                print(f"{printable(options.out)}: {wav.seconds:.2f} s of speech{limit}", file=sys.stderr)
        if options.json:
            print(json.dumps({**shown, "seconds": round(event.seconds, 4)}, ensure_ascii=False), flush=True)


class GrowingWav:
    """A mono 16-bit WAV file whose header is true after every `write`, so that it can be played while it grows."""

    def __init__(self, path: Path, sample_rate: int) -> None:
        self._file = path.open("wb")
        self._wav = wave.Wave_write(self._file)
        self._wav.setparams((1, 2, sample_rate, 0, "NONE", "not compressed"))
        self._write_header()

    @property
    def samples(self) -> int:
        return self._wav.getnframes()

    @property
    def seconds(self) -> float:
        return self.samples / self._wav.getframerate()

    def write(self, wav: np.ndarray) -> None:
        """Append samples within [-1, 1]. They are on disk before the header tells of them."""
        self._wav.writeframesraw((wav * 32767).round().astype("i2").tobytes())
        self._file.flush()
        self._write_header()

    def _write_header(self) -> None:
        self._wav.writeframes(b"")  # brings the sizes in it up to date
        self._file.flush()

    def __enter__(self) -> GrowingWav:
        return self

    def __exit__(self, *error: object) -> None:
        self._wav.close()
        self._file.close()
