"""What can be set of the evaluation that follows training: plain frozen dataclasses, which are the configuration too.

Nothing heavy is imported here. Types are those that structured configurations take (OmegaConf 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every evaluation has.

    Attributes:
        scores: ``heldout`` (text answers), ``transcripts`` (answers about recordings), ``codec``, ``speech`` or
            ``dialogue`` (which judge sound); see `SETTINGS`.
        after_fit: `fit` ends with it; False: `fit` ends with the last checkpoint, and `test RUN_DIR` scores it later.
        report: write ``report.html``.
    """

    scores: str
    after_fit: bool = True
    report: bool = True


@dataclass(frozen=True, kw_only=True)
class HeldoutEvaluation(Evaluation):
    """Losses, answers and media swaps on `data.test_sources` (`evaluation.heldout`).

    Attributes:
        max_samples: of each split and modality, for losses and media swaps; None: all.
        max_generated: of each split and modality, answers that are generated.
        max_new_tokens: of a generated answer.
        media_swap: score each answer also with other samples' media; the dearest part where recordings are long.
        seed: of which samples are drawn, and of the bootstrap; the same for every run, so that runs compare.
    """

    scores: str = "heldout"
    max_samples: int | None = 96
    max_generated: int = 24
    max_new_tokens: int = 40
    media_swap: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TranscriptEvaluation(Evaluation):
    """How the recordings of `data.test_sources` are transcribed, translated and named (`evaluation.transcripts`).

    Attributes:
        max_samples: of each task and language, or direction of translation; None: all.
        max_swapped: of each task, samples whose loss is also computed with others' recordings (the media swap).
        window_seconds: attention windows of the audio encoder, whole seconds; everything is answered with each.
        max_new_tokens: of an answer.
        beam: hypotheses of a beam search (AuT alone); 1: the likeliest token each time.
        ctc_weight: of the CTC head of an AuT against its decoder, where transcripts of both are scored too
            (`generation.rescore.Rescoring`); null: these are not.
        players: recordings that can be heard in the report.
        seed: of which samples are drawn, and of the bootstrap; the same for every run, so that runs compare.
    """

    scores: str = "transcripts"
    max_samples: int | None = 32
    max_swapped: int = 48
    window_seconds: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    max_new_tokens: int = 64
    beam: int = 1
    ctc_weight: float | None = 0.5
    players: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.window_seconds or min(self.window_seconds) < 1:
            raise ValueError(f"evaluation.window_seconds={self.window_seconds}: name whole seconds, as in [1, 8]")


@dataclass(frozen=True, kw_only=True)
class CodecEvaluation(Evaluation):
    """How a codec's round trips of the recordings of `data.test_sources` sound (`evaluation.listening`).

    Attributes:
        max_samples: recordings that are encoded and decoded.
        players: of them, that can be heard in the report.
        judge: a Whisper model that hears the speech too, in any language (`evaluation.judges.Whisper`).
    """

    scores: str = "codec"
    max_samples: int = 32
    players: int = 8
    judge: str | None = None


@dataclass(frozen=True, kw_only=True)
class SpeechEvaluation(Evaluation):
    """How a Talker speaks the texts of `data.test_sources` (`evaluation.listening`).

    Attributes:
        max_samples: texts that are spoken.
        players: of them, that can be heard in the report.
        batch: texts spoken side by side.
        voice: speak all texts in this voice, and compare with it; None: in that of each recording.
        other_voices: speak each text in every other voice of the texts' recordings too, as in those of other languages,
            and judge, beside all else, whether it stays the language and the voice.
        int8: speak with the weights of Thinker, Talker and MTP in 8 bits, as `talk --int8` does (CPU).
        seconds_limit: of one answer, in seconds.
        temperature: of all codes; 0: always the likeliest.
        top_k: draw from so many of the likeliest codes; 0: from all.
        repetition_penalty: of codebook 0; 1: none.
        judge: a Whisper model that hears the speech too, in any language (`evaluation.judges.Whisper`).
        grammar_words: recognise also with a loop of the test texts' words (for small vocabularies).
        seed: of the drawing.
    """

    scores: str = "speech"
    max_samples: int = 40
    players: int = 8
    batch: int = 8
    voice: str | None = None
    other_voices: bool = False
    int8: bool = False
    seconds_limit: float = 12.0
    temperature: float = 0.7
    top_k: int = 50
    repetition_penalty: float = 1.0
    judge: str | None = None
    grammar_words: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.other_voices and self.voice is not None:
            raise ValueError(f"evaluation.voice={self.voice} and evaluation.other_voices=true: choose one")


@dataclass(frozen=True, kw_only=True)
class DialogueEvaluation(SpeechEvaluation):
    """How a model answers the questions of `data.test_sources` aloud (`evaluation.dialogue`): the Thinker sees, hears
    and writes, the Talker says what is written.

    Attributes:
        voice: answer in this voice; None: in that of each recording.
        max_new_tokens: of an answer's text.
        grammar_words: the words of a loop would be those that the model wrote, which need be none.
    """

    scores: str = "dialogue"
    max_new_tokens: int = 64
    grammar_words: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.other_voices:
            raise ValueError("evaluation.other_voices is for given texts; evaluation=dialogue takes evaluation.voice")
        if self.grammar_words:
            raise ValueError("evaluation.grammar_words is for given texts; leave it out with evaluation=dialogue")


SETTINGS: dict[str, type[Evaluation]] = {
    "heldout": HeldoutEvaluation,
    "transcripts": TranscriptEvaluation,
    "codec": CodecEvaluation,
    "speech": SpeechEvaluation,
    "dialogue": DialogueEvaluation,
}
"""The settings by the name that `Evaluation.scores` gives."""
