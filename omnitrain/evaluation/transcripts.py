"""Recordings that are transcribed, translated and named, scored by task, language and attention window of the encoder.

    evaluate_transcripts(...)  ->  eval/transcripts.json  eval/transcripts.parquet

For any model that answers about recordings: AuT, or a Thinker. Beside it stand two that never listen.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.shards import Source
from omnitrain.evaluation.answers import answer_samples
from omnitrain.evaluation.captions import cider_d, mentioned
from omnitrain.evaluation.heldout import direction, draw, listing
from omnitrain.evaluation.intervals import Interval, bootstrap_interval
from omnitrain.evaluation.media_swap import Drawn, MediaSwap, media_segments, media_swap
from omnitrain.evaluation.metrics import (
    ERROR_RATE_TASKS,
    WITHOUT_SPACES,
    bleu_from,
    bleu_statistics,
    chrf_from,
    chrf_statistics,
    edits,
    short_language,
    whisper_normalise,
)
from omnitrain.evaluation.progress import progress_bar
from omnitrain.evaluation.settings import TranscriptEvaluation
from omnitrain.evaluation.teacher_forced import Writer, evaluating
from omnitrain.files import HEARD, TRANSCRIPTS, write_json, write_parquet
from omnitrain.generation.rescore import Rescoring
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.timestamps import cross_attention_maps
from omnitrain.generation.transcribe import BeamSearch
from omnitrain.models.aut_decoder import AuT
from omnitrain.vocabulary import TEXT

MODEL, FREQUENT, CONSTANT = "model", "most frequent", "best constant"
"""Who answers: the model; whoever always gives the most frequent training answer of that task and language; whoever
gives the one of the `CANDIDATES` most frequent that has the lowest character error rate on the training answers."""
BY_CTC, BY_BOTH = "asr_ctc", "asr_ctc_decoder"
"""The tasks of transcripts that do not come from an AuT's decoder alone: those of its CTC head, which is what the
encoder hears, and those of both (`generation.rescore`)."""
CANDIDATES = 20
TRAINING_ANSWERS = 400
"""So many training answers of a task and language, evenly spaced, are read for the two that never listen."""
_BATCH = 24  # recordings that are answered together
_KEPT_BYTES = 1 << 20  # larger recordings are not copied for the report
_KEPT_MAPS = 6  # recordings of which cross-attention is kept
_RESAMPLES = 500


# --- measures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score of a corpus.

    Attributes:
        statistics: of answers, float [I, K]: what is summed over them.
        combine: the sums to the score; None: the first over the second.
        title, form: how it is printed.
    """

    name: str
    title: str
    statistics: Callable[[Sequence[Answer]], np.ndarray]
    combine: Callable[[np.ndarray], float] | None = None
    lower_is_better: bool = False
    form: str = ".1f"

    @property
    def heading(self) -> str:
        """The title, and which way is better."""
        return f"{self.title} {'↓' if self.lower_is_better else '↑'}"

    def interval(self, answers: Sequence[Answer], seed: int) -> Interval | None:
        """The score of the corpus, with its bootstrap interval over sentences; None where nothing can be scored."""
        sums = self.statistics(answers)
        if self.combine is None and not sums[:, 1].any():
            return None
        groups = [a.group for a in answers]
        if self.combine is not None:
            return bootstrap_interval(sums, groups=groups, combine=self.combine, resamples=_RESAMPLES, seed=seed)
        return bootstrap_interval(sums[:, 0], weights=sums[:, 1], groups=groups, seed=seed)


@lru_cache(1 << 16)  # four windows often give one answer
def _edits(prediction: str, reference: str, language: str, characters: bool) -> tuple[float, float]:
    said, heard = whisper_normalise(reference, language), whisper_normalise(prediction, language)
    wrong, length = edits(said, heard, characters=characters)
    return float(wrong), float(length)


def _errors(answers: Sequence[Answer], *, characters: bool) -> np.ndarray:
    """(errors, length of the reference) of each, against the reference with the lowest rate."""
    return np.array([
        min(
            (_edits(a.prediction, reference, a.language, characters) for reference in a.references),
            key=lambda pair: pair[0] / max(1.0, pair[1]),
        )
        for a in answers
    ])  # fmt: skip


