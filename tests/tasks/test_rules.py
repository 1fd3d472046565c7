"""Scoring rules against the edge cases of the published ones, and against independent computations."""

from __future__ import annotations

import json
import math

import jiwer
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from omnitrain.evaluation.intervals import bootstrap_interval
from omnitrain.tasks.benchmark import Answered, ratio
from omnitrain.tasks.captions import AudioCaptionRule, cider_d, mentioned
from omnitrain.tasks.choices import (
    MathVistaRule,
    MMMURule,
    MMStarRule,
    StringMatch,
    VideoMMERule,
    chosen_letter,
    open_answers,
    open_is_right,
    relaxed_match,
    string_match,
)
from omnitrain.tasks.speech_to_text import ErrorRate, Translation
from omnitrain.tasks.tool_calls import calls_match, parse_calls

OPTIONS = ["a red car", "a blue bicycle", "two dogs", "none of them"]


def answered(prediction: str, **truth) -> Answered:
    return Answered(id="x", truth=truth, prediction=prediction)


def right(rule, prediction: str, **truth) -> bool:
    return bool(rule.score_one(answered(prediction, **truth)).statistics["accuracy"][0])


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_of_a_ratio_of_sums_is_that_of_the_mean():
    rng = np.random.default_rng(1)
    values, groups = rng.random(40), [str(i // 3) for i in range(40)]
    ours = bootstrap_interval([(v, 1.0) for v in values], groups=groups, combine=ratio, seed=5)
    assert ours == bootstrap_interval(values, groups=groups, seed=5)


# --- speech ----------------------------------------------------------------------------------------------------------


def test_english_error_rate_uses_whispers_normaliser():
    rule = ErrorRate(language="en_us")
    pairs = [
        ("MR BROWN'S COLOUR IS TWENTY FIVE", "Mr. Brown's color is 25."),  # equal after it
        ("the cat sat on the mat", "the cat [noise] sat on mat"),  # one deletion, brackets vanish
        ("yes", "yes it is indeed"),  # three insertions, above 100 %
    ]
    stats = [rule.score_one(answered(said, text=truth)).statistics["wer"] for truth, said in pairs]
    assert [s[0] for s in stats] == [0, 1, 3]
    total = sum(s[0] for s in stats) / sum(s[1] for s in stats)
    plain = jiwer.wer(["mister brown is color is 25", *(p[0] for p in pairs[1:])],
                      ["mister brown is color is 25", "the cat sat on mat", "yes it is indeed"])  # fmt: skip
    assert total == pytest.approx(plain)


def test_chinese_is_counted_in_characters_and_german_keeps_its_words():
    chinese = ErrorRate(language="zh-CN")
    assert chinese.metrics[0].name == "cer"
    assert chinese.score_one(answered("你好世", text="你好世界。")).statistics["cer"] == (1.0, 4.0)
    german = ErrorRate(language="de").score_one(answered("Über Wasser!", text="über wasser"))
    assert german.statistics["wer"] == (0.0, 2.0)


def test_words_heard_in_silence_are_errors():
    assert ErrorRate(language="en").score_one(answered("hello you", text="")).statistics["wer"] == (2.0, 0.0)


@pytest.mark.parametrize("tokenize", ["13a", "zh", "char"])
def test_bleu_and_chrf_of_a_corpus_are_sacrebleus(tokenize):
    hypotheses = ["the cat is on the mat .", "there is a dog", "Hello", "", "他在家"]
    references = ["the cat sat on the mat .", "there is a big dog here", "hello world", "empty", "他现在在家"]
    rule = Translation(tokenize=tokenize)
    stats = [rule.score_one(answered(h, texts=[r])).statistics for h, r in zip(hypotheses, references, strict=True)]
    for metric, theirs in zip(rule.metrics, (BLEU(tokenize=tokenize), CHRF()), strict=True):
        ours = metric.combine(np.sum([s[metric.name] for s in stats], axis=0))
        assert ours == pytest.approx(theirs.corpus_score(hypotheses, [references]).score)


# --- MMMU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B.", "B"),
        ("The answer is (A), not (B)", "B"),  # the last in parentheses
        ("(A) because B is wrong", "A"),  # parentheses before free-standing letters
        ("A or maybe D", "D"),
        ("It must surely be the blue one, a blue bicycle", "B"),  # text of an option, more than five words
        ("a blue bicycle", None),  # five words or fewer: texts of options do not count
        ("I cannot see a red car, only two dogs", "C"),
        ("b", None),  # lower case is no letter
        ("A.'", None),  # the quote is taken off after the full stop was looked for
        ("", None),
    ],
)
def test_mmmu_letters(response, letter):
    assert chosen_letter(response, OPTIONS) == letter


