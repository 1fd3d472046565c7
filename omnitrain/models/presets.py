"""Sizes, and the initial weights.

model = build("tiny", vocab_size=4096, special_tokens=tokenizer.special_ids, thinker={"layers": 4})
init_weights(model, seed=0)
build("tiny", speech=True, talker={"codebooks": 4, "mtp": {"layers": 1}})      # with Talker and Code2Wav
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omnitrain.models.aut_decoder import AuT
from omnitrain.models.codec import Codec
from omnitrain.models.deferred import part_of_whole, put
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import (
    CODEC_PRESETS,
    PRESETS,
    PUBLIC_SPECIAL_TOKENS,
    SPEECH_PRESETS,
    OmniConfig,
    ThinkerConfig,
    codec_vocabulary,
)


def build(
    preset: str = "tiny",
    *,
    vocab_size: int | None = None,
    special_tokens: Mapping[str, int] | None = None,
    position_id_per_seconds: int | None = None,
    thinker: Mapping[str, Any] | None = None,
    aut: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    speech: bool = False,
    talker: Mapping[str, Any] | None = None,
    code2wav: Mapping[str, Any] | None = None,
) -> OmniModel:
    """A model of a preset's size, its weights not yet drawn (`init_weights`). Under `torch.device("meta")` it costs no
    memory.

    Args:
        preset: a name in `PRESETS`.
        vocab_size, special_tokens: those of the tokenizer; None keeps the preset's (the public ids).
        thinker, aut, vision: fields to change, e.g. `thinker={"layers": 3}`. `out_dim` of the encoders follows
            `thinker.d_model`, `accept_hidden_layer` follows `thinker.layers`.
        speech: with Talker and Code2Wav.
        talker, code2wav: fields to change, e.g. `talker={"layers": 2, "mtp": {"layers": 1}}`. Special codes follow
            `talker.codebook_size`; MTP's width, and the number and size of codebooks everywhere, follow the Talker's.

    Raises ValueError: unknown preset or field (the message lists the valid ones), or fields of parts that are left out.
    """
    if preset not in PRESETS:
        raise ValueError(f"model.preset={preset!r}: no such preset; use one of {', '.join(PRESETS)}")
    base = PRESETS[preset]
    changed = {**(thinker or {}), **({} if vocab_size is None else {"vocab_size": vocab_size})}
    if "layers" in changed:  # the Talker listens half-way up, as in the public model
        changed = {"accept_hidden_layer": changed["layers"] // 2, **changed}
    decoder = _replace(base.thinker, changed, "thinker")
    width = {"out_dim": decoder.d_model}
    return OmniModel(
        OmniConfig(
            thinker=decoder,
            aut=_replace(base.aut, {**width, **(aut or {})}, "aut"),
            vision=_replace(base.vision, {**width, **(vision or {})}, "vision"),
            special_tokens=dict(PUBLIC_SPECIAL_TOKENS if special_tokens is None else special_tokens),
            position_id_per_seconds=position_id_per_seconds or base.position_id_per_seconds,
            **_speech(preset, decoder, talker or {}, code2wav or {}, speech),
        )
    )


def _speech(
    preset: str, thinker: ThinkerConfig, talker: Mapping[str, Any], code2wav: Mapping[str, Any], speech: bool
) -> dict[str, Any]:
    """The fields `talker` and `code2wav` of `OmniConfig`."""
    if not speech:
        if talker or code2wav:
            raise ValueError("model.talker and model.code2wav need model.speech=true")
        return {}
    base, wave = SPEECH_PRESETS[preset]
    changes: dict[str, Any] = {"thinker_dim": thinker.d_model, "accept_hidden_layer": thinker.accept_hidden_layer}
    if "codebook_size" in talker:
        changes |= codec_vocabulary(talker["codebook_size"])
    changes |= talker
    follows = {name: changes.get(name, getattr(base, name)) for name in ("d_model", "codebooks", "codebook_size")}
    changes["mtp"] = _replace(base.mtp, {**follows, **talker.get("mtp", {})}, "talker.mtp")
    codes = {"quantizers": follows["codebooks"], "codebook_size": follows["codebook_size"]}
    return {"talker": _replace(base, changes, "talker"), "code2wav": _replace(wave, {**codes, **code2wav}, "code2wav")}


def _replace(config: Any, changes: Mapping[str, Any], part: str) -> Any:
    names = [f.name for f in fields(config)]
    for name in changes:
        if name not in names:
            raise ValueError(f"model.{part}.{name}: no such field; the fields are {', '.join(names)}")
    return replace(config, **changes)


RESIDUAL_WRITERS = ("attn.out_proj.weight", ".fc2.weight", ".attn.proj.weight", ".mlp.linear_fc2.weight")
"""Last matrices of the residual branches of AuT (encoder and decoder) and of the vision encoder."""

STD = {
    "thinker.embed_tokens.weight": 0.1,
    "thinker.lm_head.weight": 0.02,
    "talker.codec_embedding.weight": 0.1,
    "talker.codec_head.weight": 0.02,
    "talker.mtp.code_embedding": 0.1,
    "talker.mtp.code_head": 0.02,
}
"""Standard deviations of embeddings and heads."""

STEM = ("aut.conv2d1.weight", "aut.conv2d2.weight", "aut.conv2d3.weight", "aut.conv_out.weight")
"""The convolutions with which AuT begins, each (but the first) behind a GELU."""


def init_weights(model: OmniModel | AuT, seed: int) -> None:
    """Draw every parameter, each from its own random stream named by the parameter: the same values in whatever order
    and wherever they are drawn.

    Matrices are normal with variance 1 / fan_in (at width 2048 the usual 0.02), the head has 0.02, so that training
    starts near the uniform distribution. Norm weights are 1, biases 0. In the encoders the last matrix of every
    residual branch is divided by sqrt(2 * layers) (GPT-2). Talker and MTP are as the Thinker, `Code2Wav` says its own.

    In the Thinker it is not, and token embeddings have 0.1, less than the encoders' features. So what attention fetches
    from a picture is, from the first step, loud in the residual stream of the word that is to be predicted. With quiet
    branches and embeddings of 0.5 it is 3 % there, and a small model first learns to guess well and only much later to
    look (309 pictures, 8,300 samples: the loss rises by 0.3 with another's picture there, by 0.5 here).

    GELU halves a small signal. With variance 1 / fan_in a log-mel spectrogram of deviation 0.4 comes out of AuT's
    convolutions with 0.03, and the positions that are added there have 0.7: the encoder begins nearly deaf. So the
    matrices of its stem have twice the deviation.

    The Talker's input is a sum of codes' embeddings (0.3 for eight of 0.1) and of a projected word. Two layers and a
    SiLU leave 0.05 of a word's 0.1: the text begins as a whisper beside the sound so far, and a small Talker continues
    the sound and says any word. So the first layer of `text_projection` undoes the embeddings' 0.1.

    AuT's decoder is as the encoders; its embeddings have 1 / sqrt(width), so that the first logits have variance 1.
    """
    depth = {"aut": len(model.aut.layers)}
    if isinstance(model, AuT):
        depth["decoder"] = len(model.decoder.layers)
    else:
        depth["visual"] = len(model.visual.blocks)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            if name.endswith("bias"):
                put(p, part_of_whole(partial(torch.zeros, p.shape)))
            elif not name.startswith("code2wav."):  # there, layer scales and the like keep what they were made with
                put(p, part_of_whole(partial(torch.ones, p.shape)))
            continue
        fan_in = p.shape[-1] if ".experts." in name else p[0].numel()
        std = _wave_std(model, name) if name.startswith("code2wav.") else STD.get(name, fan_in**-0.5)
        if name.endswith(STEM):
            std *= 2
        if name == "talker.text_projection.linear_fc1.weight":
            std /= STD["thinker.embed_tokens.weight"]
        if name.endswith(RESIDUAL_WRITERS):
            std /= (2 * depth[name.split(".")[0]]) ** 0.5
        _draw(p, name, seed, std)


def _draw(p: Tensor, name: str, seed: int, std: float) -> None:
    def whole() -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return torch.randn(p.shape, generator=generator) * std

    put(p, part_of_whole(whole))


def _wave_std(model: nn.Module, name: str) -> float:
    """Of a matrix of Code2Wav or of the codec. Convolutions have variance 1 / (3 fan_in): with 1 / fan_in the chain of
    residual units would start with an output of 60 times the size of speech."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.ConvTranspose1d):  # weight [in, out, kernel]: so many inputs reach an output
        return (3 * module.in_channels * module.kernel_size[0] / module.stride[0]) ** -0.5
    if isinstance(module, nn.Conv1d):
        return (3 * module.weight[0].numel()) ** -0.5
    if isinstance(module, nn.Linear):
        return module.in_features**-0.5
    return 0.02


def build_codec(preset: str = "tiny", *, decoder: Mapping[str, Any] | None = None, **changes: Any) -> Codec:
    """A codec of a preset's size, its weights not yet drawn (`init_codec_weights`): `changes` of `CodecConfig` and,
    in `decoder`, of `Code2WavConfig`. Raises as `build`."""
    if preset not in CODEC_PRESETS:
        raise ValueError(f"model.preset={preset!r}: no such preset; use one of {', '.join(CODEC_PRESETS)}")
    base = CODEC_PRESETS[preset]
    changes["decoder"] = _replace(base.decoder, decoder or {}, "decoder")
    return Codec(_replace(base, changes, "codec"))


@torch.no_grad()
def init_codec_weights(codec: Codec, seed: int) -> None:
    """Draw the weights of a codec as `init_weights` draws those of Code2Wav. Codebooks come from the first batch."""
    for name, p in codec.named_parameters():
        if p.ndim > 1:
            _draw(p, name, seed, _wave_std(codec, name))
        elif name.endswith("bias"):
            p.zero_()  # layer scales and the like keep what they were made with


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, experts that rest included."""
    return sum(p.numel() for p in module.parameters())