def _right(answers: Sequence[Answer]) -> np.ndarray:
    """(equal to a reference, 1) of each."""

    def right(a: Answer) -> bool:
        said = whisper_normalise(a.prediction, a.language)
        return any(said == whisper_normalise(reference, a.language) for reference in a.references)

    return np.array([(float(right(a)), 1.0) for a in answers])


def _bleu(answers: Sequence[Answer]) -> np.ndarray:
    def tokenizer(language: str) -> str:
        return "char" if short_language(language) in WITHOUT_SPACES else "13a"

    return np.array([bleu_statistics(a.prediction, a.references, tokenizer(a.language)) for a in answers])


def _chrf(answers: Sequence[Answer]) -> np.ndarray:
    return np.array([chrf_statistics(a.prediction, a.references) for a in answers])


def _cider(answers: Sequence[Answer]) -> np.ndarray:
    scores = cider_d([a.prediction for a in answers], [a.references for a in answers])
    return np.array([scores, np.ones(len(answers))]).T


def _hallucinated(answers: Sequence[Answer]) -> np.ndarray:
    """(events that are named but not in the recording, events that are named) of each. The names that are looked for
    are the true events of all recordings; one that a reference names is in the recording too."""
    vocabulary = sorted({event for a in answers for event in a.events})
    counts = []
    for a in answers:
        named = mentioned(a.prediction, vocabulary)
        true = set(a.events).union(*(mentioned(reference, vocabulary) for reference in a.references))
        counts.append((float(len(named - true)), float(len(named))))
    return np.array(counts)


def _hallucinating(answers: Sequence[Answer]) -> np.ndarray:
    """(names an event that is not in the recording, 1) of each: CHAIR of captions (arXiv 1809.02156)."""
    return np.array([(float(wrong > 0), 1.0) for wrong, _ in _hallucinated(answers)])


def _named(answers: Sequence[Answer]) -> np.ndarray:
    """(true events that are named, true events) of each."""
    return np.array([(float(len(mentioned(a.prediction, a.events))), float(len(a.events))) for a in answers])


WER = Measure(name="wer", title="WER", form=".1%", lower_is_better=True, statistics=partial(_errors, characters=False))
CER = Measure(name="cer", title="CER", form=".1%", lower_is_better=True, statistics=partial(_errors, characters=True))
ACCURACY = Measure(name="accuracy", title="right", form=".1%", statistics=_right)
BLEU = Measure(name="bleu", title="BLEU", statistics=_bleu, combine=bleu_from)
CHRF = Measure(name="chrf", title="chrF", statistics=_chrf, combine=chrf_from)
CIDER = Measure(name="cider_d", title="CIDEr-D", form=".2f", statistics=_cider)
NAMED = Measure(name="named_events", title="named", form=".1%", statistics=_named)
HALLUCINATED = Measure(
    name="hallucinated_events", title="of named", form=".1%", lower_is_better=True, statistics=_hallucinated
)
HALLUCINATING = Measure(
    name="hallucinating_captions", title="made up", form=".1%", lower_is_better=True,
    statistics=_hallucinating,
)  # fmt: skip
OF_TASK = {
    "asr": (CER, WER),
    BY_CTC: (CER, WER),
    BY_BOTH: (CER, WER),
    "s2tt": (CHRF, BLEU),
    "audio_caption": (NAMED, HALLUCINATING, HALLUCINATED, CHRF, CIDER),
}
"""The measures of a task, the most telling one first."""
OF_OTHERS = (ACCURACY, CHRF)
"""Of every other task about recordings, such as naming a sound."""


