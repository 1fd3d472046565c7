"""Speech that was made, judged and kept for the report: a codec's round trips, a Talker's answers.

    judge_codec(...), judge_talker(...)  ->  eval/speech.json  eval/speech.parquet

Both score recordings of `test_sources`: real (or synthetic) speech whose text is known. `evaluation.speech` has the
judges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from omnitrain.data.media import MediaLimits, encode_audio
from omnitrain.data.sample import BadSample
from omnitrain.data.shards import Source
from omnitrain.data.waveforms import Utterance, UtteranceReader
from omnitrain.evaluation.metrics import Interval
from omnitrain.evaluation.speech import (
    SpeechScores,
    Spoken,
    Voices,
    missing_judges,
    missing_judges_notice,
    score_speech,
    spoken_form,
)

SAMPLE_RATE = 24_000
RECORDINGS_PER_VOICE = 10
"""So many recordings of the training data make the mean of a voice."""


class EncodesSpeech(Protocol):
    """A `models.codec.Codec` or `interop.mimi.MimiCodec`."""

    def encode(self, wav: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a Talker made of a text: wav float [T] at 24 kHz; `hit_limit`: it did not end by itself."""

    wav: np.ndarray
    hit_limit: bool


Speak = Callable[[Sequence[Utterance]], list[Said]]
"""Speech of the texts, after their questions and in their voices."""


def judge_codec(
    codec: EncodesSpeech,
    test_sources: Mapping[str, Source],
    train_sources: Mapping[str, Source],
    out_dir: Path,
    *,
    max_samples: int = 32,
    players: int = 8,
) -> dict[str, Any]:
    """Encode and decode recordings, and judge what is left of them.

    Args:
        test_sources: whose recordings are used, evenly over each.
        train_sources: what the voices are learnt from.
        out_dir: receives the two files.
        max_samples: recordings.  players: of them, kept for listening.

    Returns:
        what stands in ``speech.json``.

    Raises:
        ValueError: no recording with a text.
    """
    recordings = read_recordings(test_sources, max_samples)
    spoken = []
    for u in track(recordings, "round trips", console=Console(stderr=True)):
        trip = round_trip(codec, u.wav)
        spoken.append(_spoken(u, generated=trip, round_trip=trip))
    return _judge(spoken, recordings, train_sources, out_dir, players=players, kind="codec", grammar=True)


def judge_talker(
    speak: Speak,
    codec: EncodesSpeech | None,
    test_sources: Mapping[str, Source],
    train_sources: Mapping[str, Source],
    out_dir: Path,
    *,
    max_samples: int = 40,
    players: int = 8,
    batch: int = 8,
    grammar_words: bool = True,
    voice: str | None = None,
) -> dict[str, Any]:
    """Have held-out texts spoken, and judge the speech beside the recording of the same text and its round trip.

    Args:
        speak: the Talker.
        codec: makes the round trips; None: there are none.
        batch: texts spoken at once.
        grammar_words: also recognise with a loop of the texts' words.
        voice: speak all texts in this voice, and compare with it; None: in that of each recording.
        Others, and errors: see `judge_codec`.
    """
    recordings = read_recordings(test_sources, max_samples)
    spoken = []
    batches = [recordings[i : i + batch] for i in range(0, len(recordings), batch)]
    for group in track(batches, "speaking", console=Console(stderr=True)):
        group = [u if voice is None else replace(u, voice=voice) for u in group]
        for u, said in zip(group, speak(group), strict=True):
            trip = None if codec is None else round_trip(codec, u.wav)
            spoken.append(_spoken(u, generated=said.wav, round_trip=trip, hit_limit=said.hit_limit))
    return _judge(spoken, recordings, train_sources, out_dir, players=players, kind="talker", grammar=grammar_words)


