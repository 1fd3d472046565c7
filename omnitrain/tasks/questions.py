"""Questions about pictures, videos and recordings: MMMU, MMStar, MathVista, ChartQA, Video-MME, MMAU, AudioBench."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnitrain.data.sample import BadSample, Segment
from omnitrain.tasks.benchmark import LETTERS, Benchmark, Item, fill, get, lettered, listed, medium, question, text
from omnitrain.tasks.tables import read_table


@dataclass(frozen=True, kw_only=True)
class _Table(Benchmark):
    """A benchmark that is one table; `split` and `config` are of a data set of the Hub."""

    split: str = "test"
    config: str | None = None

    def rows(self, path: str) -> Sequence[dict[str, Any]]:
        return read_table(path, split=self.split, config=self.config)


@dataclass(frozen=True, kw_only=True)
class MMMU(_Table):
    """Columns id, question (with ``<image 1>`` where a picture belongs), options, answer, question_type, image_1 to
    image_7. Prompt fields: question, options, instruction (`choice_instruction` or `open_instruction`)."""

    split: str = "validation"
    choice_instruction: str = "Answer with the option's letter from the given choices directly."
    open_instruction: str = "Answer the question using a single word or phrase."

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        id, answer = str(get(row, "id")), get(row, "answer")
        choice = get(row, "question_type") == "multiple-choice"
        options = listed(get(row, "options", default=[]), "options") if choice else []
        truth: dict[str, Any] = {"options": options, "answer": str(answer)}
        if not choice:
            several = isinstance(answer, list) or str(answer).startswith("[")
            truth = {"answers": listed(answer, "answer") if several else [str(answer)]}
        asked = fill(
            prompt,
            question=get(row, "question"),
            options=lettered(options) if options else "",
            instruction=self.choice_instruction if choice else self.open_instruction,
        )
        segments: list[Segment] = []
        for piece in re.split(r"(<image \d>)", re.sub(r"\n{3,}", "\n\n", asked)):
            if marker := re.fullmatch(r"<image (\d)>", piece):
                segments.append(medium("image", row.get(f"image_{marker.group(1)}")))
            elif piece:
                segments.append(text(piece))
        if all(segment.type == "text" for segment in segments):
            segments.insert(0, medium("image", row.get("image_1")))
        parts = id.split("_")
        return question(
            id, segments, truth.get("answer") or truth["answers"][0], source="mmmu", truth=truth,
            category=str(get(row, "subject", default="_".join(parts[1:-1]))),  # validation_Art_Theory_12
            options=tuple(LETTERS[: len(options)]),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MMStar(_Table):
    """Columns index, question (which holds its options), image, answer, category. Prompt field: question."""

    split: str = "val"

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        answer = str(get(row, "answer")).strip()
        segments = [medium("image", get(row, "image")), text(fill(prompt, question=get(row, "question")))]
        return question(
            str(get(row, "index")), segments, answer, source="mmstar", truth={"answer": answer},
            category=get(row, "category", default=""), options=tuple("ABCD"),
        )  # fmt: skip


_MATHVISTA_HINTS = {
    "multi_choice": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
    "the end.",
    "float": "Please answer the question requiring a floating-point number with {places} and provide the final value, "
    "e.g., {example}, at the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
    "[1, 2, 3], at the end.",
    "text": "Please answer the question.",
}


@dataclass(frozen=True, kw_only=True)
class MathVista(_Table):
    """Columns pid, question, decoded_image or image, choices, unit, precision, answer, question_type, answer_type,
    metadata. Prompt fields: question, hint, options."""

    split: str = "testmini"

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        kind, choice = get(row, "answer_type"), get(row, "question_type") == "multi_choice"
        options = listed(get(row, "choices"), "choices") if choice else []
        precision = int(float(get(row, "precision", default=0) or 0))
        places = "one decimal place" if precision == 1 else f"{precision} decimal places"
        hint = _MATHVISTA_HINTS.get("multi_choice" if choice else kind, _MATHVISTA_HINTS["text"])
        unit = row.get("unit")
        answer = str(get(row, "answer"))
        asked = fill(
            prompt,
            question=get(row, "question") + (f" (Unit: {unit})" if unit else ""),
            hint=hint.format(places=places, example=", ".join(f"{n:.{precision}f}" for n in (1.2, 1.3, 1.4))),
            options="Choices:\n" + lettered(options) if options else "",
        ).strip()
        return question(
            str(get(row, "pid")), [medium("image", get(row, "decoded_image", "image")), text(asked)], answer,
            source="mathvista",
            truth={"answer": answer, "answer_type": kind, "precision": precision, "options": options},
            category=get(row, "metadata.task", default=""),
            options=tuple(f"({letter})" for letter in LETTERS[: len(options)]),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChartQA(_Table):
    """``test_human.json`` or ``test_augmented.json`` (imgname, query, label) with the pictures in ``png/`` beside them;
    or the Hub's columns image, query, label, human_or_machine. Prompt field: question."""

    def rows(self, path: str) -> Sequence[dict[str, Any]]:
        if Path(path).is_dir() and (lists := sorted(Path(path).glob("*.json"))):
            whose = ("human", "augmented")
            return [
                {**row, "number": f"{file.stem}/{number}", "whose": next((w for w in whose if w in file.stem), "")}
                for file in lists
                for number, row in enumerate(read_table(str(file)))
            ]
        return _Numbered(super().rows(path))

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        name, label, machine = row.get("imgname"), get(row, "label"), row.get("human_or_machine")
        answers = [str(entry) for entry in (label if isinstance(label, list) else [label])]
        whose = get(row, "whose", default="") or ("" if machine is None else ("human", "augmented")[int(machine)])
        picture = medium("image", f"png/{name}" if name else get(row, "image"))
        asked = text(fill(prompt, question=get(row, "query")))
        return question(
            str(row["number"]), [picture, asked], answers[0], source="chartqa", truth={"answers": answers},
            category=whose, group=name or "",
        )  # fmt: skip


