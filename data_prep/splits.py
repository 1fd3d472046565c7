"""Which split a sample belongs to, as a pure function of what it is about: every run, arm and seed has the same one.

Two things are held out. A *concept* ("fire truck") is held out whole: nothing about it is trained in any modality or
language. A *cell* (concept, input modality and language, output language) is one task on one concept: holding it out
while its neighbours are trained measures transfer between modalities and languages.

The concept's key is its normalised English caption. Near-duplicates (a stamp and its mirror image, three stamps called
"A sports car.", the dictionary's entry "sports car") therefore fall on the same side.

Sentences that differ in English may still be the same in another language ("A cab." and "A taxi." are both "un taxi").
No function of the English text alone can see that: :class:`Sides` leaves such rows out, so that what is held out was
never trained in any language.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from omnitrain.data.shards import shard_files

HELDOUT_CONCEPTS = 0.05
HELDOUT_CELLS = 0.18
VALIDATION_CELLS = 0.02
VALIDATION_DOCUMENTS = 0.04

SIDES = ("heldout_concept", "heldout_cell", "validation", "train")
"""Splits, the strictest first."""

_ARTICLES = frozenset({"a", "an", "the", "some"})


def fraction(*key: str) -> float:
    """A number in [0, 1), uniform over keys and the same everywhere (SHA-256, not Python's salted hash)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(key).encode()).digest()[:6], "big") / 2**48


def concept_key(english: str) -> str:
    """An English caption without case, punctuation, articles and accents: ``"A T-shirt."`` -> ``"t shirt"``."""
    plain = unicodedata.normalize("NFKD", english).encode("ascii", "ignore").decode().lower().replace("'", "")
    words = [word for word in re.findall(r"[a-z0-9]+", plain) if word not in _ARTICLES]
    return " ".join(words) or " ".join(english.lower().split())


def concept_is_heldout(concept: str) -> bool:
    """Whether nothing about this concept (a `concept_key`) may be trained."""
    return fraction("concept", concept) < HELDOUT_CONCEPTS


def cell_split(concept: str, given: str, wanted: str) -> str:
    """The split of one cell: `given` is the input's modality and language (``"image"``, ``"audio:fr"``, ``"text:es"``),
    `wanted` the output's language (or, for a moving picture, the action)."""
    if concept_is_heldout(concept):
        return "heldout_concept"
    place = fraction("cell", concept, given, wanted)
    if place < HELDOUT_CELLS:
        return "heldout_cell"
    return "validation" if place < HELDOUT_CELLS + VALIDATION_CELLS else "train"


def sentence_key(text: str) -> str:
    """A sentence of any language without case, punctuation and doubled spaces: ``"¡Sí, señor!"`` -> ``"sí señor"``."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("’", "")
    plain = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    return " ".join(plain.split()) or " ".join(folded.split())


def document_split(concept: str) -> str:
    """The split of a text about `concept` (a headword's key, or a document's id)."""
    if concept_is_heldout(concept):
        return "heldout_concept"
    return "validation" if fraction("document", concept) < VALIDATION_DOCUMENTS else "train"


def strictest(splits: Iterable[str]) -> str:
    """The split of a sample that touches several cells: held out if any of them is."""
    return min(splits, key=SIDES.index)


class Sides:
    """On which side each sentence stands, so that none stands on two.

    A sentence said of several concepts stands on the strictest of their sides, and rows of the other sides that say or
    answer it are left out: the held-out sets stay whole. Data sets that exist already (`beside`) are not touched: what
    contradicts them is left out here.

    Args:
        beside: folders of shards. A sentence that any row there trains on is a trained one.
    """

    def __init__(self, beside: Iterable[Path] = ()) -> None:
        self._here: dict[str, str] = {}
        self._beside: dict[str, str] = {}
        for folder in beside:
            for split, sentence in answers(folder):
                key = sentence_key(sentence)
                self._beside[key] = max(self._beside.get(key, split), split, key=SIDES.index)

    def add(self, split: str, sentences: Iterable[str]) -> None:
        """These sentences, in any language, belong to a concept of that split."""
        for key in map(sentence_key, sentences):
            self._here[key] = strictest([split, self._here.get(key, split)])

    def admit(self, split: str, sentences: Iterable[str]) -> bool:
        """Whether a row of that split with these sentences leaves each of them on one side."""
        keys = [sentence_key(sentence) for sentence in sentences]
        return all(side.get(key, split) == split for key in keys for side in (self._here, self._beside))


def answers(folder: Path) -> Iterator[tuple[str, str]]:
    """(split, text of the assistant) of every row of the shards in `folder`. Raises as `shard_files`."""
    columns = ["split", "messages.list.element.role", "messages.list.element.segments.list.element.text"]
    for file in shard_files(folder):
        for batch in pq.ParquetFile(file).iter_batches(columns=columns):
            for row in batch.to_pylist():
                for message in row["messages"]:
                    if message["role"] == "assistant":
                        yield row["split"], "".join(segment["text"] or "" for segment in message["segments"])
