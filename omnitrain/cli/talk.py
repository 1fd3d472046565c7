"""``talk``: answer aloud, with a trained run or with weights in the public Qwen3-Omni format."""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from omnitrain.cli.generate import add_device_options, add_media_options, media_segments
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
    _talk(_parser().parse_intermixed_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omnitrain talk",
        description="Answer one prompt aloud. The file is a playable WAV from the first frame on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="a run folder, or a folder in the public format")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what is asked, after the media")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="WAV file to write, 16 bit")
    parser.add_argument("--voice", metavar="NAME", help="default: the first of the model's voices by name")
    parser.add_argument(
        "--say",
        metavar="TEXT",
        help='speak TEXT itself; the Thinker does not write. PROMPT is then what TEXT answers, by default "Say: TEXT"',
    )
    add_media_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt (persona); the Talker does not read it")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="of the text; 0 (default): the most probable token"
    )
    sampling.add_argument(
        "--speech-temperature",
        metavar="T",
        type=float,
        default=0.9,
        help="of the sound; default 0.9. 0 is reproducible on any machine, but may drone",
    )
    sampling.add_argument("--seed", metavar="S", type=int, default=0, help="default: 0")
    sampling.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="longest text; default: 512")
    sampling.add_argument("--max-seconds", metavar="S", type=float, default=60.0, help="longest sound; default: 60")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--json", action="store_true", help="print events, one JSON object per line, instead of the text"
    )
    running.add_argument("--prefill-chunk", type=int, metavar="N", help="read the prompt N tokens at a time")
    running.add_argument(
        "--frames-per-piece",
        type=int,
        metavar="N",
        default=1,
        help="after the first 80 ms, decode N frames together: cheaper, and heard N frames at a time; default: 1",
    )
    add_device_options(running)
    return parser


def _talk(options: argparse.Namespace) -> None:
    media = media_segments(options.media, options.mute)
    if options.prompt is None and options.say is None and not media:
        raise ValueError('nothing is asked: give a PROMPT, media, or --say "text"')
    if options.max_seconds <= 0:
        raise ValueError(f"--max-seconds {options.max_seconds} is not positive")

    from omnitrain.runs.load import load

    model, encoder = load(options.model, device=options.device, dtype=options.dtype, speech=True)
    if model.talker is None or model.code2wav is None:
        raise ValueError(f"{options.model} has no Talker and Code2Wav: it can only write (`omnitrain generate`)")

    from omnitrain.data.sample import BadSample, Message, Segment
    from omnitrain.generation.sampling import Sampling
    from omnitrain.generation.speech import CODES, RESIDUALS, SpeechOptions, SpeechSession

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
    )
    session = SpeechSession(model, encoder, how, system=options.system)
    asked = f"Say: {options.say}" if options.prompt is None and options.say is not None else options.prompt
    text = () if asked is None else (Segment(type="text", text=asked),)
    message = Message(role="user", segments=(*media, *text))
    events = session.answer(message) if options.say is None else session.speak_text(options.say, message)
    samples_per_second = int(model.code2wav.config.samples_per_frame * FRAMES_PER_SECOND)
    try:
        with closing(events), GrowingWav(options.out, samples_per_second) as wav:
            _report(options, session, events, wav)
    except BadSample as error:
        raise ValueError(str(error)) from error


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
        self.sample_rate, self.samples = sample_rate, 0
        self._file = path.open("wb")
        self._file.write(b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt ")
        self._file.write(struct.pack("<IHHIIHH", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16))
        self._file.write(b"data" + struct.pack("<I", 0))
        self._file.flush()

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    def write(self, wav: np.ndarray) -> None:
        """Append samples within [-1, 1]. They are on disk before the header tells of them."""
        self._file.seek(0, 2)
        self._file.write((wav * 32767).round().astype("<i2").tobytes())
        self._file.flush()
        self.samples += len(wav)
        for place, size in ((40, 2 * self.samples), (4, 36 + 2 * self.samples)):
            self._file.seek(place)
            self._file.write(struct.pack("<I", size))
        self._file.flush()

    def __enter__(self) -> GrowingWav:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
