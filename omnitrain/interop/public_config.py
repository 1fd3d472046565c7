"""`config.json` of the public layouts: sizes, in and out.

One table for each part of the model says which public field is which of ours (`Part`); it is read in both directions.
Sizes from a stranger's file are checked before anything is built from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from omnitrain.models import sizes

FULL, THINKER = "Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"
FILE = "config.json"
Layout = Literal["full", "thinker"]

LARGEST = 2**17
"""Of any size that has no limit of its own in `LARGEST_OF`."""
LARGEST_OF = {
    "layers": 1000, "codebooks": 1000, "quantizers": 1000, "n_experts": 2**14, "vocab_size": 2**24,
    "codec_vocab": 2**24, "grid_side": 2**20, "max_positions": 2**31, "window_frames": 2**24,
    "patch": 64, "temporal_patch": 64, "merge": 64, "channels": 64,
}  # fmt: skip
MOST_PARAMETERS = 2 * 10**12
_LONGEST_LIST = 1000


class CheckpointError(ValueError):
    """No checkpoint, or not the one that was expected. The message names file, key and what was expected."""


@dataclass(frozen=True)
class Section:
    """A part of config.json that knows its place, so that errors can name it."""

    values: Mapping[str, Any]
    path: Path
    place: str = ""

    @classmethod
    def of(cls, path: Path) -> Section:
        """The object in a JSON file. Raises CheckpointError if there is no such file, or something else in it."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected an object {{...}}, found {str(values)[:40]}")
        return cls(values, path)

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise self.error(key, "is missing")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str, *, optional: bool = False) -> Section:
        """The section below `key`; where it may be left out, an empty one stands for it."""
        value = self.get(key, {}) if optional else self[key]
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, found {value!r}")
        return Section(value, self.path, f"{self.place}{key}.")

    def require(self, key: str, allowed: Any) -> None:
        """Refuse a variant of the architecture that the public checkpoints do not have."""
        value = self.values.get(key)
        if value is not None and value != allowed:
            raise self.error(key, f"is {value!r}; only {allowed!r} is supported")

    def checked(self, key: str, kind: Any, default: Any = None, largest: int = LARGEST, least: int = 0) -> Any:
        """The field as `kind` (`int`, `float`, `bool`, `str`, tuples of int, a dictionary of int). Raises
        CheckpointError if it is missing, or nothing of that kind, or no sane size."""
        value = self[key] if default is None else self.get(key, default)
        outer, of = get_origin(kind), get_args(kind) or (kind,)
        inner = of[-1] if outer is dict else of[0]
        what = f"a whole number from {least} to {largest}" if inner is int else f"of type {inner.__name__}"
        good, items = True, [value]
        if outer is tuple:
            length = len(of) if of[-1] is not ... else None
            what = f"a list of {'' if length is None else f'{length} times '}{what}"
            good = isinstance(value, list | tuple) and (len(value) == length if length else len(value) <= _LONGEST_LIST)
            items = value
        elif outer is dict:
            good, what = isinstance(value, Mapping) and len(value) <= _LONGEST_LIST, f"an object; each value {what}"
            items = value.values() if good else []
        if not good or not all(_is_sane(item, inner, least, largest) for item in items):
            raise self.error(key, f"is {str(value)[:60]!r}; it must be {what}")
        return tuple(value) if outer is tuple else float(value) if kind is float else value

    def error(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: field {self.place}{key} {what}")


def _is_sane(value: Any, kind: type, least: int, largest: int) -> bool:
    if kind is int:
        return type(value) is int and least <= value <= largest
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and value >= 0
    return type(value) is kind


class Field(NamedTuple):
    """A public field, and what it is called here.

    `inwards`, `outwards`: from the public value to ours, and back.  `least`: of a size.  `also`: another public name.
    """

    key: str
    name: str
    least: int = 1
    also: str = ""
    inwards: Callable[[Any], Any] | None = None
    outwards: Callable[[Any], Any] | None = None

    def read(self, c: Section, kind: Any, defaults: Mapping[str, Any]) -> Any:
        """Our value, of the type `kind`. Raises CheckpointError as `Section.checked`."""
        key = self.also if self.also and self.key not in c.values and self.also in c.values else self.key
        default = defaults.get(self.key)
        if callable(default):
            default = default(c, defaults) if c.values.get(key) is None else None
        value = c.checked(key, kind, default, LARGEST_OF.get(self.name, LARGEST), self.least)
        try:
            return value if self.inwards is None else self.inwards(value)
        except ValueError as error:
            raise c.error(key, str(error)) from error

    def write(self, config: Any) -> Any:
        """The public value."""
        value = getattr(config, self.name)
        if self.outwards is not None:
            return self.outwards(value)
        return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Part:
    """A part of the model as a section of `config.json`.

    Attributes:
        config: our dataclass.
        model_type: what the section says it is.
        fields: the table.
        fixed: what all public checkpoints have: written, and a file that says something else is refused.
        defaults: public fields that a file need not say, with the values of transformers; a function is called with the
            section and the defaults. A field without a default must be there.
        unread: written for other programs.
        rope_type, theta: of the rotary embedding; its base where a file does not say it.
    """

    config: type
    model_type: str
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    unread: Mapping[str, Any] = field(default_factory=dict)
    rope_type: str = "default"
    theta: float = 10000.0

    def read(self, c: Section, **more: Any) -> Any:
        """Our dataclass from section `c`; `more` of its fields come from elsewhere."""
        values, kinds = self.values(c), get_type_hints(self.config)
        if "mrope_sections" in kinds:  # older files have rope_scaling and rope_theta side by side
            rope = c.section("rope_parameters" if c.get("rope_parameters", None) else "rope_scaling", optional=True)
            rope.require("rope_type", "default")
            values["mrope_sections"] = rope.checked("mrope_section", tuple[int, int, int], (24, 20, 20))
        if "rope_theta" in kinds:
            values["rope_theta"] = rope_theta(c, self.theta)
        try:
            return self.config(**values, **more)
        except (ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{c.path}: {c.place.rstrip('.')}: {error}") from error

    def values(self, c: Section, only: Collection[str] | None = None) -> dict[str, Any]:
        """What the table reads (of it the fields `only`), by our names. Raises CheckpointError if a field is missing or
        not sane, or the section is of a variant that is not supported."""
        for key, value in self.fixed.items():
            c.require(key, value)
        kinds = get_type_hints(self.config)
        if "window" not in kinds and c.get("use_sliding_window", c.get("sliding_window", None) is not None):
            raise c.error("sliding_window", "is set; sliding windows are not supported")
        return {f.name: f.read(c, kinds[f.name], self.defaults) for f in self.fields if only is None or f.name in only}

    def write(self, config: Any) -> dict[str, Any]:
        """The section that says `config`."""
        section: dict[str, Any] = {"model_type": self.model_type, **self.fixed, **self.unread}
        section |= {f.key: f.write(config) for f in self.fields}
        if hasattr(config, "rope_theta"):
            section["rope_parameters"] = {"rope_type": self.rope_type, "rope_theta": config.rope_theta}
        if hasattr(config, "mrope_sections"):
            section["rope_parameters"] |= {"mrope_section": list(config.mrope_sections), "mrope_interleaved": True}
        return section


def rope_theta(c: Section, default: float) -> float:
    """Base of the rotary frequencies, which older files have outside of `rope_parameters`."""
    inside = c.section("rope_parameters", optional=True)
    place = inside if inside.get("rope_theta", None) is not None else c
    return place.checked("rope_theta", float, default)


# ----------------------------------------------------------------------------------------------------------- the tables


def _head_dim(c: Section, defaults: Mapping[str, Any]) -> int:
    width = c.checked("hidden_size", int, defaults["hidden_size"])
    return width // c.checked("num_attention_heads", int, defaults["num_attention_heads"], least=1)


def _side(positions: int) -> int:
    if math.isqrt(positions) ** 2 != positions:
        raise ValueError("must be a square")
    return math.isqrt(positions)


_TRANSFORMER = (
    Field("hidden_size", "d_model"), Field("num_hidden_layers", "layers"), Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads"), Field("rms_norm_eps", "norm_eps"),
)  # fmt: skip
_DECODER = (
    *_TRANSFORMER, Field("head_dim", "head_dim"), Field("attention_bias", "attention_bias"),
    Field("max_position_embeddings", "max_positions"),
)  # fmt: skip
_EXPERTS = (
    Field("num_experts", "n_experts", also="num_local_experts"),  # transformers writes the latter
    Field("num_experts_per_tok", "top_k"), Field("moe_intermediate_size", "expert_width"),
    Field("norm_topk_prob", "normalise_top_k"),
)  # fmt: skip
_BALANCE = {"router_aux_loss_coef": 0.001}  # the public value; ours is `module.loss.balance_coefficient`
_SILU = {"hidden_act": "silu"}
_DECODER_DEFAULTS = {
    "head_dim": _head_dim, "rms_norm_eps": 1e-6, "attention_bias": False, "max_position_embeddings": 32768,
    "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip

TEXT = Part(sizes.ThinkerConfig, "qwen3_omni_moe_text", (
    *_DECODER, *_EXPERTS, Field("vocab_size", "vocab_size"), Field("intermediate_size", "ffn", least=0),
    Field("mlp_only_layers", "dense_layers", least=0), Field("decoder_sparse_step", "sparse_step"),
), fixed=_SILU, unread=_BALANCE, theta=1e6, defaults={
    **_DECODER_DEFAULTS, "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "moe_intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 3584,
    "intermediate_size": 18944, "mlp_only_layers": (), "decoder_sparse_step": 1,
})  # fmt: skip
AUDIO = Part(sizes.AuTConfig, "qwen3_omni_moe_audio_encoder", (
    Field("d_model", "d_model"), Field("encoder_layers", "layers"), Field("encoder_attention_heads", "heads"),
    Field("encoder_ffn_dim", "ffn"), Field("output_dim", "out_dim"), Field("downsample_hidden_size", "conv_hidden"),
    Field("num_mel_bins", "n_mels"), Field("n_window_infer", "window_frames"),
    Field("n_window", "chunk_frames", inwards=lambda half: 2 * half, outwards=lambda frames: frames // 2),
), fixed={"activation_function": "gelu", "scale_embedding": False}, defaults={
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "output_dim": 3584,
    "downsample_hidden_size": 480, "num_mel_bins": 128, "n_window_infer": 800, "n_window": 50,
})  # fmt: skip
VISION = Part(sizes.VisionConfig, "qwen3_omni_moe_vision_encoder", (
    Field("hidden_size", "d_model"), Field("depth", "layers"), Field("num_heads", "heads"),
    Field("intermediate_size", "ffn"), Field("out_hidden_size", "out_dim"), Field("patch_size", "patch"),
    Field("temporal_patch_size", "temporal_patch"), Field("spatial_merge_size", "merge"),
    Field("in_channels", "channels"), Field("deepstack_visual_indexes", "deepstack_layers", least=0),
    Field("num_position_embeddings", "grid_side", inwards=_side, outwards=lambda side: side**2),
), fixed={"hidden_act": "gelu_pytorch_tanh"}, rope_type="axial", defaults={
    "hidden_size": 1152, "depth": 27, "num_heads": 16, "intermediate_size": 4304, "out_hidden_size": 3584,
    "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    "deepstack_visual_indexes": (8, 16, 24), "num_position_embeddings": 2304,
})  # fmt: skip
TALKER_TEXT = Part(sizes.TalkerConfig, "qwen3_omni_moe_talker_text", (
    *_DECODER, *_EXPERTS, Field("vocab_size", "codec_vocab"), Field("intermediate_size", "projection_width"),
    Field("shared_expert_intermediate_size", "shared_expert_width"),
), fixed={**_SILU, "mlp_only_layers": [], "decoder_sparse_step": 1}, unread=_BALANCE, defaults={
    **_DECODER_DEFAULTS, "hidden_size": 1024, "num_hidden_layers": 20, "num_attention_heads": 16,
    "num_key_value_heads": 2, "moe_intermediate_size": 384, "norm_topk_prob": False, "vocab_size": 3072,
    "intermediate_size": 2048,
})  # fmt: skip
TALKER = Part(sizes.TalkerConfig, "qwen3_omni_moe_talker", (  # beside that section
    Field("thinker_hidden_size", "thinker_dim"), Field("accept_hidden_layer", "accept_hidden_layer", least=0),
    Field("num_code_groups", "codebooks"), Field("speaker_id", "speakers", least=0),
    Field("codec_pad_id", "codec_pad"), Field("codec_bos_id", "codec_bos"), Field("codec_eos_token_id", "codec_eos"),
    Field("codec_nothink_id", "codec_nothink"), Field("codec_think_bos_id", "codec_think_bos"),
    Field("codec_think_eos_id", "codec_think_eos"),
), fixed={}, defaults={
    "thinker_hidden_size": 2048, "accept_hidden_layer": 18, "num_code_groups": 32, "speaker_id": {},
    "codec_pad_id": 4196, "codec_bos_id": 4197, "codec_eos_token_id": 4198, "codec_nothink_id": 4203,
    "codec_think_bos_id": 4204, "codec_think_eos_id": 4205,
})  # fmt: skip
MTP = Part(sizes.MTPConfig, "qwen3_omni_moe_talker_code_predictor", (
    *_DECODER, Field("vocab_size", "codebook_size"), Field("intermediate_size", "ffn"),
    Field("num_code_groups", "codebooks"),
), fixed=_SILU, defaults={
    "hidden_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "attention_bias": False, "max_position_embeddings": 32768, "vocab_size": 2048,
    "intermediate_size": 3072, "num_code_groups": 32,
})  # fmt: skip
CODE2WAV = Part(sizes.Code2WavConfig, "qwen3_omni_moe_code2wav", (
    *_TRANSFORMER, Field("num_quantizers", "quantizers"), Field("codebook_size", "codebook_size"),
    Field("intermediate_size", "ffn"), Field("sliding_window", "window"), Field("decoder_dim", "decoder_dim"),
    Field("layer_scale_initial_scale", "layer_scale"), Field("upsampling_ratios", "upsampling_ratios"),
    Field("upsample_rates", "upsample_rates"),
    Field("trim", "trim"),  # ours alone: other programs trim as the public model
), fixed={**_SILU, "attention_bias": False}, defaults={
    "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5, "num_quantizers": 16, "codebook_size": 2048, "intermediate_size": 3072, "sliding_window": 72,
    "decoder_dim": 1536, "layer_scale_initial_scale": 0.01, "upsampling_ratios": (2, 2),
    "upsample_rates": (8, 5, 4, 3), "trim": "public",
})  # fmt: skip

_PLACEHOLDERS = {
    "audio_token_id": "<|audio_pad|>", "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "audio_start_token_id": "<|audio_start|>", "vision_start_token_id": "<|vision_start|>",
}  # fmt: skip
_THINKER_TOKENS = {**_PLACEHOLDERS, "vision_end_token_id": "<|vision_end|>", "user_token_id": "user"}
_FULL_TOKENS = {
    "im_start_token_id": "<|im_start|>", "im_end_token_id": "<|im_end|>", "tts_pad_token_id": "<tts_pad>",
    "tts_bos_token_id": "<tts_text_bos>", "tts_eos_token_id": "<tts_text_eod>", "system_token_id": "system",
    "user_token_id": "user", "assistant_token_id": "assistant",
}  # fmt: skip
_TOKEN_DEFAULTS = {
    "audio_token_id": 151646, "image_token_id": 151655, "video_token_id": 151656, "audio_start_token_id": 151647,
    "im_start_token_id": 151644, "im_end_token_id": 151645, "tts_pad_token_id": 151671, "tts_bos_token_id": 151672,
    "tts_eos_token_id": 151673, "system_token_id": 8948, "user_token_id": 872, "assistant_token_id": 77091,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- in, out


def read_config(folder: str | Path, *, speech: bool = True) -> tuple[sizes.OmniConfig, str]:
    """The model's sizes from `folder`/config.json, and the prefix of the Thinker's keys ("thinker." in a full
    checkpoint). `speech=False` leaves Talker and Code2Wav out. Raises CheckpointError: no such file, another
    architecture, a missing field, a size that is not sane, or a variant that is not supported."""
    path = Path(folder) / "config.json"
    root = Section.of(path)
    architecture = architecture_of(root)
    if architecture not in (FULL, THINKER):
        raise CheckpointError(f"{path}: architectures is {architecture!r}; expected {FULL} or {THINKER}")
    full = architecture == FULL
    thinker = root.section("thinker_config") if full else root
    thinker.require("tie_word_embeddings", False)
    for section in (root, thinker):
        if section.get("quantization_config", None):
            raise section.error(
                "quantization_config", "is set; quantised weights are not read: use the folder that they were made from"
            )
    text, talker = (c.section(key, optional=True) for c, key in ((thinker, "text_config"), (root, "talker_config")))
    layers = text.checked("num_hidden_layers", int, TEXT.defaults["num_hidden_layers"], LARGEST_OF["layers"], least=1)
    described = talker.get("text_config", None)
    default = TALKER.defaults["accept_hidden_layer"] if described else layers // 2
    accept = talker.checked("accept_hidden_layer", int, default)
    # Checkpoints without speech say so, or describe no Talker.
    speech = speech and full and root.get("enable_audio_output", True)
    speaks, sounds = speech and described, speech and root.get("code2wav_config", None)
    parts = {
        "thinker": TEXT.read(text, accept_hidden_layer=accept),
        "aut": AUDIO.read(thinker.section("audio_config", optional=True)),
        "vision": VISION.read(thinker.section("vision_config", optional=True)),
        "talker": _read_talker(talker) if speaks else None,
        "code2wav": CODE2WAV.read(root.section("code2wav_config")) if sounds else None,
    }
    words = parts["thinker"].vocab_size
    tokens = _read_tokens(thinker, _THINKER_TOKENS, words) | (_read_tokens(root, _FULL_TOKENS, words) if full else {})
    seconds = thinker.checked("position_id_per_seconds", int, 25, least=1)
    try:
        config = sizes.OmniConfig(**parts, special_tokens=tokens, position_id_per_seconds=seconds)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, "thinker." if full else ""


def architecture_of(root: Section) -> Any:
    """The first of `architectures`, or None."""
    names = root.get("architectures", None)
    return names[0] if isinstance(names, list) and names else None


def stored_dtype(folder: str | Path) -> torch.dtype | None:
    """The dtype that the config.json of a public folder says its weights have; None if there is none, or says none."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    root = Section.of(path)
    name = root.get("dtype", root.get("torch_dtype", None))
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name))


def _read_talker(c: Section) -> sizes.TalkerConfig:
    mtp: sizes.MTPConfig = MTP.read(c.section("code_predictor_config", optional=True))
    own = TALKER.values(c)
    return TALKER_TEXT.read(c.section("text_config"), **own, codebook_size=mtp.codebook_size, mtp=mtp)


def _read_tokens(c: Section, names: Mapping[str, str], vocab_size: int) -> dict[str, int]:
    """Ids of special tokens. What a file does not say has the id of transformers, if there is such a word."""
    most = LARGEST_OF["vocab_size"]
    said = {name: c.checked(key, int, largest=most) for key, name in names.items() if c.get(key, None) is not None}
    return {names[key]: i for key, i in _TOKEN_DEFAULTS.items() if key in names and i < vocab_size} | said


def public_config(config: sizes.OmniConfig, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `config.json` must say about `config`. A full one without Talker says `enable_audio_output: false`. Raises
    ValueError for a Talker that reads its text at another pace."""

    def tokens(names: Mapping[str, str]) -> dict[str, int]:
        return {key: config.special_tokens[name] for key, name in names.items() if name in config.special_tokens}

    stored = {"dtype": str(dtype).removeprefix("torch.")}
    thinker = {
        "architectures": [THINKER],
        "model_type": "qwen3_omni_moe_thinker",
        **stored,
        "tie_word_embeddings": False,
        "position_id_per_seconds": config.position_id_per_seconds,
        **tokens(_THINKER_TOKENS),
        "text_config": TEXT.write(config.thinker),
        "audio_config": AUDIO.write(config.aut),
        "vision_config": VISION.write(config.vision),
    }
    if layout == "thinker":
        return thinker
    if config.talker is not None and config.talker.frames_per_word != 1:
        raise ValueError(
            f"model.talker.frames_per_word is {config.talker.frames_per_word}, which the public format cannot say: "
            "whoever reads it gives a text token with every frame. Train with model.talker.frames_per_word=1"
        )
    talker: dict[str, Any] = {
        "model_type": TALKER.model_type,
        "accept_hidden_layer": config.thinker.accept_hidden_layer,
    }
    if config.talker is not None:
        talker |= {
            "architectures": ["Qwen3OmniMoeTalkerForConditionalGeneration"],
            **stored,
            **{f.key: f.write(config.talker) for f in TALKER.fields},
            **tokens(_PLACEHOLDERS),  # what the Talker computes TM-RoPE ids from
            "position_id_per_seconds": config.position_id_per_seconds,
            "spatial_merge_size": config.vision.merge,
            "text_config": TALKER_TEXT.write(config.talker),
            "code_predictor_config": MTP.write(config.talker.mtp),
        }
    code2wav = {} if config.code2wav is None else CODE2WAV.write(config.code2wav) | stored
    if code2wav.get("trim") == "public":
        del code2wav["trim"]
    return {
        "architectures": [FULL],
        "model_type": "qwen3_omni_moe",
        **stored,
        "enable_audio_output": config.talker is not None or config.code2wav is not None,
        **tokens(_FULL_TOKENS),
        "thinker_config": thinker,
        "talker_config": talker,
        **({"code2wav_config": code2wav} if code2wav else {}),
    }
