"""Waveforms for training a codec: rows of equal length, filled with whole utterances one after the other.

1. The mixture draws recordings (`mixture.py`: weights, shuffle, ranks and resume as for packed batches).
2. A recording goes behind the one before it in the row, from its start, until the row is full; the rest of the last one
   is dropped. A recording longer than a row gives one piece of it, at a place that is a function of seed and position.
3. So nothing is padded, every row has the same length, and the text is known of the utterances that stand whole in a
   row (it trains codebook 0, see `training.codec_losses.ContentHead`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.media import decode_audio
from omnitrain.data.mixture import Draw, Mixture
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.data.settings import DataConfig, MediaLimits, WaveformsConfig
from omnitrain.data.stream import BadSampleLog, Skipped, Tally

SILENCE = 1e-4
"""Peak amplitude below which a recording is silent."""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording: `wav` float32 [S] in [-1, 1], what is said in it, whose voice it is, and the text of the user's
    turns before it (each "" if unknown)."""

    id: str
    source: str
    wav: np.ndarray
    text: str = ""
    voice: str = ""
    question: str = ""
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WaveBatch:
    """Rows of sound.

    Attributes:
        wav: float32 [B, S]
        spans: (row, first frame, end frame, text) of every utterance that stands whole in a row
        sample_ids, sources: of all that is heard, in order
        frames: codec frames in the batch
        stream_state, skipped: as in `PackedBatch`
    """

    wav: Tensor
    spans: tuple[tuple[int, int, int, str], ...]
    sample_ids: tuple[str, ...]
    sources: tuple[str, ...]
    frames: int
    stream_state: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def n_tokens(self) -> int:
        """Codec frames, which is what the codec's speed is counted in."""
        return self.frames

    def to(self, device: torch.device | str, non_blocking: bool = False) -> WaveBatch:
        return replace(self, wav=self.wav.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, kw_only=True)
class UtteranceReader:
    """`reader(sample, media_bytes)` -> :class:`Utterance`: the first recording in a sample and what is said in it.

    A `speech` segment carries its own text; an `audio` segment of an ASR sample is explained by the answer.
    """

    sample_rate: int
    limits: MediaLimits

    def __call__(self, sample: Sample, media_bytes: Callable[[Segment], bytes]) -> Utterance:
        """Raises:
        BadSample: ``no_recording``, ``audio_silent``, or what `decode_audio` says.
        """
        for message in sample.messages:
            for segment in message.segments:
                if segment.type in ("audio", "speech") and (segment.media is not None or segment.path is not None):
                    wav = decode_audio(media_bytes(segment), self.sample_rate, self.limits)
                    if np.abs(wav).max() < SILENCE:
                        raise BadSample("audio_silent", f"the loudest sample is {np.abs(wav).max():.1e}")
                    said = (
                        segment.text if segment.type == "speech" else sample.reference if sample.task == "asr" else ""
                    )
                    return Utterance(
                        id=sample.id,
                        source=sample.source,
                        wav=np.clip(wav, -1, 1).astype(np.float32),
                        text=said or "",
                        voice=sample.meta.get("voice", ""),
                        question="".join(s.text or "" for m in sample.messages if m.role == "user" for s in m.segments),
                        languages=sample.languages,
                    )
        raise BadSample("no_recording", "the sample has neither an audio nor a speech segment with a recording")


class RowFiller:
    """Utterances into rows of `samples` samples."""

    def __init__(self, rows: int, samples: int, samples_per_frame: int, seed: int) -> None:
        self.rows, self.samples, self.samples_per_frame, self.seed = rows, samples, samples_per_frame, seed

    def fill(self, draws: Iterator[tuple[int, int, Utterance]]) -> WaveBatch | None:
        """One batch from (source, position, utterance); None if `draws` ends before it is full."""
        wav = np.zeros((self.rows, self.samples), dtype=np.float32)
        spans: list[tuple[int, int, int, str]] = []
        heard: list[Utterance] = []
        for row in range(self.rows):
            at = 0
            while at < self.samples:
                source, position, utterance = next(draws, (0, 0, None))
                if utterance is None:
                    return None
                heard.append(utterance)
                piece, room = utterance.wav, self.samples - at
                whole = len(piece) <= room
                if len(piece) > self.samples:
                    spare = len(piece) - room
                    start = random.Random(f"{self.seed}/{source}/{position}").randint(0, spare)
                    piece = piece[start:]
                piece = piece[:room]
                wav[row, at : at + len(piece)] = piece
                if whole and utterance.text:
                    first, end = at // self.samples_per_frame, -(-(at + len(piece)) // self.samples_per_frame)
                    spans.append((row, first, end, utterance.text))
                at += len(piece)
        return WaveBatch(
            wav=torch.from_numpy(wav),
            spans=tuple(spans),
            sample_ids=tuple(u.id for u in heard),
            sources=tuple(u.source for u in heard),
            frames=self.rows * self.samples // self.samples_per_frame,
        )


