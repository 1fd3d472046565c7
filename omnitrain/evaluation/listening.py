"""Speech that was made, judged and kept for the report: a codec's round trips, a Talker's answers.

    judge_codec(...), judge_talker(...)  ->  eval/speech.json  eval/speech.parquet

Both score recordings of `test_sources`: real (or synthetic) speech whose text is known. `evaluation.judges` has the
judges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.media import MediaLimits, encode_audio
from omnitrain.data.sample import BadSample
from omnitrain.data.shards import Source
from omnitrain.data.waveforms import Utterance, UtteranceReader
from omnitrain.evaluation.judges import (
    Voices,
    Whisper,
    missing_judges,
    missing_judges_notice,
    spoken_form,
)
from omnitrain.evaluation.settings import CodecEvaluation, SpeechEvaluation
from omnitrain.evaluation.speech_scores import SpeechScores, Spoken, score_speech
from omnitrain.evaluation.speech_tables import speech_tables
from omnitrain.files import SPEECH, SPOKEN, SPOKEN_OTHERS, write_json, write_parquet
from omnitrain.generation.sampling import Sampling
from omnitrain.generation.speech import Speaker, speak_texts
from omnitrain.models.omni import OmniModel

SAMPLE_RATE = 24_000
RECORDINGS_PER_VOICE = 10
"""So many recordings of the training data make the mean of a voice."""


class EncodesSpeech(Protocol):
    """A `models.codec.Codec` or `interop.mimi.MimiCodec`."""

    def encode(self, wav: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


def judge_codec(
    codec: EncodesSpeech,
    test_sources: Mapping[str, Source],
    train_sources: Mapping[str, Source],
    settings: CodecEvaluation,
    out_dir: Path,
) -> dict[str, Any]:
    """Encode and decode recordings of the test sources, evenly over each, and judge what is left of them; voices are
    learnt from the training sources. Returns what stands in ``speech.json``. Raises ValueError where no recording has a
    text."""
    recordings = read_recordings(test_sources, settings.max_samples)
    spoken = []
    for u in track(recordings, "round trips", console=Console(stderr=True)):
        trip = round_trip(codec, u.wav)
        spoken.append(spoken_of(u, generated=trip, round_trip=trip))
    return judge_spoken(spoken, train_sources, settings, out_dir, bit_rate(codec))


def judge_talker(
    model: OmniModel | Speaker,
    tokenizer: ChatTokenizer,
    codec: EncodesSpeech | None,
    test_sources: Mapping[str, Source],
    train_sources: Mapping[str, Source],
    settings: SpeechEvaluation,
    out_dir: Path,
) -> dict[str, Any]:
    """Have held-out texts spoken by a model with Talker and Code2Wav, each after its question, and judge the speech
    beside the recording of the same text and its round trip (none without `codec`); with `settings.other_voices` also
    in the voices of the others, which ``speech.json`` has under ``other_voices``. The rest as in `judge_codec`."""
    speaker = model if isinstance(model, Speaker) else Speaker(model, tokenizer)
    recordings = read_recordings(test_sources, settings.max_samples)
    if settings.voice is not None:
        recordings = [replace(u, voice=settings.voice) for u in recordings]
    crossed: list[Utterance] = []
    if settings.other_voices:
        voices = sorted({u.voice for u in recordings})
        crossed = [replace(u, voice=v, id=f"{u.id} by {v}") for u in recordings for v in voices if v != u.voice]
    residuals = Sampling(temperature=settings.temperature, top_k=settings.top_k)
    codes = replace(residuals, repetition_penalty=settings.repetition_penalty)
    frames_per_second = SAMPLE_RATE / speaker.samples_per_frame
    spoken, every = [], recordings + crossed
    groups = [every[i : i + settings.batch] for i in range(0, len(every), settings.batch)]
    for group in track(groups, "speaking", console=Console(stderr=True)):
        said = speak_texts(
            speaker, tokenizer, [u.text for u in group], [u.voice for u in group],
            questions=[u.question for u in group], codes=codes, residuals=residuals,
            max_frames=max(1, round(settings.seconds_limit * frames_per_second)), seed=settings.seed,
        )  # fmt: skip
        for u, speech in zip(group, said, strict=True):
            trip = None if codec is None else round_trip(codec, u.wav)
            spoken.append(spoken_of(u, generated=speech.wav, round_trip=trip, hit_limit=speech.hit_limit))
    own, others = spoken[: len(recordings)], spoken[len(recordings) :]
    return judge_spoken(own, train_sources, settings, out_dir, None if codec is None else bit_rate(codec), others)


def read_recordings(sources: Mapping[str, Source], most: int) -> list[Utterance]:
    """Recordings with a speakable text, evenly over the sources and over each of them. Raises ValueError for none."""
    share = math.ceil(most / max(1, len(sources)))
    found = [utterance for utterance in _every(sources, share) if spoken_form(utterance.text)]
    if not found:
        raise ValueError(f"no recording with a text in {', '.join(sources) or 'the test sources'}: nothing to judge")
    return found[:most]


@torch.no_grad()
def round_trip(codec: EncodesSpeech, wav: np.ndarray) -> np.ndarray:
    """float32 [T] at 24 kHz through the codec and back, of the same length."""
    codes = codec.encode(torch.from_numpy(np.ascontiguousarray(wav))[None])
    return codec.decode(codes)[0, : len(wav)].float().cpu().numpy()


def bit_rate(codec: EncodesSpeech) -> float | None:
    """Bits a second of a codec's codes, stored without further coding. None for one that does not say how many."""
    bits, samples = getattr(codec, "bits_per_frame", None), getattr(codec, "samples_per_frame", None)
    return None if bits is None or samples is None else SAMPLE_RATE / samples * bits


