"""From a configuration to the objects of a run. The configuration as a whole goes no further than this file: everything
else takes the part that it needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from omnitrain.config.codec_sizes import codec_size
from omnitrain.config.run_config import (
    DistillModuleConfig,
    GspoModuleConfig,
    PretrainedConfig,
    RunConfig,
    TalkerDpoModuleConfig,
    TalkerModuleConfig,
    TeacherConfig,
    TrainerConfig,
)
from omnitrain.config.saved import read_config
from omnitrain.config.targets import LOOSE, build, check_inside
from omnitrain.config.typed import ConfigError, Named
from omnitrain.data.codec_frames import SpeechCodes
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.files import CONFIG, LAST_CHECKPOINT, last_checkpoint
from omnitrain.interop.mimi import mimi_codebook_size
from omnitrain.interop.public_config import FILE
from omnitrain.interop.public_config import read_config as read_public_config
from omnitrain.interop.stored import fill
from omnitrain.models.code2wav import of_first_codebooks
from omnitrain.models.codec import Codec
from omnitrain.models.deferred import LargeOnMeta
from omnitrain.models.omni import OmniModel, thinker_fingerprint
from omnitrain.models.presets import init_codec_weights, init_weights
from omnitrain.models.sizes import AuTModelConfig, CodecConfig, OmniConfig
from omnitrain.training.lora import add_lora
from omnitrain.training.mesh_strategy import MeshStrategy
from omnitrain.training.module import TrainingModule
from omnitrain.training.quiet import quiet_libraries
from omnitrain.training.teachers import ModelTeacher, ServerTeacher, Teacher


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a verb works with."""

    run_dir: Path
    datamodule: OmniDataModule
    module: TrainingModule
    trainer: L.Trainer