def measures_of(task: str) -> tuple[Measure, ...]:
    """The measures of a task, the most telling one first."""
    return OF_TASK.get(task, OF_OTHERS)


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What someone answered about a recording.

    Attributes:
        languages: `heldout.direction`. language: the one that is written.
        group: the sentence; whole ones are redrawn for intervals.
        events: what is heard in it, where the data say so.
        system: `MODEL`, `FREQUENT` or `CONSTANT`.
        window: of the encoder's attention, in seconds; None where nobody listened.
    """

    id: str
    task: str
    languages: str
    language: str
    split: str
    group: str
    references: tuple[str, ...]
    prediction: str
    events: tuple[str, ...] = ()
    system: str = MODEL
    window: int | None = None

    @staticmethod
    def of(sample: Sample, prediction: str, window: int | None) -> Answer:
        return Answer(
            id=sample.id, task=sample.task, languages=direction(sample.languages), split=sample.split,
            language=sample.languages[-1] if sample.languages else "", references=references(sample),
            group=sample.concept or sample.reference or sample.id, prediction=prediction, window=window,
            events=_listed(sample, "events"),
        )  # fmt: skip


def references(sample: Sample) -> tuple[str, ...]:
    """All right answers: that of the conversation, and those that ``meta["references"]``, a JSON list, adds."""
    return tuple(dict.fromkeys([sample.reference, *_listed(sample, "references")]))


def _listed(sample: Sample, key: str) -> tuple[str, ...]:
    try:
        found = json.loads(sample.meta.get(key, "[]"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{key}_invalid", f"meta {key!r} is no JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise BadSample(f"{key}_invalid", f"meta {key!r} must be a JSON list of texts")
    return tuple(found)


Kind = tuple[str, str]
"""A task, and a language or direction of translation."""


def training_answers(
    sources: Mapping[str, Source], tested: Collection[Kind], most: int = TRAINING_ANSWERS
) -> dict[Kind, Counter[str]]:
    """How often each answer about a recording is given in the training data, from up to `most` evenly spaced ones of
    each kind that is tested; of all kinds of a task of which a tested language was not trained."""
    heard: dict[Kind, list[tuple[Source, int]]] = defaultdict(list)
    for source in sources.values():
        for index, about in listing(source, Counter()):
            if about["modality"] == "audio":
                heard[about["task"], about["languages"]].append((source, index))
    wanting = {task for task, languages in tested if (task, languages) not in heard}
    found: dict[Kind, Counter[str]] = defaultdict(Counter)
    for kind in (kind for kind in heard if kind in tested or kind[0] in wanting):
        places = heard[kind]
        for i in range(min(most, len(places))):
            source, index = places[i * len(places) // min(most, len(places))]
            try:
                found[kind][source[index].reference.strip()] += 1
            except BadSample:
                continue  # training counts these; who never listens does without
    return dict(found)


def constant_answers(training: Mapping[Kind, Counter[str]]) -> dict[Kind, dict[str, str]]:
    """What `FREQUENT` and `CONSTANT` say, for each kind, and as ``(task, "")`` for languages without training data."""
    pooled: dict[Kind, Counter[str]] = defaultdict(Counter)
    for (task, _), counts in training.items():
        pooled[task, ""].update(counts)
    return {
        kind: {FREQUENT: counts.most_common(1)[0][0], CONSTANT: _best_constant(counts, kind[1].rpartition(">")[2])}
        for kind, counts in {**training, **pooled}.items()
    }


def _best_constant(counts: Counter[str], language: str) -> str:
    def rate(constant: str) -> float:
        errors = np.array([_edits(constant, answer, language, True) for answer in counts])
        wrong, length = np.array(list(counts.values())) @ errors
        return wrong / max(1.0, length)

    return min((answer for answer, _ in counts.most_common(CANDIDATES)), key=rate)


def without_listening(answers: Sequence[Answer], constants: Mapping[Kind, Mapping[str, str]]) -> Iterator[Answer]:
    """What `FREQUENT` and `CONSTANT` answer about the same recordings; nothing of a task that was never trained."""
    for answer in answers:
        task = "asr" if answer.task in (BY_CTC, BY_BOTH) else answer.task
        known = constants.get((task, answer.languages), constants.get((task, "")))
        for system, said in (known or {}).items():
            yield replace(answer, system=system, prediction=said, window=None)


def score(answers: Iterable[Answer], seed: int = 0) -> list[dict[str, Any]]:
    """One record for each system and window, task, and language ("all": together; of several splits also each split):
    samples, sentences, and the measures of the task as `Interval`s."""
    parts: dict[tuple[Any, ...], list[Answer]] = defaultdict(list)
    for a in answers:
        for languages, split in (("all", "all"), (a.languages, "all"), ("all", a.split)):
            parts[a.task, languages, split, a.system, a.window].append(a)
    splits = {task: {part[2] for part in parts if part[0] == task} - {"all"} for task, *_ in parts}

    def place(part: tuple[Any, ...]) -> tuple[Any, ...]:
        task, languages, split, system, window = part
        return task, languages != "all", languages, split != "all", split, system != MODEL, system, window or math.inf

    records = []
    for part in sorted(parts, key=place):
        task, languages, split, system, window = part
        if split != "all" and len(splits[task]) < 2:
            continue
        found = {measure.name: measure.interval(parts[part], seed) for measure in measures_of(task)}
        records.append({
            "task": task, "languages": languages, "split": split, "system": system, "window": window,
            "samples": len(parts[part]), "sentences": len({a.group for a in parts[part]}),
            "measures": {name: asdict(interval) for name, interval in found.items() if interval is not None},
        })  # fmt: skip
    return records


# --- the evaluation --------------------------------------------------------------------------------------------------


def evaluate_transcripts(
    model: Writer,
    encoder: SampleEncoder,
    sources: Mapping[str, Source],
    settings: TranscriptEvaluation,
    out_dir: str | Path,
    *,
    train_sources: Mapping[str, Source] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Have the model answer about held-out recordings, write `out_dir` and return the content of ``transcripts.json``.
    Run under `torch.autocast` to answer in 16 bits. The model's training mode is restored.

    `train_sources` are what the model was trained on, for those that never listen; without them there are none. Raises
    ValueError where there is no recording with an answer.
    """
    started, skipped = time.perf_counter(), Counter[str]()
    groups = draw(
        sources, settings.max_samples, seed=settings.seed, skipped=skipped, by=("task", "languages"), turns="split",
        modality="audio",
    )  # fmt: skip
    groups = {kind: [one for one in drawn if _can_be_scored(one.sample, skipped)] for kind, drawn in groups.items()}
    drawn = [one for part in groups.values() for one in part]
    if not drawn:
        raise ValueError(f"evaluation: no recording with an answer in {', '.join(sources)}; check data.test_sources")
    heard = {task: _first(groups, task, settings.max_swapped) for task in {kind[0] for kind in groups}}
    windows, decoding = settings.window_seconds, Decoding(max_new_tokens=settings.max_new_tokens)
    if settings.beam > 1:
        decoding = BeamSearch(width=settings.beam, max_new_tokens=settings.max_new_tokens)
    others: dict[str, Rescoring | Literal["ctc"]] = {}
    if isinstance(model, AuT) and model.ctc is not None:
        others[BY_CTC] = "ctc"
        if settings.ctc_weight is not None:
            others[BY_BOTH] = Rescoring(ctc_weight=settings.ctc_weight)
    with progress_bar(progress, f"answering about {len(drawn)} recordings, {len(windows)} windows") as bar:
        task = bar.add_task("transcripts", total=len(drawn) * len(windows))
        answers = []
        for window in windows:
            bar.update(task, description=f"window of {window} s")
            for found in _answers(model, encoder, drawn, window, decoding, others, skipped):
                answers += found
                bar.advance(task, _BATCH)
        bar.update(task, description="media swap", completed=len(drawn) * len(windows))
        swaps = {name: media_swap(model, encoder, some, seed=settings.seed) for name, some in heard.items() if some}
    if not answers:
        raise ValueError(f"evaluation: none of {len(drawn)} recordings could be answered; skipped: {dict(skipped)}")
    constants = constant_answers(training_answers(train_sources, groups.keys())) if train_sources else {}
    same = without_listening([a for a in answers if a.window == windows[0]], constants)
    scores = {
        "scores": score([*answers, *same], settings.seed),
        "media_swap": [_swap_record(name, swap) for name, swap in sorted(swaps.items())],
        "constants": [
            {"task": kind[0], "languages": kind[1] or "all", **said} for kind, said in sorted(constants.items())
        ],
        "skipped": dict(sorted(skipped.items())),
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    out = Path(out_dir)
    write_json(out / Path(TRANSCRIPTS).name, scores)
    kept, longest = _players(groups, settings.players), max(windows)
    beside = {id: {"media": data} for id, data in kept.items()}
    said = {a.id: a.prediction for a in answers if a.window == longest and a.prediction}
    by_id = {one.sample.id: one for one in drawn}
    if isinstance(model, AuT):
        for id in [id for id in kept if id in said][:_KEPT_MAPS]:
            beside[id] |= cross_attention(model, encoder, by_id[id], said[id], longest)
    _write_rows(answers, beside, longest, out / Path(HEARD).name)
    return scores


def _can_be_scored(sample: Sample, skipped: Counter[str]) -> bool:
    try:
        Answer.of(sample, "", None)
    except BadSample as bad:
        skipped[bad.reason] += 1
        return False
    return bool(sample.reference.strip())


def _first(groups: Mapping[Kind, Sequence[Drawn]], task: str, most: int) -> list[Drawn]:
    """Up to `most` recordings of a task, its languages in turn."""
    queues = [list(drawn) for (name, _), drawn in groups.items() if name == task]
    turns = (queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue))
    return [one for one, _ in zip(turns, range(most), strict=False)]


