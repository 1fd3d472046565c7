"""Scores of captions of sounds: likeness to several references, and which events a caption names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def _ngrams(text: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    return [Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for n in (1, 2, 3, 4)]


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each caption, 0 to 10 (Vedantam et al. 2015, arXiv 1411.5726): tf-idf weighted n-grams of orders 1 to
    4, document frequencies from these references, clipped, with a Gaussian penalty on the difference in length. Texts
    are cut by `words`; the original's PTB tokenizer differs on contractions and hyphens."""
    documents = [[_ngrams(words(reference)) for reference in several] for several in references]
    frequency = Counter(gram for several in documents for gram in {g for doc in several for n in doc for g in n})
    log_n = math.log(len(documents))

    def weighted(grams: list[Counter[tuple[str, ...]]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        vectors = [
            {gram: count * (log_n - math.log(max(1, frequency[gram]))) for gram, count in order.items()}
            for order in grams
        ]
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
        return vectors, norms, sum(grams[1].values())  # the original measures length in bigrams

    scores = []
    for prediction, several in zip(predictions, documents, strict=True):
        mine, my_norms, my_length = weighted(_ngrams(words(prediction)))
        total = 0.0
        for document in several:
            theirs, norms, length = weighted(document)
            penalty = math.exp(-((my_length - length) ** 2) / (2 * sigma**2))
            for a, b, norm_a, norm_b in zip(mine, theirs, my_norms, norms, strict=True):
                product = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
                total += penalty * product / (norm_a * norm_b) if norm_a and norm_b else 0.0
        scores.append(10 * total / (4 * len(several)))
    return scores


def mentioned(text: str, events: Sequence[str]) -> set[str]:
    """The events that a text names. An event is named by one of its synonyms, which are parted by commas ("Bark, Dog
    barking"): all words of it one after the other, singular and plural alike."""
    said = [_singular(word) for word in words(text)]
    found = set()
    for event in events:
        for synonym in event.split(","):
            name = [_singular(word) for word in words(synonym)]
            if name and any(said[i : i + len(name)] == name for i in range(len(said) - len(name) + 1)):
                found.add(event)
    return found


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