def build_experiment(config: RunConfig, stage: str, checkpoint: Path | None = None) -> Experiment:
    """Seed everything, then build data (those opened that `stage`, ``fit``, ``validate``, ``test`` or ``predict``,
    reads), model, module, callbacks, loggers and trainer, in this order. `checkpoint`: where a Trainer will take all
    weights from, so that processes that share the model need not make them. Raises ConfigError if a constructor refuses
    what the configuration gives it, or data or tokenizer are not where it says."""
    quiet_libraries()
    config = settle_decoder(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    run_dir = Path(config.paths.run_dir)
    datamodule = build_data(config)
    try:
        datamodule.setup(stage)  # a missing shard stops the run here, before anything large is built
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data: {error}") from error
    spread = stage in ("fit", "validate")
    cached = isinstance(config.module.config, TalkerModuleConfig) and config.module.config.cached_thinker
    # Who shares a model has no room for all of it. (What a Talker has heard is compared with a whole Thinker.)
    deferred = config.parallel.engine == "fsdp" and spread and not cached
    with LargeOnMeta() if deferred else nullcontext():
        model = build(config.model, place="model", deferred=deferred)
    if isinstance(model, Codec):
        init_codec_weights(model, config.seed)
    elif has_fresh_weights(config):
        init_weights(model, config.seed)
    if isinstance(model, OmniModel) and model.talker is not None:
        pairs = isinstance(config.module.config, TalkerDpoModuleConfig)
        datamodule.speech = replace(give_voice(model, config.codec), pairs=pairs)
    check_start(config)
    offered: dict[str, Any] = {"optim": config.optim, "seed": config.seed}
    if isinstance(config.module.config, DistillModuleConfig):
        offered["teacher"] = _teacher(config.module.config.teacher, datamodule)
    elif isinstance(config.module.config, GspoModuleConfig):
        rewards = {name: node for name, node in config.module.config.rewards.items() if node is not None}
        offered["rewards"] = {name: build(node, place=f"module.rewards.{name}") for name, node in rewards.items()}
    module: TrainingModule = build(config.module, model, place="module", **offered)
    if cached:
        assert isinstance(model, OmniModel)
        assert datamodule.speech is not None
        datamodule.speech = replace(datamodule.speech, thinker=thinker_fingerprint(model))
    datamodule.work = module.work()
    trainer = build_trainer(config, spread=spread)
    if isinstance(trainer.strategy, MeshStrategy):
        trainer.strategy.checkpoint_follows = checkpoint is not None
    return Experiment(run_dir=run_dir, datamodule=datamodule, module=module, trainer=trainer)


def _teacher(config: TeacherConfig, datamodule: OmniDataModule) -> Teacher | None:
    """Who `module.teacher` names, None if nobody is named. Raises ConfigError: it is not there, or does not know the
    student's tokens or media."""
    from omnitrain.interop.openai_server import OpenAIServer
    from omnitrain.runs.load import load

    vocabulary = datamodule.tokenizer.vocabulary
    if config.server is not None and config.name is not None:
        try:
            return ServerTeacher(OpenAIServer(config.server, config.name), vocabulary, config.top_k or 20)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"module.teacher.server: {error}") from error
    if config.folder is None:
        return None
    try:
        model, encoder = load(config.folder)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"module.teacher.folder: {error}") from error
    if encoder.tokenizer.vocabulary != vocabulary:
        raise ConfigError(
            f"module.teacher.folder={config.folder}: its tokenizer is another than data.tokenizer, so that its tokens "
            "mean something else; train the student with the teacher's"
        )
    read = datamodule.config
    pairs: list[tuple[str, Any, Any]] = [("audio", encoder.audio, read.audio), ("vision", encoder.vision, read.vision)]
    sizes = {
        "audio": ("sample_rate", "n_fft", "hop", "n_mels", "chunk_frames"),
        "vision": ("patch", "temporal_patch", "merge"),
    }
    for key, theirs, ours in pairs:
        for name in sizes[key]:
            if getattr(theirs, name) != getattr(ours, name) and not read.transcripts:
                raise ConfigError(
                    f"module.teacher.folder={config.folder}: it reads media with {key}.{name}={getattr(theirs, name)}, "
                    f"and data.{key}.{name} is {getattr(ours, name)}; set it to the teacher's"
                )
    return ModelTeacher(model, datamodule.tokenizer.vocab_size, config.top_k)


def build_data(config: RunConfig) -> OmniDataModule:
    """The data, nothing of them opened yet."""
    sizes = config.model.config
    if isinstance(sizes, PretrainedConfig):
        sizes = read_public_config(sizes.folder)[0]
    ids_per_second = sizes.position_id_per_seconds if isinstance(sizes, OmniConfig) else 13
    offered = {"seed": config.seed, "run_dir": config.paths.run_dir, "ids_per_second": ids_per_second}
    return build(config.data, place="data", **offered)


READ_BY = ("heads", "kv_heads", "head_dim", "chunk_frames")
"""Sizes that say how weights are read, and that no weight's shape gives away."""


def check_start(config: RunConfig) -> None:
    """Raise ConfigError, which names the key, if `module.init_from` takes weights from a run that read them otherwise
    than this model would, though all shapes agree."""
    start = getattr(config.module.config, "init_from", None)
    for part, folder in start.items() if isinstance(start, dict) else [(None, start)]:
        if folder is None or not (Path(folder) / CONFIG).is_file():
            continue
        theirs, ours = (_sizes(c.model.config) for c in (read_config(Path(folder)), config))
        for name in theirs.keys() & ours.keys():
            for size in READ_BY if part in (None, name) else ():
                there, here = getattr(theirs[name], size, None), getattr(ours[name], size, None)
                if there != here:
                    raise ConfigError(f"module.init_from: {folder} has {name}.{size}={there}, and this model {here}")


def _sizes(model: Any) -> dict[str, Any]:
    """Of the parts that a training may start from, by the names of the modules."""
    if isinstance(model, AuTModelConfig):
        return {"aut": model.encoder, "decoder": model.decoder}
    return {"aut": model.aut, "visual": model.vision, "thinker": model.thinker} if isinstance(model, OmniConfig) else {}


