"""English dictionaries: WordNet and the GNU Collaborative International Dictionary (GCIDE), from their dictd files.

    python -m data_prep.dictionaries --out data/dictionaries

Each sense becomes a plain document, ``"stable (noun): a farm building for housing horses"``, and the first sense of
each headword also a question. The concept is the headword, under the same key as a picture's caption: "horse" is held
out from the dictionaries if and only if it is held out from the pictures.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep import dictd
from data_prep.fetch import Opened, Package
from data_prep.job import Counts, run
from data_prep.prompts import ask, prompt
from data_prep.splits import concept_key, document_split
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import write_shards

WORDNET = Package(name="dict-wn", manager="debian", licence="WordNet-3.0")
GCIDE = Package(name="dict-gcide", manager="debian", licence="GPL-3.0-or-later")

_POS = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}
# A sense opens with its part of speech, its number, or both: "n 1: ...", "2: ...", "adj : ...".
_WN_SENSE = re.compile(r"^ {4,6}(?:(?P<pos>n|v|adj|adv)\b)? ?(?P<number>\d+)?: ", re.MULTILINE)
_BRACKETS = re.compile(r"\[(?:syn|ant|also):\s.*?\]", re.DOTALL)
_GCIDE_POS = re.compile(r"\\[^\\]*\\(?:,? ?\([^)]*\))?,? *(?P<pos>[a-z]+\.(?: ?[a-z]+\.)?)")


def wordnet_senses(root: Path) -> Iterator[tuple[str, str, str]]:
    """(headword, part of speech, definition with its examples) for each sense."""
    for _, entry in dictd.entries(dictd.find(root, "wn")):
        headword, _, body = entry.partition("\n")
        body = _BRACKETS.sub("", body)
        starts = list(_WN_SENSE.finditer(body))
        pos = ""
        for match, after in zip(starts, [*starts[1:], None], strict=True):
            pos = match["pos"] or pos
            definition = dictd.unwrap(body[match.end() : after.start() if after else len(body)])
            if definition:
                yield headword.strip(), _POS.get(pos, ""), definition


def gcide_entries(root: Path) -> Iterator[tuple[str, str, str]]:
    """(headword, part of speech, text of the entry without its header and sources)."""
    for headword, entry in dictd.entries(dictd.find(root, "gcide")):
        header, _, body = entry.partition("\n")
        pos = match["pos"] if (match := _GCIDE_POS.search(header)) else ""
        body = re.sub(r"\[(?:1913 Webster|PJC|WordNet[^\]]*|[^\]]*Webster[^\]]*)\]", "", body)
        text = dictd.unwrap(body.replace("{", "").replace("}", ""))
        if len(text) > 10:
            yield headword, pos, text


def document(dictionary: str, number: int, headword: str, pos: str, definition: str, licence: str) -> Sample:
    """One sense as a plain document."""
    concept = concept_key(headword)
    return Sample(
        id=f"{dictionary}/{number}",
        source=dictionary,
        messages=(
            Message(
                role="document",
                segments=(Segment(type="text", text=f"{headword}{f' ({pos})' if pos else ''}: {definition}"),),
            ),
        ),
        split=document_split(concept),
        task="text",
        licence=licence,
        languages=("en",),
        concept=concept,
    )


def question(dictionary: str, number: int, headword: str, definition: str, licence: str) -> Sample:
    """A headword's sense as question and answer."""
    concept, sample_id = concept_key(headword), f"{dictionary}/{number}/define"
    return Sample(
        id=sample_id,
        source=dictionary,
        messages=ask(sample_id, prompt("define", sample_id, text=headword), definition),
        split=document_split(concept),
        task="define",
        licence=licence,
        languages=("en", "en"),
        concept=concept,
    )


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    def wordnet() -> Iterator[Sample]:
        last = None
        for number, (headword, pos, definition) in enumerate(wordnet_senses(opened[WORDNET.name].root)):
            yield document("wordnet", number, headword, pos, definition, WORDNET.licence)
            if headword != last:
                yield question("wordnet", number, headword, definition.partition(";")[0], WORDNET.licence)
            last = headword

    def gcide() -> Iterator[Sample]:
        for number, (headword, pos, text) in enumerate(gcide_entries(opened[GCIDE.name].root)):
            yield document("gcide", number, headword, pos, text, GCIDE.licence)

    if WORDNET.name in opened:
        write_shards(counts.watch(wordnet()), options.out, "wordnet", rows_per_shard=100_000, progress=options.progress)
    if GCIDE.name in opened:
        write_shards(counts.watch(gcide()), options.out, "gcide", rows_per_shard=100_000, progress=options.progress)


def _packages(options: argparse.Namespace) -> list[Package]:
    known = {"wordnet": WORDNET, "gcide": GCIDE}
    return [known[name] for name in options.only or known]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="*", choices=("wordnet", "gcide"), default=[], help="only these dictionaries")


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name="dictionaries",
        description=__doc__ or "",
        packages=_packages,
        build=_build,
        add_options=_add_options,
    )


if __name__ == "__main__":
    sys.exit(main())
