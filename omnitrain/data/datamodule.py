"""`OmniDataModule`: sources and budgets in, packed batches out, and a position that resumes exactly."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lightning import LightningDataModule

from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.codec_frames import SpeechCodes
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import AudioGeometry, VisionGeometry
from omnitrain.data.media import MediaLimits
from omnitrain.data.mixture import Mixture, SourceConfig
from omnitrain.data.packing import Budget
from omnitrain.data.shards import Source
from omnitrain.data.stream import BadSampleLog, FinitePacks, PackedStream, Stage, planned_mixture

T = TypeVar("T")
Sources = Sequence[SourceConfig | Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]
"""Source configurations: a list of them, or a mapping from their names (which Hydra overrides one key at a time)."""


class OmniDataModule(LightningDataModule):
    """Training, validation, test and prediction batches from shards.

    ::

        _target_: omnitrain.data.datamodule.OmniDataModule
        tokenizer: ${omnitrain.pack:}/tokenizer.json
        sources:                      # by name; a list of the same with `name:` in each also works
          captions: {path: data/stamps, split: train, where: {task: [caption]}, weight: 3}
          speech:   {path: data/stamps, split: train, where: {task: [asr, s2tt]}, weight: 2}
          text:     {path: data/gcide, split: train, weight: 1}
        validation_sources:
          stamps: {path: data/stamps, split: validation, limit: 200}
        max_tokens: 4096              # of a pack, which is the batch of one rank and step
        max_mel_frames: 12000
        max_patches: 8192
        stages:                       # optional: change mixture and lengths at a token count of the whole run
          - {until_tokens: 2000000, weights: {captions: 1, speech: 1}, max_tokens: 2048}
          - {}                        # the weights and budgets above; or {samples: {captions: 300}}, exactly
        num_workers: 2
        seed: 0

    The training loader is endless (unless the last stage counts `samples`): a trainer needs `max_steps`. Call
    :meth:`mark_trained` with each batch once it has been trained on; checkpoints then hold the position after it,
    however far the loader has read ahead.

    Args:
        sources: what is trained on, see `SourceConfig`.
        tokenizer: a tokenizer, its file or its folder (`ChatTokenizer.from_file`).
        validation_sources, test_sources, predict_sources: read once, in order, unshuffled; weights are ignored. Test
            and prediction fall back on the validation sources. Prediction batches are prompts (no last answer).
        voice_sources: recordings by which generated speech is told whose voice it is; default: `sources`.
        max_tokens, max_mel_frames, max_patches, max_frames: budget of a pack (None: no bound).
        validation_max_tokens: budget of tokens outside training; default `max_tokens`.
        window: packs kept open by the packer. More packs fill better and hold more decoded media in memory.
        stages: see `Stage`.
        num_workers: worker processes of the training loader; the batches do not depend on it.
        worker_buffer: encoded samples that each worker keeps ready: more than a pack holds, or training waits for each.
        seed: of the order.
        max_bad_fraction: see `PackedStream`.
        audio, vision, limits: geometry of the features and limits on media, as dataclasses or mappings of their fields.
        ids_per_second: TM-RoPE ids per second.
        vocab_size: of the model; samples with larger token ids are bad.
        speech: how the model's Talker numbers codes and voices; spoken answers are then laid out for it. None: their
            text alone is used. Settable later (`datamodule.speech = ...`), before anything is encoded.
        bad_samples_path: JSONL of skipped samples (ranks above 0 add ``.rankN`` before the suffix).
        rank, world_size: default: the trainer's.

    Raises:
        ValueError, TypeError: a misspelt or contradicting field; the message names it.
        FileNotFoundError: a missing shard or tokenizer (on setup).
    """

    def __init__(
        self,
        *,
        sources: Sources,
        tokenizer: str | Path | ChatTokenizer,
        validation_sources: Sources = (),
        test_sources: Sources = (),
        predict_sources: Sources = (),
        voice_sources: Sources = (),
        max_tokens: int = 4096,
        max_mel_frames: int | None = None,
        max_patches: int | None = None,
        max_frames: int | None = None,
        validation_max_tokens: int | None = None,
        window: int = 8,
        stages: Sequence[Stage | Mapping[str, Any]] = (),
        num_workers: int = 0,
        worker_buffer: int = 64,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        audio: AudioGeometry | Mapping[str, Any] | None = None,
        vision: VisionGeometry | Mapping[str, Any] | None = None,
        limits: MediaLimits | Mapping[str, Any] | None = None,
        ids_per_second: float = 13,
        vocab_size: int | None = None,
        speech: SpeechCodes | None = None,
        bad_samples_path: str | Path | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.sources = _sources(sources, "sources")
        self.validation_sources = _sources(validation_sources, "validation_sources")
        self.test_sources = _sources(test_sources, "test_sources") or self.validation_sources
        self.predict_sources = _sources(predict_sources, "predict_sources") or self.validation_sources
        self.voice_sources = _sources(voice_sources, "voice_sources") or self.sources
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {max_bad_fraction}; it is a share between 0 and 1")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 0")
        self.budget = Budget(tokens=max_tokens, mel_frames=max_mel_frames, patches=max_patches, frames=max_frames)
        self.validation_budget = Budget(
            tokens=validation_max_tokens or max_tokens,
            mel_frames=max_mel_frames,
            patches=max_patches,
            frames=max_frames,
        )
        self.window, self.num_workers, self.worker_buffer = window, num_workers, worker_buffer
        self.stages = [_build(Stage, stage, f"stages[{i}]") for i, stage in enumerate(stages)]
        self.seed, self.max_bad_fraction = seed, max_bad_fraction
        self.audio = _build(AudioGeometry, audio or {}, "audio")
        self.vision = _build(VisionGeometry, vision or {}, "vision")
        self.limits = _build(MediaLimits, limits or {}, "limits")
        self.ids_per_second, self.vocab_size, self._speech = ids_per_second, vocab_size, speech
        self.bad_samples_path = Path(bad_samples_path) if bad_samples_path is not None else None
        self._rank, self._world_size = rank, world_size
        self._tokenizer = tokenizer
        self._encoder: SampleEncoder | None = None
        self._opened: dict[str, dict[str, Source]] = {}
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint's state that no stream has taken over yet
        self._trained: dict[str, Any] | None = None  # the stream's state after the last trained batch
        self._stream: PackedStream | None = None
        self._emitted: dict[str, Any] | None = None  # the stream's state after the last batch handed out

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> SampleEncoder:
        """Sample -> numbers, as in training; evaluation and generation use the same."""
        if self._encoder is None:
            loaded = self._tokenizer
            self._encoder = SampleEncoder(
                tokenizer=loaded if isinstance(loaded, ChatTokenizer) else ChatTokenizer.from_file(loaded),
                audio=self.audio,
                vision=self.vision,
                limits=self.limits,
                ids_per_second=self.ids_per_second,
                vocab_size=self.vocab_size,
                speech=self.speech,
            )
        return self._encoder

    @property
    def speech(self) -> SpeechCodes | None:
        """How the model's Talker numbers codes and voices."""
        return self._speech

    @speech.setter
    def speech(self, codes: SpeechCodes | None) -> None:
        self._speech = codes
        if self._encoder is not None:
            self._encoder = replace(self._encoder, speech=codes)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.encoder.tokenizer

    def opened(self, which: str) -> dict[str, Source]:
        """The opened sources by name; `which`: ``sources``, ``validation_sources``, ``test_sources``,
        ``predict_sources``, ``voice_sources``."""
        if which not in self._opened:
            self._opened[which] = {config.name: config.open() for config in getattr(self, which)}
        return self._opened[which]

    def _mixture(self, which: str, encode: Any, names: Sequence[str] | None = None) -> Mixture:
        opened = self.opened(which)
        return Mixture(
            {name: opened[name] for name in (opened if names is None else names)},
            encode,
            seed=self.seed,
            rank=self.global_rank,
            world_size=self.global_world_size,
        )

    @property
    def global_rank(self) -> int:
        return self._rank if self._rank is not None else (self.trainer.global_rank if self.trainer else 0)

    @property
    def global_world_size(self) -> int:
        return self._world_size if self._world_size is not None else (self.trainer.world_size if self.trainer else 1)

    # --- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open what `stage` reads, so that a missing shard or tokenizer stops the run before anything is built."""
        _ = self.encoder
        for which in {
            "fit": ("sources", "validation_sources"),
            "validate": ("validation_sources",),
            "test": ("test_sources",),
            "predict": ("predict_sources",),
        }[stage]:
            self.opened(which)

    def train_dataloader(self) -> TrainLoader:
        """Endless; has no length. Iterating again goes on after the last trained batch."""
        return TrainLoader(self)

    def val_dataloader(self) -> FinitePacks | list[Any]:
        """All validation sources, one after another, as one loader."""
        return self._finite("validation_sources", [config.name for config in self.validation_sources])

    def test_dataloader(self) -> dict[str, FinitePacks | list[Any]]:
        """One loader per test source, by name: held-out splits are scored apart."""
        return {config.name: self._finite("test_sources", [config.name]) for config in self.test_sources}

    def predict_dataloader(self) -> FinitePacks | list[Any]:
        """All prediction sources, one after another: prompts without their last answer."""
        return self._finite("predict_sources", [config.name for config in self.predict_sources], prompts=True)

    def _finite(self, which: str, names: list[str], prompts: bool = False) -> FinitePacks | list[Any]:
        if not names:
            return []
        return FinitePacks(
            self._mixture(which, self.encoder.encode_prompt if prompts else self.encoder, names),
            budget=self.validation_budget,
            n_bytes=self.tokenizer.n_bytes,
            max_bad_fraction=self.max_bad_fraction,
        )

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    # --- the position in the data --------------------------------------------------------------------------------

    def stream(self) -> PackedStream:
        """The training stream, standing after the last trained batch."""
        self._take_over_loaded()
        if self._stream is not None and self._emitted != self._trained:  # it has read ahead of training
            self._stream.close()
            self._stream = None
        if self._stream is None:
            self._stream = self._new_stream(self._trained)
            self._emitted = self._trained
        return self._stream

    def _new_stream(self, state: Mapping[str, Any] | None) -> PackedStream:
        return PackedStream(
            self._mixture("sources", self.encoder),
            weights=self._weights(),
            budget=self.budget,
            stages=self.stages,
            window=self.window,
            n_bytes=self.tokenizer.n_bytes,
            max_bad_fraction=self.max_bad_fraction,
            num_workers=self.num_workers,
            ahead=self.worker_buffer,
            log=BadSampleLog(self._log_path()),
            state=state,
        )

    def next_batch(self, stream: PackedStream) -> PackedBatch | None:
        """The next batch of `stream`; None after its last."""
        batch = next(stream, None)
        if batch is not None and stream is self._stream:
            self._emitted = batch.stream_state
        return batch

    def mark_trained(self, batch: PackedBatch) -> None:
        """Say that `batch` has been trained on: a checkpoint from now on continues after it.

        Raises:
            ValueError: the batch is not from the training loader.
        """
        if batch.stream_state is None:
            raise ValueError("mark_trained needs a batch of the training loader (its stream_state is None)")
        self._trained = batch.stream_state

    def state_dict(self) -> dict[str, Any]:
        """Position after the last trained batch, of all ranks (a collective call when distributed), and the settings
        it depends on. Plain Python values, so it loads with ``weights_only=True``."""
        self._take_over_loaded()
        mine = self._trained
        ranks: list[Any] = [mine]
        if self.global_world_size > 1:
            import torch.distributed as dist

            if dist.is_available() and dist.is_initialized():
                ranks = [None] * self.global_world_size
                dist.all_gather_object(ranks, mine)
        return {"settings": self._settings(), "ranks": ranks}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: another number of ranks, or settings that make another stream; the message names them. The
                number of workers may differ, and so may the end of the current stage (`until_tokens`) and all later
                stages.
        """
        self._loaded = state_dict
        self._take_over_loaded()

    def _take_over_loaded(self) -> None:
        state, self._loaded = self._loaded, None
        if state is None:
            return
        ranks = state["ranks"]
        stage = max((rank["stage"] for rank in ranks if rank is not None), default=0)
        saved, now = dict(state["settings"]), self._settings()
        for settings in (saved, now):
            settings["stages"] = _binding_stages(settings["stages"], stage)
        if different := [name for name in now if saved.get(name) != now[name]]:
            rows = "; ".join(f"{name}: {saved.get(name)} -> {now[name]}" for name in different)
            raise ValueError(
                f"the data stream cannot continue exactly, because these settings changed: {rows}. Set them back, or "
                "start a new run from the checkpoint's weights alone"
            )
        if len(ranks) != self.global_world_size:
            raise ValueError(f"the checkpoint holds data positions of {len(ranks)} of {self.global_world_size} ranks")
        self._trained = ranks[self.global_rank]
        self.teardown("fit")

    def _settings(self) -> dict[str, Any]:
        """All that the order and the content of the batches depend on."""
        return {
            "world_size": self.global_world_size,
            "seed": self.seed,
            "sources": {name: len(source) for name, source in self.opened("sources").items()},
            "filters": {config.name: _plain([config.split, config.where, config.limit]) for config in self.sources},
            "weights": self._weights(),
            "budget": asdict(self.budget),
            "window": self.window,
            "stages": [_plain(asdict(stage)) for stage in self.stages],
            "tokenizer": zlib.crc32(self.tokenizer.to_json().encode()),
            "features": _plain(
                [asdict(self.audio), asdict(self.vision), asdict(self.limits), self.ids_per_second, self.vocab_size]
            ),
            "speech": None if self.speech is None else _plain(asdict(self.speech)),
        }

    def _weights(self) -> dict[str, float]:
        opened = self.opened("sources")
        return {c.name: float(len(opened[c.name]) if c.weight is None else c.weight) for c in self.sources}

    def _log_path(self) -> Path | None:
        path, rank = self.bad_samples_path, self.global_rank
        return path if path is None or rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")

    # --- what was planned and what was seen ----------------------------------------------------------------------

    def planned_mixture(self) -> list[dict[str, Any]]:
        """See `stream.planned_mixture`."""
        return planned_mixture(self.stages, self._weights())

    def seen_mixture(self) -> dict[str, Any]:
        """What this rank has trained on so far: samples and tokens by source, modality and languages (``"en>fr"``);
        samples drawn by source (these follow the plan exactly; some still wait in open packs, some were skipped);
        skipped samples by reason; packing efficiency (mean filling of a pack, by the budget nearest to its end)."""
        self._take_over_loaded()
        state = self._trained
        names = [config.name for config in self.sources]
        if state is None:
            return {"seen": {}, "drawn": dict.fromkeys(names, 0), "skipped": {}, "tokens": 0, "batches": 0, "stage": 0}
        drawn = [a + b for a, b in zip(state["drawn"], state["before"], strict=True)]
        return {
            "seen": state["seen"],
            "drawn": dict(zip(names, drawn, strict=True)),
            "skipped": state["skipped"],
            "tokens": state["tokens"],
            "batches": state["batches"],
            "stage": state["stage"],
            "packing_efficiency": state["filling"] / max(1, state["batches"]),
        }


class TrainLoader(Iterable[PackedBatch]):
    """The training batches. It deliberately has neither a length nor a `state_dict`: Lightning reads one batch ahead
    of such a loader and would save a position one batch late; the data module saves that of the last trained batch."""

    def __init__(self, module: OmniDataModule) -> None:
        self._module = module

    def __iter__(self) -> Iterator[PackedBatch]:
        stream, batches = self._module.stream(), 0
        while (batch := self._module.next_batch(stream)) is not None:
            batches += 1
            yield batch
        trainer = self._module.trainer
        finished = trainer is not None and 0 <= trainer.max_steps <= trainer.global_step
        if not batches and not finished:  # Lightning would ask again for ever
            raise RuntimeError(
                "the data stages hold no further batch (their `samples` are all drawn), but trainer.max_steps asks for "
                "more; lower it, or raise `samples`"
            )


def _sources(configs: Sources, argument: str) -> list[SourceConfig]:
    if isinstance(configs, Mapping):
        configs = [{"name": name, **config} for name, config in configs.items() if config is not None]
    built = [_build(SourceConfig, config, f"{argument}[{i}]") for i, config in enumerate(configs)]
    names = [config.name for config in built]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{argument}: the names {repeated} occur more than once; each source needs its own")
    return built


def _build(kind: type[T], values: T | Mapping[str, Any], where: str) -> T:
    """`values` as the dataclass `kind`; unknown fields are named, with the nearest one that exists."""
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise TypeError(f"data.{where} must be a mapping, not {type(values).__name__}")
    known = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"data.{where} has no field {name!r}{hint} Fields: {', '.join(known)}")
    try:
        return kind(**{str(name): value for name, value in values.items()})
    except TypeError as error:
        raise TypeError(f"data.{where}: {error}") from error


def _binding_stages(stages: list[dict[str, Any]], current: int) -> list[dict[str, Any]]:
    """The stages that a stream in stage `current` has used; where that one will end is still open."""
    used = [dict(stage) for stage in (stages or [_plain(asdict(Stage()))])[: current + 1]]
    if len(used) == current + 1:
        used[-1].pop("until_tokens")
    return used


def _plain(value: Any) -> Any:
    """Mappings, sequences and paths as dicts, lists and strings (as they come back from a checkpoint)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
