"""Rules for short answers: letters of options, numbers, words. Each follows a benchmark's published scorer."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchaudio.functional import edit_distance

from omnitrain.tasks.benchmark import LETTERS, Answered, Metric, Rule, Scored

ACCURACY = Metric(name="accuracy", higher_is_better=True)


class Accuracy(Rule):
    """Share of right answers."""

    metrics = (ACCURACY,)

    def score_one(self, item: Answered) -> Scored:
        answer, right = self.mark(item)
        return Scored(answer=answer, statistics={"accuracy": (float(right), 1.0)})

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        """(the answer that was read out of the text, whether it is right)."""
        raise NotImplementedError


# --- MMMU ------------------------------------------------------------------------------------------------------------


def chosen_letter(response: str, options: Sequence[str]) -> str | None:
    """The letter that a response settles on, by MMMU's rule: the last ``(B)``, else the last free-standing ``B``, else,
    in responses of more than five words, the option whose text comes last. None if there is none of these."""
    for mark in (",", ".", "!", "?", ";", ":", "'"):  # one after the other, so "A.'" keeps its full stop
        response = response.strip(mark)
    response = f" {response} "
    letters = LETTERS[: len(options)]
    places = [[response.rfind(form.format(letter)) for letter in letters] for form in ("({})", " {} ")]
    if len(response.split()) > 5:
        places.append([response.lower().rfind(option.lower()) for option in options])
    return next((letters[of_form.index(max(of_form))] for of_form in places if max(of_form) >= 0), None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def normalised_open(answer: str) -> list[float | str]:
    """MMMU: a number is rounded to two places; text is lower case; a single character must stand at a word's edge."""
    answer = answer.strip()
    if (number := _number(answer.replace(",", ""))) is not None:
        return [round(number, 2)]
    answer = answer.lower()
    return [f" {answer}", f"{answer} "] if len(answer) == 1 else [answer]


