"""Checkpoints in the public Qwen3-Omni layout, in and out.

A folder holds `config.json` and `model.safetensors`, or several files with `model.safetensors.index.json`. Two layouts
are read and written: "full" (`Qwen3OmniMoeForConditionalGeneration`, keys `thinker.model...`, `thinker.audio_tower...`,
and of the speaking parts `talker...`, `code2wav...`) and "thinker" (`Qwen3OmniMoeThinkerForConditionalGeneration`, the
Thinker's keys without the first part).

Where our tensors are joined (queries, keys and values; gate and up; all experts of a layer), one of ours is many
of theirs. `_pieces` says which, and serves both directions.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import (
    AuTConfig,
    Code2WavConfig,
    MTPConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
    VisionConfig,
)

FULL, THINKER = "Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"
Layout = Literal["full", "thinker"]
SPEECH_PARTS = ("talker.", "code2wav.")
"""How the keys of the speaking parts start, ours and the public ones; only a full checkpoint has them."""

Index = tuple[int | slice, ...]
Pieces = list[tuple[str, Index]]
"""Public key, and which part of our tensor it is."""


class CheckpointError(ValueError):
    """No checkpoint, or not the one that was expected. The message names file, key and what was expected."""


# ---------------------------------------------------------------------------------------------------------------- load


def load_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    speech: bool = True,
) -> OmniModel:
    """The Thinker with its encoders, and Talker and Code2Wav where they are, from a folder in the public layout.

    Args:
        dtype: None keeps the stored one.
        speech: False leaves Talker and Code2Wav out; they are not even read.

    Raises:
        CheckpointError: a file, key or field is missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    config, prefix = read_config(folder, speech=speech)
    with torch.device("meta"):
        model = OmniModel(config)
    with _Checkpoint(folder, prefix) as checkpoint:
        tensors = {
            name: checkpoint.assemble(name, parameter, config, dtype, device)
            for name, parameter in model.named_parameters()
        }
        absent = {"talker.": config.talker is None, "code2wav.": config.code2wav is None}
        checkpoint.check_all_read(tuple(part for part in SPEECH_PARTS if absent[part]))
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