class _Numbered(Sequence):
    """Rows of a table without ids: their number is one."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.table = rows

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return {**self.table[index], "number": str(index)}


@dataclass(frozen=True, kw_only=True)
class VideoMME(_Table):
    """Columns question_id, videoID, duration, question, options ("A. ..."), answer; videos are ``data/VIDEOID.mp4``
    beside the table, in the folder `videos`. `with_audio`: hear the sound track too. Prompt fields: question, options.
    """

    with_audio: bool = True
    videos: str = "data"

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        video, answer = get(row, "videoID"), get(row, "answer")
        options = listed(get(row, "options"), "options")
        asked = text(fill(prompt, question=get(row, "question"), options="\n".join(options)))
        clip = medium("video", f"{self.videos}/{video}.mp4", with_audio=self.with_audio)
        return question(
            str(get(row, "question_id")), [clip, asked], answer, source="video_mme", truth={"answer": answer},
            category=get(row, "duration"), group=video, options=tuple(LETTERS[: len(options)]),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MMAU(_Table):
    """A list such as ``mmau-test-mini.json``: id, audio_id (a path), question, choices, answer, task. Prompt fields:
    question, options."""

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        options, answer = listed(get(row, "choices"), "choices"), str(get(row, "answer"))
        audio = get(row, "audio_id", "audio", "context")
        audio = audio.removeprefix("./") if isinstance(audio, str) else audio
        asked = fill(prompt, question=get(row, "question", "instruction"), options=lettered(options))
        return question(
            str(get(row, "id")), [medium("audio", audio), text(asked)], answer, source="mmau",
            truth={"answer": answer, "options": options}, category=get(row, "task", default=""), options=tuple(options),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AudioBenchChoice(_Table):
    """Multiple choice as AudioBench's data sets have it: context.audio, instruction.text, answer.text, and the options
    as ``choices`` or in the instruction as ``(A) ... (B) ...``. Prompt field: question."""

    def rows(self, path: str) -> Sequence[dict[str, Any]]:
        return _Numbered(super().rows(path))

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        instruction, answer = get(row, "instruction.text"), get(row, "answer.text").strip()
        given = row.get("choices")
        in_text = [option.strip() for option in re.split(r"\([A-Z]\)", instruction)[1:]]
        options = listed(given, "choices") if given else in_text
        if len(options) < 2:
            raise BadSample("row_invalid", "no choices, neither as a column nor as (A) ... (B) ... in the instruction")
        bare = re.match(r"\(([A-Z])\)", answer)
        if not bare and answer not in options[: len(LETTERS)]:
            raise BadSample("row_invalid", f"the answer {answer!r} is none of the choices")
        letter = bare.group(1) if bare else LETTERS[options.index(answer)]
        asked = instruction if not given else f"{instruction}\n{lettered(options)}"
        segments = [medium("audio", get(row, "context.audio")), text(fill(prompt, question=asked))]
        return question(
            str(get(row, "id", "number")), segments, answer, source="audiobench",
            truth={"answer": letter, "options": options},
            options=tuple(f"({name})" for name in LETTERS[: len(options)]),
        )  # fmt: skip
