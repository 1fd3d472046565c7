"""What can be set of the data: plain frozen dataclasses, which are the configuration too.

Nothing heavy is imported here, so that a command line can be checked before PyTorch is loaded. Types are those that
structured configurations take (OmegaConf 2.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from omnitrain.data.shards import Source


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of the mixture.

    Attributes:
        name: its key; weights, counters and logs use it.
        path: a folder of shards, one file, a glob, or a list of files of one folder; a ``.yaml`` mapping reads a user's
            own data (`adapters`).
        split, where: which rows, see `SampleSource`.
        weight: share of the samples, relative to the other sources' weights. Default: its number of samples, which
            passes over all sources equally often.
        limit: use only so many samples, evenly spaced over the source (for quick validation).
        samples: a ready `Source` instead of `path`, from Python alone.

    Raises ValueError: a limit or a weight that cannot be.
    """

    name: str = ""
    path: Any = None
    split: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    weight: float | None = None
    limit: int | None = None
    samples: Any = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data source {self.name!r}: limit {self.limit} must be at least 1")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise ValueError(f"data source {self.name!r}: weight {self.weight} must be a number of at least 0")

    def open(self) -> Source:
        """The samples, shards opened.

        Raises ValueError or FileNotFoundError: nothing there, or nothing left by `split` and `where`.
        """
        from omnitrain.data.adapters import open_source, spaced

        source = self.samples
        if source is None:
            if self.path is None:
                raise ValueError(f"data source {self.name!r} needs a path (a folder of shards or a mapping) or samples")
            source = open_source(self.path, split=self.split, where=self.where, name=self.name)
        if len(source) == 0:
            raise ValueError(f"data source {self.name!r} ({self.path}) holds no samples")
        return spaced(source, self.limit)


@dataclass(frozen=True, kw_only=True)
class AudioGeometry:
    """How a waveform becomes mel frames (Qwen3-Omni report section 2.2: 128 mels, 25 ms window, 10 ms hop at 16 kHz).

    `chunk_frames` is the length of the encoder's convolution chunks, which decides how many tokens an audio takes.
    `reference_padding` fills all recordings of a sample up to the longest before they become frames, as `transformers`
    does; else what becomes of a recording does not depend on its neighbours. Raises ValueError: a number below 1.
    """

    sample_rate: int = 16_000
    n_fft: int = 400
    hop: int = 160
    n_mels: int = 128
    chunk_frames: int = 100
    reference_padding: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "audio", but=("reference_padding",))


@dataclass(frozen=True, kw_only=True)
class VisionGeometry:
    """How pictures and frames become patches.

    A picture is resized so that both sides are multiples of ``patch * merge`` and its area lies within `min_pixels` and
    `max_pixels`. A video is sampled at `fps`; its frames keep to `video_min_pixels` .. `video_max_pixels` each, and all
    frames together to about ``video_total_pixels * temporal_patch``. Raises ValueError: a number of zero or less.

    `sampling`: "times" takes what is on screen every 1 / fps seconds; "reference" as many frames as `transformers`
    takes, an even number of at least 4, spread evenly over the clip's frames, and counts 1 / fps from one to the next.
    """

    patch: int = 16
    temporal_patch: int = 2
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 32 * 32
    video_min_pixels: int = 128 * 32 * 32
    video_max_pixels: int = 768 * 32 * 32
    video_total_pixels: int = 115_200 * 32 * 32
    fps: float = 2.0
    sampling: str = "times"

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError(f"vision: fps is {self.fps}; it must be above 0")
        if self.sampling not in ("times", "reference"):
            raise ValueError(f"vision: sampling is {self.sampling!r}; it must be 'times' or 'reference'")
        _at_least_one(self, "vision", but=("fps", "sampling"))

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x time x height x width."""
        return 3 * self.temporal_patch * self.patch * self.patch


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What is accepted. Pixels count height x width; of a video, `max_video_pixels` counts all sampled frames.

    A video that would give more than `max_video_frames` is sampled more sparsely, over its whole length. The longest
    recording has 40 minutes, and what a codec adds to fill its last frame.
    """

    max_pixels: int = 64 << 20
    max_aspect_ratio: float = 200.0
    max_audio_seconds: float = 40 * 60 + 1
    max_video_seconds: float = 60 * 60
    max_video_frames: int = 768
    max_video_pixels: int = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that one pack holds. None: no bound. `mel_frames` are 10 ms each; `patches` are counted before the
    merge, so four of them become one token; `frames` are codec frames of spoken answers, 80 ms each. Raises ValueError:
    a bound below 1."""

    tokens: int = 4096
    mel_frames: int | None = None
    patches: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "pack budget")

    def filling(self, sizes: Iterable[float]) -> float:
        """How full a pack of these `EncodedSample.sizes` is, by the bound nearest to its end. Above 1: does not fit."""
        return max(used / most for used, most in zip(sizes, vars(self).values(), strict=True) if most is not None)

    def excess(self, sizes: Iterable[int]) -> str:
        """Which bounds are broken, in words."""
        names = ("tokens", "mel frames", "patches", "codec frames")
        rows = zip(sizes, names, vars(self).values(), strict=True)
        return ", ".join(f"{used} {name} > {most}" for used, name, most in rows if most is not None and used > most)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with its own mixture and lengths; what several of them must fulfil together,
    `stream.check_stages` says.

    Attributes:
        until_tokens: the stage ends once the run (all ranks) has emitted so many tokens; None: never (last stage only).
        samples: by source name, instead of `until_tokens` and `weights`: the stage draws exactly so many samples of
            each, evenly interleaved, hands out its open packs and ends. If it is the last stage, the stream ends too.
            One process only, since ranks would end after different numbers of batches.
        weights: by source name; sources left out are not drawn. None: the sources' own weights.
        max_tokens, max_mel_frames, max_patches: budgets of a pack. None: the data module's own.
    """

    until_tokens: int | None = None
    samples: dict[str, int] | None = None
    weights: dict[str, float] | None = None
    max_tokens: int | None = None
    max_mel_frames: int | None = None
    max_patches: int | None = None


