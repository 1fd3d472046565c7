"""Codecs, or Talkers, of several runs side by side: runs that differ in nothing but their seed are one arm. Scores over
all sentences that all runs have spoken and by voice, differences to the first arm paired by seed and sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.evaluation.intervals import Estimate, bootstrap_interval, crossed_interval
from omnitrain.evaluation.scores import read_table
from omnitrain.evaluation.speech_tables import LABELS, TRIP
from omnitrain.files import SPOKEN, write_bytes, write_text
from omnitrain.reports.run import Run
from omnitrain.reports.transcripts import arm_heads, cell_text, markdown_table, runs_by_arm

_RATE, _BIT_RATE = 24_000, 24_000
"""Hz, and bits a second, of clips."""
_LOWER = ("wer", "cer", "mel_db", "voicing_error", "failed")


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """`numbers`: see `speech_scores.utterance_numbers`."""

    text: str
    voice: str
    numbers: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class SpeechLine:
    """One measure in one voice ("all": together).

    Attributes:
        title, form: of the measure, and how it is printed.
        values: of each arm that has such a score. With one run of an arm, the interval is over sentences alone.
        differences: of each arm but the first to the first, over the seeds that both have.
    """

    voice: str
    title: str
    form: str
    sentences: int
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class SpeechArms:
    """Of each arm, in the order of the runs, how many `runs` it has; the `lines` of their scores."""

    runs: Mapping[str, int]
    lines: Sequence[SpeechLine]


def read_speech_arms(runs: Sequence[Run], names: Sequence[str]) -> SpeechArms | None:
    """Of the runs whose speech was judged; None if there are none. Raises ValueError if two runs of one arm have the
    same seed, or a file cannot be read."""
    spoken = [(run, name) for run, name in zip(runs, names, strict=True) if run.speech]
    if not spoken:
        return None
    arms = {
        label: {seed: read_sentences(run.folder / SPOKEN) for seed, (run, _) in part.items()}
        for label, part in runs_by_arm(spoken).items()
    }
    return SpeechArms(runs={label: len(part) for label, part in arms.items()}, lines=tuple(compare_speech(arms)))


def read_sentences(path: Path) -> dict[str, Sentence]:
    """What a run has spoken, by the ids of the recordings. Raises ValueError, naming the file, if it cannot be read."""
    table = read_table(path, ("id", "text", "voice", "measured"))
    return {
        row["id"]: Sentence(text=row["text"], voice=row["voice"], numbers=json.loads(row["measured"]))
        for row in table.to_pylist()
    }


def compare_speech(arms: Mapping[str, Mapping[int, Mapping[str, Sentence]]]) -> Iterator[SpeechLine]:
    """Lines of arms, each with its runs by seed."""
    runs = [run for arm in arms.values() for run in arm.values()]
    common = [id for id in runs[0] if all(id in run for run in runs[1:])]
    voices = sorted({runs[0][id].voice for id in common})
    for voice in ["all", *voices] if len(voices) > 1 else ["all"]:
        ids = [id for id in common if voice in ("all", runs[0][id].voice)]
        for key, (title, form) in _measures(runs, ids).items():
            there = {
                name: arm
                for name, arm in arms.items()
                if all(any(key in run[id].numbers for id in ids) for run in arm.values())
            }
            shared = [id for id in ids if all(key in run[id].numbers for arm in there.values() for run in arm.values())]
            if not shared:
                continue
            groups = [runs[0][id].text for id in shared]
            sums = {
                name: {seed: np.array([run[id].numbers[key] for id in shared]) for seed, run in sorted(arm.items())}
                for name, arm in there.items()
            }
            first = next(iter(arms))
            differences = {}
            for name in [name for name in sums if name != first and first in sums]:
                if seeds := sorted(sums[name].keys() & sums[first].keys()):
                    mine, theirs = (np.stack([sums[arm][seed] for seed in seeds]) for arm in (name, first))
                    differences[name] = _estimate(mine[:, :, 0] - theirs[:, :, 0], mine[0, :, 1], groups)
            yield SpeechLine(
                voice=voice, title=title, form=form, sentences=len(shared), differences=differences,
                values={
                    name: _estimate(both[:, :, 0], both[0, :, 1], groups)
                    for name, both in ((name, np.stack(list(of.values()))) for name, of in sums.items())
                },
            )  # fmt: skip


def _measures(runs: Sequence[Mapping[str, Sentence]], ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Title and form of what was measured, in the order of the page: of recognisers the one for any language first."""
    found = {key for run in runs for id in ids for key in run[id].numbers}
    by = next((name for name in ("whisper", "open", "word_loop") if f"wer/{name}/reference" in found), "whisper")
    shown: dict[str, tuple[str, str]] = {}
    for signal, label in LABELS.items():
        shown |= {f"{rate}/{by}/{signal}": (f"{rate.upper()}, {label}", ".1%") for rate in ("wer", "cer")}
    shown |= TRIP
    shown |= {f"own_voice/{signal}": (f"similarity to the voice, {label}", ".2f") for signal, label in LABELS.items()}
    shown |= {f"failed/{signal}": (f"fails, {label}", ".1%") for signal, label in LABELS.items()}
    return {
        key: (f"{title} {'↓' if key.split('/')[0] in _LOWER else '↑'}", form)
        for key, (title, form) in shown.items() if key in found
    }  # fmt: skip


