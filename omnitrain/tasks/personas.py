"""Does the system prompt steer? A persona is a style of answering and a language; both are told by rule.

    "You are a pirate: ..." + "Answer in French."   ->   Arr! Un camion de pompiers rouge. Aye, matey!

An answer *adheres* if it has the style's form and is nearer (chrF) to the caption in the persona's language than to
those in the others. It is *kept* if what stands in the form is right, in whichever language. One may go without the
other: a model that ignores its prompt keeps the answer, one that only plays the part adheres.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from omnitrain.data.sample import BadSample, Message, Sample
from omnitrain.data.shards import SampleSource
from omnitrain.evaluation.metrics import chrf, normalise
from omnitrain.tasks.benchmark import Answered, Benchmark, Item, Metric, Rule, Scored, text

LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "ru": "Russian"}
REFUSALS = {
    "en": "I do not talk about animals.",
    "es": "No hablo de animales.",
    "fr": "Je ne parle pas d’animaux.",
    "ru": "Я не говорю о животных.",
}
"""What a persona that avoids the topic says of animals."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """prompt: what the system prompt asks for.  write: a caption in the style.  read: what stands in the form, or None
    if the text has not got it.  part: of a caption, what the style says."""

    prompt: str
    write: Callable[[str], str]
    read: Callable[[str], str | None]
    part: Callable[[str], str] = lambda caption: caption


def _between(before: str, after: str) -> Callable[[str], str | None]:
    form = re.compile(re.escape(before) + "(.+)" + re.escape(after), re.DOTALL)

    def read(said: str) -> str | None:
        found = form.fullmatch(said)
        return found[1].strip() if found else None

    return read


def _around(prompt: str, before: str, after: str) -> Style:
    return Style(prompt=prompt, write=lambda caption: f"{before}{caption}{after}", read=_between(before, after))


def _read_json(said: str) -> str | None:
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return found["answer"] if isinstance(found, dict) and [*found] == ["answer"] and _is_text(found["answer"]) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _lower(caption: str) -> str:
    return caption.lower().rstrip(" .!?")


def _three(caption: str) -> str:
    return " ".join(caption.rstrip(" .!?").split()[:3])


_LIKE_NOTHING = 5.0
"""A chrF (0 to 100) up to which a text is like no caption, and tells no language."""

FORMS = {
    "pirate": _around("You are a pirate: begin with “Arr!” and end with “Aye, matey!”.", "Arr! ", " Aye, matey!"),
    "robot": _around("You are a robot: begin and end with “BEEP.”.", "BEEP. ", " BEEP."),
    "polite": _around(
        "Be most polite: begin with “Dear friend:” and end with “Yours truly.”.", "Dear friend: ", " Yours truly."
    ),
    "casual": _around("Talk casually: begin with “hey,” and end with “lol”.", "hey, ", " lol"),
    "long": _around(
        "Be wordy: after the answer add “That is all that there is to say about it.”.",
        "", " That is all that there is to say about it.",
    ),
    "list": _around("Answer as a Markdown list of one item.", "- ", ""),
    "tag": _around("Answer within <answer> and </answer>.", "<answer>", "</answer>"),
    "json": Style(
        prompt='Answer as a JSON object with the one key "answer".',
        write=lambda caption: json.dumps({"answer": caption}, ensure_ascii=False),
        read=_read_json,
    ),
    "upper": Style(
        prompt="Shout: write capital letters alone.",
        write=str.upper,
        read=lambda said: said if said.isupper() else None,
    ),
    "lower": Style(
        prompt="Write small letters alone, without a full stop.",
        write=_lower,
        read=lambda said: said if said.islower() and said[-1].isalnum() else None,
        part=_lower,
    ),
    "short": Style(
        prompt="Answer in at most three words, without a full stop.",
        write=_three,
        read=lambda said: said if 1 <= len(said.split()) <= 3 and said[-1].isalnum() and not said.islower() else None,
        part=_three,
    ),
}  # fmt: skip
"""Styles with a form of their own."""


def _read_plain(said: str) -> str | None:
    """A sentence in no other style, which refuses nothing."""
    other = any(form.read(said) is not None for form in FORMS.values()) or normalise(said) in _REFUSED
    return said if said[:1].isalpha() and not said[-1].isalnum() and not other else None


_REFUSED = {normalise(refusal) for refusal in REFUSALS.values()}


STYLES: dict[str, Style] = {
    "plain": Style(prompt="Answer in a sentence.", write=str, read=_read_plain),
    "refusing": Style(prompt="You do not talk about animals: say so, whatever is asked.", write=str, read=_read_plain),
    **FORMS,
}


@dataclass(frozen=True)
class Persona:
    """One of `STYLES` in one of `LANGUAGES`."""

    style: str
    language: str

    @property
    def name(self) -> str:
        return f"{self.style}-{self.language}"

    @property
    def prompt(self) -> str:
        """The system prompt."""
        return f"{STYLES[self.style].prompt} Answer in {LANGUAGES[self.language]}."

    def answer(self, captions: Mapping[str, str], *, animal: bool) -> str:
        """What it says of a thing with these captions by language."""
        if self.refuses(animal):
            return REFUSALS[self.language]
        return STYLES[self.style].write(captions[self.language])

    def refuses(self, animal: bool) -> bool:
        return self.style == "refusing" and animal

    def adheres(self, said: str, captions: Mapping[str, str], *, animal: bool) -> bool:
        """Whether an answer has the style and the language."""
        if self.refuses(animal):
            return normalise(said) == normalise(REFUSALS[self.language])
        style = STYLES[self.style]
        found = style.read(said.strip())
        if found is None or not found.strip():
            return False
        near = {code: chrf([found.lower()], [style.part(caption).lower()]) for code, caption in captions.items()}
        others = [score for code, score in near.items() if code != self.language]
        return near[self.language] > max([*others, _LIKE_NOTHING])

    def kept(self, said: str, captions: Mapping[str, str]) -> bool:
        """Whether what an answer says is right, in the form that it has, whichever that is, and in any language."""
        for style in STYLES.values():
            found = style.read(said.strip())
            right = {normalise(style.part(caption)) for caption in captions.values()}
            if found is not None and normalise(found) in right:
                return True
        return False


PERSONAS: dict[str, Persona] = {p.name: p for style in STYLES for p in [Persona(style, code) for code in LANGUAGES]}


@dataclass(frozen=True, kw_only=True)
class PersonaShards(Benchmark):
    """Shards of `data_prep.personas`. Prompt field: none, the samples have their own questions.

    Attributes:
        split: ``heldout_cell``, pairs of style and language that were never trained together; ``heldout_concept``,
            things that never were.
        system: the persona's own prompt, "none", or that of "another" persona. Answers are always held against the own.
    """

    split: str = "heldout_cell"
    system: Literal["own", "none", "another"] = "own"

    def rows(self, path: str) -> SampleSource:
        return SampleSource(path, split=self.split, where={"task": ["persona"]})

    def item(self, row: Sample, prompt: str) -> Item:
        try:
            persona, captions = PERSONAS[row.meta["persona"]], json.loads(row.meta["captions"])
        except (KeyError, ValueError) as error:
            raise BadSample("row_invalid", f"the row is none of data_prep.personas: {error}") from error
        turns = row.messages[1:]
        if self.system != "none":
            names = [*PERSONAS]
            other = names[(names.index(persona.name) + len(LANGUAGES) + 1) % len(names)]  # another style and language
            shown = persona if self.system == "own" else PERSONAS[other]
            turns = (Message(role="system", segments=(text(shown.prompt),)), *turns)
        return Item(
            sample=replace(row, messages=turns),
            truth={"persona": persona.name, "captions": captions, "animal": row.meta["animal"] == "yes"},
            category=persona.style,
            group=row.concept,
        )


@dataclass(frozen=True, kw_only=True)
class PersonaRule(Rule):
    """Adherence, and whether the answer was kept (of those that are not to be refused)."""

    metrics = (
        Metric(name="adherence", higher_is_better=True),
        Metric(name="answer_kept", higher_is_better=True),
    )

    def score_one(self, item: Answered) -> Scored:
        persona, captions, animal = PERSONAS[item.truth["persona"]], item.truth["captions"], item.truth["animal"]
        adheres = persona.adheres(item.prediction, captions, animal=animal)
        statistics: dict[str, tuple[float, ...]] = {"adherence": (float(adheres), 1.0)}
        if not persona.refuses(animal):
            statistics["answer_kept"] = (float(persona.kept(item.prediction, captions)), 1.0)
        return Scored(answer=item.prediction.strip(), statistics=statistics)
