"""Function calls on a catalogue of pictures: find, count, translate, show; asked for in text, aloud, and by a picture.

    python -m data_prep.tool_data data/stamps --out data/tools

Every sample offers a few functions, in any order, with names drawn from several for each purpose; it calls one, or two
at once, or answers with what the call gave. Whole purposes are held out (``play``, ``compare``: `heldout_cell`, to be
used from their signatures alone), and the held-out concepts of the shards (`heldout_concept`). What is right stands in
``meta["answers"]``, as the checker of `omnitrain.tasks.tool_calls` reads it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.prompts import LANGUAGE_NAMES
from data_prep.splits import concept_is_heldout, document_split, fraction
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.data.turns import write_calls

INTO = ("English", "Spanish", "French", "Russian")


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """names: of the function, one is drawn.  what: its description.  arguments: name and description of each.
    requests: wordings, with ``{thing}`` and ``{other}`` for names and ``{into}`` for a language.  result: what it
    gives, from the arguments."""

    names: tuple[str, ...]
    what: str
    arguments: dict[str, str]
    requests: tuple[str, ...]
    result: Callable[[dict[str, str]], str]

    def signature(self, name: str) -> dict[str, Any]:
        properties = {key: {"type": "string", "description": text} for key, text in self.arguments.items()}
        parameters = {"type": "object", "properties": properties, "required": [*self.arguments]}
        return {"name": name, "description": self.what, "parameters": parameters}


THING = "the thing's name"
PURPOSES: dict[str, Purpose] = {
    "find": Purpose(
        names=("find", "search", "find_pictures", "look_up"),
        what="Finds pictures of a thing in the catalogue.",
        arguments={"name": THING},
        requests=("Find pictures of this: {thing}", "Is there a picture of it? {thing}", "Look for this one. {thing}"),
        result=lambda given: json.dumps([f"{given['name'].rstrip('.')}.png"], ensure_ascii=False),
    ),
    "count": Purpose(
        names=("count", "how_many", "count_pictures"),
        what="Counts the pictures of a thing in the catalogue.",
        arguments={"name": THING},
        requests=("How many pictures are there of this? {thing}", "Count these: {thing}"),
        result=lambda given: str(1 + int(9 * fraction("count", given["name"]))),
    ),
    "translate": Purpose(
        names=("translate", "say_in", "to_language"),
        what="Translates a thing's name.",
        arguments={"text": "what is to be translated", "language": "into which language"},
        requests=("Translate into {into}: {thing}", "What is this in {into}? {thing}"),
        result=lambda given: f"{given['text']} [{given['language']}]",
    ),
    "show": Purpose(
        names=("show", "display", "show_picture", "open_picture"),
        what="Shows the picture of a thing.",
        arguments={"name": THING},
        requests=("Show me this: {thing}", "I want to see it. {thing}"),
        result=lambda given: "shown",
    ),
    "play": Purpose(
        names=("play", "play_sound"),
        what="Plays the sound of a thing.",
        arguments={"name": THING},
        requests=("Play the sound of this: {thing}", "How does it sound? {thing}"),
        result=lambda given: "played",
    ),
    "compare": Purpose(
        names=("compare", "difference"),
        what="Compares two things.",
        arguments={"first": "one thing's name", "second": "the other thing's name"},
        requests=("Compare these two. {thing} {other}",),
        result=lambda given: "they differ",
    ),
}
HELDOUT = ("play", "compare")
"""Purposes that no sample trains or offers in training."""


@dataclass(frozen=True)
class Thing:
    """What is asked about: its name as the call has it, and a picture or recording in the place of it."""

    id: str
    concept: str
    name: str
    licence: str
    language: str = "en"
    medium: Segment | None = None


def split_of(thing: Thing, purpose: str) -> str:
    """See the module."""
    if concept_is_heldout(thing.concept):
        return "heldout_concept"
    return "heldout_cell" if purpose in HELDOUT else document_split(thing.concept)


def request(thing: Thing, other: Thing, purpose: str, thoughts: float = 0.0) -> Sample:
    """One question with its calls: one, or two at once for every fourth of text, or (every third) with the result and
    an answer. `thoughts`: share of the samples that think before they call."""
    kind = PURPOSES[purpose]
    asked = {"image": "picture", "audio": "spoken"}.get(thing.medium.type if thing.medium else "", "text")
    id = f"{thing.id}/tool/{purpose}/{asked}"
    split = split_of(thing, purpose)

    def draw(key: str, options: Sequence[Any]) -> Any:
        return options[int(fraction(key, id) * len(options))]

    name, into = draw("name", kind.names), draw("into", INTO)
    offered = [kind.signature(name)]
    for found, extra in PURPOSES.items():
        if found != purpose and (found not in HELDOUT or split != "train") and fraction("offered", id, found) < 0.5:
            offered.append(extra.signature(draw(f"name of {found}", extra.names)))
    offered.sort(key=lambda signature: fraction("order", id, signature["name"]))

    def arguments(of: Thing) -> dict[str, str]:
        values = (of.name, other.name) if purpose == "compare" else (of.name, into)
        return dict(zip(kind.arguments, values, strict=False))

    twice = asked == "text" and purpose != "compare" and fraction("twice", id) < 0.25
    shown = {"picture": "the picture", "spoken": "what is said"}.get(asked, thing.name)
    words = draw("request", kind.requests).format(
        thing=f"{shown} {other.name}" if twice else shown, other=other.name, into=into
    )
    calls = [{"name": name, "arguments": arguments(of)} for of in ([thing, other] if twice else [thing])]
    parts = (*([thing.medium] if thing.medium else []), _text(words))
    said = write_calls(calls)
    if fraction("thoughts", id) < thoughts:
        heard = ", ".join(value for call in calls for value in call["arguments"].values())
        said = f"<think>\n{name}: {kind.what} It is about {heard}\n</think>\n\n{said}"
    messages = [Message(role="user", segments=parts), Message(role="assistant", segments=(_text(said),))]
    if split == "train" and fraction("answered", id) < 0.33:
        given = [kind.result(call["arguments"]) for call in calls]
        messages += [Message(role="tool", segments=(_text(result),)) for result in given]
        messages.append(Message(role="assistant", segments=(_text(f"Here you are: {', '.join(given)}"),)))
    answers = [{c["name"]: {key: [value] for key, value in c["arguments"].items()}} for c in calls]
    tools = [{"type": "function", "function": signature} for signature in offered]
    return Sample(
        id=id, source="tools", task="tool", split=split, licence=thing.licence, languages=(thing.language, "en"),
        concept=thing.concept, messages=tuple(messages),
        meta={
            "tools": json.dumps(tools, ensure_ascii=False), "answers": json.dumps(answers, ensure_ascii=False),
            "asked": asked, "purpose": purpose,
        },
    )  # fmt: skip


def _text(value: str) -> Segment:
    return Segment(type="text", text=value)


def things(source: SampleSource, languages: Sequence[str], counts: Counts) -> Iterator[Thing]:
    """Each English caption as a name and as a picture, and each transcribed recording of one of `languages`."""
    for i, row in enumerate(source.light().to_pylist()):
        picture = row["task"] == "caption" and row["modality"] == "image" and row["languages"][-1] == "en"
        if not picture and not (row["task"] == "asr" and row["languages"][-1] in languages):
            continue
        sample = source[i]
        kind = "image" if picture else "audio"
        try:
            medium = next(segment for segment in sample.segments if segment.type == kind)
            shown = Segment(type=kind, media=source.media_bytes(medium))
        except BadSample as bad:
            counts.left_out[bad.reason] += 1
            continue
        about = (sample.id, sample.concept, sample.reference.strip(), sample.licence)
        if picture:
            yield Thing(*about)
        yield Thing(*about, language=sample.languages[-1], medium=shown)


def samples(source: SampleSource, options: argparse.Namespace, counts: Counts) -> Iterator[Sample]:
    """Each thing for a few purposes, chosen by hash; `other` is the thing named before on the same side."""
    before: dict[bool, Thing] = {}
    for thing in things(source, options.languages, counts):
        side = concept_is_heldout(thing.concept)
        drawn = sorted(PURPOSES, key=lambda purpose: fraction("purpose", thing.id, purpose))
        for purpose in drawn[: options.each]:
            if side in before and (purpose != "compare" or thing.medium is None):
                yield request(thing, before[side], purpose, options.thoughts)
        if thing.medium is None:
            before[side] = thing


def _build(_: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    for folder in options.folders:
        source = SampleSource(Path(folder), where={"task": ["caption", "asr"]})
        rows = counts.watch(samples(source, options, counts))
        write_shards(rows, options.out, f"{source.name}_tools", progress=options.progress)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="folders of shards with captioned pictures and transcripts")
    spoken, share = "of the spoken requests; default: en es fr ru", "of the samples that think first; default: 0"
    add = parser.add_argument
    add("--languages", nargs="*", default=["en", "es", "fr", "ru"], choices=[*LANGUAGE_NAMES], help=spoken)
    add("--each", type=int, default=3, metavar="N", help="requests about each thing; default: 3")
    add("--thoughts", type=float, default=0.0, metavar="SHARE", help=share)


def main(argv: list[str] | None = None) -> int:
    assert __doc__ is not None
    return run(
        argv, name="tool_data", description=__doc__.splitlines()[0], packages=[], build=_build, add_options=_add_options
    )


if __name__ == "__main__":
    sys.exit(main())