def _estimate(values: np.ndarray, weights: np.ndarray, groups: Sequence[str]) -> Estimate:
    """The mean over seeds of values [S, I], weighted by item. With one seed, its interval is over sentences."""
    found = crossed_interval(values, weights, np.asarray(groups))
    if len(values) > 1:
        return found
    interval = bootstrap_interval(values[0], weights=weights, groups=list(groups))
    return replace(found, low=interval.low, high=interval.high) if interval.groups > 1 else found


@dataclass(frozen=True, kw_only=True)
class ArmTable:
    """Of one voice, or all: a row for each arm, and for the recording what stands in none; cells as text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def arm_tables(arms: SpeechArms) -> list[ArmTable]:
    """A table for all voices together, then one for each. In a cell a score, and behind it what it is more than that of
    the first arm. What is the same of all, as the recordings' scores are, stands above, not in a column."""
    heads, _ = arm_heads(arms.runs)
    tables = []
    for voice in dict.fromkeys(line.voice for line in arms.lines):
        lines = [line for line in arms.lines if line.voice == voice]
        shared = [line for line in lines if set(line.values) == set(arms.runs) and _alike(line.values.values())]
        told = [line for line in lines if line not in shared]
        same = [f"{line.title[:-2]} {cell_text(next(iter(line.values.values())), line.form)}" for line in shared]
        title = f"{voice}, {max(line.sentences for line in lines)} sentences"
        rows = tuple((head, *(_cell(line, name) for line in told)) for head, name in zip(heads, arms.runs, strict=True))
        title += f" ({'; '.join(same)})" if same else ""
        tables.append(ArmTable(title=title, head=("arm", *(line.title for line in told)), rows=rows))
    return tables


def _alike(values: Iterable[Estimate]) -> bool:
    return len({round(value.value, 9) for value in values}) == 1


def _cell(line: SpeechLine, name: str) -> str:
    value = cell_text(line.values.get(name), line.form)
    difference = line.differences.get(name)
    return value if difference is None else f"{value}; {cell_text(difference, line.form, '+')}"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What an arm (or the recording) made of one sentence: Ogg Opus."""

    arm: str
    text: str
    sound: bytes


def read_clips(runs: Sequence[Run], names: Sequence[str], count: int) -> list[Clip]:
    """Up to `count` sentences that every arm has the sound of, of different voices first, as each arm's first seed said
    them (a codec: its round trip), behind their recordings. Raises ValueError if a file cannot be read."""
    arms = runs_by_arm([(run, name) for run, name in zip(runs, names, strict=True) if run.speech])
    sounds: dict[str, dict[str, dict[str, Any]]] = {}
    for label, by_seed in arms.items():
        run = by_seed[min(by_seed)][0]
        table = read_table(run.folder / SPOKEN, ("id", "text", "voice", "reference", "round_trip", "generated"))
        made = "round_trip" if run.speech.get("kind") == "codec" else "generated"
        sounds[label] = {
            row["id"]: row | {"made": row[made]} for row in table.to_pylist() if row.get(made) and row.get("reference")
        }
    first, *others = sounds.values()
    common = [row for id, row in first.items() if all(id in other for other in others)]
    turns = {row["id"]: sum(r["voice"] == row["voice"] for r in common[:i]) for i, row in enumerate(common)}
    chosen = sorted(common, key=lambda row: turns[row["id"]])[:count]
    clips = [Clip(arm="recording", text=row["text"], sound=_opus(row["reference"])) for row in chosen]
    return clips + [
        Clip(arm=label, text=row["text"], sound=_opus(rows[row["id"]]["made"]))
        for label, rows in sounds.items()
        for row in chosen
    ]


def _opus(recording: bytes) -> bytes:
    return encode_audio(decode_audio(recording, _RATE), _RATE, "opus", _BIT_RATE)


def write_speech_markdown(arms: SpeechArms, clips: Sequence[Clip], path: Path) -> None:
    """The same tables as Markdown, and the `clips` as files in the folder ``clips`` beside it."""
    parts = [
        "On sentences that all runs have. Means over seeds, with 95 % intervals for new seeds and new sentences; of a "
        f"single seed for new sentences alone. Behind the semicolon: the difference to {next(iter(arms.runs))}, paired "
        "by seed and sentence."
    ]
    parts += [f"**{table.title}**\n\n{markdown_table(table.head, table.rows)}" for table in arm_tables(arms)]
    if clips:
        texts, by_arm = dict.fromkeys(clip.text for clip in clips), dict[str, list[str]]()
        for clip in clips:
            links = by_arm.setdefault(clip.arm, [])
            name = f"clips/{clip.arm.replace('/', '_')}-{len(links) + 1}.opus"
            write_bytes(path.parent / name, clip.sound)
            links.append(f"[listen]({name})")
        rows = [(arm, *links) for arm, links in by_arm.items()]
        parts.append("**To listen to** (the first seed of each arm)\n\n" + markdown_table(("arm", *texts), rows))
    write_text(path, "\n\n".join(parts) + "\n")
