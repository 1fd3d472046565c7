"""Everything a run is judged by, on samples it was never trained on (docs/evaluation.md): losses of given answers
beside those of a unigram model, scores of generated answers, and the media-swap test.

    evaluate(...)  ->  eval/scores.json  eval/predictions.parquet  eval/media_swap.json
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.media import decode_image, encode_image
from omnitrain.data.sample import MODALITIES, BadSample, Message, Sample
from omnitrain.data.shards import Source
from omnitrain.evaluation.answers import answer_samples
from omnitrain.evaluation.intervals import bootstrap_interval
from omnitrain.evaluation.media_swap import Drawn, MediaSwap, Swap, drawn_losses, media_segments, media_swap, swap_gain
from omnitrain.evaluation.metrics import (
    ERROR_RATE_TASKS,
    UnigramBaseline,
    bits_per_byte,
    cer,
    chrf,
    exact_match,
    normalise,
    wer,
)
from omnitrain.evaluation.progress import progress_bar
from omnitrain.evaluation.settings import HeldoutEvaluation
from omnitrain.evaluation.teacher_forced import SampleLoss, Writer
from omnitrain.files import write_json, write_parquet
from omnitrain.generation.sampling import Decoding

_GENERATION_BATCH = 24  # prompts that are answered together
_KEPT_MEDIA = 6  # per split and modality, samples whose medium is copied into predictions.parquet, for the report
_EMBED_BYTES = 1 << 20  # larger recordings and videos are not copied into predictions.parquet
_THUMBNAIL = 320  # longest side of a copied picture


@dataclass
class _Row:
    """One drawn sample and all that is found out about it."""

    drawn: Drawn
    loss: SampleLoss | None = None
    unigram_nats: float | None = None
    prediction: str | None = None
    swap: Swap | None = None
    media: bytes | None = None
    media_type: str | None = None

    @property
    def sample(self) -> Sample:
        return self.drawn.sample


def direction(languages: Iterable[str]) -> str:
    """``es`` of what is said and written in one language, ``es>ca`` of a translation."""
    return ">".join(dict.fromkeys(languages))


def listing(source: Source, skipped: Counter[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The index of each sample, and what it is: id, split, modality, task, languages (`direction`). Shards tell it
    without reading messages or media."""
    columns = ("id", "split", "modality", "task")
    if (light := getattr(source, "light", None)) is not None:
        for index, row in enumerate(light().select((*columns, "languages")).to_pylist()):
            named = {name: row[name] or "" for name in columns}
            yield index, named | {"languages": direction(row["languages"] or ())}
        return
    for index in range(len(source)):
        try:
            sample = source[index]
        except BadSample as bad:
            skipped[bad.reason] += 1
            continue
        yield index, {name: getattr(sample, name) for name in columns} | {"languages": direction(sample.languages)}


def draw(
    sources: Mapping[str, Source],
    max_samples: int | None,
    *,
    seed: int = 0,
    skipped: Counter[str] | None = None,
    by: tuple[str, str] = ("split", "modality"),
    turns: str = "task",
    modality: str | None = None,
) -> dict[tuple[str, str], list[Drawn]]:
    """`by` (split, modality) -> at most `max_samples` (None: all) samples, the same for the same sources and seed:
    `turns` (tasks) in turn, in the order of a hash of the ids. `modality`: no other (None: all)."""
    skipped = Counter() if skipped is None else skipped

    def place(listed: tuple[str, Source, int]) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}/{listed[0]}".encode(), digest_size=8).digest(), listed[0]

    groups: dict[tuple[str, str], dict[str, list[tuple[str, Source, int]]]] = defaultdict(lambda: defaultdict(list))
    for source in sources.values():
        for index, about in listing(source, skipped):
            if modality in (None, about["modality"]):
                groups[about[by[0]], about[by[1]]][about[turns]].append((about["id"], source, index))
    drawn: dict[tuple[str, str], list[Drawn]] = {}
    for group, tasks in sorted(groups.items()):
        queues = [sorted(listed, key=place, reverse=True) for _, listed in sorted(tasks.items())]
        picked: list[Drawn] = []
        while queues and (max_samples is None or len(picked) < max_samples):
            queue = queues.pop(0)
            _, source, index = queue.pop()
            try:
                picked.append(Drawn(source[index], source))
            except BadSample as bad:
                skipped[bad.reason] += 1
            if queue:
                queues.append(queue)
        if picked:
            drawn[group] = picked
    return drawn