_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def open_answers(response: str) -> list[float | str]:
    """What a response to an open question of MMMU may be saying: of each line the shortest end behind a word such as
    "is" or "therefore" (in the last line also behind "="), and all numbers in it."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    keys = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            end = line.split(indicator)[-1].strip()
            if indicator in line and (not shortest or len(end) < len(shortest)):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(shortest)
    keys = keys or [response]
    found = [*keys, *(number for key in keys for pattern in _NUMBERS for number in pattern.findall(key))]
    return list(dict.fromkeys(value for text in found for value in normalised_open(text)))


def open_is_right(answers: Sequence[str], said: Sequence[float | str]) -> bool:
    """MMMU: a number must be equal, a text must be contained in what was said."""
    truths = [value for answer in answers for value in normalised_open(answer)]
    texts = [truth for truth in truths if isinstance(truth, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in truths for value in said)


@dataclass(frozen=True, kw_only=True)
class MMMURule(Accuracy):
    """``truth``: ``options`` and ``answer`` (a letter), or ``answers`` of an open question. A response that names no
    option counts as a guess, as MMMU has it, which is drawn from the item's id, so that it repeats; without `guess`
    as wrong."""

    guess: bool = True

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        if "options" not in item.truth:
            said = open_answers(item.prediction)
            return " | ".join(map(str, said)), open_is_right(item.truth["answers"], said)
        options = item.truth["options"]
        letter = chosen_letter(item.prediction, options)
        if letter is None and self.guess:
            letter = random.Random(item.id).choice(LETTERS[: len(options)])
        return letter, letter == item.truth["answer"]


# --- MMStar, Video-MME -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MMStarRule(Accuracy):
    """The response must begin with the letter, with ``(`` and the letter, or with "option " or "the answer is " and the
    letter; what follows is not looked at."""

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        said = item.prediction.lower().replace("\n", " ").strip()
        truth = str(item.truth["answer"]).lower().strip()
        starts = ("", "(", "option ", "the answer is ")
        readings = [said.removeprefix(start)[:1] for start in starts if said.startswith(start)]
        right = next((reading for reading in readings if reading == truth), None)
        return (right or readings[-1]).upper() or None, right is not None


_VIDEO_MME_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:", "The correct answer",
    "The correct option",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VideoMMERule(Accuracy):
    """The first capital A, B, C or D of the response, phrases such as "The best answer is" taken out first."""

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        said = item.prediction.strip()
        for prefix in _VIDEO_MME_PREFIXES:
            said = said.replace(prefix, "")
        found = re.search("[ABCD]", said)
        letter = found.group() if found else None
        return letter, letter == item.truth["answer"]


# --- MMAU ------------------------------------------------------------------------------------------------------------


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def string_match(answer: str, prediction: str, options: Sequence[str]) -> bool:
    """MMAU: every word of the answer occurs in the prediction, and no word that only wrong options have."""
    said, truth = _words(prediction), _words(answer)
    wrong = set().union(*(_words(option) - truth for option in options))
    return bool(said) and truth <= said and not said & wrong


@dataclass(frozen=True, kw_only=True)
class StringMatch(Accuracy):
    """MMAU's `string_match` on the options' texts; ``truth``: ``answer`` (the text), ``options``. With `letters` (off
    in MMAU's own rule) a response that is only an option's letter stands for its text."""

    letters: bool = False

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        said, options = item.prediction, item.truth["options"]
        bare = re.fullmatch(r"\(?([A-Za-z])[).:]?", said.strip())
        if self.letters and bare and (place := LETTERS.find(bare.group(1).upper())) < len(options):
            said = options[place]
        return said, string_match(item.truth["answer"], said, options)


# --- MathVista -------------------------------------------------------------------------------------------------------


def extracted(response: str, truth: dict[str, Any]) -> str:
    """What a response to MathVista gives as its answer. Where its quick rules fail (the whole response, or ``The answer
    is "..."``), MathVista asks a language model; here the last number, list, or parenthesised letter is taken."""
    response = response.strip()
    options, kind = truth.get("options") or [], truth["answer_type"]
    if response in options or (not options and kind in ("integer", "float") and _number(response) is not None):
        return response
    if quoted := re.search(r'The answer is "(.*)"\.', response):
        return quoted.group(1)
    if options:
        behind = re.split(r"(?i)answer(?: is)?:?", response)[-1].strip().rstrip(".")
        letter = re.findall(r"\(([a-zA-Z])\)", response)
        return f"({letter[-1]})" if letter else behind
    pattern = r"\[[^\[\]]*\]" if kind == "list" else r"-?\d[\d,]*\.?\d*|-?\.\d+"
    found = re.findall(pattern, response)
    if kind != "list":
        found = [number.replace(",", "").rstrip(".") for number in found]
    return found[-1] if found else response


def normalised_extraction(extraction: str, truth: dict[str, Any]) -> str | None:
    """MathVista: a letter becomes its option, other text the option nearest by edit distance; an integer is cut, a
    float rounded to the item's precision. None: no answer of this kind."""
    options = truth.get("options") or []
    if options:
        extraction = extraction.strip()
        if letter := re.findall(r"\(([a-zA-Z])\)", extraction):
            extraction = letter[0].upper()
        place = LETTERS.find(extraction) if len(extraction) == 1 else -1
        if 0 <= place < len(options):
            return options[place]
        return min(options, key=lambda option: edit_distance(extraction, option))
    if truth["answer_type"] not in ("integer", "float"):
        return extraction
    number = _number(extraction)
    if number is None or not math.isfinite(number):
        return None
    return str(int(number)) if truth["answer_type"] == "integer" else str(round(number, int(truth["precision"] or 0)))


@dataclass(frozen=True, kw_only=True)
class MathVistaRule(Accuracy):
    """``truth``: ``answer``, ``answer_type`` (text, integer, float, list), ``precision``, ``options`` of a choice."""

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        truth = dict(item.truth)
        answer = normalised_extraction(extracted(item.prediction, truth), truth)
        return answer, answer == str(truth["answer"])


# --- ChartQA ---------------------------------------------------------------------------------------------------------


def _chart_number(text: str) -> float | None:
    value = _number(text.rstrip("%"))
    return value / 100 if value is not None and text.endswith("%") else value


def relaxed_match(target: str, prediction: str, tolerance: float = 0.05) -> bool:
    """ChartQA: numbers may be off by 5 % of the target (``12%`` is 0.12; a target of 0 must be spelled the same);
    anything else must be equal but for case."""
    said, truth = _chart_number(prediction), _chart_number(target)
    if said is not None and truth:
        return abs(said - truth) / abs(truth) <= tolerance
    return prediction.lower() == target.lower()


@dataclass(frozen=True, kw_only=True)
class RelaxedAccuracy(Accuracy):
    """``truth["answers"]``: one must match."""

    tolerance: float = 0.05

    def mark(self, item: Answered) -> tuple[str | None, bool]:
        said = item.prediction.strip()
        return said, any(relaxed_match(str(answer), said, self.tolerance) for answer in item.truth["answers"])
