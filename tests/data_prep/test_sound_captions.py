"""Captions of the pack's own sounds and voices, and of voices that are known."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep import sound_captions
from data_prep.sound_captions import captioned
from omnitrain.config.locations import PACK
from omnitrain.data.media import decode_audio
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import SampleSource

SOUND = Segment(type="audio", media=b"sound")


def row(task: str, answer: str, languages: tuple[str, ...], **meta: str) -> Sample:
    said = Message(role="assistant", segments=(Segment(type="text", text=answer),))
    return Sample(id="a", source="s", messages=(said,), task=task, languages=languages, meta=meta, concept="c")


def test_captions_say_what_the_rows_say() -> None:
    duck = captioned(row("sound", "A great blue heron.", ("en",)), SOUND)
    assert duck.reference == "A great blue heron can be heard."
    assert json.loads(duck.meta["references"]) == ["The sound of a great blue heron."]
    assert json.loads(duck.meta["events"]) == ["great blue heron"]
    voice = captioned(row("asr", "Una luna.", ("es", "es")), SOUND)
    assert voice.reference == "A voice says in Spanish: “Una luna.”"
    known = captioned(row("asr", "Une lune.", ("fr", "fr"), voice="June"), SOUND)
    assert known.reference == "A woman says in French: “Une lune.”"
    assert json.loads(known.meta["events"]) == ["french", "woman"]
    assert (known.task, known.languages, known.concept, known.split) == ("audio_caption", ("en",), "c", "train")


def test_the_packs_captions(tmp_path: Path) -> None:
    given = [str(PACK), "--languages", "es", "--out", str(tmp_path), "--no-progress"]
    assert sound_captions.main(given) == 0
    rows = list(SampleSource(tmp_path))
    there = SampleSource(PACK, where={"task": ["asr"], "languages": ["es"]})
    voices = [r for r in rows if "Spanish" in r.reference]
    assert len(voices) == len(there)
    sounds = SampleSource(tmp_path / "pack_sounds-00000-of-00001.parquet")
    assert len(voices) + len(sounds) == len(rows)
    assert {r.split for r in rows} == {"train", "validation", "heldout_cell", "heldout_concept"}
    [medium] = [s for s in sounds[0].segments if s.type == "audio"]
    assert len(decode_audio(sounds.media_bytes(medium), 16_000)) > 1600
