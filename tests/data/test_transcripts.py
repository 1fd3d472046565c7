"""The conversation that a teacher reads where the student hears."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.chat import train_bpe
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import AudioGeometry, VisionGeometry
from omnitrain.data.media import MediaLimits
from omnitrain.data.sample import BadSample, Message, Sample, Segment

ENCODER = SampleEncoder(
    tokenizer=train_bpe(["where is the cat"] * 3, 400), audio=AudioGeometry(), vision=VisionGeometry(),
    limits=MediaLimits(), transcripts=True,
)  # fmt: skip


def spoken(transcript: str | None) -> Sample:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000, np.float32), 16_000, format="WAV")
    question = Segment(type="audio", media=file.getvalue(), text=transcript)
    answer = Message(role="assistant", segments=(Segment(type="text", text="on the mat"),))
    return Sample(id="a", source="s", messages=(Message(role="user", segments=(question,)), answer), meta={"k": "1"})


def encoded(sample: Sample):
    return ENCODER(sample, lambda segment: segment.media or b"")


def test_words_in_the_place_of_sound() -> None:
    sample = encoded(spoken("where is the cat"))
    assert sample.read is not None
    written = Sample(id="a", source="s", messages=(Message(role="user", segments=(Segment(type="text", text="where is the cat"),)), spoken(None).messages[1]))  # noqa: E501  # fmt: skip
    assert np.array_equal(sample.read.input_ids, encoded(written).input_ids)
    batch = PackedBatch.pack([sample, encoded(written)])
    assert batch.mel is not None
    assert batch.read is not None
    assert batch.read.mel is None
    assert batch.read.sample_ids == batch.sample_ids
    assert batch.metas[0] == {"k": "1"}
    targets = [pack.labels[pack.labels != IGNORE] for pack in (batch, batch.read)]
    assert targets[0].tolist() == targets[1].tolist()
    assert PackedBatch.pack([encoded(written)]).read is None


def test_a_recording_without_a_transcript_is_named() -> None:
    with pytest.raises(BadSample, match=r"no_transcript: an audio segment has no `text`.*data\.transcripts=false"):
        encoded(spoken(None))
