"""Captions of recordings, from shards that say what a sound is or what a voice says.

    python -m data_prep.sound_captions data/stamps data/asterisk --out data/sound_captions

"A fire truck." of a sound becomes "A fire truck can be heard."; a transcript becomes 'A woman says in Spanish: "..."',
or "A voice" where nobody knows who speaks. What is truly heard stands in ``meta["events"]``, a JSON list: it is what
hallucinations are counted against. Sounds and voices have shards of their own (`*_sounds-*`, `*_voices-*`), so that a
recipe can weight them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.prompts import LANGUAGE_NAMES, ask, prompt
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards

SPEAKERS = {"Allison": "woman", "June": "woman", "Carlo": "man", "Maxim": "man"}
"""Voices of `data_prep.asterisk`; the folders of the packages say who they are (``en_US_f_Allison``)."""

_ARTICLE = re.compile(r"^(an?|the|some)\s+", re.IGNORECASE)
"""What names of things begin with; "We remember those who have died." names nothing that could be heard."""


def sound_caption(sample: Sample) -> tuple[str, list[str], list[str]]:
    """Caption, other right captions and events of a sound that is named in English."""
    name = sample.reference.strip().rstrip(".")
    return f"{name} can be heard.", [f"The sound of {name[:1].lower()}{name[1:]}."], [_ARTICLE.sub("", name).lower()]


def speech_caption(sample: Sample) -> tuple[str, list[str], list[str]]:
    """Caption, other right captions and events of a recording that somebody transcribed."""
    speaker = SPEAKERS.get(sample.meta.get("voice", ""), "voice")
    language, said = LANGUAGE_NAMES[sample.languages[0]], sample.reference.strip()
    events = [language.lower(), *([speaker] if speaker != "voice" else [])]
    return f"A {speaker} says in {language}: “{said}”", [f"Speech in {language}: “{said}”"], events


def captions(source: SampleSource, task: str, languages: Collection[str], counts: Counts) -> Iterator[Sample]:
    """A caption of each sound with an English name (`task` sound) or of each transcript in one of `languages` (asr)."""
    for i, row in enumerate(source.light().to_pylist()):
        if row["task"] == task and row["languages"][-1] in (("en",) if task == "sound" else languages):
            sample = source[i]
            if task == "sound" and not _ARTICLE.match(sample.reference):
                counts.left_out["sounds whose text is no name of a thing"] += 1
                continue
            try:
                medium = next(s for s in sample.segments if s.type == "audio")
                sound = Segment(type="audio", media=source.media_bytes(medium))
            except BadSample as bad:
                counts.left_out[bad.reason] += 1
                continue
            yield captioned(sample, sound)


def captioned(sample: Sample, sound: Segment) -> Sample:
    """`sample` with a question for a caption of its recording, and the caption as the answer."""
    text, others, events = (speech_caption if sample.task == "asr" else sound_caption)(sample)
    id = f"{sample.id}/caption"
    meta = {"references": json.dumps(others, ensure_ascii=False), "events": json.dumps(events, ensure_ascii=False)}
    return replace(
        sample, id=id, task="audio_caption", messages=ask(id, prompt("audio_caption", id), text, sound),
        languages=("en",), meta={**sample.meta, **meta},
    )  # fmt: skip


def _build(_: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    for folder in options.folders:
        source = SampleSource(Path(folder), where={"task": ["asr", "sound"]})
        for task, name in (("sound", "sounds"), ("asr", "voices")):
            rows = counts.watch(captions(source, task, options.languages or LANGUAGE_NAMES, counts))
            write_shards(rows, options.out, f"{source.name}_{name}", progress=options.progress)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="folders of shards with sounds or transcripts")
    parser.add_argument("--languages", nargs="*", help="of the voices, as in: en es fr; default: all")


def main(argv: list[str] | None = None) -> int:
    assert __doc__ is not None
    return run(
        argv, name="sound_captions", description=__doc__.splitlines()[0], packages=[], build=_build,
        add_options=_add_options,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