class _Checkpoint:
    """The safetensors files of a folder, opened lazily; remembers which keys were read."""

    def __init__(self, folder: Path, prefix: str) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map: dict[str, str] = read_json(index).get("weight_map", {})
            self.file_of = {key: folder / name for key, name in weight_map.items()}
        else:
            paths = sorted(folder.glob("*.safetensors"))
            if not paths:
                raise CheckpointError(f"{folder}: no *.safetensors and no model.safetensors.index.json")
            self.file_of = {}
            for path in paths:
                with _open(path) as file:
                    self.file_of |= dict.fromkeys(file.keys(), path)
        self.folder, self.prefix, self.read = folder, prefix, set[str]()

    def __enter__(self) -> _Checkpoint:
        self.stack, self.files = ExitStack(), {}
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def get(self, key: str) -> Tensor:
        path = self.file_of.get(key)
        if path is None:
            near = sorted(k for k in self.file_of if k.rpartition(".")[0] == key.rpartition(".")[0])
            beside = f"; beside it there are {', '.join(near[:4])}" if near else ""
            raise CheckpointError(f"{self.folder}: key {key!r} is missing{beside}")
        if path not in self.files:
            self.files[path] = self.stack.enter_context(_open(path))
        self.read.add(key)
        try:
            return self.files[path].get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: key {key!r} cannot be read: {error}") from error

    def assemble(
        self,
        name: str,
        parameter: Tensor,
        config: OmniConfig,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> Tensor:
        """Our tensor `name` from its pieces."""
        pieces = _pieces(name, parameter, config, self.prefix)
        stacked = re.sub(r"experts\.0\.(?:gate|up|down)_proj\.weight$", "experts.", pieces[0][0])
        if stacked != pieces[0][0]:  # experts; also read as one tensor per layer, as transformers has them in memory
            stacked += "gate_up_proj" if name.endswith("gate_up") else "down_proj"
            if stacked in self.file_of:
                pieces = [(stacked, ())]
        out: Tensor | None = None
        for key, index in pieces:
            tensor = self.get(key)
            if out is None:
                out = torch.empty(parameter.shape, dtype=dtype or tensor.dtype, device=device)
            if out[index].shape != tensor.shape:
                raise CheckpointError(
                    f"{self.file_of[key]}: key {key!r} has shape {list(tensor.shape)}, "
                    f"config.json asks for {list(out[index].shape)}"
                )
            out[index].copy_(tensor)
        assert out is not None
        return out

    def check_all_read(self, left_out: tuple[str, ...]) -> None:
        """Refuse keys that nobody asked for, but those of parts that are left out of a full checkpoint."""
        for key in sorted(set(self.file_of) - self.read):
            if not (self.prefix and key.startswith(left_out)):
                raise CheckpointError(
                    f"{self.file_of[key]}: unknown key {key!r}; config.json describes no tensor of that name"
                )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or something else in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object {{...}}, found {str(values)[:40]}")
    return values


# ---------------------------------------------------------------------------------------------------------------- names


def _pieces(name: str, parameter: Tensor, config: OmniConfig, prefix: str) -> Pieces:
    """The public keys that make up our parameter `name`, in order; `prefix` stands before those of the Thinker."""
    part, _, rest = name.partition(".")
    match part:
        case "aut":
            return [(f"{prefix}audio_tower.{rest}", ())]
        case "visual":
            return [(prefix + name, ())]
        case "thinker":
            if rest == "lm_head.weight":
                return [(prefix + rest, ())]
            return _decoder_pieces(f"{prefix}model.", rest, parameter, config.thinker)
        case "talker":
            assert config.talker is not None
            if not rest.startswith("mtp."):
                inside = rest.startswith(("layers.", "norm.", "codec_embedding."))
                return _decoder_pieces(f"talker.{'model.' if inside else ''}", rest, parameter, config.talker)
            rest, theirs = rest.removeprefix("mtp."), "talker.code_predictor."
            if rest in _PER_CODEBOOK:
                return [(f"{theirs}{_PER_CODEBOOK[rest]}.{q}.weight", (q,)) for q in range(len(parameter))]
            return _decoder_pieces(f"{theirs}model.", rest, parameter, config.talker.mtp)
    return [(name, ())]  # Code2Wav has the public names


_PER_CODEBOOK = {"code_embedding": "model.codec_embedding", "code_head": "lm_head"}


def _decoder_pieces(
    prefix: str, name: str, parameter: Tensor, config: ThinkerConfig | TalkerConfig | MTPConfig
) -> Pieces:
    """The same within a decoder: its layers, and what else has the public name."""
    if match := re.fullmatch(r"(layers\.\d+)\.(.+)", name):
        layer, rest = f"{prefix}{match[1]}.", match[2]
        if rest.startswith("attention.qkv."):
            q, k = config.heads * config.head_dim, config.kv_heads * config.head_dim
            rows = {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k)}
            kind = rest.rpartition(".")[2]
            return [(f"{layer}self_attn.{x}_proj.{kind}", (r,)) for x, r in rows.items()]
        width = parameter.shape[-2] // 2 if "gate_up" in rest else 0
        halves = (("gate", slice(0, width)), ("up", slice(width, None)))
        if rest.endswith(".gate_up.weight"):
            mlp = layer + rest.removesuffix("gate_up.weight")
            return [(f"{mlp}{x}_proj.weight", (r,)) for x, r in halves]
        if rest == "mlp.experts.gate_up":
            return [
                (f"{layer}mlp.experts.{e}.{x}_proj.weight", (e, r)) for e in range(len(parameter)) for x, r in halves
            ]
        if rest == "mlp.experts.down":
            return [(f"{layer}mlp.experts.{e}.down_proj.weight", (e,)) for e in range(len(parameter))]
        for ours, theirs in _RENAMED.items():
            if rest.startswith(ours):
                return [(layer + theirs + rest.removeprefix(ours), ())]
        raise KeyError(f"no public name for {name}")
    return [(prefix + name, ())]


