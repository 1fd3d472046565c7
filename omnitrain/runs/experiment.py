"""From a configuration to the objects of a run. The configuration goes no further than this file: everything else takes
typed arguments."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from omnitrain.config.compose import ConfigError
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.codec_frames import SpeechCodes
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.files import write_text
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel, thinker_fingerprint
from omnitrain.models.presets import init_codec_weights, init_weights
from omnitrain.training.module import TrainingModule
from omnitrain.training.talker import TalkerModule


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a verb works with."""

    run_dir: Path
    datamodule: OmniDataModule
    module: TrainingModule
    trainer: L.Trainer


def build(cfg: DictConfig, stage: str) -> Experiment:
    """Seed everything, then build data, model, module, callbacks, loggers and trainer, in this order.

    Args:
        stage: ``fit``, ``validate``, ``test`` or ``predict``: which data are opened.

    Raises:
        hydra.errors.InstantiationException: a constructor refused its arguments; names the place in the configuration.
        ConfigError: data or tokenizer are not where the configuration says.
    """
    quiet_lightning()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule: OmniDataModule = instantiate(cfg.data, _convert_="all")
    try:
        datamodule.setup(stage)  # a missing shard stops the run here, before anything large is built
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data: {error}") from error
    model = build_model(cfg, datamodule.tokenizer)
    if "preset" in cfg.model:
        if isinstance(model, Codec):
            init_codec_weights(model, cfg.seed)
        else:
            init_weights(model, cfg.seed)
    if isinstance(model, OmniModel) and model.talker is not None:
        datamodule.speech = give_voice(model, cfg.codec)
    optim = instantiate(cfg.optim, _convert_="all")
    try:
        module: TrainingModule = instantiate(cfg.module, _convert_="all", _partial_=True)(model, optim)
    except ValueError as error:  # parts, weights to start from
        raise ConfigError(str(error)) from error
    if isinstance(module, TalkerModule) and module.cached_thinker:
        assert datamodule.speech is not None
        datamodule.speech = replace(datamodule.speech, thinker=thinker_fingerprint(module.model))
    trainer: L.Trainer = instantiate(cfg.trainer, _convert_="all", _partial_=True)(
        callbacks=[instantiate(callback, _convert_="all") for callback in cfg.callbacks.values() if callback],
        logger=[instantiate(logger, _convert_="all") for logger in cfg.logger.values() if logger],
    )
    return Experiment(run_dir=Path(cfg.paths.run_dir), datamodule=datamodule, module=module, trainer=trainer)


def build_model(cfg: DictConfig, tokenizer: ChatTokenizer) -> OmniModel | Codec:
    """The model that ``cfg.model`` describes. The weights of a preset are not drawn yet."""
    # The model's vocabulary is the tokenizer's, unless the configuration says otherwise.
    from_tokenizer = {"vocab_size": tokenizer.vocab_size, "special_tokens": tokenizer.special_ids}
    filled = {key: value for key, value in from_tokenizer.items() if key in cfg.model and cfg.model[key] is None}
    return instantiate(cfg.model, _convert_="all", **filled)


def give_voice(model: OmniModel, codec_run: str | None) -> SpeechCodes:
    """Put the decoder of a trained codec into `model` as its Code2Wav, and say how its Talker numbers codes.

    Args:
        codec_run: folder of the codec's run; None leaves Code2Wav as it is and takes codes of any codec.

    Raises:
        ConfigError: no such codec, or one with other codebooks than the Talker.
    """
    assert model.talker is not None
    talker, fingerprint = model.talker.config, None
    if codec_run is not None:
        from omnitrain.runs.load import codec_fingerprint, load_codec

        try:
            codec = load_codec(codec_run)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"codec={codec_run}: {error}") from error
        fingerprint = codec_fingerprint(codec)
        if isinstance(codec, Codec):  # Mimi's frames are decoded by the public checkpoint's own Code2Wav
            ours, theirs = model.config.code2wav, codec.config.decoder
            if ours != theirs:
                raise ConfigError(
                    f"codec={codec_run}: its decoder is {theirs}, but the model's Code2Wav is {ours}; choose the codec "
                    "and the model of the same preset"
                )
            assert model.code2wav is not None
            model.code2wav.load_state_dict(codec.decoder.state_dict())
    special = {f.name: getattr(talker, f.name) for f in fields(SpeechCodes) if hasattr(talker, f.name)}
    return SpeechCodes(**special, codec=fingerprint, default_voice=next(iter(talker.speakers), None))


def quiet_lightning() -> None:
    """Keep what Lightning has to warn of, without its notes on hardware that is not there."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")


def starting_checkpoint(cfg: DictConfig) -> Path | None:
    """The file that `ckpt_path` names: ``last`` is that of the run folder, or None while there is none.

    Raises:
        ConfigError: the file does not exist.
    """
    if cfg.ckpt_path is None:
        return None
    if cfg.ckpt_path == "last":
        last = Path(cfg.paths.run_dir) / "checkpoints" / "last.ckpt"
        return last if last.exists() else None
    path = Path(cfg.ckpt_path)
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: there is no file {path}")
    return path


def trained_checkpoint(cfg: DictConfig, verb: str) -> Path | None:
    """The checkpoint of a verb that needs trained weights. None for a model that brings its own (model=pretrained).

    Raises:
        ConfigError: there is none.
    """
    path = starting_checkpoint(cfg)
    if path is None and "preset" in cfg.model and cfg.module.init_from is None:
        raise ConfigError(
            f"{verb} needs trained weights, and {cfg.paths.run_dir} holds none: name a run, as in "
            f"`python -m omnitrain {verb} RUN_DIR`, or a file with ckpt_path=FILE"
        )
    return path


def save_config(cfg: DictConfig, run_dir: Path) -> None:
    """Write the resolved configuration to ``run_dir/config.yaml``, all or nothing."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
