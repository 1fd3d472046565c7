"""Whole dialogues: a model sees and hears a question, writes an answer and says it while it writes; judged is whether
the answer is right, whether what is heard is what was written, and whether the sound began before the text ended.

    judge_dialogues(...)  ->  eval/speech.json  eval/speech.parquet
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from omnitrain.data.encode import SampleEncoder
from omnitrain.data.media import MediaLimits, decode_audio
from omnitrain.data.sample import BadSample, Message, Sample, has_medium
from omnitrain.data.shards import Source
from omnitrain.evaluation.intervals import Interval, bootstrap_interval
from omnitrain.evaluation.judges import spoken_form
from omnitrain.evaluation.listening import SAMPLE_RATE, judge_spoken
from omnitrain.evaluation.settings import DialogueEvaluation
from omnitrain.evaluation.speech_scores import Spoken
from omnitrain.generation.sampling import Sampling
from omnitrain.generation.speech import AudioPiece, Done, Speaker, SpeechOptions, SpeechSession, TextPiece, speak_batch


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer, media in it, and that answer: its text and recording, float32 [T]."""

    sample: Sample
    messages: tuple[Message, ...]
    text: str
    recording: np.ndarray


@dataclass
class Answered:
    """What was written and said, and when: seconds since the question of the first sound (None: there is none) and of
    the text's last token."""

    text: str = ""
    pieces: list[np.ndarray] = field(default_factory=list)
    first_sound: float | None = None
    text_end: float = 0.0
    reason: str = ""

    @property
    def wav(self) -> np.ndarray:
        return np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.float32)

    @property
    def sound_first(self) -> bool:
        """Whether there was sound before the text had ended."""
        return self.first_sound is not None and self.first_sound < self.text_end


def judge_dialogues(
    speaker: Speaker,
    encoder: SampleEncoder,
    test_sources: Mapping[str, Source],
    train_sources: Mapping[str, Source],
    settings: DialogueEvaluation,
    out_dir: Path,
) -> dict[str, Any]:
    """Have the questions of the test sources answered aloud, evenly over each, and judge the answers; voices are learnt
    from the training sources. Returns what stands in ``speech.json``. Raises ValueError where no answer has a
    recording."""
    questions = read_questions(test_sources, settings.max_samples)
    answered: list[Answered] = []
    groups = [questions[i : i + settings.batch] for i in range(0, len(questions), settings.batch)]
    for group in track(groups, "answering", console=Console(stderr=True)):
        answered += answer(speaker, encoder, group, settings, first=len(answered))
    spoken = [
        Spoken(
            text=a.text if spoken_form(a.text) else q.text, wav=a.wav, sample_rate=SAMPLE_RATE,
            reference=q.recording if right(a, q) else None, voice=q.sample.meta.get("voice", ""),
            hit_limit=a.reason == "max_frames", language=(q.sample.languages or ("",))[-1], id=q.sample.id,
        )
        for q, a in zip(questions, answered, strict=True)
    ]  # fmt: skip
    return judge_spoken(
        spoken, train_sources, settings, out_dir, more={"dialogue": asdict(dialogue_scores(questions, answered))}
    )


def right(a: Answered, q: Question) -> bool:
    """Whether the text is that of the data, but for case and punctuation."""
    return spoken_form(a.text) == spoken_form(q.text)


@dataclass(frozen=True, kw_only=True)
class DialogueScores:
    """Of n dialogues: shares of those answered as in the data, by source of the questions too, and of those whose sound
    began before their text had ended; seconds until the first sound (of those that have one) and the end of the text,
    on this machine, `settings.batch` side by side."""

    n: int
    right: Interval
    right_by_source: Mapping[str, Interval]
    sound_first: Interval
    first_sound: Interval | None
    text_end: Interval


def dialogue_scores(questions: Sequence[Question], answered: Sequence[Answered]) -> DialogueScores:
    found = [float(right(a, q)) for q, a in zip(questions, answered, strict=True)]
    sources = [q.sample.source for q in questions]
    sounds = [a.first_sound for a in answered if a.first_sound is not None]
    return DialogueScores(
        n=len(questions),
        right=bootstrap_interval(found),
        right_by_source={
            source: bootstrap_interval([r for r, s in zip(found, sources, strict=True) if s == source])
            for source in sorted(set(sources))
        },
        sound_first=bootstrap_interval([float(a.sound_first) for a in answered]),
        first_sound=bootstrap_interval(sounds) if sounds else None,
        text_end=bootstrap_interval([a.text_end for a in answered]),
    )


def answer(
    speaker: Speaker, encoder: SampleEncoder, questions: Sequence[Question], settings: DialogueEvaluation, first: int
) -> list[Answered]:
    """Answers to `questions` side by side; the first is number `first` of all, which its seed is made of."""
    warm = Sampling(temperature=settings.temperature, top_k=settings.top_k)
    frames = max(1, round(settings.seconds_limit * SAMPLE_RATE / speaker.samples_per_frame))
    sessions = [
        SpeechSession(
            speaker.model, encoder, speaker=speaker,
            options=SpeechOptions(
                voice=settings.voice or q.sample.meta.get("voice") or min(speaker.talker.config.speakers, default=""),
                codes=replace(warm, repetition_penalty=settings.repetition_penalty), residuals=warm,
                max_new_tokens=settings.max_new_tokens, max_frames=frames, seed=settings.seed + first + i,
            ),
        )
        for i, q in enumerate(questions)
    ]  # fmt: skip
    found = [Answered() for _ in questions]
    for i, event in speak_batch(sessions, [q.messages for q in questions]):
        a = found[i]
        if isinstance(event, TextPiece):
            a.text += event.text
            a.text_end = event.seconds
        elif isinstance(event, AudioPiece):
            a.pieces.append(event.wav)
            a.first_sound = event.seconds if a.first_sound is None else a.first_sound
        elif isinstance(event, Done):
            a.reason = event.reason
    return found


def read_questions(sources: Mapping[str, Source], most: int) -> list[Question]:
    """Conversations that end in a recorded answer, evenly over the sources and over each of them. Raises ValueError for
    none."""
    share = math.ceil(most / max(1, len(sources)))
    found: list[Question] = []
    for source in sources.values():
        count = min(share, len(source))
        for i in range(count):
            try:
                question = _question(source[i * len(source) // count], source)
            except BadSample:
                continue
            if question is not None:
                found.append(question)
    if not found:
        raise ValueError(f"no recorded answer with a text in {', '.join(sources) or 'the test sources'}: none to hear")
    return found[:most]


def _question(sample: Sample, source: Source) -> Question | None:
    *asked, last = sample.messages
    said = [segment for segment in last.segments if segment.type == "speech" and has_medium(segment)]
    if last.role != "assistant" or len(said) != 1 or not spoken_form(said[0].text or ""):
        return None
    messages = tuple(
        replace(m, segments=tuple(replace(s, media=source.media_bytes(s), path=None) if has_medium(s) else s
                                  for s in m.segments))
        for m in asked
    )  # fmt: skip
    recording = decode_audio(source.media_bytes(said[0]), SAMPLE_RATE, MediaLimits())
    return Question(sample, messages, said[0].text or "", np.clip(recording, -1, 1).astype(np.float32))
