"""Speech recognition and translation: LibriSpeech, Common Voice, FLEURS, CoVoST 2.

Word error rate is that of the corpus: edits over words of the references, after the normalisation that recognisers are
usually compared with (Whisper, arXiv 2212.04356, appendix C): its English normaliser for English, its basic one for
other languages; Chinese and Japanese are compared by characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnitrain.evaluation.metrics import (
    WITHOUT_SPACES,
    bleu_from,
    bleu_statistics,
    chrf_from,
    chrf_statistics,
    edits,
    short_language,
    whisper_normalise,
)
from omnitrain.tasks.benchmark import Answered, Benchmark, Item, Metric, Rule, Scored, fill, get, medium, question, text
from omnitrain.tasks.tables import file_in, read_table


@dataclass(frozen=True, kw_only=True)
class ErrorRate(Rule):
    """Word error rate, or character error rate for languages written without spaces. ``truth["text"]`` is what was
    said."""

    language: str

    @property
    def metrics(self) -> tuple[Metric, ...]:
        name = "cer" if short_language(self.language) in WITHOUT_SPACES else "wer"
        return (Metric(name=name, higher_is_better=False),)

    def score_one(self, item: Answered) -> Scored:
        said = whisper_normalise(str(item.truth["text"]), self.language)
        heard = whisper_normalise(item.prediction, self.language)
        return Scored(answer=heard, statistics={self.metrics[0].name: edits(said, heard)})


CHRF_METRIC = Metric(name="chrf", higher_is_better=True, percent=False, combine=chrf_from)


@dataclass(frozen=True, kw_only=True)
class Translation(Rule):
    """BLEU and chrF of the corpus by sacrebleu; ``truth["texts"]`` are the references. `tokenize`: sacrebleu's
    tokenizer for BLEU, ``13a``, or ``zh``, ``char`` for what is written without spaces."""

    tokenize: str = "13a"

    metrics = (Metric(name="bleu", higher_is_better=True, percent=False, combine=bleu_from), CHRF_METRIC)

    def score_one(self, item: Answered) -> Scored:
        references = [str(reference) for reference in item.truth["texts"]]
        bleu = bleu_statistics(item.prediction, references, self.tokenize)
        return Scored(
            answer=item.prediction, statistics={"bleu": bleu, "chrf": chrf_statistics(item.prediction, references)}
        )


# --- benchmarks ------------------------------------------------------------------------------------------------------


def _recording(audio: Any, said: str, prompt: str, *, id: str, source: str, language: str, group: str = "") -> Item:
    return question(
        id, [medium("audio", audio), text(fill(prompt))], said, source=source, languages=(language,),
        truth={"text": said}, group=group,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LibriSpeech(Benchmark):
    """``SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`` with one line ``ID TEXT`` per recording ``ID.flac`` beside it."""

    def rows(self, path: str) -> list[dict[str, Any]]:
        folder = Path(path)
        lists = sorted(folder.rglob("*.trans.txt"))
        if not lists:
            raise FileNotFoundError(
                f"{folder}: no *.trans.txt below it; name an unpacked part of LibriSpeech, e.g. LibriSpeech/test-clean"
            )
        return [
            {"id": id, "text": said, "audio": str((file.parent / f"{id}.flac").relative_to(folder))}
            for file in lists
            for line in file.read_text(encoding="utf-8").splitlines()
            for id, _, said in [line.strip().partition(" ")]
            if id
        ]

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        return _recording(
            row["audio"], row["text"], prompt, id=row["id"], source="librispeech", language="en",
            group=row["id"].split("-")[0],
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CommonVoice(Benchmark):
    """A list such as ``test.tsv`` (columns client_id, path, sentence, ...) with the recordings in ``clips/``."""

    language: str

    def rows(self, path: str) -> Sequence[dict[str, Any]]:
        return read_table(str(file_in(path, "test.tsv")))

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        name, said = get(row, "path"), get(row, "sentence")
        return _recording(
            f"clips/{name}", said, prompt, id=name, source="common_voice", language=self.language,
            group=get(row, "client_id", default=""),
        )  # fmt: skip


FLEURS_COLUMNS = ("id", "file_name", "raw_transcription", "transcription", "characters", "num_samples", "gender")
"""Of its TSV files, which have no header."""


@dataclass(frozen=True, kw_only=True)
class Fleurs(Benchmark):
    """``test.tsv`` of a language, without a header, with recordings in ``audio/test/``; or the Hub's data set (columns
    id, audio, raw_transcription, transcription)."""

    language: str
    split: str = "test"

    def rows(self, path: str) -> Sequence[dict[str, Any]]:
        file = Path(path) / f"{self.split}.tsv" if Path(path).is_dir() else Path(path)
        if file.is_file() and file.suffix == ".tsv":
            return read_table(str(file), columns=FLEURS_COLUMNS)
        return read_table(path, split=self.split, config=self.language)

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        local = row.get("file_name")
        audio = f"audio/{self.split}/{local}" if local else get(row, "audio")
        name = local or get(row, "path", "audio.path", default="")
        said = get(row, "transcription")
        group = str(get(row, "id"))  # several people read one sentence
        return _recording(
            audio, said, prompt, id=f"{group}/{Path(name).name}", source="fleurs", language=self.language,
            group=group,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CoVoST(Benchmark):
    """``covost_v2.FROM_TO.tsv`` (columns path, translation, split) beside the ``clips/`` of Common Voice."""

    source_language: str
    target_language: str
    split: str = "test"

    def rows(self, path: str) -> Sequence[dict[str, Any]]:
        rows = read_table(str(file_in(path, f"covost_v2.{self.source_language}_{self.target_language}.tsv")))
        kept = [row for row in rows if row.get("split", self.split) == self.split]
        if not kept:
            raise ValueError(f"{path}: no row of split {self.split!r}")
        return kept

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        name, translation = get(row, "path"), get(row, "translation")
        return question(
            name, [medium("audio", f"clips/{name}"), text(fill(prompt))], translation, source="covost",
            languages=(self.source_language, self.target_language), truth={"texts": [translation]},
        )  # fmt: skip
