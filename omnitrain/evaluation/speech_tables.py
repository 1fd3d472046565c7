"""The scores of speech (``speech.json``) as tables of text, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omnitrain.evaluation.speech_scores import FAILURES

LABELS = {"reference": "recording", "round_trip": "codec round trip", "generated": "generated"}
NOTHING = "–"

Scores = Mapping[str, Any]
"""`SpeechScores` as a mapping, its intervals too."""


@dataclass(frozen=True)
class SpeechTable:
    """A table whose first columns are names."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def interval_text(value: Mapping[str, Any] | None, form: str) -> str:
    """``mean [low, high]``; a dash where there is none."""
    if value is None:
        return NOTHING
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def speech_tables(summary: Scores) -> list[SpeechTable]:
    """All tables of what stands in ``speech.json``, without those that would be empty."""
    signals = [name for name in LABELS if name != "generated" or summary.get("kind") != "codec"]
    tables = [_overall(summary, signals), _round_trips(summary)]
    for parts, name in _partitions(summary):
        tables += [_by_part(parts, name, signals), _by_part_paired(parts, name, signals)]
    tables.append(_failures(summary, signals))
    if dialogue := summary.get("dialogue"):
        tables.insert(0, _dialogue(dialogue))
    if others := summary.get("other_voices"):
        parts = next(dict(found) for found, _ in [*reversed([*_partitions(others)]), ({"all": others}, "")])
        by = _by_part(parts, "voice and language", ["generated"])
        tables += [
            replace(table, title=f"in other voices, {table.title}") for table in (by, _failures(others, ["generated"]))
        ]
    return [table for table in tables if table.rows]


def _dialogue(scores: Mapping[str, Any]) -> SpeechTable:
    """What whole dialogues have besides."""
    rows = [("answered as in the data", interval_text(scores["right"], ".0%"))]
    rows += [(f"asked as in {name}", interval_text(of, ".0%")) for name, of in scores["right_by_source"].items()]
    rows += [
        ("sound before the text has ended", interval_text(scores["sound_first"], ".0%")),
        ("first sound after, s", interval_text(scores["first_sound"], ".2f")),
        ("end of the text after, s", interval_text(scores["text_end"], ".2f")),
    ]
    return SpeechTable(f"{scores['n']} dialogues", ("measure", ""), tuple(rows))


def _partitions(summary: Scores) -> Iterator[tuple[Mapping[str, Scores], str]]:
    """Scores by voice, by language and by both, as far as they are there."""
    parts = (("by_voice", "voice"), ("by_language", "language"), ("by_voice_and_language", "voice and language"))
    for key, name in parts:
        if summary.get(key):
            yield summary[key], name


def _recognisers(summary: Scores) -> dict[str, str]:
    """Recognisers and how they are called."""
    names = {
        "open": "open vocabulary",
        "word_loop": f"loop of {summary.get('words')} words",
        "whisper": f"Whisper {Path(summary.get('judge') or '').name}",
    }
    return {name: label for name, label in names.items() if name in summary.get("wer", {})}


def _overall(summary: Scores, signals: list[str]) -> SpeechTable:
    """A row a measure, a column a signal."""
    measures: list[tuple[str, str, Mapping[str, Any] | None]] = []
    for name, label in _recognisers(summary).items():
        measures += [(f"{measure.upper()}, {label}", ".1%", summary[measure].get(name)) for measure in ("wer", "cer")]
        measures.append((f"WER above the recording's, {label}", "+.1%", summary.get("wer_rise", {}).get(name)))
    measures += [
        ("similarity to the voice", ".2f", summary.get("own_voice")),
        ("to the nearest other voice", ".2f", summary.get("other_voice")),
        ("nearest to its own voice", ".0%", summary.get("right_voice")),
        ("taken for its language", ".0%", summary.get("right_language")),
        ("pitch above the voice's own, semitones", "+.1f", summary.get("pitch_rise")),
        ("deviation of the pitch, semitones", ".1f", summary.get("pitch_spread")),
    ]
    rows = tuple(
        (label, *(interval_text(of.get(signal), form) for signal in signals)) for label, form, of in measures if of
    )
    return SpeechTable(f"{summary['n']} utterances", ("measure", *(LABELS[s] for s in signals)), rows)