def _answers(
    model: Writer,
    encoder: SampleEncoder,
    drawn: Sequence[Drawn],
    window: int,
    decoding: Decoding | BeamSearch,
    others: Mapping[str, Rescoring | Literal["ctc"]],
    skipped: Counter[str],
) -> Iterator[list[Answer]]:
    """Of `_BATCH` recordings at a time; `others`: ways to write transcripts by the tasks under which they stand."""

    def count_bad(bad: BadSample, _: str) -> None:
        skipped[bad.reason] += 1

    def asked(
        part: Sequence[Drawn], way: Any, on_bad: Callable[[BadSample, str], None]
    ) -> Iterator[tuple[Sample, str]]:
        media = [(one.sample, one.source.media_bytes) for one in part]
        texts = answer_samples(model, encoder, media, decoding=way, on_bad=on_bad, aut_window_frames=100 * window)
        return ((one.sample, text) for one, text in zip(part, texts, strict=True) if text is not None)

    for start in range(0, len(drawn), _BATCH):
        part = drawn[start : start + _BATCH]
        answers = [Answer.of(sample, text, window) for sample, text in asked(part, decoding, count_bad)]
        spoken = [one for one in part if one.sample.task in ERROR_RATE_TASKS]
        for task, way in others.items():
            answers += [_heard(*pair, window, task) for pair in asked(spoken, way, lambda *_: None)]
        yield answers


