"""Captions of sounds (AudioCaps): similarity to several references, and events that were made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omnitrain.evaluation.captions import cider_d, mentioned
from omnitrain.evaluation.metrics import chrf_statistics
from omnitrain.tasks.benchmark import Answered, Benchmark, Item, Metric, Rule, Scored, fill, get, medium, question
from omnitrain.tasks.benchmark import text as text_segment
from omnitrain.tasks.speech_to_text import CHRF_METRIC
from omnitrain.tasks.tables import file_in, read_table


@dataclass(frozen=True, kw_only=True)
class AudioCaptionRule(Rule):
    """CIDEr-D, chrF to the best reference, and hallucination after CHAIR (Rohrbach et al. 2018, arXiv 1809.02156):

    - ``hallucinated_events``: of all events that the captions name, the share that is not in the recording;
    - ``hallucinating_captions``: share of captions with at least one of these.

    An event is in the recording if it is among its true events or a human caption names it. The names that are looked
    for are the true events of all recordings. Without true events in the data there are no hallucination scores.

    ``truth``: ``captions``, ``events``.
    """

    metrics = (
        Metric(name="cider_d", higher_is_better=True, percent=False),
        CHRF_METRIC,
        Metric(name="hallucinated_events", higher_is_better=False),
        Metric(name="hallucinating_captions", higher_is_better=False),
    )

    def score(self, answered: Sequence[Answered]) -> list[Scored]:
        vocabulary = sorted({event for item in answered for event in item.truth["events"]})
        cider = cider_d([item.prediction for item in answered], [item.truth["captions"] for item in answered])
        scored = []
        for item, similarity in zip(answered, cider, strict=True):
            captions = item.truth["captions"]
            statistics: dict[str, tuple[float, ...]] = {
                "cider_d": (similarity, 1.0),
                "chrf": chrf_statistics(item.prediction, captions),
            }
            named = mentioned(item.prediction, vocabulary)
            if vocabulary:
                true = set(item.truth["events"]).union(*(mentioned(caption, vocabulary) for caption in captions))
                wrong = named - true
                statistics["hallucinated_events"] = (float(len(wrong)), float(len(named)))
                statistics["hallucinating_captions"] = (float(bool(wrong)), 1.0)
            scored.append(Scored(answer="; ".join(sorted(named)), statistics=statistics))
        return scored


@dataclass(frozen=True, kw_only=True)
class AudioCaps(Benchmark):
    """``test.csv`` (audiocap_id, youtube_id, start_time, caption; several rows per recording) with the recordings
    beside it. An optional column ``events`` names the sounds that are really there, parted by semicolons, e.g.
    AudioSet's labels of the recording. `audio` is where a recording lies, relative to the list; its fields are columns.
    """

    audio: str = "audio/{youtube_id}.wav"

    def rows(self, path: str) -> list[dict[str, Any]]:
        file = file_in(path, "test.csv")
        recordings: dict[tuple[str, str], dict[str, Any]] = {}
        for row in read_table(str(file)):
            missing = {"youtube_id", "caption"} - row.keys()
            if missing:
                raise ValueError(f"{file}: column {missing.pop()} is missing; it has {', '.join(row)}")
            key = (row["youtube_id"], row.get("start_time") or "")
            found = recordings.setdefault(key, {**row, "captions": [], "true_events": []})
            found["captions"].append(row["caption"])
            events = [event.strip() for event in (row.get("events") or "").split(";")]
            found["true_events"] = list(dict.fromkeys([*found["true_events"], *filter(None, events)]))
        return list(recordings.values())

    def item(self, row: dict[str, Any], prompt: str) -> Item:
        captions = row["captions"]
        sound = medium("audio", fill(self.audio, **{key: str(value) for key, value in row.items()}))
        id = "_".join(filter(None, [get(row, "youtube_id"), row.get("start_time")]))
        return question(
            id, [sound, text_segment(fill(prompt))], captions[0], source="audiocaps",
            truth={"captions": captions, "events": row["true_events"]},
        )  # fmt: skip
