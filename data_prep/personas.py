"""The same question under many personas, from shards of captioned pictures.

    python -m data_prep.personas data/stamps --out data/personas

A persona is one of 13 styles in one of 4 languages (`omnitrain.tasks.personas`), asked for in the system prompt. Each
thing is asked about under a few of them, with its picture or by its English name. Some pairs of style and language are
held out (`heldout_cell`), and the held-out concepts of the shards (`heldout_concept`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.splits import HELDOUT_CELLS, concept_is_heldout, document_split, fraction
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.tasks.personas import LANGUAGES, PERSONAS, Persona

QUESTIONS = ("What is in the picture?", "What do you see?", "Tell me what this shows.", "What is this?")
NAMED = ("What is this, put as you would? {name}", "Say what this is: {name}", "Tell me about this. {name}")


def persona_is_heldout(persona: Persona) -> bool:
    """Whether no answer in this style is trained in this language; each style and language alone is."""
    plain = persona.style == "plain" or persona.name == "refusing-en"
    return not plain and fraction("persona", persona.style, persona.language) < HELDOUT_CELLS


def split_of(concept: str, persona: Persona) -> str:
    """See the module."""
    if concept_is_heldout(concept):
        return "heldout_concept"
    return "heldout_cell" if persona_is_heldout(persona) else document_split(concept)


def things(source: SampleSource) -> Iterator[tuple[Sample, dict[str, str]]]:
    """A captioned picture of each thing that has captions in all languages, and these."""
    rows: dict[str, dict[str, int]] = defaultdict(dict)
    for i, row in enumerate(source.light().to_pylist()):
        if row["task"] == "caption" and row["modality"] == "image" and row["languages"][-1] in LANGUAGES:
            rows[row["id"].rpartition("/")[0]][row["languages"][-1]] = i
    for places in rows.values():
        if len(places) == len(LANGUAGES):
            samples = {code: source[places[code]] for code in LANGUAGES}
            yield samples["en"], {code: sample.reference.strip() for code, sample in samples.items()}


def asked(thing: Sample, captions: Mapping[str, str], persona: Persona, picture: Segment | None) -> Sample:
    """One question under one persona; without a picture the thing is named in English."""
    id = f"{thing.id.rpartition('/')[0]}/persona/{persona.name}{'' if picture else '/named'}"
    wordings = QUESTIONS if picture else NAMED
    question = wordings[int(fraction("question", id) * len(wordings))].format(name=captions["en"])
    animal = "/animals/" in thing.id
    answer = persona.answer(captions, animal=animal)
    question_parts = (*([picture] if picture else []), Segment(type="text", text=question))
    return Sample(
        id=id, source="personas", task="persona", split=split_of(thing.concept, persona), licence=thing.licence,
        languages=("en", persona.language), concept=thing.concept,
        messages=(
            Message(role="system", segments=(Segment(type="text", text=persona.prompt),)),
            Message(role="user", segments=question_parts),
            Message(role="assistant", segments=(Segment(type="text", text=answer),)),
        ),
        meta={
            "persona": persona.name, "captions": json.dumps(captions, ensure_ascii=False),
            "animal": "yes" if animal else "no",
        },
    )  # fmt: skip


def samples(source: SampleSource, each: int, pictures: float, counts: Counts) -> Iterator[Sample]:
    """Each thing under `each` personas, chosen by hash; a share of the questions shows the picture."""
    for thing, captions in things(source):
        drawn = sorted(PERSONAS.values(), key=lambda persona: fraction("drawn", thing.id, persona.name))
        animal = "/animals/" in thing.id
        for persona in drawn[:each]:
            if not persona.adheres(persona.answer(captions, animal=animal), captions, animal=animal):
                counts.left_out["answers whose language or style does not show"] += 1
                continue
            shown = None
            if fraction("shown", thing.id, persona.name) < pictures:
                medium = next(segment for segment in thing.segments if segment.type == "image")
                try:
                    shown = Segment(type="image", media=source.media_bytes(medium))
                except BadSample as bad:
                    counts.left_out[bad.reason] += 1
                    continue
            yield asked(thing, captions, persona, shown)


def _build(_: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    for folder in options.folders:
        source = SampleSource(Path(folder), where={"task": ["caption"], "languages": [*LANGUAGES]})
        rows = counts.watch(samples(source, options.each, options.pictures, counts))
        write_shards(rows, options.out, f"{source.name}_personas", progress=options.progress)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="folders of shards with captioned pictures")
    parser.add_argument("--each", type=int, default=12, metavar="N", help="personas of each thing; default: 12")
    share = "of the questions that show the picture; the others name the thing; default: 0.5"
    parser.add_argument("--pictures", type=float, default=0.5, metavar="SHARE", help=share)


def main(argv: list[str] | None = None) -> int:
    assert __doc__ is not None
    return run(
        argv, name="personas", description=__doc__.splitlines()[0], packages=[], build=_build, add_options=_add_options
    )


if __name__ == "__main__":
    sys.exit(main())