def spoken_of(u: Utterance, *, generated: np.ndarray, round_trip: np.ndarray | None, hit_limit: bool = False) -> Spoken:
    """What was generated for the text of the recording `u`, beside it."""
    return Spoken(
        text=u.text, wav=generated, sample_rate=SAMPLE_RATE, reference=u.wav, round_trip=round_trip, voice=u.voice,
        hit_limit=hit_limit, language=u.languages[-1] if u.languages else "", id=u.id,
    )  # fmt: skip


def known_voices(judged: Sequence[str], train_sources: Mapping[str, Source]) -> Voices | None:
    """The voices of the training data; None where fewer than two are named, or a judged voice is none of them."""
    heard: dict[str, list[tuple[np.ndarray, int]]] = {}
    for utterance in _every(train_sources):
        if utterance.voice and len(heard.setdefault(utterance.voice, [])) < RECORDINGS_PER_VOICE:
            heard[utterance.voice].append((utterance.wav, SAMPLE_RATE))
    known = len(heard) >= 2 and set(judged) <= heard.keys()
    return Voices(heard) if known else None


def _every(sources: Mapping[str, Source], most: int = 400) -> Iterator[Utterance]:
    """Up to `most` recordings of each source, evenly spaced, as far as they can be read."""
    reader = UtteranceReader(sample_rate=SAMPLE_RATE, limits=MediaLimits())
    for source in sources.values():
        count = min(most, len(source))
        for i in range(count):
            try:
                yield reader(source[i * len(source) // count], source.media_bytes)
            except BadSample:
                continue


def judge_spoken(
    spoken: Sequence[Spoken],
    train_sources: Mapping[str, Source],
    settings: CodecEvaluation | SpeechEvaluation,
    out_dir: Path,
    bits: float | None = None,
    others: Sequence[Spoken] = (),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge what was spoken, write ``speech.json`` and its rows, and print the tables.

    Args:
        bits: bits a second of a codec.  others: what was spoken in other voices, scored apart.
        more: what else stands in ``speech.json``.
    """
    kind, grammar = ("talker", settings.grammar_words) if isinstance(settings, SpeechEvaluation) else ("codec", True)
    english = all(s.language in ("en", "") for s in spoken)  # the recogniser knows no other language
    words = sorted({word for s in spoken for word in spoken_form(s.text).split()}) if english and grammar else None
    missing = missing_judges()
    judge = partial(
        score_speech,
        voices=None if "resemblyzer" in missing else known_voices([s.voice for s in spoken], train_sources),
        grammar_words=words,
        open_vocabulary=english,
        whisper=None if settings.judge is None else Whisper(settings.judge),
        without=missing,
    )
    recognisers = ["pocketsphinx"] if english and "pocketsphinx" not in missing else []
    recognisers += [] if settings.judge is None else ["Whisper"]
    scores = judge(spoken)
    summary = {
        "kind": kind,
        "recogniser": " and ".join(recognisers) or None,
        "judge": settings.judge,
        "not_judged": missing_judges_notice(missing) if missing else None,
        "words": len(words) if words else None,
        "bit_rate": bits,
        **(more or {}),
        **_record(scores),
    }
    _write_rows(out_dir / Path(SPOKEN).name, spoken, scores, settings.players)
    if others:
        crossed = judge(others)
        summary["other_voices"] = _record(crossed)
        _write_rows(out_dir / Path(SPOKEN_OTHERS).name, others, crossed, settings.players)
    write_json(out_dir / Path(SPEECH).name, summary)
    print_speech(summary)
    if missing:
        print(missing_judges_notice(missing))
    return summary


def _write_rows(path: Path, spoken: Sequence[Spoken], scores: SpeechScores, players: int) -> None:
    """A row for each utterance; `players` of them, evenly spaced, with their sound."""
    heard_here = {i * len(spoken) // players for i in range(players)} if players < len(spoken) else range(len(spoken))
    rows = [
        {
            "id": s.id, "text": s.text, "voice": s.voice, "hit_limit": s.hit_limit,
            "heard": json.dumps({k: v for k, v in heard.items() if k not in ("id", "text")}),
            "measured": json.dumps(measured),
            **{name: encode_audio(w, SAMPLE_RATE, "flac") for name, w in s.signals.items() if i in heard_here},
        }
        for i, (s, heard, measured) in enumerate(zip(spoken, scores.heard, scores.measured, strict=True))
    ]  # fmt: skip
    sound = [(name, pa.binary()) for name in ("reference", "round_trip", "generated")]
    text = [(name, pa.string()) for name in ("id", "text", "voice", "heard", "measured")]
    write_parquet(path, pa.Table.from_pylist(rows, schema=pa.schema([*text, ("hit_limit", pa.bool_()), *sound])))


def _record(scores: SpeechScores) -> dict[str, Any]:
    """The scores as they stand in ``speech.json``; what was heard stands in ``speech.parquet``."""
    found = asdict(scores)
    parts = [key for key in found if key.startswith("by_")]
    for one in (found, *(scores for key in parts for scores in found[key].values())):
        del one["heard"], one["measured"]
        if one is not found:
            for key in parts:
                del one[key]
    return found


def print_speech(summary: Mapping[str, Any]) -> None:
    """The scores of ``speech.json`` as tables."""
    console = Console(width=120)
    for found in speech_tables(summary):
        table = Table(*found.headings, title=found.title, title_justify="left")
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