def targets(sample: Sample, tokenizer: ChatTokenizer) -> np.ndarray:
    """Target token ids of `sample`, int64 [n]: they do not depend on its media, which are not read."""
    messages = [
        Message(role=m.role, segments=tuple(s for s in m.segments if s.type in ("text", "speech")))
        for m in sample.messages
    ]
    labels = tokenizer.render(messages).labels
    return labels[labels >= 0]


def unigram_baselines(
    sources: Mapping[str, Source], tokenizer: ChatTokenizer, *, max_samples: int = 6000
) -> dict[str, UnigramBaseline]:
    """A unigram model of the training answers of each modality, from up to `max_samples` evenly spaced samples."""
    baselines: dict[str, UnigramBaseline] = {}
    total = sum(len(source) for source in sources.values())
    for source in sources.values():
        count = min(len(source), max(1, max_samples * len(source) // max(1, total)))
        for i in range(count):
            try:
                sample = source[i * len(source) // count]
                ids = targets(sample, tokenizer)
            except BadSample:
                continue  # training counts these; the baseline does without
            baselines.setdefault(sample.modality, UnigramBaseline(tokenizer.vocab_size)).update(ids)
    return baselines


def prompt_text(sample: Sample) -> str:
    """What the model is given before its last answer, media as ``[image]``, for people to read."""
    turns = list(sample.messages)
    if turns and turns[-1].role == "assistant":
        turns.pop()
    if turns and turns[-1].role == "document":
        return ""
    lines = [
        "".join((s.text or "") if s.type in ("text", "speech") else f"[{s.type}] " for s in m.segments).strip()
        for m in turns
    ]
    return "\n".join(lines)


def evaluate(
    model: Writer,
    encoder: SampleEncoder,
    sources: Mapping[str, Source],
    settings: HeldoutEvaluation,
    out_dir: str | Path,
    *,
    train_sources: Mapping[str, Source] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score `model` on held-out sources, write `out_dir` and return the content of ``scores.json``. Run under
    `torch.autocast` to score in 16 bits. The model's training mode is restored.

    `train_sources` are what the model was trained on, for the unigram baseline; without them there is none. Raises
    ValueError where there is no sample to score; the message says why.
    """
    tokenizer, seed, max_generated = encoder.tokenizer, settings.seed, settings.max_generated
    decoding = Decoding(max_new_tokens=settings.max_new_tokens)
    started = time.perf_counter()
    skipped: Counter[str] = Counter()
    groups = {
        key: [_Row(d) for d in drawn]
        for key, drawn in draw(sources, settings.max_samples, seed=seed, skipped=skipped).items()
    }
    if not groups:
        raise ValueError(f"evaluation: no sample in {', '.join(sources) or 'no source'}; check data.test_sources")
    baselines = unigram_baselines(train_sources, tokenizer) if train_sources else {}
    expert_load: dict[str, np.ndarray] = {}  # [L, E] of a modality: how often each expert was used
    swaps: dict[tuple[str, str], MediaSwap] = {}

    n_rows = sum(map(len, groups.values()))
    n_media = sum(len(rows) for (_, modality), rows in groups.items() if modality != "text")
    n_generated = sum(min(max_generated, sum(map(_answers, rows))) for rows in groups.values())
    with progress_bar(progress, f"scoring {n_rows} held-out samples, answering {n_generated}") as bar:
        task = bar.add_task("scoring held-out samples", total=n_rows + n_media + n_generated)
        advance = partial(bar.advance, task)

        def count_bad(bad: BadSample, _: str) -> None:
            skipped[bad.reason] += 1

        for (split, modality), rows in groups.items():
            name = f"{modality}, {split.replace('_', ' ')}"
            drawn = [row.drawn for row in rows]

            def count_experts(_: int, output: Any, modality: str = modality) -> None:
                used = getattr(output, "router_counts", None)
                if used is not None and used.numel():
                    expert_load[modality] = expert_load.get(modality, 0) + used.double().cpu().numpy()

            bar.update(task, description=f"loss: {name}")
            losses = drawn_losses(model, encoder, drawn, skipped, on_sample=advance, on_batch=count_experts)
            for row, loss in zip(rows, losses, strict=True):
                row.loss = loss
                if loss is not None and modality in baselines:
                    row.unigram_nats = baselines[modality].nats(targets(row.sample, tokenizer))
            if settings.media_swap and any(media_segments(row.sample) for row in rows):
                bar.update(task, description=f"media swap: {name}")
                result = media_swap(model, encoder, drawn, own_losses=losses, seed=seed, on_sample=advance)
                by_id = {swap.id: swap for swap in result.swaps}
                for row in rows:
                    row.swap = by_id.get(row.sample.id)
                swaps[split, modality] = result
            bar.update(task, description=f"answers: {name}")
            chosen = [row for row in rows if _answers(row) and row.loss is not None][:max_generated]
            for start in range(0, len(chosen), _GENERATION_BATCH):
                part = chosen[start : start + _GENERATION_BATCH]
                asked = [(row.sample, row.drawn.source.media_bytes) for row in part]
                answers = answer_samples(model, encoder, asked, decoding=decoding, on_bad=count_bad)
                for row, answer in zip(part, answers, strict=True):
                    row.prediction = answer
                advance(len(part))
            for row in [row for row in [*chosen, *rows] if media_segments(row.sample)][:_KEPT_MEDIA]:
                _keep_medium(row, encoder)
        bar.update(task, description="held-out samples scored", completed=n_rows + n_media + n_generated)

    rows = [row for group in groups.values() for row in group if row.loss is not None]
    if not rows:
        raise ValueError(f"evaluation: none of {n_rows} samples could be scored; skipped: {dict(skipped)}")
    swap_records = _swap_records(swaps, groups, seed)
    scores: dict[str, Any] = {
        "scores": _score_rows(rows, seed),
        "languages": _language_rows(rows, seed),
        "media_swap": [{k: v for k, v in record.items() if k != "samples"} for record in swap_records],
        "expert_load": {modality: counts.astype(int).tolist() for modality, counts in sorted(expert_load.items())},
        "skipped": dict(sorted(skipped.items())),
        "settings": {
            "max_samples": settings.max_samples, "max_generated": max_generated,
            "max_new_tokens": settings.max_new_tokens, "seed": seed,
            "unigram": "add-one smoothed, of the training answers of the same modality" if baselines else None,
        },
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    out = Path(out_dir)
    write_json(out / "scores.json", scores)
    write_json(out / "media_swap.json", swap_records)
    write_predictions(rows, out / "predictions.parquet")
    return scores


def _answers(row: _Row) -> bool:
    return bool(row.sample.messages) and row.sample.messages[-1].role == "assistant"


def _keep_medium(row: _Row, encoder: SampleEncoder) -> None:
    """Copy the sample's first medium, a picture as a thumbnail."""
    segment = media_segments(row.sample)[0]
    try:
        data = row.drawn.source.media_bytes(segment)
        row.media_type = segment.type
        if segment.type == "image":
            picture = Image.fromarray(decode_image(data, encoder.limits))
            picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
            row.media = encode_image(np.asarray(picture))
        elif len(data) <= _EMBED_BYTES:
            row.media = data
    except BadSample:
        return  # it was counted when the loss was computed


# --- tables --------------------------------------------------------------------------------------------------------


def _text_scores(rows: Sequence[_Row]) -> dict[str, Any]:
    answered = [(r, r.prediction) for r in rows if r.prediction is not None and r.sample.reference.strip()]
    scores: dict[str, Any] = {"generated": len(answered)}
    if not answered:
        return scores
    predictions, references = [p for _, p in answered], [r.sample.reference for r, _ in answered]
    scores |= {"chrf": chrf(predictions, references), "exact_match": exact_match(predictions, references)}
    spoken = [(r, p) for r, p in answered if r.sample.task in ERROR_RATE_TASKS and normalise(r.sample.reference)]
    if spoken:
        heard, said = [p for _, p in spoken], [r.sample.reference for r, _ in spoken]
        scores |= {"wer": wer(heard, said), "cer": cer(heard, said)}
    return scores


def _loss_scores(rows: Sequence[_Row], seed: int) -> dict[str, Any]:
    """Loss over all targets with its interval, in nats per token, and in bits per byte."""
    losses = [r.loss for r in rows if r.loss is not None]
    nats, tokens = sum(x.nats for x in losses), sum(x.tokens for x in losses)
    size = sum(x.target_bytes for x in losses)
    groups = [r.sample.concept or r.sample.id for r in rows if r.loss is not None]
    interval = bootstrap_interval(
        [x.nats for x in losses], weights=[x.tokens for x in losses], groups=groups, seed=seed
    )
    scores: dict[str, Any] = {
        "samples": len(losses), "tokens": tokens, "bytes": size,
        "loss": nats / tokens, "loss_low": interval.low, "loss_high": interval.high,
        "bits_per_byte": bits_per_byte(nats, size) if size else None,
    }  # fmt: skip
    known = [r.unigram_nats for r in rows if r.unigram_nats is not None]
    if len(known) == len(rows):
        scores |= {
            "unigram_loss": sum(known) / tokens,
            "unigram_bits_per_byte": bits_per_byte(sum(known), size) if size else None,
        }
    return scores


def _score_rows(rows: Sequence[_Row], seed: int) -> list[dict[str, Any]]:
    """One row per modality (split and task "all"), per split, and per task within a split."""
    parts: dict[tuple[str, str, str], list[_Row]] = defaultdict(list)
    for row in rows:
        split, task = row.sample.split, row.sample.task
        for part in (("all", "all"), (split, "all"), (split, task)):
            parts[row.sample.modality, *part].append(row)

    def place(part: tuple[str, str, str]) -> tuple[Any, ...]:
        return _modality_order(part[0]), *((name != "all", name) for name in part[1:])

    return [
        {**dict(zip(("modality", "split", "task"), part, strict=True)), **_loss_scores(of, seed), **_text_scores(of)}
        for part, of in sorted(parts.items(), key=lambda item: place(item[0]))
    ]


def _language_rows(rows: Sequence[_Row], seed: int) -> list[dict[str, Any]]:
    """Bits per byte of text by the language that is written."""
    by_language: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        if row.sample.modality == "text":
            by_language[row.sample.languages[-1] if row.sample.languages else "unknown"].append(row)
    return [{"language": name, **_loss_scores(part, seed)} for name, part in sorted(by_language.items())]


def _swap_records(
    swaps: Mapping[tuple[str, str], MediaSwap], groups: Mapping[tuple[str, str], Sequence[_Row]], seed: int
) -> list[dict[str, Any]]:
    """One record per modality ("all"), per split, and per task of a modality, each with its samples' losses."""
    records = []
    for modality in sorted({m for _, m in swaps}, key=_modality_order):
        parts = {split: part for (split, m), part in sorted(swaps.items()) if m == modality}
        everyone = [swap for part in parts.values() for swap in part.swaps]
        tasks = {r.sample.id: r.sample.task for (_, m), rows in groups.items() if m == modality for r in rows}
        names = sorted(set(tasks.values()))
        cuts: list[tuple[str, str, Sequence[Swap], Sequence[MediaSwap]]] = [
            ("all", "all", everyone, list(parts.values())),
            *((split, "all", part.swaps, [part]) for split, part in parts.items()),
            *(("all", task, [s for s in everyone if tasks[s.id] == task], []) for task in names if len(names) > 1),
        ]
        for split, task, of, tests in cuts:
            gain = swap_gain(of, seed=seed)
            records.append({
                "modality": modality, "split": split, "task": task, "pairs": len(of),
                "own": float(np.average([s.own for s in of], weights=[s.tokens for s in of])) if of else None,
                "swapped": float(np.average([s.swapped for s in of], weights=[s.tokens for s in of])) if of else None,
                "gain": {**asdict(gain), "above_zero": gain.above_zero} if gain else None,
                "without_partner": sum(test.without_partner for test in tests),
                "skipped": dict(sum((Counter(test.skipped) for test in tests), Counter())),
                "samples": [asdict(swap) for swap in of] if split == task == "all" else [],
            })  # fmt: skip
    return records


def _modality_order(modality: str) -> tuple[int, str]:
    return (MODALITIES.index(modality) if modality in MODALITIES else len(MODALITIES), modality)


PREDICTIONS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "split", "modality", "task", "concept")]
    + [("languages", pa.list_(pa.string()))]
    + [(name, pa.string()) for name in ("prompt", "reference", "prediction")]
    + [("chrf", pa.float64()), ("exact_match", pa.bool_()), ("loss", pa.float64()), ("unigram_loss", pa.float64())]
    + [("tokens", pa.int64()), ("bytes", pa.int64())]
    + [("swap_partners", pa.list_(pa.string())), ("swapped_loss", pa.float64())]
    + [("media_type", pa.string()), ("media", pa.binary()), ("meta", pa.string())]
)
"""One row per scored sample. `loss`, `unigram_loss`, `swapped_loss`: nats per target token. `prediction` is null where
none was generated; `media` holds the first medium of some samples (pictures as thumbnails), `meta` is the sample's, as
JSON."""


def write_predictions(rows: Iterable[_Row], path: Path) -> None:
    """Write `PREDICTIONS_SCHEMA` rows."""
    table = []
    for row in rows:
        sample, loss = row.sample, row.loss
        if loss is None:
            continue
        prediction, reference = row.prediction, sample.reference
        table.append(
            {
                "id": sample.id, "source": sample.source, "split": sample.split, "modality": sample.modality,
                "task": sample.task, "concept": sample.concept, "languages": list(sample.languages),
                "prompt": prompt_text(sample), "reference": reference, "prediction": prediction,
                "chrf": None if prediction is None else chrf([prediction], [reference]),
                "exact_match": None if prediction is None else normalise(prediction) == normalise(reference),
                "loss": loss.per_token, "tokens": loss.tokens, "bytes": loss.target_bytes,
                "unigram_loss": None if row.unigram_nats is None else row.unigram_nats / max(1, loss.tokens),
                "swap_partners": list(row.swap.partners) if row.swap else None,
                "swapped_loss": row.swap.swapped if row.swap else None,
                "media_type": row.media_type, "media": row.media, "meta": json.dumps(sample.meta, sort_keys=True),
            }
        )  # fmt: skip
    write_parquet(path, pa.Table.from_pylist(table, schema=PREDICTIONS_SCHEMA))


def print_table(scores: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `evaluate` returned: one line per modality and split (fits 80 columns)."""
    table = Table(title="Held-out samples", box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("n", "loss", "bits/B", "unigram", "chrF", "exact", "WER", "media swap"):
        table.add_column(column, justify="right", no_wrap=True)
    swaps = {(r["modality"], r["split"]): r["gain"] for r in scores["media_swap"] if r["task"] == "all"}
    forms = {"bits_per_byte": ".2f", "unigram_bits_per_byte": ".2f", "chrf": ".1f", "exact_match": ".0%", "wer": ".0%"}
    for row in scores["scores"]:
        if row["task"] != "all":
            continue
        gain = swaps.get((row["modality"], row["split"]))
        whole = row["split"] == "all"
        name = row["modality"].replace("_", "+") if whole else "  " + row["split"].removeprefix("heldout_")
        table.add_row(
            name,
            f"{row['samples']:,}",
            f"{row['loss']:.2f}",
            *("-" if row.get(key) is None else format(row[key], form) for key, form in forms.items()),
            f"{gain['mean']:+.2f} [{gain['low']:+.2f},{gain['high']:+.2f}]" if gain else "-",
            style="bold" if whole else "dim",
        )
    console = console or Console()
    console.print(table)
    console.print(
        "cell: known things, in a combination never trained on; concept: unknown things.\n"
        "loss: nats per target token; unigram: bits/B of knowing token frequencies alone.\n"
        "media swap: rise of the loss with other samples' media, 95 % interval;\n"
        "above 0, the model looks and listens.",
        style="dim",
        highlight=False,
    )
