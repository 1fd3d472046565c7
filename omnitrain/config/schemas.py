"""What Hydra composes from: each option's defaults, from the dataclasses, as the group `schema`.

``conf/module/talker.yaml`` begins with ``/schema/module/talker@_here_`` and says only what differs. Sizes that follow
another size are interpolations here, so that ``model.thinker.d_model=256`` changes what must change with it; a saved
``config.yaml`` has the numbers.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from omnitrain.config import run_config
from omnitrain.config.targets import OURS
from omnitrain.config.typed import schema
from omnitrain.data.settings import DataConfig, WaveformsConfig
from omnitrain.evaluation.settings import SETTINGS
from omnitrain.models.sizes import (
    AUT_PRESETS,
    CODEC_PRESETS,
    PRESETS,
    SPEECH_PRESETS,
    CodecConfig,
    OmniConfig,
    codec_vocabulary,
)

_TARGETS = {cls: target for target, cls in OURS.items()}
GROUPS = ("model", "data", "module", "optim", "trainer", "parallel", "callbacks", "logger", "evaluation", "paths")
"""One option of each stands in every configuration."""


def register_schemas() -> None:
    """Put them into Hydra's store. Can be called again."""
    store = ConfigStore.instance()
    for group, options in _options().items():
        for name, node in options.items():
            store.store(group=f"schema/{group}", name=name, node=node)
    store.store(group="schema", name="run", node=_root())


def _root() -> DictConfig:
    """The keys that are in no group."""
    node = schema(run_config.RunConfig)
    with open_dict(node):
        for name in (*GROUPS, "eval", "study", "arm", "match", "variables"):
            del node[name]
    return node


def _options() -> dict[str, dict[str, DictConfig]]:
    c = run_config
    callbacks = {
        "checkpoint": c.CheckpointConfig, "spike_guard": c.SpikeGuardConfig, "throughput": c.ThroughputConfig,
        "record": c.RunRecordConfig, "progress": c.ProgressConfig, "watchdog": c.WatchdogConfig,
        "media_panels": c.MediaPanelsConfig,
    }  # fmt: skip
    modules = {
        "thinker": c.ThinkerModuleConfig,
        "talker": c.TalkerModuleConfig,
        "distill": c.DistillModuleConfig,
        "gspo": c.GspoModuleConfig,
        "talker_dpo": c.TalkerDpoModuleConfig,
        "aut": c.AuTModuleConfig,
        "codec": c.CodecModuleConfig,
    }
    return {
        "model": {
            **{name: omni(name, speech=False) for name in PRESETS},
            **{f"{name}_speech": omni(name, speech=True) for name in SPEECH_PRESETS},
            **{f"codec_{name}": _named(type(config), config) for name, config in CODEC_PRESETS.items()},
            "codec_of_start": codec_of_start(),
            **{f"aut_{name}": aut(name) for name in AUT_PRESETS},
            "pretrained": _named(c.PretrainedConfig),
        },
        "data": {"shards": _named(DataConfig), "waveforms": _named(WaveformsConfig)},
        "module": {name: _named(cls) for name, cls in modules.items()},
        "optim": {"adamw": schema(c.OptimConfig)},
        "trainer": {"trainer": schema(c.TrainerConfig)},
        "parallel": {"parallel": schema(c.ParallelConfig)},
        "callbacks": {"default": OmegaConf.create({name: _named(cls) for name, cls in callbacks.items()})},
        "logger": {
            "csv": OmegaConf.create({"csv": _named(c.CsvLoggerConfig)}),
            "wandb": OmegaConf.create({"wandb": _named(c.WandbConfig)}),
        },
        "evaluation": {name: schema(cls) for name, cls in SETTINGS.items()},
        "paths": {"default": schema(c.PathsConfig)},
    }


def _named(cls: type, value: Any = None) -> DictConfig:
    return schema(cls, value, target=_TARGETS[cls])


def aut(preset: str) -> DictConfig:
    """The sizes of a preset of `AuT`, with what follows from others as interpolations."""
    node = _named(type(AUT_PRESETS[preset]), AUT_PRESETS[preset])
    node.decoder.d_model = "${model.encoder.d_model}"
    node.decoder.vocab_size = "${omnitrain.vocab_size:${data.tokenizer}}"
    return node


def codec_of_start() -> DictConfig:
    """The sizes of the codec that `module.init_from` names; before there is one, those of the smallest preset."""
    node = _named(CodecConfig)
    follow(node, CODEC_PRESETS["tiny"], "module.init_from")
    return node


def omni(preset: str, *, speech: bool) -> DictConfig:
    """The sizes of a preset of `OmniModel`, with what follows from others as interpolations."""
    talker, code2wav = SPEECH_PRESETS[preset] if speech else (None, None)
    node = _named(OmniConfig, SimpleNamespace(**{**vars(PRESETS[preset]), "talker": talker, "code2wav": code2wav}))
    model = "${model.thinker."
    node.special_tokens = "${omnitrain.special_tokens:${data.tokenizer}}"
    if preset != "qwen3_omni_30b_a3b":  # there it is padded beyond the tokenizer
        node.thinker.vocab_size = "${omnitrain.vocab_size:${data.tokenizer}}"
    node.thinker.accept_hidden_layer = "${omnitrain.half:" + model + "layers}}"
    node.aut.out_dim = node.vision.out_dim = model + "d_model}"
    if talker is not None and code2wav is not None:
        own = "${model.talker."
        node.talker.thinker_dim, node.talker.accept_hidden_layer = model + "d_model}", model + "accept_hidden_layer}"
        for name in ("d_model", "codebooks", "codebook_size"):
            node.talker.mtp[name] = own + name + "}"
        for name in codec_vocabulary(talker.codebook_size):
            if name != "codebook_size":
                node.talker[name] = "${omnitrain.codec_vocabulary:" + name + "," + own + "codebook_size}}"
        follow(node.code2wav, code2wav, "codec", "decoder.")
        node.talker.codebooks = of_codec("codec", "decoder.quantizers", talker.codebooks)
        node.talker.codebook_size = of_codec("codec", "decoder.codebook_size", talker.codebook_size)
        node.code2wav.quantizers, node.code2wav.codebook_size = own + "codebooks}", own + "codebook_size}"
    return node


def follow(node: DictConfig, sizes: Any, key: str, below: str = "") -> None:
    """Make each size in `node` that of a codec (`of_codec`), of its fields `below`; without one that in `sizes`."""
    for f in fields(sizes):
        value = getattr(sizes, f.name)
        if is_dataclass(value):
            follow(node[f.name], value, key, f"{below}{f.name}.")
        else:
            node[f.name] = of_codec(key, below + f.name, value)


def of_codec(key: str, field: str, otherwise: Any) -> str:
    """An interpolation: a size of the codec that the configuration names at `key`, or `otherwise`."""
    otherwise = list(otherwise) if isinstance(otherwise, tuple) else otherwise
    return "${omnitrain.codec_size:${" + key + "}," + f"{field},{otherwise}" + "}"
