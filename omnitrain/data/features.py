"""Arrays to what the encoders read: log-mel frames and vision patches.

Both equal the public processors: mel within 1e-4 of the Whisper extractor with 128 bins and no padding, patches within
1e-6 of the Qwen vision processors where no resizing is needed, and within one grey level after it (both resize bytes
with torchvision's antialiased bicubic kernel).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2 import functional as image_ops

from omnitrain.data.sample import BadSample
from omnitrain.data.settings import AudioGeometry, VisionGeometry


def _hertz(mel: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear to 1 kHz (15 mel), then 27 mel for every factor of 6.4."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


@lru_cache(maxsize=4)
def _mel_filters(geometry: AudioGeometry) -> tuple[Tensor, Tensor]:
    """Hann window [n_fft] and mel filters of unit area [n_fft // 2 + 1, n_mels].

    In float64, because torchaudio's float32 filter edges alone shift quiet mels by 1e-4.
    """
    highest = geometry.sample_rate / 2
    top = highest * 3 / 200 if highest < 1000 else 15 + 27 * math.log(highest / 1000, 6.4)
    edges = _hertz(np.linspace(0, top, geometry.n_mels + 2))
    bins = np.linspace(0, highest, geometry.n_fft // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return torch.hann_window(geometry.n_fft), torch.from_numpy(filters).to(torch.float32)


_BLOCK_FRAMES = 6000  # one minute: spectra of a 40-minute recording need not lie in memory at once


def log_mel(wave: np.ndarray, geometry: AudioGeometry = AudioGeometry(), padded_to: int = 0) -> np.ndarray:
    """Log-mel frames of a waveform with Whisper's scaling (Radford et al. 2022): log10 of the mel power, at most 8
    below the recording's maximum, then ``(x + 4) / 4``.

    Args:
        wave: float32 [T] in [-1, 1] at `geometry.sample_rate`; one shorter than a window is filled up with silence.
        padded_to: samples to fill it up to (`AudioGeometry.reference_padding`).

    Returns:
        float32 [T // hop, n_mels]; rounded up where silence follows.

    Raises ValueError: `wave` is not one-dimensional or has no sample.
    """
    if wave.ndim != 1:
        raise ValueError(f"log_mel needs samples [T], T > 0, not {wave.shape}")
    size = _BLOCK_FRAMES * geometry.hop
    return log_mel_of_blocks((wave[at : at + size] for at in range(0, len(wave), size)), geometry, padded_to)


def log_mel_of_blocks(
    blocks: Iterable[np.ndarray], geometry: AudioGeometry = AudioGeometry(), padded_to: int = 0
) -> np.ndarray:
    """`log_mel` of a recording that comes in pieces float32 [n]: bit for bit that of the whole, with a minute of it in
    memory besides the frames. The maximum that it is scaled by is that of the whole recording, so no frame is final
    before the end."""
    signal = _MirroredEnds(blocks, geometry.n_fft // 2, max(geometry.n_fft, padded_to))
    hop, size = geometry.hop, _BLOCK_FRAMES * geometry.hop
    mel, waiting = _Frames(geometry.n_mels), torch.zeros(0)
    for piece in signal:
        waiting = torch.cat([waiting, torch.from_numpy(piece)])
        while len(waiting) >= size + geometry.n_fft:  # less could end with the frame that is left out
            mel.append(_log_power(waiting[: size - hop + geometry.n_fft], geometry))
            waiting = waiting[size:]
    if not signal.samples:
        raise ValueError("log_mel needs samples [T], T > 0, not (0,)")
    if rest := max(signal.samples, signal.shortest) // hop - len(mel.frames):
        mel.append(_log_power(waiting[: (rest - 1) * hop + geometry.n_fft], geometry))
    kept = -(-signal.samples // hop) if padded_to > signal.samples else None
    return mel.scaled()[:kept]


class _MirroredEnds:
    """Samples, filled up with silence to `shortest`, with `half` (< shortest) more at either end, mirrored there; in
    pieces, with a window's worth in memory."""

    def __init__(self, blocks: Iterable[np.ndarray], half: int, shortest: int) -> None:
        self.blocks, self.half, self.shortest = blocks, half, shortest
        self.samples = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        kept, begun, half = np.zeros(0, np.float32), False, self.half
        for block in self.blocks:
            self.samples += len(block)
            kept = np.concatenate([kept, block], dtype=np.float32)
            if len(kept) > half:
                if not begun:
                    yield kept[half:0:-1].copy()
                yield kept[: -half - 1]
                kept, begun = kept[-half - 1 :], True
        kept = np.concatenate([kept, np.zeros(max(0, self.shortest - self.samples), np.float32)])
        if not begun:
            yield kept[half:0:-1].copy()
        yield kept
        yield kept[-2 : -half - 2 : -1].copy()


def _log_power(signal: Tensor, geometry: AudioGeometry) -> Tensor:
    """[(n - 1) * hop + n_fft] -> log10 of the mel power [n, n_mels]."""
    window, filters = _mel_filters(geometry)
    spectrum = torch.stft(signal, geometry.n_fft, geometry.hop, window=window, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power.T @ filters).clamp_(min=1e-10).log10_()


class _Frames:
    """A growing table of frames: as one allocation, which the system enlarges without a second copy of it."""

    def __init__(self, n_mels: int) -> None:
        self.frames = np.empty((0, n_mels), np.float32)
        self.highest = np.float32(-np.inf)

    def append(self, block: Tensor) -> None:
        """[n, n_mels], log10 of the power."""
        n = len(self.frames)
        self.frames.resize((n + len(block), self.frames.shape[1]), refcheck=False)
        self.frames[n:] = block.numpy()
        self.highest = max(self.highest, self.frames[n:].max())

    def scaled(self) -> np.ndarray:
        """[T, n_mels], Whisper's scaling, in place."""
        np.maximum(self.frames, self.highest - np.float32(8.0), out=self.frames)
        self.frames += np.float32(4.0)
        self.frames /= np.float32(4.0)
        return self.frames


def fit_size(height: int, width: int, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size near ``height x width`` whose sides are multiples of `multiple` and whose area lies within the bounds,
    at nearly the same aspect ratio (the Qwen vision processors' rule)."""
    rows, columns = round(height / multiple) * multiple, round(width / multiple) * multiple
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(multiple, math.floor(height / shrink / multiple) * multiple)
        columns = max(multiple, math.floor(width / shrink / multiple) * multiple)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / multiple) * multiple
        columns = math.ceil(width * grow / multiple) * multiple
    # a side shorter than half a patch block would vanish where min_pixels is small
    return max(rows, multiple), max(columns, multiple)


def _patches(
    frames: Tensor, kind: str, min_pixels: int, max_pixels: int, geometry: VisionGeometry
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [T, H, W, 3] -> patches [P, D] in blocks of merge x merge, and the grid (t, h, w) in patches."""
    height, width = frames.shape[1:3]
    if not height or not width or max(height, width) > 200 * min(height, width):
        reason = f"{width} x {height} pixels: sides may differ by a factor of 200 at most"
        raise BadSample(f"{kind}_aspect_ratio", reason)
    size = fit_size(height, width, geometry.patch * geometry.merge, min_pixels, max_pixels)
    frames = frames.permute(0, 3, 1, 2)
    if (height, width) != size:
        frames = image_ops.resize(frames, list(size), image_ops.InterpolationMode.BICUBIC, antialias=True)
    if missing := -len(frames) % geometry.temporal_patch:  # an odd last frame is repeated
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    p, m = geometry.patch, geometry.merge
    patches = rearrange(  # of bytes, which is a third of the time that it takes of floats
        frames,
        "(t tp) c (h mh ph) (w mw pw) -> (t h w mh mw) (c tp ph pw)",
        tp=geometry.temporal_patch, mh=m, mw=m, ph=p, pw=p,
    )  # fmt: skip
    grid = np.array([len(frames) // geometry.temporal_patch, size[0] // p, size[1] // p], dtype=np.int64)
    values = torch.sub(patches.contiguous(), 127.5).div_(127.5)  # mean and deviation 0.5
    return values.numpy(), grid


def image_patches(image: np.ndarray, geometry: VisionGeometry = VisionGeometry()) -> tuple[np.ndarray, np.ndarray]:
    """Patches of a picture; it fills all `temporal_patch` time steps of its patches.

    Args:
        image: uint8 [H, W, 3]

    Returns:
        patches float32 [P, patch_dim] and the grid int64 [3] = (1, H' / patch, W' / patch), P its product.

    Raises BadSample: ``image_aspect_ratio``, sides that differ by more than 200.
    """
    return _patches(torch.tensor(image)[None], "image", geometry.min_pixels, geometry.max_pixels, geometry)


def video_patches(frames: np.ndarray, geometry: VisionGeometry = VisionGeometry()) -> tuple[np.ndarray, np.ndarray]:
    """Patches of a video; the last frame is repeated where T is no multiple of `temporal_patch`.

    Args:
        frames: uint8 [T, H, W, 3]

    Returns:
        patches float32 [P, patch_dim] and the grid int64 [3] = (ceil(T / temporal_patch), H' / patch, W' / patch).

    Raises BadSample: ``video_no_frames``, ``video_aspect_ratio``.
    """
    if not len(frames):
        raise BadSample("video_no_frames", "the video has no frame")
    share = geometry.video_total_pixels * geometry.temporal_patch // len(frames)
    most = max(min(geometry.video_max_pixels, share), int(geometry.video_min_pixels * 1.05))
    return _patches(torch.from_numpy(np.ascontiguousarray(frames)), "video", geometry.video_min_pixels, most, geometry)
