"""FreeDict: bilingual dictionaries, as translation pairs in both directions.

python -m data_prep.freedict --pairs eng-fra eng-spa deu-eng --out data/freedict
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
from data_prep.splits import cell_split, concept_key
from omnitrain.data.sample import Sample
from omnitrain.data.shards import write_shards

_NAMES = """
    afr=af ara=ar bre=br bul=bg cat=ca ces=cs ckb=ckb cym=cy dan=da deu=de ell=el eng=en fin=fi fra=fr gla=gd gle=ga
    hin=hi hrv=hr hun=hu ind=id isl=is ita=it jpn=ja kur=ku lat=la lit=lt mkd=mk nld=nl nno=nn nob=nb nor=no oci=oc
    pol=pl por=pt rom=ro rus=ru san=sa slk=sk slv=sl spa=es srp=sr swe=sv swh=sw tur=tr wol=wo
"""
_CODES: dict[str, str] = {iso: code for iso, _, code in (pair.partition("=") for pair in _NAMES.split())}
"""ISO 639-3 (as the packages are named) -> BCP 47."""

# [pol.], <masc, n, sg>, (something optional) and numbers of senses are no part of a translation.
_MARKS = re.compile(r"\[[^\]]*\]|<[^>]*>|\([^)]*\)|^\d+\. ?")
_HEADWORD = re.compile(r"^(?P<word>[^/<\[{(]+?)\s*(?:[/<\[{(].*)?$")


def package_of(pair: str) -> Package:
    """The package of a pair of ISO 639-3 codes, ``"eng-fra"``."""
    # The German-English dictionary also comes under the AGPL; the others are the project's own (GPL-2+).
    licence = "AGPL-3.0-or-later" if "deu" in pair and "eng" in pair else "GPL-2.0-or-later"
    return Package(name=f"dict-freedict-{pair}", manager="debian", licence=licence)


def translations(root: Path, pair: str) -> Iterator[tuple[str, str]]:
    """(headword, first translation), without grammar, pronunciation and notes."""
    for _, entry in dictd.entries(dictd.find(root, f"freedict-{pair}")):
        lines = [line for line in entry.split("\n") if line.strip()]
        if len(lines) < 2 or not (match := _HEADWORD.match(lines[0].strip())):
            continue
        translation = dictd.unwrap(_MARKS.sub("", lines[1].strip())).split(", ")[0].split(";")[0].strip()
        if translation and not translation.lower().startswith(("synonym", "see:", "note:")) and "{" not in translation:
            yield match["word"], translation


def samples(pair: str, number: int, word: str, translation: str, licence: str) -> Iterator[Sample]:
    """Both directions. The concept is the English word where the pair has English, else the headword."""
    given, wanted = (_CODES[code] for code in pair.split("-"))
    concept = concept_key(translation if wanted == "en" else word)
    for source_language, target_language, text, answer in (
        (given, wanted, word, translation),
        (wanted, given, translation, word),
    ):
        sample_id = f"freedict/{pair}/{number}/{source_language}>{target_language}"
        yield Sample(
            id=sample_id,
            source="freedict",
            messages=ask(sample_id, prompt("t2tt", sample_id, language=target_language, text=text), answer),
            split=cell_split(concept, f"text:{source_language}", target_language),
            task="t2tt",
            licence=licence,
            languages=(source_language, target_language),
            concept=concept,
        )


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    def rows() -> Iterator[Sample]:
        for pair in options.pairs:
            package = package_of(pair)
            for number, (word, translation) in enumerate(translations(opened[package.name].root, pair)):
                yield from samples(pair, number, word, translation, package.licence)

    write_shards(counts.watch(rows()), options.out, "freedict", rows_per_shard=200_000, progress=options.progress)


def _pair(text: str) -> str:
    codes = text.split("-")
    if len(codes) != 2 or not set(codes) <= set(_CODES):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pair of known codes such as eng-fra; known: {' '.join(_CODES)}"
        )
    return text


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs", nargs="+", type=_pair, default=["eng-fra", "eng-spa", "deu-eng"], help="dictionaries to read"
    )


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name="freedict",
        description=__doc__ or "",
        packages=lambda options: [package_of(pair) for pair in options.pairs],
        build=_build,
        add_options=_add_options,
    )


if __name__ == "__main__":
    sys.exit(main())
