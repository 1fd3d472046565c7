from __future__ import annotations

from collections import Counter

from data_prep.prompts import FEW, LANGUAGE_NAMES, NATIVE_PROMPTS, PROMPTS, ask, prompt
from data_prep.splits import (
    HELDOUT_CELLS,
    HELDOUT_CONCEPTS,
    Sides,
    cell_split,
    concept_is_heldout,
    concept_key,
    document_split,
    fraction,
    sentence_key,
    strictest,
)
from omnitrain.data.sample import SPLITS, Segment

CONCEPTS = [f"thing {number}" for number in range(4000)]


def test_the_same_key_has_the_same_place_on_every_machine() -> None:
    # Written down once: a change would move samples between the splits of data sets that people already trained on.
    assert [round(fraction(*key), 6) for key in (("a",), ("a", "b"), ("ab",))] == [0.791374, 0.938673, 0.982637]


def test_a_concept_is_the_caption_without_case_articles_and_punctuation() -> None:
    assert concept_key("A T-shirt.") == concept_key("a t shirt!") == "t shirt"
    assert concept_key("A plumber’s wrench.") == concept_key("The plumbers wrench")
    assert concept_key("“Fuji” apple") == "fuji apple"
    assert concept_key("The.") != ""
    assert concept_key("日本") == "日本"


def test_shares_of_the_splits() -> None:
    held = sum(map(concept_is_heldout, CONCEPTS)) / len(CONCEPTS)
    assert abs(held - HELDOUT_CONCEPTS) < 0.01
    counts = Counter(cell_split(concept, "image", "fr") for concept in CONCEPTS)
    assert set(counts) == set(SPLITS)
    assert abs(counts["heldout_cell"] / len(CONCEPTS) / (1 - held) - HELDOUT_CELLS) < 0.015


def test_a_heldout_concept_is_held_out_in_every_cell_and_text() -> None:
    concept = next(concept for concept in CONCEPTS if concept_is_heldout(concept))
    cells = {cell_split(concept, given, wanted) for given in ("image", "audio:fr") for wanted in ("en", "es")}
    assert cells | {document_split(concept)} == {"heldout_concept"}
    trained = next(concept for concept in CONCEPTS if not concept_is_heldout(concept))
    assert "heldout_concept" not in {cell_split(trained, "image", str(i)) for i in range(200)}


def test_cells_of_one_concept_are_held_out_independently() -> None:
    both = Counter(
        (cell_split(c, "image", "fr") == "heldout_cell", cell_split(c, "image", "es") == "heldout_cell")
        for c in CONCEPTS
    )
    assert both[True, True] < 0.03 * len(CONCEPTS)
    assert both[True, False] > 0.05 * len(CONCEPTS)


def test_strictest() -> None:
    assert strictest(["train", "validation"]) == "validation"
    assert strictest(["heldout_cell", "heldout_concept", "train"]) == "heldout_concept"


def test_every_prompt_is_complete_and_chosen_by_id() -> None:
    for task, choices in PROMPTS.items():
        native = NATIVE_PROMPTS.get(task, {}).get("fr", ())
        seen = {prompt(task, f"id {i}", language="fr", given="ru", text="TEXT") for i in range(400)}
        assert len(seen) == len(choices) + len(native) >= 3, task
        assert set(native) <= seen
        assert not any("{" in text for text in seen)
    assert prompt("asr", "x", given="ca", language="ca") == prompt("asr", "x", given="ca", language="ca")
    assert all(len(PROMPTS[task]) >= 15 for task in ("asr", "s2tt", "sound"))
    assert {language for of in NATIVE_PROMPTS.values() for language in of} <= set(LANGUAGE_NAMES)
    few = {prompt("asr", f"id {i}", given="ca", language="ca", few=FEW) for i in range(300)}
    assert len(few) == FEW["asr"]
    assert LANGUAGE_NAMES["zh"] == "Chinese"
    assert LANGUAGE_NAMES["ca-valencia"] == "Valencian"


def test_the_medium_stands_before_or_after_the_question() -> None:
    medium = Segment(type="image", path="media.parquet#x")
    orders = Counter(ask(f"id {i}", "What?", "That.", medium)[0].segments[0].type for i in range(200))
    assert orders["image"] > orders["text"] > 20


def test_a_sentence_is_compared_without_case_and_punctuation() -> None:
    assert sentence_key("¡Sí,  señor!") == "sí señor"
    assert sentence_key("Don't…") == sentence_key("don’t") == "dont"
    assert sentence_key("नमस्ते।") == "नमस्ते"
    assert sentence_key("?!") == "?!"


def test_a_sentence_stands_on_the_strictest_of_its_sides() -> None:
    sides = Sides()
    sides.add("train", ["A taxi.", "Un taxi."])
    sides.add("heldout_concept", ["A cab.", "un taxi"])
    assert sides.admit("train", ["A taxi."])
    assert not sides.admit("train", ["A taxi.", "Un taxi."])
    assert sides.admit("heldout_concept", ["A cab.", "Un taxi!"])
    assert sides.admit("train", ["Never seen."])
