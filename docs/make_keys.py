"""Writes docs/keys.md, all keys of the configuration, from the dataclasses: python docs/make_keys.py"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omnitrain.config import run_config
from omnitrain.config.hydra_keys import CONSTRUCTORS as OF_HYDRA
from omnitrain.config.targets import LOOSE, OURS
from omnitrain.config.typed import annotations
from omnitrain.data import settings as data_settings
from omnitrain.evaluation.settings import SETTINGS
from omnitrain.models import sizes
from omnitrain.study.spec import StudySpec
from omnitrain.tasks.settings import BenchmarkRun

PAGE = Path(__file__).parent / "keys.md"
HEADER = """\
# All keys

Made by `python docs/make_keys.py` from the dataclasses that hold the defaults; a test keeps it fresh. `GROUP=OPTION`
chooses one of a group's options (`python -m omnitrain fit --help` lists them), `KEY=VALUE` changes one key, `--cfg job`
prints the result with all that recipe and options have set. *must be given*: without a default. A size that follows
another one (`aut.out_dim` is the Thinker's `d_model`) is filled in by the option.
"""

PARTS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("The run", "", [("", run_config.RunConfig)]),
    ("model", "tiny, small, qwen3_omni_30b_a3b, each also with `_speech`", [
        ("model", sizes.OmniConfig), ("model.thinker", sizes.ThinkerConfig), ("model.aut", sizes.AuTConfig),
        ("model.vision", sizes.VisionConfig), ("model.talker", sizes.TalkerConfig),
        ("model.talker.mtp", sizes.MTPConfig), ("model.code2wav", sizes.Code2WavConfig)]),
    ("model (codec)", "codec_tiny, codec_small, codec_public, codec_of_start", [("model", sizes.CodecConfig)]),
    ("model=pretrained", "", [("model", run_config.PretrainedConfig)]),
    ("data", "pack, pack_part, post_tasks, shards", [
        ("data", data_settings.DataConfig), ("data.sources.NAME", data_settings.SourceConfig),
        ("data.stages[i]", data_settings.Stage), ("data.audio", data_settings.AudioGeometry),
        ("data.vision", data_settings.VisionGeometry), ("data.limits", data_settings.MediaLimits)]),
    ("data=waveforms", "", [("data", data_settings.WaveformsConfig)]),
    ("module=thinker", "", [
        ("module", run_config.ThinkerModuleConfig), ("module.lora", run_config.LoraConfig),
        ("module.loss", run_config.LossConfig),
        ("module.generation", run_config.GenerationConfig)]),
    ("module=aut", "", [
        ("module", run_config.AuTModuleConfig), ("module.loss", run_config.AuTLossConfig),
        ("module.spec_augment", run_config.SpecAugmentConfig),
        ("module.generation", run_config.AuTGenerationConfig)]),
    ("module=talker", "", [("module", run_config.TalkerModuleConfig), ("module.loss", run_config.TalkerLossConfig)]),
    ("module=distill", "", [
        ("module", run_config.DistillModuleConfig), ("module.teacher", run_config.TeacherConfig),
        ("module.rollout", run_config.RolloutConfig)]),
    ("module=gspo", "", [("module", run_config.GspoModuleConfig)]),
    ("module=talker_dpo", "", [("module", run_config.TalkerDpoModuleConfig)]),
    ("module=codec", "", [
        ("module", run_config.CodecModuleConfig), ("module.loss", run_config.CodecLossConfig),
        ("module.discriminator", sizes.DiscriminatorConfig)]),
    ("optim", "wsd, cosine", [("optim", run_config.OptimConfig)]),
    ("trainer", "cpu, gpu, ddp", [("trainer", run_config.TrainerConfig)]),
    ("parallel", "ddp, fsdp, fsdp_ep, fsdp_ep_cp", [("parallel", run_config.ParallelConfig)]),
    ("callbacks", "default; one is left out with callbacks.NAME=null", [
        ("callbacks.checkpoint", run_config.CheckpointConfig), ("callbacks.spike_guard", run_config.SpikeGuardConfig),
        ("callbacks.throughput", run_config.ThroughputConfig), ("callbacks.progress", run_config.ProgressConfig),
        ("callbacks.media_panels", run_config.MediaPanelsConfig)]),
    ("logger", "csv, wandb", [("logger.wandb", run_config.WandbConfig)]),
    ("evaluation", "heldout, transcripts, codec, speech, dialogue", [("evaluation", cls) for cls in SETTINGS.values()]),
    ("paths", "", [("paths", run_config.PathsConfig)]),
    ("eval", "with `test`: `+eval=NAME`", [("eval", BenchmarkRun)]),
    ("study", "of the recipe nondegradation", [("study", StudySpec)]),
]


def page() -> str:
    """The whole page."""
    parts = [HEADER]
    for title, options, tables in PARTS:
        parts.append(f"\n## {title}\n" + (f"\nOptions: {options}.\n" if options else ""))
        parts += [table(place, cls) for place, cls in tables]
    parts.append(
        "\n## What `_target_` may name\n\nConstructors with keys of their own, above:\n"
        + "".join(f"\n- `{name}`" for name in OURS)
        + "\n\nConstructors that take any of their keywords:\n"
        + "".join(f"\n- `{name}`" for name in LOOSE)
        + "\n\nBelow `hydra`:\n"
        + "".join(f"\n- `{name}`" for name in OF_HYDRA)
        + "\n"
    )
    return "".join(parts)


def table(place: str, cls: Any) -> str:
    """One dataclass: what it is, and its keys."""
    summary = " ".join((cls.__doc__ or "").split("Attributes:")[0].split("Raises:")[0].split())
    meanings, hints = described(cls), annotations(cls)
    rows = []
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            continue  # a table of its own
        key = f"{place}.{f.name}" if place else f.name
        meaning = meanings.get(f.name, "").replace("|", "\\|")
        rows.append(f"| `{key}` | {kind(hints[f.name])} | {default(f)} | {meaning} |\n")
    head = "\n| key | type | default | |\n|---|---|---|---|\n" if rows else ""
    return f"\n{summary}\n{head}{''.join(rows)}"


def described(cls: Any) -> dict[str, str]:
    """Field -> its meaning, from the Attributes of the class and of those it derives from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, text = (base.__doc__ or "").partition("Attributes:")
        entries = re.split(r"\n\s{4,8}(?=[a-z_0-9*][\w, *]*(?:: | \())", text.split("Raises:")[0])
        for entry in entries[1:]:
            names, _, meaning = entry.partition(": ") if ": " in entry.split("(")[0] else entry.partition(" (")
            meaning = meaning if ": " in entry.split("(")[0] else f"({meaning}"
            for name in names.split(","):
                found[name.strip()] = " ".join(meaning.split())
    return found


def kind(annotation: Any) -> str:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    names = []
    for option in options:
        if option is NoneType:
            names.append("null")
        elif get_origin(option) is Literal:
            names += map(str, get_args(option))
        elif get_origin(option) in (list, tuple):
            names.append("list")
        elif get_origin(option) is dict or is_dataclass(option) or option is Any:
            names.append("mapping" if option is not Any else "any")
        else:
            names.append(option.__name__)
    return ", ".join(dict.fromkeys(names))


def default(f: Any) -> str:
    value = f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
    if f.default is MISSING and f.default_factory is MISSING:
        return "*must be given*"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if len(text) > 80:
        return "(the option's)"
    return f"`{text}`" if text else '`""`'


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