def _heard(sample: Sample, text: str, window: int, task: str) -> Answer:
    """Under an id of its own, since the decoder answers about the same recording."""
    return replace(Answer.of(sample, text, window), task=task, id=f"{sample.id}/{task}")


def _swap_record(task: str, swap: MediaSwap) -> dict[str, Any]:
    gain = swap.gain
    return {
        "task": task,
        "pairs": len(swap.swaps),
        "gain": {**asdict(gain), "above_zero": gain.above_zero} if gain is not None else None,
    }


ROWS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "task", "languages", "language", "split", "group")]
    + [("window", pa.int64()), ("references", pa.list_(pa.string())), ("events", pa.list_(pa.string()))]
    + [("prediction", pa.string()), *((measure.name, pa.float64()) for measure in (WER, CER, ACCURACY, CHRF))]
    + [("media", pa.binary()), ("tokens", pa.list_(pa.string())), ("attention", pa.list_(pa.list_(pa.float32())))]
)
"""One row per recording and window (in seconds). `wer`, `cer`: of this answer, null where the task has no such measure.
`media`: some recordings, for the report, beside the answer with the longest window. `tokens`, `attention`: of some of
them, where the model is an AuT, the tokens of the answer, and how much each looks at each feature of the recording
while it is predicted, [tokens, features], mean over layers and heads."""


def _players(groups: Mapping[Kind, Sequence[Drawn]], most: int) -> dict[str, bytes]:
    """The media of the first recordings, all tasks and languages in turn, by the samples' ids."""
    kept: dict[str, bytes] = {}
    for i in range(max(map(len, groups.values()))):
        for one in (drawn[i] for drawn in groups.values() if i < len(drawn)):
            if len(kept) == most:
                return kept
            try:
                data = one.source.media_bytes(media_segments(one.sample)[0])
            except BadSample:
                continue  # it was counted when it was asked about
            if len(data) <= _KEPT_BYTES:
                kept[one.sample.id] = data
    return kept