def has_fresh_weights(config: RunConfig) -> bool:
    """Whether the model is described by its sizes, so that its weights are drawn from the seed."""
    return isinstance(config.model.config, OmniConfig | AuTModelConfig | CodecConfig)


def build_trainer(config: RunConfig, *, spread: bool) -> L.Trainer:
    """Lightning's Trainer with callbacks and loggers, all of which write into the run folder alone. `spread`: the model
    is shared as `config.parallel` says; else each process has its own, as those that write answers need it."""
    run_dir = Path(config.paths.run_dir)
    arguments: dict[str, Any] = {**vars(config.trainer), "precision": precision(config.trainer)}
    for name in ("strategy", "profiler"):
        arguments[name] = _part(arguments[name], config, f"trainer.{name}")
    if config.parallel.engine == "fsdp" and spread:
        arguments["strategy"] = _mesh_strategy(config)
    plugins = [_part(plugin, config, f"trainer.plugins[{i}]") for i, plugin in enumerate(config.trainer.plugins)]
    arguments["plugins"] = plugins or None
    for group, nodes in (("callbacks", config.callbacks), ("logger", config.logger)):
        arguments[group] = [_part(node, config, f"{group}.{name}") for name, node in nodes.items() if node]
    try:
        return L.Trainer(**arguments, default_root_dir=run_dir)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {error}") from error


def _mesh_strategy(config: RunConfig) -> MeshStrategy:
    if config.trainer.strategy != "auto":
        raise ConfigError(f"trainer.strategy={config.trainer.strategy}: parallel.engine=fsdp brings its own; set auto")
    if isinstance(config.model.config, CodecConfig):
        raise ConfigError("parallel.engine=fsdp: a codec is small, and each process has a copy; set parallel=ddp")
    return MeshStrategy(**{name: value for name, value in vars(config.parallel).items() if name != "engine"})


def precision(config: TrainerConfig) -> str:
    """What `trainer.precision=auto` means on this machine."""
    if config.precision != "auto":
        return config.precision
    fast = config.accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16-mixed" if fast else "32-true"


def _part(node: Any, config: RunConfig, place: str) -> Any:
    if not isinstance(node, Named):
        return node
    run_dir = Path(config.paths.run_dir)
    if node.target in LOOSE:
        check_inside(node, run_dir, place)
        folders = {name: node.keywords.get(name) for name in ("save_dir", "dirpath")}
        given = {name: str(run_dir / folder) for name, folder in folders.items() if folder is not None}
        default = {"save_dir": str(run_dir)} if place.startswith("logger.") else {}
        node = replace(node, keywords={**default, **node.keywords, **given})
    timeout = config.parallel.timeout_seconds
    return build(node, run_dir=run_dir, run_name=config.name, timeout_seconds=timeout, place=place)


def gather(experiment: Experiment, config: RunConfig) -> None:
    """Put the whole model, on the first process, in the place of one that is spread. A collective."""
    module = experiment.module
    if module.mesh is None:
        return
    state = module.mesh.whole_state()
    if experiment.trainer.is_global_zero:
        model = build(config.model, place="model")
        if (lora := getattr(config.module.config, "lora", None)) is not None:
            add_lora(model, lora, config.seed)
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
        module.model = model


def settle_decoder(config: RunConfig) -> RunConfig:
    """Say who makes sound of a Mimi's codes. A Code2Wav that comes with weights in the public format was trained on
    them, and stays. Any other knows nothing of them: the model is made without it (`model.code2wav` is null, also in
    the run's config.yaml), and Mimi speaks."""
    sizes, start = config.model.config, getattr(config.module.config, "init_from", None)
    if config.codec is None or not isinstance(sizes, OmniConfig) or sizes.code2wav is None:
        return config
    if mimi_codebook_size(Path(config.codec)) is None:
        return config
    if isinstance(start, str) and (not Path(start).exists() or _knows_mimi(Path(start))):
        return config
    return replace(config, model=replace(config.model, config=replace(sizes, code2wav=None)))


