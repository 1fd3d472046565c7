"""Sentences joined from prompts: every word of them a recording of the voice, no sentence on two sides of the split."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_prep import announcements
from data_prep.announcements import LANGUAGES, RATE, drawn_sentence, fragments, joined, prompt_key, sentences
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards

TEXTS = "you have|zero|one|two|three|Four.|five|new|messages|Message from extension|minutes|seconds|Monday|March|first"


class Everything(frozenset[str]):
    """A voice that has recorded whatever one asks for."""

    def __contains__(self, key: object) -> bool:
        return True


def recording(number: int) -> np.ndarray:
    """A tone of its own pitch between silences."""
    tone = 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * np.arange(RATE // 4) / RATE)
    return np.pad(tone, RATE // 5).astype(np.float32)


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    """A folder as by `data_prep.voices`."""
    rows = [
        Sample(
            id=f"voices/asterisk_en/{n}", source="voices/asterisk_en", split="train", task="tts", languages=("en",),
            licence="CC-BY-SA-3.0", concept=text, meta={"voice": "asterisk_en"},
            messages=(
                Message(role="user", segments=(Segment(type="text", text="Say it."),)),
                Message(role="assistant", segments=(
                    Segment(type="speech", text=text, media=encode_audio(recording(n), RATE, "flac")),
                )),
            ),
        )
        for n, text in enumerate(TEXTS.split("|"))
    ]  # fmt: skip
    write_shards(rows, tmp_path / "voices", "voices", progress=False)
    (tmp_path / "voices" / "NOTICE.md").write_text("# By whom the prompts are")
    return tmp_path / "voices"


def test_sentences_are_the_prompts_one_behind_the_other(voices: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(voices), "--voices", "asterisk_en", "--out", str(out), "--no-progress"]
    assert announcements.main([*arguments, "--sentences", "60", "--fragments", "30"]) == 0
    source = SampleSource(out)
    assert Counter(row.meta["joined"] for row in source) == {"sentence": 60, "fragment": 30}
    known = {prompt_key(text): n for n, text in enumerate(TEXTS.split("|"))}
    for row in (source[i] for i in range(len(source))):
        speech = row.segments[-1]
        assert speech.text is not None
        assert (row.source, row.meta["voice"]) == ("announcements/asterisk_en", "asterisk_en")
        assert row.licence == "CC-BY-SA-3.0"
        words = speech.text.replace("you have", "you_have").replace("message from extension", "message_from_extension")
        wav = decode_audio(source.media_bytes(speech), RATE)
        said = [known[prompt_key(word.replace("_", " "))] for word in words.split()]
        # Each prompt's tone in its turn: the strongest frequency of each loud stretch.
        loud = np.flatnonzero(np.abs(wav) > 0.05)
        stretches = np.split(loud, np.flatnonzero(np.diff(loud) > RATE // 100) + 1)
        spectra = (np.abs(np.fft.rfft(wav[s[0] : s[-1]])).argmax() * RATE / (s[-1] - s[0]) for s in stretches)
        assert [round((hertz - 200) / 50) for hertz in spectra] == said
    splits = {split: {row.concept for row in source if row.split == split} for split in ("train", "heldout_concept")}
    assert splits["train"]
    assert not splits["train"] & splits["heldout_concept"]
    fragments = [row for row in source if row.meta["joined"] == "fragment"]
    assert {row.split for row in fragments} == {"train"}
    whole = [f" {row.concept} " for row in source if row.meta["joined"] == "sentence"]
    assert sum(any(f" {row.concept} " in text for text in whole) for row in fragments) > 15  # of sentences like these
    tokenizer = ChatTokenizer.from_file(out / "tokenizer.json")
    assert {len(tokenizer.encode(f" {word}")) for text in whole for word in text.split()} == {1}
    assert "By whom" in (out / "NOTICE.md").read_text()


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_grammar_has_many_sentences(language: str) -> None:
    grammar = LANGUAGES[language]
    fixed = {part for pattern in grammar.patterns for part in pattern if not part.startswith("{")}
    listed = {word for words in grammar.lists.values() for word in words}
    numbers = {word for n in range(grammar.highest + 1) for word in grammar.number(n)}
    said = {prompt_key(text) for text in fixed | listed | numbers}
    drawn = [" ".join(prompts) for prompts in islice(sentences(grammar, said), 1_500)]
    assert len(set(drawn)) == 1_500
    assert drawn[:50] == [" ".join(prompts) for prompts in islice(sentences(grammar, said), 50)]
    without = said - {prompt_key(grammar.number(7)[0])}  # a prompt that was not recorded is not said
    assert all(
        prompt_key(grammar.number(7)[0]) not in map(prompt_key, p) for p in islice(sentences(grammar, without), 300)
    )


@pytest.mark.parametrize("language", ["en", "ru"])
def test_fragments_have_each_prompt_about_as_often(language: str) -> None:
    grammar = LANGUAGES[language]
    said = {prompt_key(p) for number in range(3_000) for p in drawn_sentence(number, grammar, Everything())}
    drawn = list(islice(fragments(grammar, said), 300))
    assert len({" ".join(prompts) for prompts in drawn}) == 300
    assert drawn[:40] == list(islice(fragments(grammar, said), 40))
    times = Counter(prompt_key(prompt) for prompts in drawn for prompt in prompts)
    assert set(times) == said  # all that sentences are made of
    sentences_have = Counter(prompt_key(p) for number in range(300) for p in drawn_sentence(number, grammar, said))
    assert max(sentences_have.values()) > 20 * min(sentences_have.values())
    assert sorted(times.values())[-len(times) // 10] <= 2 * sorted(times.values())[len(times) // 10]


def test_english_numbers() -> None:
    assert announcements.english_number(766) == ["seven", "hundred", "sixty", "six"]
    assert [announcements.english_number(n) for n in (0, 19, 20, 100)] == [
        ["zero"],
        ["nineteen"],
        ["twenty"],
        ["one", "hundred"],
    ]


def test_pauses_are_a_sentences_own() -> None:
    said = {"one": np.ones(RATE, np.float32), "two": np.ones(RATE, np.float32)}
    lengths = {len(joined(["one", "two"], said)) for _ in range(3)}
    assert len(lengths) == 1
    pause = lengths.pop() / RATE - 2
    assert announcements.PAUSES[0] <= pause <= announcements.PAUSES[1]


def test_errors_name_the_voice(voices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for voice, named in (("asterisk_fr", "asterisk_fr"), ("stamps_da", "grammars for en, fr, it, es, ru")):
        arguments = [str(voices), "--voices", voice, "--out", str(tmp_path / voice), "--no-progress"]
        assert announcements.main(arguments) != 0
        assert named in " ".join(capsys.readouterr().out.split())
