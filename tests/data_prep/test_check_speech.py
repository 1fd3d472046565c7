from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep import asterisk, check_speech, fillets
from data_prep.check_speech import character_error_rate
from omnitrain.data.shards import SampleSource
from tests.data_prep.conftest import as_sources


class Judge:
    """Hears what it is told, and keeps count."""

    def __init__(self, said: dict[str, list[str]]) -> None:
        self.name, self.said = "fake", said
        self.heard: list[tuple[int, int, str]] = []

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str:
        if language == "nl":
            raise ValueError("the judge fake does not hear 'nl'")
        self.heard.append((len(wav), sample_rate, language))
        return self.said[language].pop(0)


def texts(folder: Path, language: str) -> list[str]:
    return [row.reference for row in SampleSource(folder, where={"task": "asr", "languages": [language]})]


def test_the_error_rate_is_of_characters_after_whispers_normalisation() -> None:
    assert character_error_rate("Press seven, don't wait!", "press 7 do not wait", "en") == 0
    assert character_error_rate("Počkej na mě.", "počkej na mne", "cs") == 0.2
    assert character_error_rate("ano", "a to je něco jiného", "cs") > 1
    assert character_error_rate("你好。", "你 好", "zh") == 0


def test_recordings_that_do_not_fit_are_listed_and_left_out(
    fillets_trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "checked"
    fillets.main(["--out", str(shards), "--no-progress", *as_sources(fillets_trees)])
    out.mkdir()
    said = texts(shards, "cs")
    wrong = said.index("Počkej na mně!")
    judge = Judge({"cs": [text if i != wrong else "Something else entirely." for i, text in enumerate(said)]})
    arguments = [str(shards), "--judge", "fake", "--out", str(out), "--no-progress"]
    assert check_speech.main(arguments, judge) == 0
    printed = capsys.readouterr().out
    assert "cs" in printed
    assert "does not hear 'nl'" in printed
    assert {(rate, language) for _, rate, language in judge.heard} == {(16_000, "cs")}
    assert min(samples for samples, _, _ in judge.heard) > 16_000
    (misfit,) = json.loads((out / "misfits.json").read_text())
    assert misfit["recording"] == "speech/level/a-v-wait/cs"
    assert misfit["heard"] == "Something else entirely."
    assert misfit["cer"] > 0.5

    again = Judge({"cs": []})  # nothing is left to hear
    with (out / "heard.jsonl").open("a") as file:
        file.write('{"recording": "half a li')
    assert check_speech.main(arguments, again) == 0
    assert not again.heard

    left = tmp_path / "left"
    options = ["--without", str(out / "misfits.json"), *as_sources(fillets_trees)]
    assert fillets.main(["--out", str(left), "--no-progress", *options]) == 0
    assert set(texts(left, "cs")) == set(said) - {"Počkej na mně!"}
    assert "fillets/level/a-v-wait/audio:nl>cs" in {row.id for row in SampleSource(left)}
    assert not [row for row in SampleSource(left) if row.id.startswith("fillets/level/a-v-wait/audio:cs")]
    (tmp_path / "odd.json").write_text("[1]")
    assert fillets.main(["--out", str(left), "--without", str(tmp_path / "odd.json"), *as_sources(fillets_trees)]) == 1
    assert "no list by data_prep.check_speech" in " ".join(capsys.readouterr().out.split())


def test_languages_and_limit(asterisk_trees: dict[str, Path], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    asterisk.main(["--out", str(shards), "--no-progress", "--languages", "en", "fr", *as_sources(
        {name: path for name, path in asterisk_trees.items() if "-it" not in name}
    )])  # fmt: skip
    judge = Judge({"en": texts(shards, "en"), "fr": texts(shards, "fr")})
    arguments = [str(shards), "--judge", "fake", "--no-progress", "--limit", "2", "--languages", "en"]
    assert check_speech.main(arguments, judge) == 0
    assert [language for _, _, language in judge.heard] == ["en", "en"]
    assert json.loads((shards / "misfits.json").read_text()) == []
    assert len(SampleSource(shards)) > 4  # the lists beside the shards do not disturb


def test_a_judge_that_is_not_there_is_named(
    fillets_trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    fillets.main(["--out", str(shards), "--no-progress", *as_sources(fillets_trees)])
    capsys.readouterr()
    assert check_speech.main([str(shards), "--judge", str(tmp_path / "no-model")]) == 1
    assert "no-model" in "".join(capsys.readouterr().out.split())


def test_a_text_too_long_for_its_sound_is_listed_without_a_judge(
    fillets_trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    fillets.main(["--out", str(shards), "--no-progress", *as_sources(fillets_trees)])
    assert check_speech.main([str(shards), "--fastest", "9", "--languages", "cs"]) == 0
    listed = json.loads((shards / "misfits.json").read_text())  # sounds of 1.1 seconds
    assert {one["text"]: one["pace"] for one in listed} == {
        'Řekl: "pes"': 10.0, "Počkej na mně!": 12.7, "Hele, vtip.": 10.0
    }  # fmt: skip
    assert "{'cs': 3}" in capsys.readouterr().out
    assert check_speech.main([str(shards)]) == 1
    assert "--fastest" in capsys.readouterr().out
