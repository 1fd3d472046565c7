"""Judges of speech: models and measures that nobody of this project trained. `evaluation.speech_scores` asks them all.

- *Is it what should be said?* PocketSphinx (English) and, where one is given, a Whisper model (any language) recognise
  the generated speech, the real recording and the codec's round trip of it in the same way. The error of the recording
  is the judge's own: only what lies above it is the model's.
- *Is it the right voice?* Resemblyzer's speaker embedding (GE2E, Wan et al. 2018) against the mean of each voice.
- *How much does the codec lose?* Log-mel distance, PESQ (ITU-T P.862.2) and STOI (Taal et al. 2011) between recording
  and round trip, which are the same samples in time; generated speech is not, and has none of these.

How a voice rises and falls: `evaluation.pitch`. Intervals are percentile bootstraps over utterances. The judges are
the optional extra ``eval``; what needs one of them raises ImportError without it. Every recording is mono, float [T] in
[-1, 1], with its sample rate in Hz beside it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio

from omnitrain.evaluation.intervals import Interval, bootstrap_interval
from omnitrain.evaluation.metrics import edits, normalise, short_language, whisper_normalise
from omnitrain.files import did_you_mean

JUDGE_RATE = 16_000  # Hz; what the recogniser, the speaker encoder and wideband PESQ were made for
SILENT_PEAK = 0.005  # a recording that never gets louder (-46 dB of full scale) is silent
_RECOGNISER_PEAK = 0.5  # PocketSphinx takes 16-bit samples; its silence model expects speech well above the last bits
_QUIET = 10 ** (-40 / 20)  # 10-ms frames this far below the loudest are no speech
_MEL_FLOOR_DB = -80.0

Recording = tuple[np.ndarray, int]
"""Samples, float [T], and their rate in Hz."""
JUDGES = {
    "pocketsphinx": "word errors", "resemblyzer": "voices", "librosa": "pitch", "pesq": "PESQ", "pystoi": "STOI",
}  # fmt: skip
"""Packages of the extra `eval`, and what each is needed for."""


def missing_judges() -> tuple[str, ...]:
    """Those of `JUDGES` that are not installed."""

    def is_there(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ValueError:  # somebody has blocked its import
            return False

    return tuple(module for module in JUDGES if not is_there(module))


def missing_judges_notice(missing: Iterable[str]) -> str:
    """What cannot be judged without these packages, and what to install."""
    return (
        f"speech is not judged by {', '.join(f'{module} ({JUDGES[module]})' for module in missing)}, which "
        "omnitrain's extra 'eval' installs: uv pip install -e '.[eval]' in a clone, else pip install 'omnitrain[eval]'"
    )


def extra(module: str) -> Any:
    """A package of the extra `eval`. Raises ImportError that says what to install."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside packages that are no longer developed
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'judging speech needs {module} ({error}): pip install "omnitrain[eval]"') from error


