"""TM-RoPE ids: where every token of a sample stands in time, height and width (Qwen3-Omni report section 2.4).

A sample is a list of *spans*. Inside a text or audio span the three ids are equal and count up; inside a picture t is
constant and h, w are row and column; inside a video t follows the clock at `ids_per_second` ids a second. A video heard
with its sound is one span whose audio and video tokens are merged in the order of their t ids, video first on ties.

The numbers are those of the reference implementation (`get_rope_index` of `transformers`' `qwen3_omni_moe`), also in
the three places where it is finer or coarser than the report's text:

* ids are *real* numbers. A video of 4 frames/s has a grid every 0.5 s = 6.5 ids, the reference does not round, and
  whatever follows the video starts at a fraction too. Hence float32 arrays; ids are exact whenever
  `seconds_per_grid * ids_per_second` is (13 for the usual 2 frames/s).
* tokens are merged by ids in double precision from 0, ids by themselves in float32 where the span stands: where the two
  nearly tie (at 3 frames/s, not at the usual 2), a token of one may carry the id of its neighbour.
* the span after a video with sound starts one after the largest id of that span's *last unmixed run*, the tokens left
  over once the other of the two ran out. This is the largest id of the span unless a picture side (in merged patches)
  exceeds the video's length in ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Grid = Sequence[int]
"""Patches in time, height and width of one picture or video, before the merge: (t, h, w)."""


@dataclass(frozen=True)
class TextSpan:
    """`n` tokens of text or markup (the start and end tokens of media belong here)."""

    n: int


@dataclass(frozen=True)
class AudioSpan:
    """`n` audio tokens, one per id (80 ms)."""

    n: int


@dataclass(frozen=True)
class ImageSpan:
    """The tokens of one picture. `grid_thw` counts patches."""

    grid_thw: Grid


@dataclass(frozen=True)
class VideoSpan:
    """The tokens of one silent video. `seconds_per_grid`: seconds from one temporal patch to the next, usually 1."""

    grid_thw: Grid
    seconds_per_grid: float


@dataclass(frozen=True)
class AudioVideoSpan:
    """The tokens of a video merged with those of its sound; `n_audio` of them are audio."""

    grid_thw: Grid
    seconds_per_grid: float
    n_audio: int


Span = TextSpan | AudioSpan | ImageSpan | VideoSpan | AudioVideoSpan


def audio_tokens(mel_frames: int, chunk_frames: int = 100) -> int:
    """Tokens that AuT makes of `mel_frames` frames of 10 ms: three convolutions of stride 2 over chunks of
    `chunk_frames`, so 13 per full second, and 1 to 13 for the rest. Raises ValueError if `mel_frames` is negative."""
    if mel_frames < 0:
        raise ValueError(f"mel_frames is {mel_frames}; a recording has at least 0 frames")
    full, rest = divmod(mel_frames, chunk_frames)
    return full * _thrice_halved(chunk_frames) + _thrice_halved(rest)


def _thrice_halved(n: int) -> int:
    for _ in range(3):
        n = (n + 1) // 2
    return n


def vision_tokens(grid_thw: Grid, merge: int = 2) -> int:
    """Tokens of a picture or video of `grid_thw` patches, of which `merge` x `merge` become one token.

    Raises ValueError if height or width is not a multiple of `merge`, or a side is not positive.
    """
    t, h, w = (int(n) for n in grid_thw)
    if min(t, h, w) < 1 or h % merge or w % merge:
        raise ValueError(f"grid_thw {(t, h, w)}: sides must be positive, height and width multiples of merge={merge}")
    return t * (h // merge) * (w // merge)


def span_tokens(span: Span, merge: int = 2) -> int:
    """How many tokens `span` takes."""
    match span:
        case TextSpan(n) | AudioSpan(n):
            return n
        case ImageSpan(grid_thw) | VideoSpan(grid_thw):
            return vision_tokens(grid_thw, merge)
        case AudioVideoSpan(grid_thw, _, n_audio):
            return vision_tokens(grid_thw, merge) + n_audio


def audio_video_order(
    grid_thw: Grid, seconds_per_grid: float, n_audio: int, merge: int = 2, ids_per_second: float = 13
) -> np.ndarray:
    """How the tokens of a video and of its sound are merged, by t id counted from 0 in double precision, on ties the
    video first: bool [n_video + n_audio], True where a video token stands."""
    grids = np.arange(grid_thw[0]).repeat(vision_tokens(grid_thw, merge) // int(grid_thw[0]))
    return _merge_order(grids * seconds_per_grid * ids_per_second, np.arange(n_audio))


def tm_rope_positions(spans: Sequence[Span], merge: int = 2, ids_per_second: float = 13) -> np.ndarray:
    """The ids of one sample, which consists of `spans`.

    Args:
        merge: patches per token in height and in width.
        ids_per_second: ids per second of video; 13, so that one id is one audio token (80 ms).

    Returns:
        float32 [3, n]: t, h, w. They start at 0; every span starts one after the largest id before it (for the
        exception see the module's docstring).
    """
    start = np.float32(0)
    parts: list[np.ndarray] = []
    for span in spans:
        match span:
            case TextSpan(n) | AudioSpan(n):
                ids = np.broadcast_to(np.arange(n, dtype=np.float32), (3, n))
                last = ids
            case ImageSpan(grid_thw):
                ids = last = _grid_ids(grid_thw, 1.0, merge, ids_per_second)
            case VideoSpan(grid_thw, seconds_per_grid):
                ids = last = _grid_ids(grid_thw, seconds_per_grid, merge, ids_per_second)
            case AudioVideoSpan(grid_thw, seconds_per_grid, n_audio):
                video = _grid_ids(grid_thw, seconds_per_grid, merge, ids_per_second)
                is_video = _merge_order(video[0] + start, np.arange(n_audio, dtype=np.float32) + start)
                ids = np.empty((3, len(is_video)), dtype=np.float32)
                ids[:, is_video] = video
                ids[:, ~is_video] = np.arange(n_audio, dtype=np.float32)
                ends = np.flatnonzero(is_video != is_video[-1])  # the last token before the unmixed run at the end
                last = ids[:, ends[-1] + 1 :] if len(ends) else ids
            case _:
                raise TypeError(f"{span!r} is not a span; use one of {Span}")
        if ids.shape[1]:
            parts.append(ids + start)
            start = (last + start).max() + np.float32(1)
    return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.float32)


def _grid_ids(grid_thw: Grid, seconds_per_grid: float, merge: int, ids_per_second: float) -> np.ndarray:
    """float32 [3, t * h/merge * w/merge], counted from 0, row by row and frame by frame."""
    vision_tokens(grid_thw, merge)  # checks the grid
    t, h, w = (int(n) for n in grid_thw)
    ids = np.indices((t, h // merge, w // merge), dtype=np.float32).reshape(3, -1)
    # float32 and this order of products, as in the reference, so that fractions round alike
    ids[0] *= np.float32(seconds_per_grid)
    ids[0] *= np.float32(ids_per_second)
    return ids


def _merge_order(video_t: np.ndarray, audio_t: np.ndarray) -> np.ndarray:
    t = np.concatenate([video_t, audio_t])
    return np.argsort(t, kind="stable") < len(video_t)  # stable: on ties what comes first in `t`, the video
