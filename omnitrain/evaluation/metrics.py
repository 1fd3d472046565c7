"""Scores of generated text and of losses.

Text scores are the field's own: BLEU and chrF (Papineni 2002, Popović 2015, via sacrebleu), word and character error
rate (edit distance over the reference's length, via jiwer), exact match. Losses are summed in nats and told in bits per
byte, which does not depend on the tokenizer. How sure one can be of a score: `intervals`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF

_CHRF = CHRF()  # chrF2: characters up to 6-grams, no word n-grams, recall weighted twice


ERROR_RATE_TASKS = ("asr",)
"""Tasks whose answer is what was said, word for word: they get word and character error rates."""
WITHOUT_SPACES = ("zh", "ja", "yue", "cmn")
"""Languages whose words are not parted by spaces: their error rates count characters."""


def short_language(language: str) -> str:
    """``en`` of ``en``, ``en_us`` or ``en-GB``."""
    return language.replace("-", "_").split("_")[0].lower()


def whisper_normalise(text: str, language: str) -> str:
    """`text` as recognisers are usually compared (Whisper, arXiv 2212.04356, appendix C): its English normaliser for
    English, its basic one for other languages, with a space between all letters of `WITHOUT_SPACES`."""
    return _whisper_normaliser(short_language(language))(text).strip()


@lru_cache
def _whisper_normaliser(language: str) -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    if language == "en":
        return EnglishTextNormalizer()
    return BasicTextNormalizer(split_letters=language in WITHOUT_SPACES)


def normalise(text: str) -> str:
    """Unicode NFKC, lower case, single spaces, without punctuation at the end: what exact match and WER compare."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while text and unicodedata.category(text[-1]).startswith("P"):
        text = text[:-1].rstrip()
    return text


def _paired(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions against {len(references)} references: give one for each")
    if not references:
        raise ValueError("no predictions to score")


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2, 0 to 100, one reference each."""
    _paired(predictions, references)
    return float(_CHRF.corpus_score(list(predictions), [list(references)]).score)


def chrf_statistics(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    """What chrF of a corpus sums, [18], of the reference that fits best."""
    [found] = _CHRF._extract_corpus_statistics([prediction], [[reference] for reference in references])
    return tuple(float(n) for n in found)


def chrf_from(sums: np.ndarray) -> float:
    """chrF2 of a corpus, 0 to 100, from sums over its segments [18]: n-grams of hypothesis, of reference and matches
    for orders 1 to 6 (precision and recall are means over the orders that occur, as in sacrebleu)."""
    used = [(match / said, match / true) for said, true, match in sums.reshape(6, 3) if said and true]
    if not used:
        return 0.0
    precision, recall = np.mean(used, axis=0)
    return float(100 * 5 * precision * recall / (4 * precision + recall)) if precision + recall else 0.0


def bleu_statistics(prediction: str, references: Sequence[str], tokenize: str = "13a") -> tuple[float, ...]:
    """What BLEU of a corpus sums, [10]: matches and n-grams of orders 1 to 4, lengths. `tokenize`: sacrebleu's
    tokenizer, ``13a``, or ``zh``, ``char`` for what is written without spaces."""
    one = _bleu(tokenize).sentence_score(prediction, list(references))
    return (*map(float, one.counts), *map(float, one.totals), float(one.sys_len), float(one.ref_len))


@lru_cache
def _bleu(tokenize: str) -> BLEU:
    return BLEU(tokenize=tokenize, effective_order=True)  # of a sentence only its counts are used


def bleu_from(sums: np.ndarray) -> float:
    """BLEU of a corpus, 0 to 100, from sums of `bleu_statistics` [10]."""
    counts = [int(n) for n in sums]
    score = BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp", effective_order=False)
    return float(score.score)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference after `normalise`, 0 to 1."""
    _paired(predictions, references)
    return sum(normalise(p) == normalise(r) for p, r in zip(predictions, references, strict=True)) / len(references)


def edits(reference: str, hypothesis: str, *, characters: bool = False) -> tuple[int, int]:
    """(substitutions + deletions + insertions, length of the reference), in words or in characters. Against an empty
    reference all that is there is wrong."""
    if not reference:  # jiwer refuses it
        return len(hypothesis if characters else hypothesis.split()), 0
    found = (jiwer.process_characters if characters else jiwer.process_words)(reference, hypothesis)
    wrong = found.substitutions + found.deletions + found.insertions
    return wrong, found.hits + found.substitutions + found.deletions


def _error_rate(predictions: Sequence[str], references: Sequence[str], *, characters: bool) -> float:
    _paired(predictions, references)
    counts = [
        edits(normalise(r), normalise(p), characters=characters) for p, r in zip(predictions, references, strict=True)
    ]
    if not all(length for _, length in counts):
        raise ValueError("an error rate needs a reference with at least one word in every pair")
    return sum(wrong for wrong, _ in counts) / sum(length for _, length in counts)


def wer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Word error rate of the corpus: (substitutions + deletions + insertions) / words of the references. Above 1 when a
    model says more than was there. Texts are compared after `normalise`. Raises ValueError for an empty reference."""
    return _error_rate(predictions, references, characters=False)


def cer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Character error rate of the corpus; for scripts written without spaces. Conventions as `wer`."""
    return _error_rate(predictions, references, characters=True)


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Total loss in nats over `n_bytes` UTF-8 bytes of target text, as bits per byte."""
    if n_bytes <= 0:
        raise ValueError(f"bits per byte needs target text, got {n_bytes} bytes")
    return nats / (math.log(2) * n_bytes)


class UnigramBaseline:
    """The model that knows only how often each token of V occurs: p(v) = (count_v + 1) / (total + V). A trained model
    that is not better than this has learned nothing from context."""

    def __init__(self, vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, dtype=np.int64)

    def update(self, targets: np.ndarray) -> None:
        """Count training targets, int64 [n]; negative entries (no target) are left out."""
        self.counts += np.bincount(targets[targets >= 0], minlength=len(self.counts))

    def nats(self, targets: np.ndarray) -> float:
        """Total negative log-likelihood of `targets`, int64 [n], in nats; negative entries are left out."""
        log_total = math.log(int(self.counts.sum()) + len(self.counts))
        return float((log_total - np.log(self.counts[targets[targets >= 0]] + 1)).sum())
