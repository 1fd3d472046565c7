"""No sentence, in any language, on two sides of the split: over the stamps, Asterisk's prompts and the dialogues."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from data_prep import asterisk, fillets, splits, stamps, tokenizer
from data_prep.splits import sentence_key
from omnitrain.data.chat import SPECIAL_TOKENS, ChatTokenizer
from omnitrain.data.sample import Sample
from omnitrain.data.shards import SampleSource
from tests.data_prep.conftest import as_sources


def write_three(folder: Path, stamps_tree: Path, trees: dict[str, Path]) -> dict[str, list[Sample]]:
    """The three sources, one beside the other, as rows."""
    out = {name: folder / name for name in ("stamps", "asterisk", "fillets")}
    quiet = ["--no-progress", "--force"]
    assert stamps.main(["--out", str(out["stamps"]), "--source", str(stamps_tree), "--size", "48", *quiet]) == 0
    prompts = as_sources({name: path for name, path in trees.items() if "asterisk" in name})
    options = ["--languages", "en", "fr", "it", "--beside", str(out["stamps"])]
    assert asterisk.main(["--out", str(out["asterisk"]), *options, *prompts, *quiet]) == 0
    dialogues = as_sources({name: path for name, path in trees.items() if "fillets" in name})
    options = ["--beside", str(out["stamps"]), str(out["asterisk"])]
    assert fillets.main(["--out", str(out["fillets"]), *options, *dialogues, *quiet]) == 0
    return {name: list(SampleSource(path)) for name, path in out.items()}


def transcripts(rows: list[Sample]) -> dict[str, str]:
    """What is said in each recording."""
    return {s.path: row.reference for row in rows if row.task == "asr" for s in row.segments if s.path}


def sides(sources: dict[str, list[Sample]]) -> dict[str, set[str]]:
    """The sides on which each sentence is said or answered. A stamp's cells are of one side, unless it is held out."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, rows in sources.items():
        said = transcripts(rows)
        for row in rows:
            side = "train" if name == "stamps" and row.split != "heldout_concept" else row.split
            heard = [said[s.path] for s in row.segments if s.path in said]
            for sentence in [row.reference, *heard]:
                found[sentence_key(sentence)].add(side)
    return found


@pytest.mark.parametrize("heldout", ["dog", "yes", "added"])
def test_no_sentence_stands_on_two_sides(
    heldout: str,
    stamps_tree: Path,
    asterisk_trees: dict[str, Path],
    fillets_trees: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ "A dog." is in all three; "Yes." and "Yeah." are both "Ano"; "Added." and "Joined." are both "ajouté"."""
    monkeypatch.setattr(splits, "concept_is_heldout", lambda concept: concept == heldout)
    monkeypatch.setattr(stamps, "concept_is_heldout", lambda concept: concept == heldout)
    sources = write_three(tmp_path, stamps_tree, asterisk_trees | fillets_trees)
    found = sides(sources)
    assert not {sentence: on for sentence, on in found.items() if len(on) > 1}
    held = {row.concept for rows in sources.values() for row in rows if row.split == "heldout_concept"}
    assert held == {heldout}
    if heldout == "dog":  # in each source
        assert all(any(row.concept == "dog" for row in rows) for rows in sources.values())
    if heldout == "yes":  # "Yeah." is said with the same word in Czech: left out
        assert "yeah" not in {row.concept for row in sources["fillets"] if row.languages[0] == "cs"}


def test_rows_of_other_data_sets_are_minded(
    asterisk_trees: dict[str, Path], fillets_trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that were split by another rule are not touched: what contradicts them is left out."""
    dialogues = as_sources(fillets_trees)
    first = tmp_path / "first"
    monkeypatch.setattr(splits, "concept_is_heldout", lambda concept: False)
    fillets.main(["--out", str(first), "--no-progress", *dialogues])
    monkeypatch.setattr(splits, "concept_is_heldout", lambda concept: concept == "wait for me")
    assert "wait for me" in {row.concept for row in SampleSource(first) if row.split != "heldout_concept"}
    fillets.main(["--out", str(tmp_path / "alone"), "--no-progress", *dialogues])
    assert "wait for me" in {row.concept for row in SampleSource(tmp_path / "alone")}
    fillets.main(["--out", str(tmp_path / "second"), "--no-progress", "--beside", str(first), *dialogues])
    assert "wait for me" not in {row.concept for row in SampleSource(tmp_path / "second")}


def test_a_tokenizer_of_the_training_texts(
    fillets_trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(splits, "concept_is_heldout", lambda concept: concept == "wait for me")
    monkeypatch.setattr(splits, "VALIDATION_DOCUMENTS", 0)
    out = tmp_path / "shards"
    fillets.main(["--out", str(out), "--no-progress", *as_sources(fillets_trees)])
    texts = set(tokenizer.training_texts(SampleSource(out)))
    assert "Een hond." in texts
    assert "Wacht op mij!" not in texts
    arguments = [str(out), "--out", str(tmp_path / "bpe"), "--vocabulary", "300"]
    assert tokenizer.main([*arguments, "--tasks", "asr", "s2tt"]) == 0
    assert "300 tokens" in capsys.readouterr().out
    bpe = ChatTokenizer.from_dir(tmp_path / "bpe")
    assert bpe.vocab_size == 300
    assert bpe.decode(bpe.encode("Počkej, a dog.")) == "Počkej, a dog."
    assert len(SPECIAL_TOKENS) == 33
    assert tokenizer.main([*arguments, "--tasks", "song"]) == 1
    assert "song" in capsys.readouterr().out
    assert tokenizer.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "bpe")]) == 1
