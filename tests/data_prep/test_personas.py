"""The same question under many personas: what is written adheres, and nothing that is held out is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import personas
from data_prep.personas import persona_is_heldout, split_of
from data_prep.splits import concept_is_heldout
from omnitrain.config.locations import PACK
from omnitrain.data.shards import SampleSource
from omnitrain.tasks.benchmark import Answered
from omnitrain.tasks.personas import LANGUAGES, PERSONAS, STYLES, PersonaRule, PersonaShards

CAPTIONS = {
    "en": "A big red fire truck.",
    "es": "Un camión de bomberos rojo y grande.",
    "fr": "Un gros camion de pompiers rouge.",
    "ru": "Большая красная пожарная машина.",
}


@pytest.mark.parametrize("name", PERSONAS)
def test_each_persona_adheres_to_itself_alone(name: str) -> None:
    """The scorer against the generator: its own answer counts, that of every other persona does not, and all say the
    truth, unless they refuse to."""
    persona = PERSONAS[name]
    for animal in (False, True):
        own = persona.answer(CAPTIONS, animal=animal)
        for other in PERSONAS.values():
            same = own == other.answer(CAPTIONS, animal=animal)
            assert other.adheres(own, CAPTIONS, animal=animal) == same, (other.name, own)
        assert persona.kept(own, CAPTIONS) != persona.refuses(animal)
        wrong = own.replace("fire", "ice").replace("FIRE", "ICE")
        if wrong != own:
            assert not persona.kept(wrong, CAPTIONS)
            assert persona.adheres(wrong, CAPTIONS, animal=animal)
    for junk in ("", " ", "{", '{"answer": 3}', "[" * 5000, "!!!", "ok"):
        assert not persona.adheres(junk, CAPTIONS, animal=False)
        assert not persona.kept(junk, CAPTIONS)


def test_enough_personas_and_held_out_pairs_whose_halves_are_trained() -> None:
    assert len(STYLES) >= 12
    held = [persona for persona in PERSONAS.values() if persona_is_heldout(persona)]
    assert 4 <= len(held) <= len(PERSONAS) // 4
    trained = [persona for persona in PERSONAS.values() if not persona_is_heldout(persona)]
    assert {persona.style for persona in trained} == set(STYLES)
    assert {persona.language for persona in trained} == set(LANGUAGES)
    assert split_of("fire truck", held[0]) == (
        "heldout_concept" if concept_is_heldout("fire truck") else "heldout_cell"
    )


def test_rows_of_the_pack_and_their_scores(tmp_path: Path) -> None:
    assert personas.main([str(PACK), "--each", "6", "--out", str(tmp_path), "--no-progress"]) == 0
    rows = list(SampleSource(tmp_path))
    assert {row.modality for row in rows} == {"image", "text"}
    assert {row.split for row in rows} == {"train", "validation", "heldout_cell", "heldout_concept"}
    trained = {row.meta["persona"] for row in rows if row.split == "train"}
    assert not trained & {row.meta["persona"] for row in rows if row.split == "heldout_cell"}
    concepts = {row.concept for row in rows if row.split == "heldout_concept"}
    assert not concepts & {row.concept for row in rows if row.split != "heldout_concept"}
    rule = PersonaRule()
    scores = {}
    for system in ("own", "none", "another"):
        benchmark = PersonaShards(system=system)
        source = benchmark.rows(str(tmp_path))
        items = [benchmark.item(source[i], "{question}") for i in range(len(source))]
        roles = {tuple(message.role for message in item.sample.messages) for item in items}
        assert roles == {("user", "assistant")} if system == "none" else {("system", "user", "assistant")}
        prompts = {item.sample.messages[0].segments[0].text for item in items if system != "none"}
        scores[system] = prompts
        answered = [Answered(id="", truth=item.truth, prediction=item.sample.reference) for item in items]
        found = rule.score(answered)
        assert all(scored.statistics["adherence"] == (1.0, 1.0) for scored in found)
        assert {s.statistics["answer_kept"] for s in found if "answer_kept" in s.statistics} == {(1.0, 1.0)}
        # The English caption, whatever the persona: kept, and it adheres only to plain English, which is not held out.
        plain = [Answered(id="", truth=a.truth, prediction=a.truth["captions"]["en"]) for a in answered]
        assert not any(scored.statistics["adherence"][0] for scored in rule.score(plain))
    assert scores["own"] != scores["another"]
    assert json.loads(rows[0].meta["captions"]).keys() == LANGUAGES.keys()
