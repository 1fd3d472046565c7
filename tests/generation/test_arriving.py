"""A question that is read while it arrives gets the answer to the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnitrain.data.sample import Segment
from omnitrain.generation.arriving import ArrivingQuestion
from omnitrain.generation.speech import SpeechBatch
from tests.generation.test_speech import CHATS, Heard, events_of, models, picture, prompt_of, recording, said, session

__all__ = ["models"]

LONG = [
    said("system", "be a cat"),
    said("user", "look", Segment(type="image", media=picture()), Segment(type="audio", media=recording(4.3)), "what?"),
]


def stand_in(chat):
    """The chat with another, short recording in the place of its last one."""
    *before, last = chat
    segments = [Segment(type="audio", media=recording(0.1)) if s.type == "audio" else s for s in last.segments]
    return [*before, said(last.role, *segments)]


@pytest.mark.parametrize("cut", [7, 100, 1000])
def test_the_answer_is_that_to_the_whole_question(models, cut: int, monkeypatch) -> None:
    """Whatever the pieces; with a picture before the sound and earlier turns. Windows of a second, so that most of it
    is read before the end: by Thinker and Talker."""
    for chat in (LONG, CHATS["several turns with a picture"]):
        options = session(models).options
        window = models.model.config.aut.chunk_frames
        prompt = prompt_of(models, chat)
        whole = models.speaker.answer(options, prompt)
        with torch.no_grad():
            forward = models.model.aut.forward
            monkeypatch.setattr(models.model.aut, "forward", lambda mel, n, _=None, f=forward, w=window: f(mel, n, w))
            expected = Heard(event for _, event in events_of(models, [whole]))
            monkeypatch.undo()
        question = ArrivingQuestion(models.speaker, options, prompt_of(models, stand_in(chat)), window_frames=window)
        mel = torch.from_numpy(prompt.mel[-1])
        read = [question.push(piece) for piece in mel.split(cut)]
        assert read[-1] >= read[0]
        assert cut > window or len(set(read)) >= len(mel) // window
        heard_early = question._talker_cache.length
        answer = question.finish()
        assert np.array_equal(answer.prompt.input_ids, prompt.input_ids)
        assert np.array_equal(answer.prompt.token_types, prompt.token_types)
        np.testing.assert_array_equal(answer.prompt.position_ids, prompt.position_ids)
        assert len(mel) < window or heard_early > len(mel) // window * 12
        found = Heard(event for _, event in events_of(models, [answer]))
        assert found.ids == expected.ids
        assert np.array_equal(found.codes, expected.codes)
        np.testing.assert_allclose(found.wav, expected.wav, atol=1e-4)
        for mine, theirs in (
            (answer.thinker_cache, whole.thinker_cache),
            (answer.talker_cache, whole.talker_cache),
        ):
            assert mine.length == theirs.length
            for a, b in zip((*mine.keys, *mine.values), (*theirs.keys, *theirs.values), strict=True):
                torch.testing.assert_close(a[: mine.length], b[: mine.length], atol=1e-5, rtol=1e-5)


def test_what_cannot_arrive_is_refused(models) -> None:
    options = session(models).options
    with pytest.raises(ValueError, match="has no recording that could arrive"):
        ArrivingQuestion(models.speaker, options, prompt_of(models, CHATS["text"]))
    behind = [said("user", Segment(type="audio", media=recording(0.1)), Segment(type="image", media=picture()))]
    with pytest.raises(ValueError, match="media stand behind the arriving recording"):
        ArrivingQuestion(models.speaker, options, prompt_of(models, behind))
    question = ArrivingQuestion(models.speaker, options, prompt_of(models, CHATS["audio"]))
    with pytest.raises(ValueError, match="no mel frame"):
        question.finish()
    question.push(torch.zeros(30, models.model.config.aut.n_mels))
    answer = question.finish()
    with pytest.raises(ValueError, match="finished before"):
        question.finish()
    batch = SpeechBatch(models.speaker, [answer])
    assert any(batch.round())
