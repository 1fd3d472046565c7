"""Arrays to what the encoders read: log-mel frames and vision patches.

Both equal the public processors: mel within 1e-4 of the Whisper extractor with 128 bins and no padding, patches within
1e-6 of the Qwen vision processors where no resizing is needed, and within one grey level after it (both resize bytes
with torchvision's antialiased bicubic kernel).
"""

from __future__ import annotations

import math
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
    if wave.ndim != 1 or not wave.size:
        raise ValueError(f"log_mel needs samples [T], T > 0, not {wave.shape}")
    signal = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    kept = -(-len(signal) // geometry.hop) if padded_to > len(signal) else None
    if missing := max(0, max(geometry.n_fft, padded_to) - len(signal)):
        signal = torch.nn.functional.pad(signal, (0, missing))
    window, filters = _mel_filters(geometry)
    frames, half = len(signal) // geometry.hop, geometry.n_fft // 2
    signal = torch.nn.functional.pad(signal[None], (half, half), mode="reflect")[0]
    blocks = []
    for start in range(0, frames, _BLOCK_FRAMES):
        last = min(start + _BLOCK_FRAMES, frames) - 1
        piece = signal[start * geometry.hop : last * geometry.hop + geometry.n_fft]
        spectrum = torch.stft(piece, geometry.n_fft, geometry.hop, window=window, center=False, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        blocks.append(power.T @ filters)
    mel = torch.cat(blocks).clamp_(min=1e-10).log10_()
    mel = torch.maximum(mel, mel.max() - 8.0)
    return ((mel + 4.0) / 4.0)[:kept].numpy()


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