def _knows_mimi(start: Path) -> bool:
    """Whether the Code2Wav in a folder is the public one: in the public format, or of a run that began so and has not
    been given another codec's."""
    from omnitrain.runs.convert import came_from

    public: Path | None = start
    if (start / CONFIG).is_file():
        before = read_config(start).codec
        if before is not None and codec_size(before, "encoder_dim", None) is not None:
            return False
        public = came_from(start)
    return public is not None and (public / FILE).is_file() and read_public_config(public)[0].code2wav is not None


def give_voice(model: OmniModel, codec_run: str | None) -> SpeechCodes:
    """Put the decoder of the codec that is called `codec_run` into `model` as its Code2Wav (None: it stays as it is,
    and takes codes of any codec; of a Mimi see `settle_decoder`), and say how its Talker numbers codes. Raises
    ConfigError for no such codec, or one with other codebooks than the Talker."""
    assert model.talker is not None
    talker, fingerprint = model.talker.config, None
    if codec_run is not None:
        from omnitrain.runs.load import codec_fingerprint, load_codec

        try:
            codec = load_codec(codec_run)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"codec={codec_run}: {error}") from error
        fingerprint = codec_fingerprint(codec)
        if isinstance(codec, Codec):
            ours, theirs = model.config.code2wav, codec.config.decoder
            first = ours is not None and replace(theirs, quantizers=min(ours.quantizers, theirs.quantizers))
            if ours != first:
                raise ConfigError(
                    f"codec={codec_run}: its decoder is {theirs}, but the model's Code2Wav is {ours}; leave out what "
                    "you have given of model.code2wav and of model.talker.codebooks and codebook_size, or choose the "
                    "codec that it fits"
                )
            assert model.code2wav is not None
            fill(model.code2wav, of_first_codebooks(codec.decoder, model.code2wav.config.quantizers))
        elif talker.codebooks > codec.quantizers or talker.codebook_size != codec.codebook_size:
            raise ConfigError(
                f"codec={codec_run}: a Mimi of {codec.quantizers} codebooks of {codec.codebook_size} codes, but the "
                f"model's Talker has {talker.codebooks} of {talker.codebook_size}; leave out model.talker.codebooks "
                "and codebook_size, or give fewer codebooks"
            )
    return SpeechCodes(
        **talker.special_codes(),
        codebooks=talker.codebooks,
        speakers=talker.speakers,
        frames_per_word=talker.frames_per_word,
        codec=fingerprint,
        default_voice=next(iter(talker.speakers), None),
    )


def starting_checkpoint(config: RunConfig) -> Path | None:
    """The file or folder that `ckpt_path` names: ``last`` is that of the run folder, or None while there is none.
    Raises ConfigError if it does not exist."""
    if config.ckpt_path is None:
        return None
    if config.ckpt_path == "last":
        return last_checkpoint(Path(config.paths.run_dir))
    path = Path(config.ckpt_path)
    path = path / LAST_CHECKPOINT if path.is_dir() and path.suffix != ".ckpt" else path
    if not path.exists():
        raise ConfigError(f"ckpt_path={config.ckpt_path}: there is no file {path}")
    return path


def trained_checkpoint(config: RunConfig, verb: str) -> Path | None:
    """The checkpoint of a verb that needs trained weights; None for a model that brings its own (model=pretrained).
    Raises ConfigError if there is none."""
    path = starting_checkpoint(config)
    if path is None and has_fresh_weights(config) and config.module.config.init_from is None:
        raise ConfigError(
            f"{verb} needs trained weights, and {config.paths.run_dir} holds none: name a run, as in "
            f"`python -m omnitrain {verb} RUN_DIR`, or a file with ckpt_path=FILE"
        )
    return path