def cross_attention(model: AuT, encoder: SampleEncoder, one: Drawn, said: str, window: int) -> dict[str, Any]:
    """`tokens` and `attention` (`ROWS_SCHEMA`) of the answer `said` about a recording."""
    answer = Message(role="assistant", segments=(Segment(type="text", text=said),))
    sample = replace(one.sample, messages=(*one.sample.messages[:-1], answer))
    encoded = encoder(sample, one.source.media_bytes)
    with evaluating(model):
        [maps] = cross_attention_maps(model, PackedBatch.pack([encoded]), aut_window_frames=100 * window)
    labels = encoded.labels[encoded.token_types == TEXT]
    predicts = np.flatnonzero(labels != IGNORE)
    tokens = [encoder.tokenizer.decode([int(labels[i])], skip_special=False) for i in predicts]
    attention = maps.mean(dim=(0, 1)).float().cpu().numpy()[predicts]
    return {"tokens": tokens, "attention": attention.tolist()}


def _write_rows(answers: Sequence[Answer], beside: Mapping[str, Mapping[str, Any]], longest: int, path: Path) -> None:
    rows = []
    for a in answers:
        scores = {}
        for measure in set(measures_of(a.task)) & {WER, CER, ACCURACY, CHRF}:
            [sums] = measure.statistics([a])
            if measure.combine is not None:
                scores[measure.name] = measure.combine(sums)
            elif sums[1]:
                scores[measure.name] = sums[0] / sums[1]
        more = beside.get(a.id, {}) if a.window == longest else {}
        lists = {"references": list(a.references), "events": list(a.events)}
        rows.append({**asdict(a), **scores, **lists, **more})
    table = [{name: row.get(name) for name in ROWS_SCHEMA.names} for row in rows]
    write_parquet(path, pa.Table.from_pylist(table, schema=ROWS_SCHEMA))


# --- tables ----------------------------------------------------------------------------------------------------------


def print_transcripts(scores: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `evaluate_transcripts` returned: one line per task and language with the longest window, and one per
    task with each window (fits 80 columns)."""
    console = console or Console()
    rows = [row for row in scores["scores"] if row["split"] == "all"]
    windows = sorted({row["window"] for row in rows if row["window"] is not None})
    table = Table(
        title=f"Held-out recordings, attention window {windows[-1]} s", box=box.SIMPLE_HEAD, padding=0, pad_edge=False,
        show_edge=False,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for column in ("n", "", "95 %", "", "frequent", "constant"):
        table.add_column(column, justify="right", no_wrap=True)
    found = {(r["task"], r["languages"], r["system"], r["window"]): r["measures"] for r in rows}
    kinds = Counter(r["task"] for r in rows if r["system"] == MODEL and r["window"] == windows[-1])
    for row in (r for r in rows if r["system"] == MODEL and r["window"] == windows[-1]):
        if kinds[row["task"]] == 2 and row["languages"] != "all":
            continue  # of a single language all is said
        first, second = measures_of(row["task"])[:2]
        whole, of = row["languages"] == "all", row["measures"]
        others = [found.get((row["task"], row["languages"], system, None), {}) for system in (FREQUENT, CONSTANT)]
        table.add_row(
            row["task"] if whole else f"  {row['languages']}",
            str(row["samples"]),
            f"{first.title} {_value(of, first)}",
            _range(of, first),
            f"{second.title} {_value(of, second)}",
            *(_value(other, first) for other in others),
            style="bold" if whole else "dim",
        )
    console.print(table)
    for task in dict.fromkeys(row["task"] for row in rows):
        first = measures_of(task)[0]
        values = [f"{w} s {_value(found.get((task, 'all', MODEL, w), {}), first)}" for w in windows]
        console.print(f"{task}, {first.title} by window: {', '.join(values)}", highlight=False)
    for swap in (s for s in scores["media_swap"] if s["gain"]):
        gain = swap["gain"]
        shown = f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
        console.print(f"{swap['task']}, media swap: {shown} nats per token", highlight=False)
    if "audio_caption" in kinds:
        console.print("named: of what is heard; made up: captions that name something else", style="dim")
    console.print(
        "frequent: always the most frequent training answer of the task and language;\n"
        "constant: the best of the frequent ones. Error rates after Whisper's normaliser.",
        style="dim",
        highlight=False,
    )


def _value(measures: Mapping[str, Any], measure: Measure) -> str:
    return format(measures[measure.name]["mean"], measure.form) if measure.name in measures else "-"


def _range(measures: Mapping[str, Any], measure: Measure) -> str:
    if measure.name not in measures:
        return "-"
    low, high = measures[measure.name]["low"], measures[measure.name]["high"]
    return f"[{low:{measure.form}},{high:{measure.form}}]"
