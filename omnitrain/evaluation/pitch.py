"""The pitch of a voice: its fundamental frequency (F0) over time, by probabilistic YIN (Mauch and Dixon 2014, as in
librosa).

Two recordings of the same samples in time, a recording and its round trip through a codec, are compared frame by frame
(`compare_pitch`). Generated speech is not aligned with a recording: there only the distribution can be compared, how
high a voice speaks (`mean_semitones`) and how lively (`spread_semitones`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnitrain.evaluation.judges import JUDGE_RATE, at_judge_rate, extra, is_silent

LOWEST, HIGHEST = 60.0, 500.0  # Hz; of speaking voices
FRAMES_PER_SECOND = 100
LEAST_FRAMES = 10  # voiced frames, without which there is nothing to compare
_WINDOW = 1024  # samples at `JUDGE_RATE`: nearly four periods of the lowest voice


def pitch(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """F0 of float [T] in Hz, float64 [F], every 10 ms; NaN where nothing is voiced. Takes a tenth of the recording's
    length on one core. Raises ValueError for anything but finite mono samples, ImportError without librosa."""
    librosa = extra("librosa")
    wav = at_judge_rate(wav, sample_rate)
    hop = JUDGE_RATE // FRAMES_PER_SECOND
    if is_silent(wav) or len(wav) < hop:
        return np.full(len(wav) // hop + 1, np.nan)
    hertz, _, _ = librosa.pyin(
        wav, fmin=LOWEST, fmax=HIGHEST, sr=JUDGE_RATE, frame_length=_WINDOW, hop_length=hop, fill_na=np.nan
    )
    return hertz


@dataclass(frozen=True, kw_only=True)
class PitchMatch:
    """How well the pitch of a recording is kept.

    Attributes:
        correlation: Pearson's, of log F0 over the frames that are voiced in both; None with fewer than `LEAST_FRAMES`.
        voicing_error: share of all frames that are voiced in one and not in the other.
    """

    correlation: float | None
    voicing_error: float


def compare_pitch(reference: np.ndarray, other: np.ndarray) -> PitchMatch:
    """Of two of `pitch`, of the same samples in time. Raises ValueError where one is longer by more than 0.1 s."""
    if abs(len(reference) - len(other)) > 0.1 * FRAMES_PER_SECOND:
        raise ValueError(f"{len(reference)} frames of pitch against {len(other)}: not the same samples in time")
    length = min(len(reference), len(other))
    a, b = reference[:length], other[:length]
    voiced_a, voiced_b = np.isfinite(a), np.isfinite(b)
    both = voiced_a & voiced_b
    correlation = None
    if both.sum() >= LEAST_FRAMES:
        x, y = np.log(a[both]), np.log(b[both])
        if x.std() > 0 and y.std() > 0:
            correlation = float(np.corrcoef(x, y)[0, 1])
    return PitchMatch(correlation=correlation, voicing_error=float((voiced_a != voiced_b).mean()))


def semitones(hertz: np.ndarray) -> np.ndarray:
    """The voiced frames of a `pitch`, in semitones above 1 Hz."""
    return 12 * np.log2(hertz[np.isfinite(hertz)])


def mean_semitones(hertz: np.ndarray) -> float | None:
    """How high a voice speaks; None with fewer than `LEAST_FRAMES` voiced."""
    found = semitones(hertz)
    return float(found.mean()) if len(found) >= LEAST_FRAMES else None


def spread_semitones(hertz: np.ndarray) -> float | None:
    """How lively it speaks: the standard deviation over the voiced frames. A monotone has 0; None as above."""
    found = semitones(hertz)
    return float(found.std()) if len(found) >= LEAST_FRAMES else None
