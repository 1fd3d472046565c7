"""Which split a sample belongs to, as a pure function of what it is about: every run, arm and seed has the same one.

Two things are held out. A *concept* ("fire truck") is held out whole: nothing about it is trained in any modality or
language. A *cell* (concept, input modality and language, output language) is one task on one concept: holding it out
while its neighbours are trained measures transfer between modalities and languages.

The concept's key is its normalised English caption. Near-duplicates (a stamp and its mirror image, three stamps called
"A sports car.", the dictionary's entry "sports car") therefore fall on the same side.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

HELDOUT_CONCEPTS = 0.05
HELDOUT_CELLS = 0.18
VALIDATION_CELLS = 0.02
VALIDATION_DOCUMENTS = 0.04

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


def document_split(concept: str) -> str:
    """The split of a text about `concept` (a headword's key, or a document's id)."""
    if concept_is_heldout(concept):
        return "heldout_concept"
    return "validation" if fraction("document", concept) < VALIDATION_DOCUMENTS else "train"


def strictest(splits: Iterable[str]) -> str:
    """The split of a sample that touches several cells: held out if any of them is."""
    order = ("heldout_concept", "heldout_cell", "validation", "train")
    return min(splits, key=order.index)
