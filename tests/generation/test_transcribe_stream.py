"""Text that comes out while more is heard: the same for any pieces, and that of `transcribe` where it must be."""

from __future__ import annotations

import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import write
from omnitrain.generation.transcribe import Transcripts, transcribe
from omnitrain.generation.transcribe_stream import StreamingOptions, StreamingTranscriber
from omnitrain.vocabulary import TEXT
from tests.models.whisper_reference import small_aut, spoken_sample

NEW, STOP = 12, (20, 31)


@pytest.fixture(scope="module")
def model():
    return small_aut(seed=1)


def of(frames: int, seed: int = 0):
    """Mel frames, the prompt's text, and the batch of both."""
    sample = spoken_sample(seed, frames=frames, before=2, after=3)
    prompt = sample.input_ids[sample.token_types == TEXT].tolist()
    return torch.from_numpy(sample.mel[0]), prompt, PackedBatch.pack([sample])


def joined(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


def heard(model, mel, prompt, sizes, **options):
    """What each piece and the end make final, with the transcriber."""
    live = StreamingTranscriber(model, prompt, stop_ids=STOP, options=StreamingOptions(max_new_tokens=NEW, **options))
    pieces = mel.split(sizes)
    return [*(live.push(piece) for piece in pieces), live.finish()], live


@pytest.mark.parametrize("options", [{}, {"segment_windows": 2}, {"window_frames": 200}], ids=str)
@pytest.mark.parametrize("frames", [40, 100, 523, 650])
def test_pieces_change_nothing(model, frames, options):
    mel, prompt, _ = of(frames)
    whole, live = heard(model, mel, prompt, frames, **options)
    expected = joined(whole)
    for size in (7, 100, 130):
        found, cut = heard(model, mel, prompt, size, **options)
        assert joined(found) == expected
        assert cut.segments == live.segments
    assert joined(live.segments) == expected
    assert not set(expected) & set(STOP)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_final_was_written_twice(model, seed):
    """The policy, written down once more: texts after each window, each behind what the two before it agreed on."""
    mel, prompt, batch = of(730, seed)
    encoded, _ = model.listen(batch.cu_seqlens, batch.token_types, batch.mel, batch.mel_lengths, aut_window_frames=100)

    def text(features: torch.Tensor, final: list[int]) -> list[int]:
        ids = torch.tensor(prompt + final)
        borders = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (features, ids)]
        memory = model.decoder.memory(features, borders[0])
        texts = Transcripts(model.decoder, memory, ids, torch.arange(len(ids)), borders[1])
        (new,) = write(texts, [ids], Decoding(max_new_tokens=NEW - len(final)), [torch.Generator()], frozenset(STOP))
        return final + (new[:-1] if new[-1] in STOP else new)

    final, before, steps = [], [], []
    with torch.no_grad():
        for windows in range(1, 8):
            now = text(encoded[: 13 * windows], final) if len(final) < NEW else final
            n = next(
                (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(map(len, (before, now)))
            )
            steps.append(now[len(final) : n])
            final, before = now[:n], now
        last = text(encoded, final) if len(final) < NEW else final
    found, live = heard(model, mel, prompt, 100)
    assert found[:7] == steps
    assert any(steps)
    assert joined(found) == last
    assert len(live.segments) == 2
    assert not live.segments[1]


@pytest.mark.parametrize("frames", [40, 100, 163, 200])
def test_one_window_gives_what_transcribe_gives(model, frames):
    mel, prompt, batch = of(frames, seed=frames)
    (expected,) = transcribe(model, batch, Decoding(max_new_tokens=NEW), stop_ids=STOP, aut_window_frames=200)
    found, _ = heard(model, mel, prompt, 30, window_frames=200)
    assert joined(found) == (expected[:-1] if expected[-1] in STOP else expected)


def test_a_segment_is_forgotten_when_it_ends(model):
    """Segments of two windows get what each gets as a recording of its own, since nothing before it is remembered."""
    mel, prompt, _ = of(600)
    _, live = heard(model, mel, prompt, 50, segment_windows=2)
    assert len(live.segments) == 4
    for part, segment in zip(mel.split(200), live.segments, strict=False):
        assert heard(model, part, prompt, 200, segment_windows=2)[1].segments[0] == segment
    assert not live._features
    assert len(live._state.waiting) == 0


def test_errors_name_what_is_wrong(model):
    with pytest.raises(ValueError, match="the prompt has no token"):
        StreamingTranscriber(model, [])
    with pytest.raises(ValueError, match="positive multiple of 100"):
        StreamingTranscriber(model, [1], options=StreamingOptions(window_frames=150))
    with pytest.raises(ValueError, match="segment_windows is 0"):
        StreamingOptions(segment_windows=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        StreamingOptions(max_new_tokens=0)
