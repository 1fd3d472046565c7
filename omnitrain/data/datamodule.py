"""`OmniDataModule`: sources and budgets in, packed batches out, and a position that resumes exactly."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning import LightningDataModule

from omnitrain.data.augment import AugmentingEncoder
from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.codec_frames import SpeechCodes
from omnitrain.data.composition import fingerprint
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.mixture import Mixture
from omnitrain.data.packing import Packing
from omnitrain.data.settings import Budget, DataConfig, SourceConfig, Stage
from omnitrain.data.shards import Source
from omnitrain.data.stream import BadSampleLog, FinitePacks, PackedStream, RoundRobin, add_counts, planned_mixture
from omnitrain.data.work import Balance, Work
from omnitrain.files import BAD_SAMPLES

_START_ANEW = "or start a new run from the checkpoint's weights alone (module.init_from)"


class OmniDataModule(LightningDataModule):
    """Training, validation, test and prediction batches from shards.

    The training loader is endless (unless the last stage counts `samples`): a trainer needs `max_steps`. Call
    :meth:`mark_trained` with each batch once it has been trained on; checkpoints then hold the position after it,
    however far the loader has read ahead.

    Args:
        seed: of the order, where `config` has none of its own.
        run_dir: where skipped samples are listed (`bad_samples.jsonl`; ranks above 0 add ``.rankN`` before the suffix).
        ids_per_second: TM-RoPE ids per second.
        vocab_size: of the model; samples with larger token ids are bad.
        speech: how the model's Talker numbers codes and voices; spoken answers are then laid out for it. None: their
            text alone is used. Settable later (`datamodule.speech = ...`), before anything is encoded.
        tokenizer: instead of the file that `config` names.
        work: what training on a sample costs, where `config.balance` asks for it; settable later.
        rank, world_size: default: the trainer's.

    Raises FileNotFoundError: a missing shard or tokenizer (on setup).
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int = 0,
        run_dir: str | Path | None = None,
        ids_per_second: float = 13,
        vocab_size: int | None = None,
        speech: SpeechCodes | None = None,
        tokenizer: ChatTokenizer | None = None,
        work: Work | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.sources = _named(config.sources)
        self.validation_sources = _named(config.validation_sources)
        self.test_sources = _named(config.test_sources) or self.validation_sources
        self.predict_sources = _named(config.predict_sources) or self.validation_sources
        self.voice_sources = _named(config.voice_sources) or self.sources
        self.budget = Budget(
            tokens=config.max_tokens,
            mel_frames=config.max_mel_frames,
            patches=config.max_patches,
            frames=config.max_frames,
        )
        self.validation_budget = replace(self.budget, tokens=config.validation_max_tokens or config.max_tokens)
        self.stages = list(config.stages)
        self.seed = seed if config.seed is None else config.seed
        self.ids_per_second, self.vocab_size, self.speech, self.work = ids_per_second, vocab_size, speech, work
        self.bad_samples_path = None if run_dir is None else Path(run_dir) / BAD_SAMPLES
        self._rank, self._world_size, self._tokenizer = rank, world_size, tokenizer
        self._opened: dict[str, dict[str, Source]] = {}
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint's state that no stream has taken over yet
        self._n_streams: int | None = None  # that of the checkpoint
        # By stream of this process: its state after its last trained batch, and after the last one handed out.
        self._trained: dict[int, dict[str, Any]] = {}
        self._emitted: dict[int, dict[str, Any]] = {}
        self._stream: RoundRobin | None = None
        self.on_read: Callable[[Any], Any] | None = None
        """What becomes of a training batch as soon as it is read, while the one before it is trained on."""

    @property
    def encoder(self) -> SampleEncoder:
        """Sample -> numbers, as in training; evaluation and generation use the same."""
        return SampleEncoder(
            tokenizer=self.tokenizer,
            audio=self.config.audio,
            vision=self.config.vision,
            limits=self.config.limits,
            ids_per_second=self.ids_per_second,
            vocab_size=self.vocab_size,
            speech=self.speech,
            thinking=self.config.thinking,
            loss_on=self.config.loss_on,
            transcripts=self.config.transcripts,
        )

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer or ChatTokenizer.from_file(self.config.tokenizer)

    def opened(self, which: str) -> dict[str, Source]:
        """The opened sources by name; `which`: ``sources``, ``validation_sources``, ``test_sources``,
        ``predict_sources``, ``voice_sources``."""
        if which not in self._opened:
            self._opened[which] = {config.name: config.open() for config in getattr(self, which)}
        return self._opened[which]

    def _mixture(
        self, which: str, encode: Any, part: tuple[int, int] | None = None, names: Sequence[str] | None = None
    ) -> Mixture:
        """`part`: (rank, world_size) of `Mixture`; default: this process's share."""
        opened = self.opened(which)
        rank, world_size = part or (self.data_rank, self.data_ranks)
        sources = {name: opened[name] for name in names or opened}
        return Mixture(sources, encode, seed=self.seed, rank=rank, world_size=world_size)

    @property
    def data_rank(self) -> int:
        """Which share of the data this process reads; those that share each pack have the same."""
        return self._share("rank") if self._rank is None else self._rank

    @property
    def data_ranks(self) -> int:
        """How many shares there are."""
        return self._share("num_replicas") if self._world_size is None else self._world_size

    def _share(self, which: str) -> int:
        alone = {"rank": 0, "num_replicas": 1}
        strategy = self.trainer.strategy if self.trainer else None
        return (getattr(strategy, "distributed_sampler_kwargs", None) or alone)[which]

    @property
    def n_streams(self) -> int:
        """Streams of packs, which the processes share evenly. Raises ValueError if they cannot."""
        n, processes = self._n_streams or self.config.streams or self.data_ranks, self.data_ranks
        if n % processes:
            fits = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
            raise ValueError(
                f"{processes} processes cannot share the {n} streams of packs that this run's data are dealt to: use "
                f"one of {fits} (and trainer.accumulate_grad_batches so that a step has as many packs as before), or "
                "begin a run with data.streams=N"
            )
        return n

    def setup(self, stage: str) -> None:
        """Open what `stage` reads, so that a missing shard or tokenizer stops the run before anything is built."""
        _ = self.tokenizer
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
            self._mixture(which, self.encoder.encode_prompt if prompts else self.encoder, names=names),
            packing=Packing(budget=self.validation_budget, window=1, n_bytes=self.tokenizer.n_bytes),
            max_bad_fraction=self.config.max_bad_fraction,
        )

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def stream(self) -> RoundRobin:
        """The training streams of this process, standing after the last trained batch."""
        self._take_over_loaded()
        if self._stream is not None and self._emitted != self._trained:  # it has read ahead of training
            self._stream.close()
            self._stream = None
        if self._stream is None:
            numbers = range(self.data_rank, self.n_streams, self.data_ranks)
            self._stream = RoundRobin([self._new_stream(number, self._trained.get(number)) for number in numbers])
            self._emitted = dict(self._trained)
        return self._stream

    def _new_stream(self, number: int, state: Mapping[str, Any] | None) -> PackedStream:
        return PackedStream(
            self._mixture("sources", self._training_encoder(), (number, self.n_streams)),
            weights=self._weights(),
            packing=self.packing,
            stages=self.stages,
            max_bad_fraction=self.config.max_bad_fraction,
            num_workers=self.config.num_workers,
            ahead=self.config.worker_buffer,
            log=BadSampleLog(self._log_path(number)),
            state=state,
        )

    @property
    def packing(self) -> Packing:
        """How samples become packs in training."""
        return Packing(
            budget=self.budget, window=self.config.window, n_bytes=self.tokenizer.n_bytes, balance=self._balance
        )

    @property
    def _balance(self) -> Balance | None:
        if self.config.balance is None:
            return None
        if self.work is None:
            raise ValueError(
                f"data.balance={self.config.balance}: nothing is known of what this training costs; set it to null"
            )
        return Balance(work=self.work, most=self.config.balance)

    def _training_encoder(self) -> SampleEncoder | AugmentingEncoder:
        if self.config.augment is None:
            return self.encoder
        return AugmentingEncoder(encoder=self.encoder, config=self.config.augment, seed=self.seed)

    def next_batch(self, stream: RoundRobin) -> PackedBatch | None:
        """The next batch of `stream`; None after its last."""
        batch = next(stream, None)
        if batch is not None and stream is self._stream:
            assert batch.stream_state is not None
            self._emitted[batch.stream_state["rank"]] = batch.stream_state
        return batch

    def mark_trained(self, batch: PackedBatch) -> None:
        """Say that `batch` has been trained on: a checkpoint from now on continues after it. Raises ValueError: it is
        not from the training loader."""
        if batch.stream_state is None:
            raise ValueError("mark_trained needs a batch of the training loader (its stream_state is None)")
        self._trained[batch.stream_state["rank"]] = batch.stream_state

    def state_dict(self) -> dict[str, Any]:
        """Position after the last trained batch, of all streams (a collective call when distributed), and the settings
        it depends on. Plain Python values, so it loads with ``weights_only=True``."""
        self._take_over_loaded()
        trained = dict(self._trained)
        if self.data_ranks > 1:
            import torch.distributed as dist

            if dist.is_available() and dist.is_initialized():
                everywhere: list[dict[int, Any]] = [{}] * dist.get_world_size()
                dist.all_gather_object(everywhere, self._trained)
                trained = {number: state for there in everywhere for number, state in there.items()}
        return {"settings": self._settings(), "ranks": [trained.get(number) for number in range(self.n_streams)]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError: settings that make another stream, or more processes than can
        share its streams; the message names them. The number of workers may differ, and so may the end of the current
        stage (`until_tokens`) and all later stages."""
        self._loaded = state_dict
        self._take_over_loaded()

    def _take_over_loaded(self) -> None:
        state, self._loaded = self._loaded, None
        if state is None:
            return
        ranks = state["ranks"]
        self._n_streams = len(ranks)
        stage = max((rank["stage"] for rank in ranks if rank is not None), default=0)
        saved, now = dict(state["settings"]), self._settings()
        for settings in (saved, now):
            settings["stages"] = _binding_stages(settings["stages"], stage)
        content = now.pop("content")
        content_before = saved.get("content", content)  # not noted in older checkpoints
        if different := [name for name in now if saved.get(name) != now[name]]:
            rows = "; ".join(f"{name}: {saved.get(name)} -> {now[name]}" for name in different)
            raise ValueError(
                f"the data stream cannot continue exactly, because these settings changed: {rows}. Set them back, "
                + _START_ANEW
            )
        if other := [name for name in content if content[name] != content_before[name]]:
            raise ValueError(
                f"the data stream cannot continue exactly, because data source {other[0]!r} holds other content than "
                "when the checkpoint was written. Bring its files back, " + _START_ANEW
            )
        mine = range(self.data_rank, self.n_streams, self.data_ranks)
        self._trained = {number: ranks[number] for number in mine if ranks[number] is not None}
        self.teardown("fit")

    def _settings(self) -> dict[str, Any]:
        """All that the order and the content of the batches depend on."""
        geometry = self.config.audio, self.config.vision, self.config.limits
        return {
            "world_size": self.n_streams,
            "seed": self.seed,
            "sources": {name: len(source) for name, source in self.opened("sources").items()},
            "content": self._fingerprints,
            "filters": {config.name: _plain([config.split, config.where, config.limit]) for config in self.sources},
            "weights": self._weights(),
            "budget": asdict(self.budget),
            "window": self.config.window,
            "balance": None if self._balance is None else asdict(self._balance),
            "stages": [_plain(asdict(stage)) for stage in self.stages],
            "tokenizer": zlib.crc32(self.tokenizer.to_json().encode()),
            "features": [*map(asdict, geometry), self.ids_per_second, self.vocab_size],
            "augment": None if self.config.augment is None else _plain(asdict(self.config.augment)),
            "transcripts": self.config.transcripts or None,
            "speech": None if self.speech is None else _plain(asdict(self.speech)),
        }

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {name: fingerprint(source) for name, source in self.opened("sources").items()}

    def _weights(self) -> dict[str, float]:
        opened = self.opened("sources")
        return {c.name: float(len(opened[c.name]) if c.weight is None else c.weight) for c in self.sources}

    def _log_path(self, number: int) -> Path | None:
        path = self.bad_samples_path
        return path if path is None or not number else path.with_name(f"{path.stem}.rank{number}{path.suffix}")

    def planned_mixture(self) -> list[dict[str, Any]]:
        """See `stream.planned_mixture`."""
        return planned_mixture(self.stages, self._weights())

    def seen_mixture(self) -> dict[str, Any]:
        """What this process has trained on so far: samples and tokens by source, modality and languages (``"en>fr"``);
        samples drawn by source (these follow the plan exactly; some still wait in open packs, some were skipped);
        skipped samples by reason; packing efficiency (mean filling of a pack, by the budget nearest to its end)."""
        self._take_over_loaded()
        names = [config.name for config in self.sources]
        found: dict[str, Any] = {"seen": {}, "drawn": dict.fromkeys(names, 0), "skipped": {}}
        found |= {"tokens": 0, "batches": 0, "stage": 0}
        if not self._trained:
            return found
        filling = 0.0
        for state in self._trained.values():
            drawn = [a + b for a, b in zip(state["drawn"], state["before"], strict=True)]
            counted = {name: state[name] for name in ("seen", "skipped", "tokens", "batches")}
            found = add_counts(found, counted | {"drawn": dict(zip(names, drawn, strict=True))})
            filling += state["filling"]
        stage = min(state["stage"] for state in self._trained.values())
        return found | {"stage": stage, "packing_efficiency": filling / max(1, found["batches"])}


class TrainLoader(Iterable[PackedBatch]):
    """The training batches. It deliberately has neither a length nor a `state_dict`: Lightning reads one batch ahead
    of such a loader and would save a position one batch late; the data module saves that of the last trained batch."""

    def __init__(self, module: OmniDataModule) -> None:
        self._module = module

    def __iter__(self) -> Iterator[PackedBatch]:
        stream, batches = self._module.stream(), 0
        while (batch := self._module.next_batch(stream)) is not None:
            batches += 1
            yield batch if self._module.on_read is None else self._module.on_read(batch)
        trainer = self._module.trainer
        finished = trainer is not None and 0 <= trainer.max_steps <= trainer.global_step
        if not batches and not finished:  # Lightning would ask again for ever
            raise RuntimeError(
                "the data stages hold no further batch (their `samples` are all drawn), but trainer.max_steps asks for "
                "more; lower it, or raise `samples`"
            )


def _named(sources: Mapping[str, SourceConfig | None]) -> list[SourceConfig]:
    """Those that are not left out (null), each called by its key."""
    return [replace(config, name=name) for name, config in sources.items() if config is not None]


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