def at_judge_rate(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """float32 [T] at `JUDGE_RATE`. Raises ValueError for anything but finite mono samples."""
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1 or not np.isfinite(wav).all():
        raise ValueError(f"a recording must be finite mono samples [T], got shape {wav.shape}")
    if sample_rate == JUDGE_RATE or not len(wav):
        return wav
    return torchaudio.functional.resample(torch.from_numpy(wav), sample_rate, JUDGE_RATE).numpy()


def is_silent(wav: np.ndarray) -> bool:
    """Whether there is nothing to hear in `wav`, float [T]."""
    return float(np.abs(wav).max(initial=0.0)) < SILENT_PEAK


def spoken_seconds(wav: np.ndarray, sample_rate: int) -> float:
    """From the first to the last 10-ms frame within 40 dB of the loudest, in seconds; 0 for silence."""
    hop = sample_rate // 100
    frames = np.asarray(wav, dtype=np.float64)[: len(wav) // hop * hop].reshape(-1, hop)
    if is_silent(wav) or not len(frames):
        return 0.0
    rms = np.sqrt((frames**2).mean(axis=1))
    loud = np.flatnonzero(rms > _QUIET * rms.max())
    return float(loud[-1] + 1 - loud[0]) * hop / sample_rate


# --- what was said ---------------------------------------------------------------------------------------------------


def spoken_form(text: str) -> str:
    """What can be heard of a text: `normalise`, without any punctuation but apostrophes within words. Digits stay."""
    return " ".join(re.sub(r"[^\w\s']|(?<!\w)'|'(?!\w)|_", " ", normalise(text)).split())


@lru_cache(maxsize=4)
def _decoder(words: tuple[str, ...] | None) -> Any:
    """PocketSphinx's US English decoder: its language model, or any sequence of `words`."""
    pocketsphinx = extra("pocketsphinx")
    # The means of the cepstrum are those of the utterance itself: the default carries them on from one to the next.
    settings = {"samprate": JUDGE_RATE, "loglevel": "FATAL", "cmn": "batch"}
    if words is None:
        return pocketsphinx.Decoder(**settings)
    decoder = pocketsphinx.Decoder(**settings, lm=None)
    if unknown := [word for word in words if decoder.lookup_word(word) is None]:
        raise ValueError(f"the recogniser's dictionary has no {', '.join(unknown)}; leave these words out")
    decoder.add_jsgf_string("words", f"#JSGF V1.0; grammar words; public <words> = ( {' | '.join(words)} )+ ;")
    decoder.activate_search("words")
    return decoder


def recognise(wav: np.ndarray, sample_rate: int, grammar_words: Sequence[str] | None = None) -> str:
    """What PocketSphinx hears: lower-case US English words; empty for silence. The loudness is levelled, and nothing is
    carried over from one recording to the next, so the order in which recordings are judged does not matter.

    Args:
        grammar_words: instead of the open vocabulary (134,000 words and a trigram language model), any sequence of
            these words (a word loop). Far fewer errors, but what is no word at all is heard as one of them too: tell
            both, and the recording's own error beside them.

    Raises ValueError for a word the recogniser does not know, or no mono samples.
    """
    words = None if grammar_words is None else tuple(sorted({word.lower() for word in grammar_words}))
    if words is not None and not words:
        raise ValueError("a word loop needs at least one word")
    decoder = _decoder(words)
    wav = at_judge_rate(wav, sample_rate)
    if is_silent(wav):
        return ""
    samples = (wav * (_RECOGNISER_PEAK * 32767 / np.abs(wav).max())).astype(np.int16)
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return "" if found is None else re.sub(r"\(\d+\)", "", found.hypstr)


_LOOPS = 2.4
"""Bytes of a text over those that gzip makes of it; above it a decoding of Whisper's has failed (its paper, 4.5)."""


class Whisper:
    """A Whisper model (Radford et al. 2022) as a judge of speech in any language, run by ``faster-whisper``.

    Decoded by beams of five, without sampling and without the text before, so that the same recording is always heard
    in the same way. Of babble Whisper sometimes writes one word until its memory is full. It knows that such a text
    compresses too well (section 4.5 of its paper) and would then draw at random; here it may repeat no four tokens.
    What it has heard once it knows: recordings are judged beside several voices.

    Args:
        model: a model's name (``base``, ``large-v3``, or a repository of the Hub), or a folder in CTranslate2's format.

    Raises:
        ImportError: ``faster-whisper`` is not installed.
        ValueError: there is no such folder or model.
    """

    def __init__(self, model: str) -> None:
        find_whisper(model)
        self.name = model
        self._model = _load_whisper(model)
        self._known: dict[tuple[bytes, str], str] = {}

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str:
        """What is said in float [T]; empty for silence.

        Args:
            language: BCP 47; where none is given, the model's own guess.

        Raises ValueError for a language that the model does not know.
        """
        known = self._model.supported_languages
        short = short_language(language)
        if short and short not in known:
            raise ValueError(
                f"the judge {self.name} hears {len(known)} languages, but not {language!r}: give a model that does, or "
                "leave samples in that language out"
            )
        wav = at_judge_rate(wav, sample_rate)
        if is_silent(wav):
            return ""
        key = (hashlib.sha256(wav.tobytes()).digest(), short)
        if key not in self._known:
            self._known[key] = self._text(wav, short)
        return self._known[key]

    def _text(self, wav: np.ndarray, language: str) -> str:
        written = partial(
            self._model.transcribe, wav, language=language or None, beam_size=5, temperature=0.0,
            condition_on_previous_text=False, without_timestamps=True,
        )  # fmt: skip
        segments = list(written()[0])
        if any(segment.compression_ratio > _LOOPS for segment in segments):
            segments = list(written(no_repeat_ngram_size=4)[0])
        return " ".join(segment.text.strip() for segment in segments)

    def language(self, wav: np.ndarray, sample_rate: int) -> str:
        """The language (two letters) that float [T] is most likely in; empty for silence."""
        wav = at_judge_rate(wav, sample_rate)
        return "" if is_silent(wav) else self._model.detect_language(wav)[0]


def find_whisper(model: str) -> None:
    """Raise what `Whisper` would, as far as it can be known before anything is loaded or downloaded."""
    module = extra("faster_whisper")
    extra("num2words")
    folder = Path(model).expanduser()
    looks_like_path = folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    fix = "evaluation.judge (or --judge) takes a folder with a Whisper in CTranslate2's format, or a name of the Hub"
    if folder.is_dir():
        if not (folder / "model.bin").is_file():
            raise ValueError(f"the judge {model} is a folder without model.bin; {fix}")
    elif looks_like_path:
        raise ValueError(f"the judge {model} is no folder; {fix}")
    elif "/" not in model and model not in module.available_models():
        raise ValueError(f"the judge {model!r} is unknown ({did_you_mean(model, module.available_models())}); {fix}")


def _load_whisper(model: str) -> Any:
    module = extra("faster_whisper")
    path = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
    try:
        # Threads as PyTorch has them: the judge runs beside it.
        return module.WhisperModel(path, device="auto", compute_type="auto", cpu_threads=torch.get_num_threads())
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"the judge {model} cannot be loaded: {str(error).splitlines()[0]}") from error


def compared(text: str, heard: str, language: str) -> tuple[str, str]:
    """A text and what a Whisper model heard, both after its normalisation, so that only what is said counts: whether
    it writes *0936*, *9 36* or *nine thirty six* is not heard.

    English: the normaliser writes numbers in digits; each digit is a word. Other languages that ``num2words`` knows:
    numbers are written in words, those heard as cardinals, as ordinals or digit by digit, whichever is nearest to the
    text. Raises ImportError without ``num2words``.
    """
    code = short_language(language)
    if code == "en":
        text, heard = (whisper_normalise(part, code) for part in (text, heard))
        return _digits_apart(text), _digits_apart(heard)
    text = whisper_normalise(_numbers_read(text, code, "cardinal"), code)
    readings = (whisper_normalise(_numbers_read(heard, code, kind), code) for kind in ("cardinal", "digits", "ordinal"))
    return text, min(readings, key=lambda reading: edits(text, reading)[0])


def _digits_apart(text: str) -> str:
    joined = re.sub(r"(?<=\d)[.,:](?=\d)", "", text)
    return " ".join(re.sub(r"\d", r" \g<0> ", joined).split())


def _numbers_read(text: str, language: str, kind: str) -> str:
    """`text` with its numbers in words, if the language is known: `kind` is cardinal, ordinal or digits."""
    if not re.search(r"\d", text):
        return text
    num2words = extra("num2words")
    if language not in num2words.CONVERTER_CLASSES:
        return text

    def words(match: re.Match[str]) -> str:
        numbers = list(match[0]) if kind == "digits" else [match[0]]
        to = "ordinal" if kind == "ordinal" else "cardinal"
        return f" {' '.join(num2words.num2words(int(n), lang=language, to=to) for n in numbers)} "

    return re.sub(r"\d{1,12}", words, text)


def error_counts(
    heard: Sequence[str], texts: Sequence[str], languages: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What error rates are made of: int [n, 2] in words, and in characters. Of each utterance how many are wrong, and
    how many the text has.

    Args:
        languages: of each text: compare as `compared`, after Whisper's normalisation. None: compare `spoken_form`, as
            `metrics.wer` and `cer` do.

    Raises ValueError where there is not one text for each, or one without words (with `languages`: all without).
    """
    if len(heard) != len(texts) or not texts:
        raise ValueError(f"{len(heard)} recognised utterances against {len(texts)} texts: give one for each")
    if empty := [text for text in texts if not spoken_form(text)]:
        raise ValueError(f"an error rate needs texts with at least one word, got {empty[0]!r}")
    if languages is None:
        pairs = [(spoken_form(text), spoken_form(said)) for text, said in zip(texts, heard, strict=True)]
    else:
        rows = zip(texts, heard, languages, strict=True)
        pairs = [compared(text, said, code) for text, said, code in rows]
    if not any(text for text, _ in pairs):
        raise ValueError(f"nothing is left of {texts[0]!r} after Whisper's normalisation")
    words, characters = (np.array([edits(*pair, characters=letters) for pair in pairs]) for letters in (False, True))
    return words, characters


def error_rates(
    heard: Sequence[str], texts: Sequence[str], languages: Sequence[str] | None = None
) -> tuple[Interval, Interval]:
    """Word and character error rate of recognised speech, each with its bootstrap interval over utterances. Arguments
    and errors as of `error_counts`."""
    counts = error_counts(heard, texts, languages)
    words, characters = (bootstrap_interval(wrong, weights=lengths) for wrong, lengths in (of.T for of in counts))
    return words, characters


# ------------------------------------------------------------------------------------------------------ whose voice


@lru_cache(maxsize=1)
def _speaker_encoder() -> Any:
    resemblyzer = extra("resemblyzer")
    with torch.random.fork_rng(devices=[]):  # it draws weights before it loads them: no run's numbers may change by it
        return resemblyzer.VoiceEncoder("cpu", verbose=False)


def speaker_embedding(wav: np.ndarray, sample_rate: int) -> np.ndarray | None:
    """Resemblyzer's embedding of a voice, float32 [256] of length 1; None where nothing is voiced."""
    resemblyzer = extra("resemblyzer")
    wav = at_judge_rate(wav, sample_rate)
    if is_silent(wav):
        return None
    # Its voice detector wants peaks within 16 bits; its own levelling may push them over.
    voiced = resemblyzer.trim_long_silences(wav * np.float32(0.9 / np.abs(wav).max()))
    if len(voiced) < JUDGE_RATE // 10:
        return None
    return _speaker_encoder().embed_utterance(voiced)


@dataclass(frozen=True, kw_only=True)
class VoiceMatch:
    """Cosine similarities of one utterance. `own`: to the voice it should have; `other`: to the most similar other one,
    `other_name`; `nearest`: the most similar of all. An utterance without voice has no names, and similarities of 0."""

    nearest: str
    own: float
    other: float
    other_name: str = ""


class Voices:
    """The mean embedding of each voice, of some recordings of it that are not judged; ten of two seconds are enough.
    Raises ValueError for fewer than two voices, or one in whose recordings nothing is voiced."""

    def __init__(self, recordings: Mapping[str, Iterable[Recording]]) -> None:
        if len(recordings) < 2:
            raise ValueError("telling voices apart needs recordings of at least two")
        self.means: dict[str, np.ndarray] = {}
        self.recordings = {name: list(given) for name, given in recordings.items()}
        for name, given in self.recordings.items():
            embeddings = [e for wav, rate in given if (e := speaker_embedding(wav, rate)) is not None]
            if not embeddings:
                raise ValueError(f"nothing is voiced in the recordings of {name!r}")
            mean = np.mean(embeddings, axis=0)
            self.means[name] = mean / np.linalg.norm(mean)

    def match(self, wav: np.ndarray, sample_rate: int, voice: str) -> VoiceMatch:
        """How similar `wav` is to `voice`. Raises KeyError for a voice that is none of these."""
        if voice not in self.means:
            raise KeyError(f"voice {voice!r} is none of {', '.join(self.means)}")
        embedding = speaker_embedding(wav, sample_rate)
        if embedding is None:
            return VoiceMatch(nearest="", own=0.0, other=0.0)
        similarity = {name: float(embedding @ mean) for name, mean in self.means.items()}
        own = similarity.pop(voice)
        name, other = max(similarity.items(), key=lambda item: item[1])
        return VoiceMatch(nearest=voice if own >= other else name, own=own, other=other, other_name=name)


# ------------------------------------------------------------------------------------------------- what a codec loses


def _aligned(a: np.ndarray, b: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Both cut to the shorter. Raises ValueError where they differ by more than 0.1 s, so are not the same in time."""
    if abs(len(a) - len(b)) > 0.1 * sample_rate:
        raise ValueError(
            f"{len(a) / sample_rate:.2f} s against {len(b) / sample_rate:.2f} s: only recordings of the same samples "
            "in time can be compared"
        )
    length = min(len(a), len(b))
    return np.asarray(a[:length], dtype=np.float32), np.asarray(b[:length], dtype=np.float32)


def mel_distance(a: np.ndarray, b: np.ndarray, sample_rate: int) -> float:
    """Mean absolute difference of two log-mel spectrograms, in dB: 80 bands up to half the rate, windows of 25 ms every
    10 ms, power below -80 dB (of a full-scale sine's about) counted as -80 dB. Raises ValueError where the lengths
    differ by more than 0.1 s, or less than one window is left."""
    a, b = _aligned(a, b, sample_rate)
    window = round(0.025 * sample_rate)
    if len(a) < window:
        raise ValueError(f"{len(a) / sample_rate:.3f} s are less than one window of 25 ms")
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate,
        n_fft=2 ** (math.ceil(math.log2(window)) + 1),  # so fine that the lowest bands are not empty
        win_length=window,
        hop_length=sample_rate // 100,
        n_mels=80,
    )
    full_scale = (window / 4) ** 2  # of a Hann window's spectrum at a full-scale sine

    def decibels(wav: np.ndarray) -> torch.Tensor:
        power = mel(torch.from_numpy(wav)) / full_scale
        return 10 * torch.log10(power.clamp_min(10 ** (_MEL_FLOOR_DB / 10)))

    return float((decibels(a) - decibels(b)).abs().mean())


def pesq(reference: np.ndarray, degraded: np.ndarray, sample_rate: int) -> float:
    """Wideband PESQ (ITU-T P.862.2) at 16 kHz: 1.04 (bad) to 4.64 (the same). Raises ValueError where the lengths
    differ by more than 0.1 s, or PESQ finds no speech in them."""
    module = extra("pesq")
    reference, degraded = _aligned(
        at_judge_rate(reference, sample_rate), at_judge_rate(degraded, sample_rate), JUDGE_RATE
    )
    if is_silent(reference) or is_silent(degraded):
        raise ValueError("PESQ needs speech, got silence")
    try:
        return float(module.pesq(JUDGE_RATE, reference, degraded, "wb"))
    except (module.NoUtterancesError, module.BufferTooShortError) as error:
        raise ValueError(f"PESQ finds no speech: {type(error).__name__}") from error


def stoi(reference: np.ndarray, degraded: np.ndarray, sample_rate: int) -> float:
    """Short-time objective intelligibility at 16 kHz: about 0 (nothing) to 1 (as clear as the reference). Raises
    ValueError where the lengths differ by more than 0.1 s, or there is less than 0.4 s of sound."""
    module = extra("pystoi")
    reference, degraded = _aligned(
        at_judge_rate(reference, sample_rate), at_judge_rate(degraded, sample_rate), JUDGE_RATE
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi warns and returns 1e-5 where it has too few frames
        try:
            return float(module.stoi(reference, degraded, JUDGE_RATE))
        except RuntimeWarning as warning:
            raise ValueError(f"STOI needs 0.4 s of sound: {str(warning).split('.')[0]}") from warning