def read_recordings(sources: Mapping[str, Source], most: int) -> list[Utterance]:
    """Recordings with a speakable text, evenly over the sources and over each of them.

    Raises:
        ValueError: there is none.
    """
    reader = UtteranceReader(sample_rate=SAMPLE_RATE, limits=MediaLimits())
    found: list[Utterance] = []
    share = math.ceil(most / max(1, len(sources)))
    for source in sources.values():
        for i in range(min(share, len(source))):
            try:
                utterance = reader(source[i * len(source) // min(share, len(source))], source.media_bytes)
            except BadSample:
                continue
            if spoken_form(utterance.text):
                found.append(utterance)
    if not found:
        raise ValueError(f"no recording with a text in {', '.join(sources) or 'the test sources'}: nothing to judge")
    return found[:most]


@torch.no_grad()
def round_trip(codec: EncodesSpeech, wav: np.ndarray) -> np.ndarray:
    """float32 [T] at 24 kHz through the codec and back, of the same length."""
    codes = codec.encode(torch.from_numpy(np.ascontiguousarray(wav))[None])
    return codec.decode(codes)[0, : len(wav)].float().cpu().numpy()


def _spoken(u: Utterance, *, generated: np.ndarray, round_trip: np.ndarray | None, hit_limit: bool = False) -> Spoken:
    return Spoken(
        text=u.text,
        wav=generated,
        sample_rate=SAMPLE_RATE,
        reference=u.wav,
        round_trip=round_trip,
        voice=u.voice,
        hit_limit=hit_limit,
        id=u.id,
    )


def _voices(judged: Sequence[str], train_sources: Mapping[str, Source]) -> Voices | None:
    """The voices of the training data; None where fewer than two are named, or a judged voice is none of them."""
    reader = UtteranceReader(sample_rate=SAMPLE_RATE, limits=MediaLimits())
    heard: dict[str, list[tuple[np.ndarray, int]]] = {}
    for utterance in _every(train_sources, reader):
        if utterance.voice and len(heard.setdefault(utterance.voice, [])) < RECORDINGS_PER_VOICE:
            heard[utterance.voice].append((utterance.wav, SAMPLE_RATE))
    known = len(heard) >= 2 and set(judged) <= heard.keys()
    return Voices(heard) if known else None


def _every(sources: Mapping[str, Source], reader: UtteranceReader, most: int = 400) -> Iterator[Utterance]:
    """Up to `most` readable recordings of each source, evenly spaced."""
    for source in sources.values():
        count = min(most, len(source))
        for i in range(count):
            try:
                yield reader(source[i * len(source) // count], source.media_bytes)
            except BadSample:
                continue


def _judge(
    spoken: Sequence[Spoken],
    recordings: Sequence[Utterance],
    train_sources: Mapping[str, Source],
    out_dir: Path,
    *,
    players: int,
    kind: str,
    grammar: bool,
) -> dict[str, Any]:
    english = all(u.languages[-1:] in (("en",), ()) for u in recordings)  # the recogniser knows no other language
    words = sorted({word for s in spoken for word in spoken_form(s.text).split()}) if english and grammar else None
    missing = missing_judges()
    scores = score_speech(
        spoken,
        voices=None if "resemblyzer" in missing else _voices([s.voice for s in spoken], train_sources),
        grammar_words=words,
        open_vocabulary=english,
        without=missing,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    summary = {
        "kind": kind,
        "recogniser": "pocketsphinx" if english and "pocketsphinx" not in missing else None,
        "not_judged": missing_judges_notice(missing) if missing else None,
        "words": len(words) if words else None,
        **{name: value for name, value in scores.to_dict().items() if name != "heard"},
    }
    (out_dir / "speech.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    heard = {row["id"]: row for row in scores.heard}
    rows = [
        {
            "id": s.id,
            "text": s.text,
            "voice": s.voice,
            "hit_limit": s.hit_limit,
            "heard": json.dumps({k: v for k, v in heard[s.id].items() if k not in ("id", "text")}),
            **{
                name: encode_audio(s.signals[name], SAMPLE_RATE, "flac") if name in s.signals and i < players else None
                for name in ("reference", "round_trip", "generated")
            },
        }
        for i, s in enumerate(spoken)
    ]
    sound = [(name, pa.binary()) for name in ("reference", "round_trip", "generated")]
    text = [(name, pa.string()) for name in ("id", "text", "voice", "heard")]
    schema = pa.schema([*text, ("hit_limit", pa.bool_()), *sound])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out_dir / "speech.parquet")
    print_speech(scores, kind)
    if missing:
        print(missing_judges_notice(missing))
    return summary


def print_speech(scores: SpeechScores, kind: str) -> None:
    """The scores as a table: one column per signal."""
    signals = ["reference", "round_trip", *(["generated"] if kind != "codec" else [])]
    table = Table("measure", *(s.replace("_", " ") for s in signals), title=f"{scores.n} utterances")

    def row(label: str, values: Mapping[str, Interval], form: str = ".1%") -> None:
        cells = [
            f"{values[s].mean:{form}} [{values[s].low:{form}}, {values[s].high:{form}}]" if s in values else "-"
            for s in signals
        ]
        table.add_row(label, *cells)

    for recogniser in scores.wer:
        row(f"WER, {recogniser.replace('_', ' ')}", scores.wer[recogniser])
        row(f"CER, {recogniser.replace('_', ' ')}", scores.cer[recogniser])
    if scores.own_voice:
        row("similarity to own voice", scores.own_voice, ".2f")
        row("nearest other voice", scores.other_voice, ".2f")
    console = Console(width=100)
    if table.row_count:
        console.print(table)
    for label, value in (("mel distance, dB", scores.mel_db), ("PESQ", scores.pesq), ("STOI", scores.stoi)):
        if value is not None:
            console.print(f"round trip, {label}: {value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]", highlight=False)
    if kind != "codec":
        console.print("failures: " + ", ".join(f"{k} {v}" for k, v in scores.failures.items()), highlight=False)