def test_mmmu_guesses_where_nothing_is_said_and_repeats_it():
    rule = MMMURule()
    guesses = {
        i: rule.score_one(Answered(id=str(i), truth={"options": OPTIONS, "answer": "A"}, prediction="")).answer
        for i in range(40)
    }
    assert set(guesses.values()) == set("ABCD")
    again = rule.score_one(Answered(id="7", truth={"options": OPTIONS, "answer": "A"}, prediction=""))
    assert again.answer == guesses[7]
    assert MMMURule(guess=False).score_one(answered("", options=OPTIONS, answer="A")).answer is None


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [
        ("1,234.5", ["1234.50"], True),
        ("The result is 0.333333", ["0.33"], True),  # rounded to two places
        ("so the total = 12", ["12"], True),  # "=" in the last line
        ("let it x=13\nthat is all", ["13"], False),  # "=" counts in the last line alone
        ("The final answer is Paris.", ["paris"], True),
        ("It is in Parisian style", ["paris"], True),  # contained is enough
        ("apple", ["a"], False),  # a single character needs an edge: "a " or " a"
        ("plan a b", ["a"], True),
        ("120", ["12"], False),
        ("1e3", ["1000"], True),
        ("42", ["41", "42"], True),
    ],
)
def test_mmmu_open_questions(response, answers, expected):
    assert open_is_right(answers, open_answers(response)) is expected


# --- other choices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [("B", True), ("b: because", True), ("(B) x", True), ("Option B", True), ("The answer is B.", True),
     ("Because", True), ("Answer: B", False), ("", False), ("the\nanswer is B", True)],
)  # fmt: skip
def test_mmstar_looks_at_one_character(response, expected):
    assert right(MMStarRule(), response, answer="B") is expected


@pytest.mark.parametrize(
    ("response", "letter"),
    [("The best answer is: C", "C"), ("Answer: B", "B"), ("D. a dog", "D"), ("c", None), ("", None),
     ("A man walks", "A"), ("The correct option is (B)", "B")],
)  # fmt: skip
def test_video_mme_takes_the_first_capital(response, letter):
    assert VideoMMERule().score_one(answered(response, answer="C")).answer == letter


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("It is a dog barking.", True), ("DOG BARKING", True), ("dog", False), ("dog barking, or cat meowing", False),
     ("", False), ("barking loud dog", True)],
)  # fmt: skip
def test_mmau_matches_words(prediction, expected):
    assert string_match("dog barking", prediction, ["dog barking", "cat meowing", "dog whining"]) is expected


def test_mmau_shared_words_do_not_count_as_wrong_and_letters_are_an_option():
    assert string_match("low pitch", "the low pitch", ["low pitch", "high pitch"])
    options = ["dog barking", "cat meowing"]
    assert not right(StringMatch(), "(B)", answer="cat meowing", options=options)
    assert right(StringMatch(letters=True), "(B)", answer="cat meowing", options=options)
    assert not right(StringMatch(letters=True), "(Z)", answer="cat meowing", options=options)


def _vista(answer: str, kind: str, options=(), precision=0) -> dict:
    return {"answer": answer, "answer_type": kind, "options": list(options), "precision": precision}


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("(B) 145°", _vista("145°", "text", ["135°", "145°"]), True),
        ("The answer is B", _vista("145°", "text", ["135°", "145°"]), True),
        ("14 5°", _vista("145°", "text", ["135°", "145°"]), True),  # nearest by edit distance
        ('The answer is "135°".', _vista("145°", "text", ["135°", "145°"]), False),
        ("3.7", _vista("3", "integer"), True),  # cut, not rounded
        ("It costs 1,200 dollars", _vista("1200", "integer"), True),
        ("about 2.347", _vista("2.35", "float", precision=2), True),
        ("2", _vista("2.0", "float", precision=1), True),
        ("none", _vista("2.0", "float", precision=1), False),
        ("so [1, 2]", _vista("[1, 2]", "list"), True),
        ("yes", _vista("Yes", "text"), False),  # compared as written
    ],
)
def test_mathvista(response, truth, expected):
    assert right(MathVistaRule(), response, **truth) is expected


@pytest.mark.parametrize(
    ("target", "prediction", "expected"),
    [("100", "105", True), ("100", "105.1", False), ("-10", "-9.5", True), ("12%", "0.12", True), ("0", "0", True),
     ("0", "0.0", False), ("Blue", "blue", True), ("Blue", "light blue", False), ("2010", "2012", True),
     ("5", "five", False)],
)  # fmt: skip
def test_chartqa_relaxed(target, prediction, expected):
    assert relaxed_match(target, prediction) is expected


# --- captions --------------------------------------------------------------------------------------------------------


def test_cider_d_by_hand_and_its_bounds():
    references = [["a dog barks"], ["rain falls"]]
    assert cider_d(["a dog barks", "rain falls"], references)[0] == pytest.approx(10 * 3 / 4)  # no 4-grams
    assert cider_d(["nothing here", "rain"], references)[0] == 0
    # "rain": unigrams alone; cosine 1 / sqrt(2), bigram counts differ by 1
    expected = 10 / 4 * math.exp(-1 / 72) / math.sqrt(2)
    assert cider_d(["x", "rain"], references)[1] == pytest.approx(expected)
    clipped = cider_d(["dog dog dog dog", "x"], [["a dog barks"], ["rain falls"]])[0]
    assert 0 < clipped < 10 / 4