class WaveStream(Iterator[WaveBatch]):
    """Endless batches of one rank; each carries the state after it (plain integers, as of `PackedStream`)."""

    def __init__(
        self,
        mixture: Mixture,
        filler: RowFiller,
        *,
        weights: Mapping[str, float],
        max_bad_fraction: float,
        num_workers: int,
        ahead: int,
        log: BadSampleLog,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._mixture, self._filler = mixture, filler
        self._weights = [weights[name] for name in mixture.names]
        state = state or {}
        self._drawn = list(state.get("drawn", [0] * len(mixture.names)))
        self._skipped = Skipped(max_bad_fraction, log)
        self._skipped.counts = dict(state.get("skipped", {}))
        self._batches, self._frames = state.get("batches", 0), state.get("tokens", 0)
        seen = state.get("seen", {}).get("source", {})
        self._seen = Tally(dict(seen.get("samples", {})), dict(seen.get("tokens", {})))
        self._skipped.keep_log()
        self._draws: Any = mixture.draws(self._weights, self._drawn, [0] * len(self._drawn), num_workers, ahead)

    def _utterances(self) -> Iterator[tuple[int, int, Utterance]]:
        while True:
            draw: Draw = next(self._draws)
            self._drawn[draw.pick.source] += 1
            if draw.sample is None:
                self._skipped.add(draw.bad)
                self._skipped.check(sum(self._drawn))
                continue
            utterance: Any = draw.sample
            self._seen.add(
                self._mixture.names[draw.pick.source], 1, len(utterance.wav) // self._filler.samples_per_frame
            )
            yield draw.pick.source, draw.pick.position, utterance

    def __next__(self) -> WaveBatch:
        batch = self._filler.fill(self._utterances())
        assert batch is not None  # the draws never end
        self._batches += 1
        self._frames += batch.frames
        state = {
            "rank": self._mixture.rank,
            "stage": 0,
            "drawn": list(self._drawn),
            "before": [0] * len(self._drawn),
            "skipped": dict(self._skipped.counts),
            "batches": self._batches,
            "tokens": self._frames,
            "filling": float(self._batches),
            "seen": {"source": {"samples": dict(self._seen.samples), "tokens": dict(self._seen.tokens)}},
        }
        return replace(batch, stream_state=state, skipped=dict(self._skipped.counts))

    @property
    def batches(self) -> int:
        """How many it has given."""
        return self._batches

    def close(self) -> None:
        """End the worker processes."""
        self._draws.close()


class WaveformDataModule(OmniDataModule):
    """Rows of waveforms from the same sources, with the same order, weights and resume as `OmniDataModule`.

    Args:
        config: sources and rows.
        seed, run_dir: see `OmniDataModule`.
    """

    def __init__(self, config: WaveformsConfig, *, seed: int = 0, run_dir: str | Path | None = None) -> None:
        shared = {f.name: getattr(config, f.name) for f in fields(DataConfig) if hasattr(config, f.name)}
        super().__init__(DataConfig(**shared), seed=seed, run_dir=run_dir)
        self.rows = config
        self.reader = UtteranceReader(sample_rate=config.sample_rate, limits=config.limits)
        self.filler = RowFiller(config.rows, config.row_samples, config.samples_per_frame, self.seed)

    def _new_stream(self, number: int, state: Mapping[str, Any] | None) -> Any:
        return WaveStream(
            self._mixture("sources", self.reader, (number, self.n_streams)),
            self.filler,
            weights=self._weights(),
            max_bad_fraction=self.config.max_bad_fraction,
            num_workers=self.config.num_workers,
            ahead=self.config.worker_buffer,
            log=BadSampleLog(self._log_path(number)),
            state=state,
        )

    def _finite(self, which: str, names: Sequence[str], prompts: bool = False) -> Any:
        """The first rows of the sources, read once."""
        if not names:
            return []
        mixture = self._mixture(which, self.reader, names=names)
        rows = RowFiller(1, self.rows.row_samples, self.rows.samples_per_frame, self.seed)
        found: list[WaveBatch] = []
        utterances: Any = ((d.pick.source, d.pick.position, d.sample) for d in mixture.once() if d.sample is not None)
        while len(found) < self.rows.validation_rows and (batch := rows.fill(utterances)) is not None:
            found.append(batch)
        return FiniteRows(found)

    def _settings(self) -> dict[str, Any]:
        rows = [self.filler.rows, self.filler.samples, self.filler.samples_per_frame, self.reader.sample_rate]
        return {**super()._settings(), "rows": rows}


class FiniteRows(Iterable[WaveBatch]):
    """Batches that were read already. To Lightning a plain list would be several loaders, and where it knows lengths, a
    rank with none is an error."""

    def __init__(self, batches: Sequence[WaveBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[WaveBatch]:
        return iter(self._batches)