TRIP = {
    "mel_db": ("mel distance, dB", ".2f"),
    "pesq": ("PESQ-WB", ".2f"),
    "stoi": ("STOI", ".2f"),
    "pitch_correlation": ("correlation of the pitch", ".2f"),
    "voicing_error": ("voicing error", ".1%"),
}


def _round_trips(summary: Scores) -> SpeechTable:
    """What has one value: of the round trip against the recording, the codec's bitrate, the pace."""
    rows = [(label, interval_text(summary[name], form)) for name, (label, form) in TRIP.items() if summary.get(name)]
    if summary.get("bit_rate"):
        rows.append(("bitrate, kbit/s", f"{summary['bit_rate'] / 1000:.2f}"))
    if summary.get("kind") != "codec" and summary.get("pace"):
        rows.append(("pace of the generated speech (1: as the recording)", interval_text(summary["pace"], ".2f")))
    return SpeechTable("codec round trip", ("measure", ""), tuple(rows))


def _recogniser(summary: Scores) -> str | None:
    """The one whose word errors stand in tables by voice: any language first, then the open vocabulary."""
    return next((name for name in ("whisper", "open", "word_loop") if summary.get("wer", {}).get(name)), None)


def _by_part(parts: Mapping[str, Scores], name: str, signals: list[str]) -> SpeechTable:
    """A row for each voice (or language) and signal."""
    rows = []
    for part, scores in parts.items():
        by = _recogniser(scores)
        for signal in signals:
            own, other = scores.get("own_voice", {}).get(signal), scores.get("other_voice", {}).get(signal)
            nearest = scores.get("other_name", {}).get(signal, "")
            cells = (
                *(interval_text(scores[measure].get(by, {}).get(signal), ".1%") for measure in ("wer", "cer")),
                interval_text(scores.get("right_language", {}).get(signal), ".0%"),
                interval_text(own, ".2f"),
                f"{interval_text(other, '.2f')} {nearest}".strip(),
            )
            if set(cells) != {NOTHING}:
                rows.append((part, str(scores["n"]), LABELS[signal], *cells))
    headings = (name, "n", "speech", "WER", "CER", "language", "similarity", "nearest other")
    return SpeechTable(f"by {name}", headings, tuple(rows))


def _by_part_paired(parts: Mapping[str, Scores], name: str, signals: list[str]) -> SpeechTable:
    """A row for each voice (or language): what is compared with the recording."""
    rows = []
    judged = [signal for signal in signals if signal != "reference"]
    for part, scores in parts.items():
        rises = scores.get("wer_rise", {}).get(_recogniser(scores), {})
        cells = (
            *(interval_text(rises.get(signal), "+.1%") for signal in judged),
            *(interval_text(scores.get(key), form) for key, (_, form) in TRIP.items()),
            *(interval_text(scores.get("pitch_rise", {}).get(signal), "+.1f") for signal in judged[-1:]),
        )
        if set(cells) != {NOTHING}:
            rows.append((part, *cells))
    headings = (
        name, *(f"WER above, {LABELS[signal]}" for signal in judged),
        *(label for label, _ in TRIP.values()), f"pitch, {LABELS[judged[-1]]}, semitones",
    )  # fmt: skip
    return SpeechTable(f"beside the recordings, by {name}", headings, tuple(rows))


def _failures(summary: Scores, signals: list[str]) -> SpeechTable:
    """Failures per 100 sentences: a row for each voice and signal, and for all."""
    rows = []
    for part, scores in {"all": summary, **(summary.get("by_voice") or {})}.items():
        rates = scores.get("failure_rates") or {}
        for signal in signals:
            if signal in rates and (summary.get("kind") != "codec" or "repeated" in rates[signal]):
                cells = (_per_hundred(rates[signal].get(kind)) for kind in FAILURES)
                rows.append((part, str(scores["n"]), LABELS[signal], *cells))
    return SpeechTable("failures per 100 sentences", ("voice", "n", "speech", *FAILURES), tuple(rows))


def _per_hundred(rate: Mapping[str, Any] | None) -> str:
    return interval_text(rate and {key: 100 * rate[key] for key in ("mean", "low", "high")}, ".1f")