_RENAMED = {
    "attention_norm.": "input_layernorm.",
    "mlp_norm.": "post_attention_layernorm.",
    "attention.out.": "self_attn.o_proj.",
    "attention.q_norm.": "self_attn.q_norm.",
    "attention.k_norm.": "self_attn.k_norm.",
    "mlp.router.": "mlp.gate.",
    "mlp.down.": "mlp.down_proj.",
    "mlp.shared_expert.down.": "mlp.shared_expert.down_proj.",
    "mlp.shared_gate.": "mlp.shared_expert_gate.",
}


def public_tensors(model: OmniModel, layout: Layout = "thinker") -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under their public names, as views; without Talker and Code2Wav in layout "thinker"."""
    prefix = "thinker." if layout == "full" else ""
    for name, parameter in model.named_parameters():
        if layout == "full" or not name.startswith(SPEECH_PARTS):
            for key, index in _pieces(name, parameter, model.config, prefix):
                yield key, parameter.detach()[index]


# --------------------------------------------------------------------------------------------------------------- config


class Section:
    """A part of config.json that knows its place, so that errors can name it."""

    def __init__(self, values: Mapping[str, Any], path: Path, place: str = "") -> None:
        self.values, self.path, self.place = values, path, place

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise CheckpointError(f"{self.path}: field {self.place}{key} is missing")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str) -> Section:
        value = self[key]
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.path}: field {self.place}{key} must be an object, found {value!r}")
        return Section(value, self.path, f"{self.place}{key}.")

    def require(self, key: str, allowed: Any, default: Any = None) -> None:
        """Refuse a variant of the architecture that the public checkpoints do not have."""
        value = self.values.get(key, default)
        if value is not None and value != allowed:
            raise CheckpointError(f"{self.path}: field {self.place}{key} is {value!r}; only {allowed!r} is supported")


_TOKEN_FIELDS = {
    "audio_token_id": "<|audio_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_start_token_id": "<|audio_start|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "user_token_id": "user",
}
_FULL_TOKEN_FIELDS = {
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "tts_pad_token_id": "<tts_pad>",
    "tts_bos_token_id": "<tts_text_bos>",
    "tts_eos_token_id": "<tts_text_eod>",
    "system_token_id": "system",
    "user_token_id": "user",
    "assistant_token_id": "assistant",
}


_TALKER_TOKEN_FIELDS = {
    "audio_token_id": "<|audio_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_start_token_id": "<|audio_start|>",
    "vision_start_token_id": "<|vision_start|>",
}


def read_config(folder: str | Path, *, speech: bool = True) -> tuple[OmniConfig, str]:
    """The model's sizes from `folder`/config.json, and the prefix of the Thinker's keys ("thinker." in a full
    checkpoint). `speech=False` leaves Talker and Code2Wav out.

    Raises:
        CheckpointError: no such file, another architecture, a missing field, or a variant that is not supported.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in (FULL, THINKER):
        raise CheckpointError(f"{path}: architectures is {architecture!r}; expected {FULL} or {THINKER}")
    root = Section(values, path)
    full = architecture == FULL
    thinker = root.section("thinker_config") if full else root
    thinker.require("tie_word_embeddings", False)
    tokens = {name: thinker.values[key] for key, name in _TOKEN_FIELDS.items() if thinker.values.get(key) is not None}
    if full:
        tokens |= {name: values[key] for key, name in _FULL_TOKEN_FIELDS.items() if values.get(key) is not None}
    layers = thinker.section("text_config")["num_hidden_layers"]
    talker = values.get("talker_config") or {}
    text = _text_config(thinker.section("text_config"), talker.get("accept_hidden_layer", layers // 2))
    # Checkpoints without speech say so, or describe no Talker.
    speech = speech and full and root.get("enable_audio_output", True)
    config = OmniConfig(
        thinker=text,
        aut=_aut_config(thinker.section("audio_config")),
        vision=_vision_config(thinker.section("vision_config")),
        special_tokens=tokens,
        position_id_per_seconds=thinker["position_id_per_seconds"],
        talker=_talker_config(root.section("talker_config")) if speech and talker.get("text_config") else None,
        code2wav=_code2wav_config(root.section("code2wav_config"))
        if speech and values.get("code2wav_config")
        else None,
    )
    return config, "thinker." if full else ""


def _text_config(c: Section, accept_hidden_layer: int) -> ThinkerConfig:
    _require_plain_decoder(c)
    sections, theta = _rope(c)
    heads = c["num_attention_heads"]
    return ThinkerConfig(
        vocab_size=c["vocab_size"],
        d_model=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c["num_key_value_heads"],
        head_dim=c.get("head_dim", c["hidden_size"] // heads),
        ffn=c["intermediate_size"],
        n_experts=c["num_experts"],
        top_k=c["num_experts_per_tok"],
        expert_width=c["moe_intermediate_size"],
        normalise_top_k=c["norm_topk_prob"],
        dense_layers=tuple(c.get("mlp_only_layers", ())),
        sparse_step=c.get("decoder_sparse_step", 1),
        mrope_sections=sections,
        rope_theta=theta,
        norm_eps=c["rms_norm_eps"],
        attention_bias=c.get("attention_bias", False),
        accept_hidden_layer=accept_hidden_layer,
        max_positions=c["max_position_embeddings"],
    )


def _require_plain_decoder(c: Section) -> None:
    c.require("hidden_act", "silu")
    if c.get("use_sliding_window", c.get("sliding_window", None) is not None):
        raise CheckpointError(f"{c.path}: field {c.place}sliding_window is set; sliding windows are not supported")


def _rope(c: Section) -> tuple[tuple[int, int, int], float]:
    """TM-RoPE sections and base. Older files have rope_scaling and rope_theta side by side, newer ones both in
    rope_parameters."""
    rope = c.section("rope_parameters" if c.get("rope_parameters", None) else "rope_scaling")
    rope.require("rope_type", "default")
    return tuple(rope["mrope_section"]), _theta(c)


def _theta(c: Section, default: float | None = None) -> float:
    theta = (c.get("rope_parameters", None) or {}).get("rope_theta")
    theta = c.get("rope_theta", default) if theta is None else theta
    return float(c["rope_theta"] if theta is None else theta)


def _talker_config(c: Section) -> TalkerConfig:
    text = c.section("text_config")
    _require_plain_decoder(text)
    sections, theta = _rope(text)
    heads = text["num_attention_heads"]
    mtp = _mtp_config(c.section("code_predictor_config"))
    return TalkerConfig(
        d_model=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim", text["hidden_size"] // heads),
        n_experts=text[
            "num_experts" if "num_experts" in text.values else "num_local_experts"
        ],  # transformers: the latter
        top_k=text["num_experts_per_tok"],
        expert_width=text["moe_intermediate_size"],
        shared_expert_width=text["shared_expert_intermediate_size"],
        normalise_top_k=text["norm_topk_prob"],
        codec_vocab=text["vocab_size"],
        mrope_sections=sections,
        rope_theta=theta,
        norm_eps=text["rms_norm_eps"],
        attention_bias=text.get("attention_bias", False),
        max_positions=text["max_position_embeddings"],
        thinker_dim=c["thinker_hidden_size"],
        projection_width=text["intermediate_size"],
        accept_hidden_layer=c["accept_hidden_layer"],
        codebooks=c["num_code_groups"],
        codebook_size=mtp.codebook_size,
        **{name: c[key] for key, name in _CODE_FIELDS.items()},
        speakers={name: int(code) for name, code in c.get("speaker_id", {}).items()},
        mtp=mtp,
    )


_CODE_FIELDS = {
    "codec_pad_id": "codec_pad",
    "codec_bos_id": "codec_bos",
    "codec_eos_token_id": "codec_eos",
    "codec_nothink_id": "codec_nothink",
    "codec_think_bos_id": "codec_think_bos",
    "codec_think_eos_id": "codec_think_eos",
}


def _mtp_config(c: Section) -> MTPConfig:
    _require_plain_decoder(c)
    heads = c["num_attention_heads"]
    return MTPConfig(
        d_model=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c["num_key_value_heads"],
        head_dim=c.get("head_dim", c["hidden_size"] // heads),
        ffn=c["intermediate_size"],
        codebooks=c["num_code_groups"],
        codebook_size=c["vocab_size"],
        rope_theta=_theta(c),
        norm_eps=c["rms_norm_eps"],
        attention_bias=c.get("attention_bias", False),
        max_positions=c["max_position_embeddings"],
    )


def _code2wav_config(c: Section) -> Code2WavConfig:
    c.require("hidden_act", "silu")
    c.require("attention_bias", False)
    return Code2WavConfig(
        quantizers=c["num_quantizers"],
        codebook_size=c["codebook_size"],
        d_model=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        ffn=c["intermediate_size"],
        window=c["sliding_window"],
        layer_scale=c["layer_scale_initial_scale"],
        rope_theta=_theta(c, 10000.0),
        norm_eps=c["rms_norm_eps"],
        upsampling_ratios=tuple(c["upsampling_ratios"]),
        decoder_dim=c["decoder_dim"],
        upsample_rates=tuple(c["upsample_rates"]),
        trim=c.get("trim", "public"),
    )


def _aut_config(c: Section) -> AuTConfig:
    c.require("activation_function", "gelu")
    c.require("scale_embedding", False)
    return AuTConfig(
        d_model=c["d_model"],
        layers=c["encoder_layers"],
        heads=c["encoder_attention_heads"],
        ffn=c["encoder_ffn_dim"],
        out_dim=c["output_dim"],
        conv_hidden=c["downsample_hidden_size"],
        n_mels=c["num_mel_bins"],
        chunk_frames=2 * c["n_window"],
        window_frames=c["n_window_infer"],
    )


def _vision_config(c: Section) -> VisionConfig:
    c.require("hidden_act", "gelu_pytorch_tanh")
    side = round(c["num_position_embeddings"] ** 0.5)
    if side**2 != c["num_position_embeddings"]:
        raise CheckpointError(f"{c.path}: field {c.place}num_position_embeddings must be a square")
    return VisionConfig(
        d_model=c["hidden_size"],
        layers=c["depth"],
        heads=c["num_heads"],
        ffn=c["intermediate_size"],
        out_dim=c["out_hidden_size"],
        patch=c["patch_size"],
        temporal_patch=c["temporal_patch_size"],
        merge=c["spatial_merge_size"],
        channels=c["in_channels"],
        grid_side=side,
        deepstack_layers=tuple(c["deepstack_visual_indexes"]),
        rope_theta=(c.get("rope_parameters", {}) or {}).get("rope_theta", 10000.0),
    )


def public_config(config: OmniConfig, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `config.json` must say about `config`. A full one without Talker says `enable_audio_output: false`."""
    t, a, v = config.thinker, config.aut, config.vision
    name = str(dtype).removeprefix("torch.")
    thinker = {
        "architectures": [THINKER],
        "model_type": "qwen3_omni_moe_thinker",
        "dtype": name,
        "tie_word_embeddings": False,
        "position_id_per_seconds": config.position_id_per_seconds,
        **_tokens(config, _TOKEN_FIELDS),
        "text_config": {
            "model_type": "qwen3_omni_moe_text",
            "vocab_size": t.vocab_size,
            "hidden_size": t.d_model,
            "num_hidden_layers": t.layers,
            "num_attention_heads": t.heads,
            "num_key_value_heads": t.kv_heads,
            "head_dim": t.head_dim,
            "intermediate_size": t.ffn,
            "num_experts": t.n_experts,
            "num_experts_per_tok": t.top_k,
            "moe_intermediate_size": t.expert_width,
            "norm_topk_prob": t.normalise_top_k,
            "mlp_only_layers": list(t.dense_layers),
            "decoder_sparse_step": t.sparse_step,
            "rope_parameters": _public_rope(t.rope_theta, t.mrope_sections),
            "rms_norm_eps": t.norm_eps,
            "attention_bias": t.attention_bias,
            "router_aux_loss_coef": 0.001,  # the public value; ours is `module.loss.balance_coefficient`
            "max_position_embeddings": t.max_positions,
            "hidden_act": "silu",
        },
        "audio_config": {
            "model_type": "qwen3_omni_moe_audio_encoder",
            "d_model": a.d_model,
            "encoder_layers": a.layers,
            "encoder_attention_heads": a.heads,
            "encoder_ffn_dim": a.ffn,
            "output_dim": a.out_dim,
            "downsample_hidden_size": a.conv_hidden,
            "num_mel_bins": a.n_mels,
            "n_window": a.chunk_frames // 2,
            "n_window_infer": a.window_frames,
            "activation_function": "gelu",
        },
        "vision_config": {
            "model_type": "qwen3_omni_moe_vision_encoder",
            "hidden_size": v.d_model,
            "depth": v.layers,
            "num_heads": v.heads,
            "intermediate_size": v.ffn,
            "out_hidden_size": v.out_dim,
            "patch_size": v.patch,
            "temporal_patch_size": v.temporal_patch,
            "spatial_merge_size": v.merge,
            "in_channels": v.channels,
            "num_position_embeddings": v.grid_side**2,
            "deepstack_visual_indexes": list(v.deepstack_layers),
            "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
            "hidden_act": "gelu_pytorch_tanh",
        },
    }
    if layout == "thinker":
        return thinker
    return {
        "architectures": [FULL],
        "model_type": "qwen3_omni_moe",
        "dtype": name,
        "enable_audio_output": config.talker is not None or config.code2wav is not None,
        **_tokens(config, _FULL_TOKEN_FIELDS),
        "thinker_config": thinker,
        "talker_config": {
            "model_type": "qwen3_omni_moe_talker",
            "accept_hidden_layer": t.accept_hidden_layer,
            **({} if config.talker is None else _public_talker(config, config.talker, name)),
        },
        **({} if config.code2wav is None else {"code2wav_config": _public_code2wav(config.code2wav, name)}),
    }


def _public_rope(theta: float, sections: tuple[int, int, int] | None = None) -> dict[str, Any]:
    multimodal = {} if sections is None else {"mrope_section": list(sections), "mrope_interleaved": True}
    return {"rope_type": "default", "rope_theta": theta, **multimodal}


def _public_talker(config: OmniConfig, t: TalkerConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3OmniMoeTalkerForConditionalGeneration"],
        "dtype": dtype,
        "thinker_hidden_size": t.thinker_dim,
        "num_code_groups": t.codebooks,
        **{key: getattr(t, name) for key, name in _CODE_FIELDS.items()},
        "speaker_id": dict(t.speakers),
        # What the Talker computes TM-RoPE ids from
        **_tokens(config, _TALKER_TOKEN_FIELDS),
        "position_id_per_seconds": config.position_id_per_seconds,
        "spatial_merge_size": config.vision.merge,
        "text_config": {
            "model_type": "qwen3_omni_moe_talker_text",
            "vocab_size": t.codec_vocab,
            "hidden_size": t.d_model,
            "num_hidden_layers": t.layers,
            "num_attention_heads": t.heads,
            "num_key_value_heads": t.kv_heads,
            "head_dim": t.head_dim,
            "intermediate_size": t.projection_width,
            "num_experts": t.n_experts,
            "num_experts_per_tok": t.top_k,
            "moe_intermediate_size": t.expert_width,
            "shared_expert_intermediate_size": t.shared_expert_width,
            "norm_topk_prob": t.normalise_top_k,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "rope_parameters": _public_rope(t.rope_theta, t.mrope_sections),
            "rms_norm_eps": t.norm_eps,
            "attention_bias": t.attention_bias,
            "router_aux_loss_coef": 0.001,  # the public value; ours is `module.loss.balance_coefficient`
            "max_position_embeddings": t.max_positions,
            "hidden_act": "silu",
        },
        "code_predictor_config": {
            "model_type": "qwen3_omni_moe_talker_code_predictor",
            "vocab_size": t.mtp.codebook_size,
            "hidden_size": t.mtp.d_model,
            "num_hidden_layers": t.mtp.layers,
            "num_attention_heads": t.mtp.heads,
            "num_key_value_heads": t.mtp.kv_heads,
            "head_dim": t.mtp.head_dim,
            "intermediate_size": t.mtp.ffn,
            "num_code_groups": t.mtp.codebooks,
            "rope_parameters": _public_rope(t.mtp.rope_theta),
            "rms_norm_eps": t.mtp.norm_eps,
            "attention_bias": t.mtp.attention_bias,
            "max_position_embeddings": t.mtp.max_positions,
            "hidden_act": "silu",
        },
    }


def _public_code2wav(c: Code2WavConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "qwen3_omni_moe_code2wav",
        "dtype": dtype,
        "num_quantizers": c.quantizers,
        "codebook_size": c.codebook_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.ffn,
        "sliding_window": c.window,
        "layer_scale_initial_scale": c.layer_scale,
        "rope_parameters": _public_rope(c.rope_theta),
        "rms_norm_eps": c.norm_eps,
        "upsampling_ratios": list(c.upsampling_ratios),
        "decoder_dim": c.decoder_dim,
        "upsample_rates": list(c.upsample_rates),
        "attention_bias": False,
        "hidden_act": "silu",
        **({} if c.trim == "public" else {"trim": c.trim}),  # ours alone: other programs trim as the public model
    }


def _tokens(config: OmniConfig, names: Mapping[str, str]) -> dict[str, int]:
    return {key: config.special_tokens[name] for key, name in names.items() if name in config.special_tokens}


# ----------------------------------------------------------------------------------------------------------------- save


def save_pretrained(
    model: OmniModel,
    folder: str | Path,
    *,
    layout: Layout | None = None,
    base: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the model in the public layout.

    Args:
        layout: "full", or "thinker" (then without Talker and Code2Wav). Default: "full" if the model can speak.
        base: a full checkpoint that the model was loaded from. What the model was loaded without (Talker, Code2Wav),
            configuration and other files (tokenizer, chat template) go along, so that the folder replaces it. Sets
            layout "full".
        max_shard_bytes: weights beyond this many bytes go to several files with an index.

    Raises:
        CheckpointError: `base` is no full checkpoint, or one of other sizes than the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.thinker.lm_head.weight.dtype
    speaks = model.talker is not None or model.code2wav is not None
    layout = layout or ("full" if speaks else "thinker")
    with ExitStack() as stack:
        others: Iterator[tuple[str, Tensor]] = iter(())
        if base is not None:
            base, layout = Path(base), "full"
            base_config, prefix = read_config(base)
            if not prefix:
                raise CheckpointError(f"{base / 'config.json'}: base must be a full checkpoint ({FULL})")
            own = {part for part in _SIZES if getattr(model.config, part) is not None}
            if any(getattr(base_config, part) != getattr(model.config, part) for part in own):
                raise CheckpointError(f"{base / 'config.json'}: describes a model of other sizes than the one to save")
            checkpoint = stack.enter_context(_Checkpoint(base, prefix))
            theirs = tuple(part for part in SPEECH_PARTS if part.removesuffix(".") not in own)
            others = ((k, checkpoint.get(k)) for k in sorted(checkpoint.file_of) if k.startswith(theirs))
            config = read_json(base / "config.json")
            for path in base.iterdir():
                if path.is_file() and path.name != "config.json" and "safetensors" not in path.name:
                    shutil.copy2(path, folder / path.name)
        else:
            config = public_config(model.config, layout, dtype)
        _write_shards(folder, [public_tensors(model, layout), others], max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_SIZES = ("thinker", "aut", "vision", "talker", "code2wav")
"""Fields of `OmniConfig` that describe a part."""


def _write_shards(folder: Path, sources: list[Iterator[tuple[str, Tensor]]], limit: int) -> None:
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    total, size, pending = 0, 0, dict[str, Tensor]()

    def flush() -> None:
        shards.append(folder / f"model-{len(shards) + 1:05d}.safetensors.partial")
        save_file(pending, shards[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, len(shards) - 1))
        pending.clear()

    for source in sources:
        for key, tensor in source:
            n_bytes = tensor.numel() * tensor.element_size()
            if pending and size + n_bytes > limit:
                flush()
                size = 0
            pending[key] = tensor.to("cpu", copy=not tensor.is_contiguous()).contiguous().clone()
            size, total = size + n_bytes, total + n_bytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {k: names[i] for k, i in sorted(weight_map.items())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