def test_events_are_found_as_words_in_order_by_synonym_and_number():
    events = ["Bark, Dog barking", "Rain", "Car horn"]
    assert mentioned("Dogs are loud while the rain falls", events) == {"Rain"}
    assert mentioned("A dog barking in trains", events) == {"Bark, Dog barking"}
    assert mentioned("Two car horns and barks", events) == {"Car horn", "Bark, Dog barking"}


def test_hallucinated_events():
    rule = AudioCaptionRule()
    items = [
        answered("rain and a car horn", captions=["rain falls"], events=["Rain"]),
        answered("a dog and rain", captions=["a dog in the rain"], events=["Dog"]),  # people heard the rain too
        answered("silence", captions=["a horn"], events=["Car horn"]),
    ]
    scored = rule.score(items)
    sums = {
        name: np.sum([s.statistics[name] for s in scored], axis=0).tolist()
        for name in ("hallucinated_events", "hallucinating_captions")
    }
    assert sums == {"hallucinated_events": [1, 4], "hallucinating_captions": [1, 3]}
    nothing = rule.score([answered("rain", captions=["rain"], events=[])])
    assert "hallucinated_events" not in nothing[0].statistics


# --- tool calls ------------------------------------------------------------------------------------------------------

FUNCTION = {
    "name": "area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "box": {"type": "dict"},
            "exact": {"type": "boolean"},
        },
        "required": ["base", "height"],
    },
}
ANSWER = {
    "area": {
        "base": [10], "height": [5.0], "unit": ["square cm", ""], "tags": [["a b", "c"], ""],
        "box": [{"x": [1], "y": [2, ""]}, ""], "exact": [True, ""],
    }
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"base": 10, "height": 5.0}, True),
        ({"base": 10, "height": 5}, True),  # an integer may stand for a float
        ({"base": 10.0, "height": 5.0}, False),  # but not the other way round
        ({"base": "10", "height": 5.0}, False),
        ({"height": 5.0}, False),  # required
        ({"base": 10, "height": 5.0, "colour": "red"}, False),  # unknown
        ({"base": 10, "height": 5.0, "unit": "Square-CM"}, True),
        ({"base": 10, "height": 5.0, "unit": "m"}, False),
        ({"base": 10, "height": 5.0, "tags": ["A-B", "c"]}, True),
        ({"base": 10, "height": 5.0, "tags": ["c", "a b"]}, False),  # order counts
        ({"base": 10, "height": 5.0, "tags": []}, True),
        ({"base": 10, "height": 5.0, "tags": [1, 2]}, False),
        ({"base": 10, "height": 5.0, "box": {"x": 1}}, True),
        ({"base": 10, "height": 5.0, "box": {"y": 2}}, False),
        ({"base": 10, "height": 5.0, "box": {"x": 1, "z": 0}}, False),
        ({"base": 10, "height": 5.0, "exact": 1}, False),
        ({"base": 10, "height": 5.0, "exact": True}, True),
    ],
)
def test_bfcl_arguments(arguments, expected):
    assert calls_match([{"name": "area", "arguments": arguments}], [ANSWER], [FUNCTION]) is expected


def test_bfcl_counts_names_and_order_of_calls():
    a, b = {"f": {"x": [1]}}, {"f": {"x": [2]}}
    function = {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}
    one, two = ({"name": "f", "arguments": {"x": x}} for x in (1, 2))
    assert calls_match([two, one], [a, b], [function])  # any order
    assert not calls_match([one, one], [a, b], [function])
    assert not calls_match([one], [a, b], [function])
    assert not calls_match([one, two, one], [a, b], [function])
    assert not calls_match([{"name": "g", "arguments": {"x": 1}}], [a], [function])
    assert calls_match([], [], [function])  # irrelevance
    assert not calls_match([one], [], [function])


def test_bfcl_required_arguments_that_are_optional_in_the_answer_must_be_there():
    assert not calls_match(
        [{"name": "area", "arguments": {"base": 10}}], [{"area": {"base": [10], "height": [5.0, ""]}}], [FUNCTION]
    )


def test_calls_are_parsed_from_the_chat_format():
    call = {"name": "f", "arguments": {"x": [1]}}
    text = f"Let me see.<tool_call>\n{json.dumps(call)}\n</tool_call>\n<tool_call>{json.dumps(call)}</tool_call>"
    assert parse_calls(text) == [call, call]
    assert parse_calls("no call") == []
    assert parse_calls("<tool_call>{broken}</tool_call>") is None
    assert parse_calls("<tool_call>" + "[" * 100_000) is None
    assert parse_calls('<tool_call>{"name": ' + "9" * 10_000 + "}</tool_call>") is None
    assert parse_calls('<tool_call>["f"]</tool_call>') is None