def _at_least_one(settings: Any, name: str, but: Sequence[str] = ()) -> None:
    for key, value in vars(settings).items():
        if value is not None and key not in but and value < 1:
            raise ValueError(f"{name}: {key} is {value}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How recordings are changed in training, each draw of a sample anew.

    Attributes:
        speeds: one of these is drawn; 1.1 is faster and higher (Ko et al. 2015).
        noise_share: share of the draws that get noise, of a random colour between white and brown.
        noise_snr: bounds of its signal-to-noise ratio, dB.
        room_share: share of the draws that sound as in a room: convolved with noise that dies away (Polack 1988).
        room_seconds: bounds of the time in which the echo falls by 60 dB.
    """

    speeds: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])
    noise_share: float = 0.3
    noise_snr: tuple[float, float] = (5.0, 30.0)
    room_share: float = 0.3
    room_seconds: tuple[float, float] = (0.1, 0.6)

    def __post_init__(self) -> None:
        if not self.speeds or any(not 0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"data.augment.speeds={self.speeds}: give at least one, each between 0.5 and 2")
        for name in ("noise_share", "room_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augment.{name}={getattr(self, name)}: must lie within 0..1")
        for name in ("noise_snr", "room_seconds"):
            low, high = getattr(self, name)
            if low > high or (name == "room_seconds" and low <= 0):
                raise ValueError(f"data.augment.{name}={[low, high]}: write the lower bound first")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``data=shards``: samples, how they are mixed and packed (`datamodule.OmniDataModule`).

    Attributes:
        tokenizer: a tokenizer.json, or a folder with one.
        sources: what is trained on, by name. `weight` is the share of samples; without it, each source counts its
            samples. `where` keeps only some rows: {task: [caption, asr], languages: [en]}. null drops a source that a
            recipe underneath has named.
        validation_sources: read once, in order, for the loss during training.
        test_sources: scored after training, split by split; none: the validation sources.
        predict_sources: prompts for `predict` (without the last answer); none: the validation sources.
        voice_sources: recordings that tell voices apart in the scores of speech; none: sources.
        max_tokens, max_mel_frames, max_patches, max_frames: a pack is one rank's batch: whole samples end to end until
            one of these budgets is full; a mel frame has 10 ms, a codec frame of a spoken answer 80 ms.
        validation_max_tokens: budget of tokens outside training; null: max_tokens.
        window: packs kept open by the packer. More packs fill better and hold more decoded media in memory.
        balance: a pack holds at most so many times the operations of one that fills its budgets and is like the mixture
            as a whole, so that no process waits long for another's; 1 suits most mixtures, with a window of 16 or more.
            null: no bound.
        stages: e.g. [{until_tokens: 2000000, max_tokens: 1024}, {}].
        streams: of packs that the data are dealt to, a multiple of the processes; null: one for each. A run goes on
            with any number of processes that divides it, and learns the same if a step has as many packs as before
            (trainer.accumulate_grad_batches).
        num_workers: processes that decode media, of each stream; batches do not depend on it.
        worker_buffer: encoded samples that each keeps ready; more than a pack holds, or training waits.
        max_bad_fraction: more unreadable samples than this stop the run.
        thinking: the model is one that thinks first: a last answer without thoughts begins with empty ones.
        loss_on: of a conversation, `all` that the assistant says is learnt, or the `last`: what it says, and calls,
            after the user's last question.
        transcripts: beside each sample with recordings the same one with their transcripts (`text` of the segments) in
            their place, which a teacher reads (module=distill).
        audio, vision: geometry of the features; must match the model's encoders.
        augment: of recordings in training, e.g. {speeds: [0.9, 1, 1.1], noise_share: 0.3}; null: as they are.
        limits: largest picture, longest recording, ...
        seed: of the order; null: the run's.
    """

    tokenizer: str
    sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    validation_sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    test_sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    predict_sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    voice_sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    max_tokens: int = 2048
    max_mel_frames: int | None = 6000
    max_patches: int | None = 8192
    max_frames: int | None = None
    validation_max_tokens: int | None = None
    window: int = 8
    balance: float | None = None
    stages: list[Stage] = field(default_factory=list)
    streams: int | None = None
    num_workers: int = 1
    worker_buffer: int = 64
    max_bad_fraction: float = 0.01
    thinking: bool = False
    loss_on: Literal["all", "last"] = "all"
    transcripts: bool = False
    audio: AudioGeometry = field(default_factory=AudioGeometry)
    vision: VisionGeometry = field(default_factory=VisionGeometry)
    augment: AugmentConfig | None = None
    limits: MediaLimits = field(default_factory=MediaLimits)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_loading(self)
        if self.streams is not None and self.streams < 1:
            raise ValueError(f"data.streams is {self.streams}; it must be at least 1, or null")
        if self.balance is not None and self.balance <= 0:
            raise ValueError(f"data.balance is {self.balance}; it must be above 0, or null")


@dataclass(frozen=True, kw_only=True)
class WaveformsConfig:
    """``data=waveforms``: rows of sound for training a codec (`waveforms.WaveformDataModule`). Sources as in
    data=shards; whatever holds a recording is used.

    Attributes:
        tokenizer: kept in the run folder with the codec, as with every run.
        sources, validation_sources, test_sources, voice_sources, num_workers, worker_buffer, max_bad_fraction, limits,
            seed: see `DataConfig`.
        rows: of a batch.
        row_seconds: length of a row, a multiple of 0.08 s.
        sample_rate: Hz.
        samples_per_frame: of the codec; a row is a whole number of frames.
        validation_rows: at most so many rows are read for a validation.
    """

    tokenizer: str
    sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    validation_sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    test_sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    voice_sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    rows: int = 8
    row_seconds: float = 1.92
    sample_rate: int = 24_000
    samples_per_frame: int = 1920
    validation_rows: int = 16
    num_workers: int = 1
    worker_buffer: int = 16
    max_bad_fraction: float = 0.01
    limits: MediaLimits = field(default_factory=MediaLimits)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_loading(self)
        samples = round(self.row_seconds * self.sample_rate)
        if self.rows < 1 or samples < self.samples_per_frame or samples % self.samples_per_frame:
            raise ValueError(
                f"data.row_seconds={self.row_seconds}: {samples} samples are no whole number of frames of "
                f"{self.samples_per_frame}; use a multiple of {self.samples_per_frame / self.sample_rate:g} s, and at "
                "least one row"
            )

    @property
    def row_samples(self) -> int:
        return round(self.row_seconds * self.sample_rate)


def _check_loading(config: DataConfig | WaveformsConfig) -> None:
    if not 0 <= config.max_bad_fraction <= 1:
        raise ValueError(f"data.max_bad_fraction is {config.max_bad_fraction}; it is a share between 0 and 1")
    if config.num_workers < 0:
        raise ValueError(f"data.num_workers is {config.num_workers}; it must be at least 0")
