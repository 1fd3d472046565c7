"""What a training step reads: one encoded sample, and many of them packed end to end. Nothing is padded anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnitrain.vocabulary import TEXT

IGNORE = -100
"""Label of a position that predicts nothing."""


@dataclass(frozen=True, kw_only=True)
class TalkerDocument:
    """One spoken answer: T positions, F frames of Q codes; rows and positions count within the sample, -1 is nothing.

    Attributes:
        text_ids, hidden_rows, codec_ids, frame_rows, labels: int64 [T];  position_ids: float32 [3, T], starting at 0
        codes: int64 [F, Q];  frame_sources: int64 [F]
        heard: float32 [H, D], hidden states of a frozen Thinker at the H positions that name one, in their order; None
            where the Thinker is asked itself
    """

    text_ids: np.ndarray
    hidden_rows: np.ndarray
    codec_ids: np.ndarray
    frame_rows: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    codes: np.ndarray
    frame_sources: np.ndarray
    heard: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.text_ids)


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample as numbers (NumPy, so that it crosses worker processes cheaply).

    Attributes:
        input_ids: int64 [n];  token_types: uint8 [n], TEXT / IMAGE / VIDEO / AUDIO
        labels: int64 [n], *already shifted*: `labels[i]` is the token that position i must predict, or IGNORE.
        position_ids: float32 [3, n], TM-RoPE ids (t, h, w) that start at 0 (fractions occur, see `positions.py`)
        mel: float32 frames [F, n_mels] per audio, in order of appearance (sound tracks of videos included)
        patches: float32 [P, C * temporal_patch * patch * patch] per image or video, in order of appearance
        grid_thw: int64 [M, 3], patches in time, height, width per image or video
        target_bytes: UTF-8 bytes of the target text (for bits per byte)
        spoken: one document per spoken answer, for the Talker
        meta: of the sample, for rewards
        read: the same conversation as a teacher reads it, with the same targets; None: as it is here
    """

    id: str
    source: str
    task: str
    modality: str
    languages: tuple[str, ...]
    input_ids: np.ndarray
    labels: np.ndarray
    token_types: np.ndarray
    position_ids: np.ndarray
    mel: tuple[np.ndarray, ...] = ()
    patches: tuple[np.ndarray, ...] = ()
    grid_thw: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    target_bytes: int = 0
    spoken: tuple[TalkerDocument, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    read: EncodedSample | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def mel_frames(self) -> int:
        return sum(map(len, self.mel))

    @property
    def n_patches(self) -> int:
        return sum(map(len, self.patches))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What a `Budget` bounds: tokens, mel frames, patches, codec frames of all spoken answers."""
        return len(self), self.mel_frames, self.n_patches, sum(len(document.codes) for document in self.spoken)


@dataclass(frozen=True, kw_only=True)
class SpokenAnswers:
    """The spoken answers of a pack, end to end: T positions, F frames of Q codes in S documents. All but `samples` are
    the fields of `models.talker.TalkerInputs`, which explains them; rows and positions count within the pack.

    Attributes:
        samples: int64 [S], the sample of the pack that each document belongs to
        heard: float32 [H, D], hidden states of a frozen Thinker, which `hidden_rows` then counts; None where those rows
            count the Thinker's positions
    """

    text_ids: Tensor
    hidden_rows: Tensor
    codec_ids: Tensor
    frame_rows: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    codes: Tensor
    frame_sources: Tensor
    samples: Tensor
    heard: Tensor | None = None

    @staticmethod
    def pack(samples: Sequence[EncodedSample]) -> SpokenAnswers | None:
        """Those of `samples`, in order; None if nobody speaks.

        Raises ValueError: some documents bring a frozen Thinker's hidden states, and others need the Thinker itself.
        """
        documents = [(i, document) for i, sample in enumerate(samples) for document in sample.spoken]
        if not documents:
            return None
        starts = np.cumsum([0, *(len(sample) for sample in samples)])  # of the samples among the Thinker's positions
        lengths = np.cumsum([0, *(len(d) for _, d in documents)])
        frames = np.cumsum([0, *(len(d.codes) for _, d in documents)])

        def joined(name: str, axis: int = 0) -> Tensor:
            return _joined([getattr(d, name) for _, d in documents], axis)

        def shifted(name: str, by: np.ndarray) -> Tensor:
            parts = [getattr(d, name) for _, d in documents]
            return _joined([np.where(part >= 0, part + n, -1) for part, n in zip(parts, by, strict=True)])

        hidden_rows = shifted("hidden_rows", starts[[i for i, _ in documents]])
        heard = [d.heard for _, d in documents if (d.hidden_rows >= 0).any()]
        states = [h for h in heard if h is not None]
        if states:
            if len(states) < len(heard):
                raise ValueError("a pack mixes cached hidden states with samples that have none")
            hidden_rows = torch.where(hidden_rows >= 0, (hidden_rows >= 0).cumsum(0) - 1, -1)
        return SpokenAnswers(
            text_ids=joined("text_ids"),
            hidden_rows=hidden_rows,
            codec_ids=joined("codec_ids"),
            frame_rows=shifted("frame_rows", frames[:-1]),
            labels=joined("labels"),
            position_ids=joined("position_ids", axis=1),
            cu_seqlens=torch.from_numpy(lengths.astype(np.int32)),
            codes=joined("codes"),
            frame_sources=shifted("frame_sources", lengths[:-1]),
            samples=torch.tensor([i for i, _ in documents], dtype=torch.int64),
            heard=_joined(states) if states else None,
        )

    def inputs(self) -> dict[str, Tensor]:
        """The fields of `TalkerInputs`."""
        return {name: value for name, value in vars(self).items() if name not in ("samples", "heard")}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SpokenAnswers:
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in vars(self).items() if v is not None}
        return SpokenAnswers(**moved)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Several samples end to end.

    Attributes:
        input_ids: int64 [N];  labels: int64 [N] (already shifted, IGNORE = -100);  token_types: uint8 [N]
        position_ids: float32 [3, N], each sample's ids as it would have them alone
        cu_seqlens: int32 [B + 1], sample b spans cu_seqlens[b] : cu_seqlens[b + 1]
        mel: float32 [F, n_mels], all audio end to end, or None;  mel_lengths: int64 [A], frames per audio
        patches: float32 [P, C * temporal_patch * patch * patch], or None;  grid_thw: int64 [M, 3] per image or video
        sample_ids, sources, tasks, modalities, languages: one per sample, so that a loss spike leads back to its rows
        target_bytes: int64 [B]
        spoken: what the Talker learns from, or None
        stream_state: the data stream's state *after* this batch; saved once the batch has been trained on, so that a
            loader may fetch ahead without being late on resume
        skipped: samples skipped on the way to this batch, count by reason (cumulative for the stream)
        metas: of the samples
        read: the same samples as a teacher reads them, with the same targets; None: as they are here
    """

    input_ids: Tensor
    labels: Tensor
    token_types: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    mel: Tensor | None = None
    mel_lengths: Tensor | None = None
    patches: Tensor | None = None
    grid_thw: Tensor | None = None
    sample_ids: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    languages: tuple[tuple[str, ...], ...] = ()
    target_bytes: Tensor | None = None
    spoken: SpokenAnswers | None = None
    stream_state: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    metas: tuple[Mapping[str, str], ...] = ()
    read: PackedBatch | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)

    @property
    def n_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    def model_inputs(self) -> dict[str, Tensor | None]:
        """The keyword arguments of `OmniModel.forward`."""
        names = ("input_ids", "position_ids", "cu_seqlens", "token_types")
        media = ("mel", "mel_lengths", "patches", "grid_thw")
        return {name: getattr(self, name) for name in (*names, *media)}

    def prompts(self) -> PackedBatch:
        """Each sample up to its first target: what comes before its (first) answer, with all media. Raises ValueError
        if a medium comes later, or a sample has no target."""
        borders = self.cu_seqlens.tolist()
        rows, lengths = [], []
        for start, end in pairwise(borders):
            targets = (self.labels[start:end] != IGNORE).nonzero()
            if not len(targets) or bool((self.token_types[start + int(targets[0]) : end] != TEXT).any()):
                raise ValueError("a prompt needs a target behind it, and media before that")
            lengths.append(int(targets[0]) + 1)
            rows.append(torch.arange(start, start + lengths[-1], device=self.labels.device))
        kept = torch.cat(rows)
        return replace(
            self,
            input_ids=self.input_ids[kept],
            labels=torch.full_like(self.labels[kept], IGNORE),
            token_types=self.token_types[kept],
            position_ids=self.position_ids[:, kept],
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.labels.device),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device` (Lightning calls this)."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | SpokenAnswers | PackedBatch)
        }
        return replace(self, **moved)

    @staticmethod
    def nothing() -> PackedBatch:
        """One position that nothing is to be learnt from: what a rank computes while only others have data."""
        zero = torch.zeros(1, dtype=torch.int64)
        return PackedBatch(
            input_ids=zero,
            labels=torch.full_like(zero, IGNORE),
            token_types=zero.to(torch.uint8),
            position_ids=torch.zeros(3, 1),
            cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
            sample_ids=("",),
            sources=("",),
            tasks=("",),
            modalities=("text",),
            languages=((),),
            target_bytes=zero,
        )

    @staticmethod
    def pack(samples: list[EncodedSample], **extra: Any) -> PackedBatch:
        """Lay `samples` end to end. `extra` sets `stream_state` and `skipped`. Raises ValueError if there is none."""
        if not samples:
            raise ValueError("PackedBatch.pack needs at least one sample")
        mels = [m for s in samples for m in s.mel]
        patches = [p for s in samples for p in s.patches]
        grids = [s.grid_thw for s in samples if len(s.grid_thw)]
        return PackedBatch(
            input_ids=_joined([s.input_ids for s in samples]),
            labels=_joined([s.labels for s in samples]),
            token_types=_joined([s.token_types for s in samples]),
            position_ids=_joined([s.position_ids for s in samples], axis=1).float(),
            cu_seqlens=torch.tensor(np.cumsum([0, *map(len, samples)]), dtype=torch.int32),
            mel=_joined(mels) if mels else None,
            mel_lengths=torch.tensor([len(m) for m in mels], dtype=torch.int64) if mels else None,
            patches=_joined(patches) if patches else None,
            grid_thw=_joined(grids) if grids else None,
            sample_ids=tuple(s.id for s in samples),
            sources=tuple(s.source for s in samples),
            tasks=tuple(s.task for s in samples),
            modalities=tuple(s.modality for s in samples),
            languages=tuple(s.languages for s in samples),
            target_bytes=torch.tensor([s.target_bytes for s in samples], dtype=torch.int64),
            spoken=SpokenAnswers.pack(samples),
            metas=tuple(s.meta for s in samples),
            read=PackedBatch.pack([s.read or s for s in samples]) if any(s.read for s in samples) else None,
            **extra,
        )


def _joined(parts: Sequence[np.ndarray], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, axis))
