"""Text models in the public Qwen3 format (`Qwen3ForCausalLM`, `Qwen3MoeForCausalLM`) as a Thinker to start from.

On text the three axes of TM-RoPE carry the same id, so that it turns queries and keys exactly as the text model's
rotary embedding does; the decoder layers are the same. So the Thinker computes the text model's logits, number for
number, and learns to hear and see from there (report section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnitrain.interop.public_config import TEXT, CheckpointError, Section, architecture_of, rope_theta
from omnitrain.interop.public_format import TensorFiles
from omnitrain.interop.stored import Stored, region
from omnitrain.models.omni import OmniModel
from omnitrain.models.thinker import ThinkerConfig

DENSE, SPARSE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
SHARED = ("d_model", "layers", "heads", "kv_heads", "head_dim", "norm_eps", "attention_bias")
OF_EXPERTS = ("n_experts", "top_k", "expert_width", "normalise_top_k")
"""Sizes of a text model that must be those of the Thinker."""
_DEFAULTS = {"rms_norm_eps": 1e-6, "attention_bias": False}
READ = {
    DENSE: replace(TEXT, theta=1e4, defaults={
        **_DEFAULTS, "head_dim": 128, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 22016,
    }),
    SPARSE: replace(TEXT, theta=1e4, defaults={
        **_DEFAULTS, "head_dim": TEXT.defaults["head_dim"], "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "mlp_only_layers": (),
        "decoder_sparse_step": 1,
    }),
}  # fmt: skip
"""How the sizes of each architecture are read: the Thinker's table, with the defaults of transformers."""


class TextWeights(NamedTuple):
    """weights: the Thinker's parameters by their names in `OmniModel` (``thinker.layers.0...``).  missing_rows: token
    ids from here on have no row in the file; theirs is the mean of the file's rows. None: all have one."""

    weights: Mapping[str, Tensor]
    missing_rows: int | None


def is_text_model(folder: str | Path) -> bool:
    """Whether `folder`/config.json names one of the two public text architectures."""
    path = Path(folder) / "config.json"
    return path.is_file() and architecture_of(Section.of(path)) in (DENSE, SPARSE)


def load_text_model(folder: str | Path, model: OmniModel) -> TextWeights:
    """The weights of a text model for `model`'s Thinker, in its dtypes; the model itself is left as it is.

    Word embeddings and output layer may be tied in the file; the Thinker's start equal and are trained apart. If the
    file has fewer rows than the model's vocabulary, the rows of further ids (special tokens, padding) are the mean of
    the file's rows: a token that nobody has seen is then as likely as an average one, not likelier than all others.
    Raises CheckpointError: another architecture, other sizes than the model's (the message says which to set), more
    rows than the model's vocabulary, a missing, unknown or wrong tensor.
    """
    folder = Path(folder)
    section = Section.of(folder / "config.json")
    architecture = architecture_of(section)
    if architecture not in (DENSE, SPARSE):
        raise CheckpointError(f"{section.path}: architectures is {architecture!r}; expected {SPARSE} or {DENSE}")
    _check_sizes(section, architecture, model.config.thinker)
    weights = _TextTensors(folder, model, tied=section.get("tie_word_embeddings", False))
    return TextWeights(weights, weights.missing_rows)


class _TextTensors(Stored):
    """The Thinker's weights in a folder; see `load_text_model`."""

    def __init__(self, folder: Path, model: OmniModel, *, tied: bool) -> None:
        self._config, self._dtype = model.config, model.thinker.norm.weight.dtype
        self._like = {f"thinker.{n}": torch.empty_like(x, device="meta") for n, x in model.thinker.named_parameters()}
        self.shapes = {name: tuple(x.shape) for name, x in self._like.items()}
        self._files = TensorFiles(folder, "")
        tables = [f"thinker.{name}" for name in ("embed_tokens.weight", "lm_head.weight")]
        named = {name: x for name, x in self._like.items() if name not in tables}
        self._files.check_all_wanted(named, self._config, extra=("model.embed_tokens.weight", "lm_head.weight"))
        for name, like in named.items():
            for key, index in self._files.pieces(name, like, self._config):
                self._files.check(key, like[index].shape)
        self._keys = {}
        for name in tables:
            key = "lm_head.weight" if "lm_head" in name else "model.embed_tokens.weight"
            if tied and key not in self._files.file_of:
                key = "model.embed_tokens.weight"
            self._keys[name] = key
            self._files.check(key)
            rows = self._files.header(key)[0]
            self.missing_rows = _missing_rows(rows, self.shapes[name], self._files.file_of[key], key)

    def region(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        if name not in self._keys:
            return self._files.region(name, self._like[name], self._config, offset, shape).to(self._dtype)
        filled = _filled(self._files.get(self._keys[name]), self.shapes[name][0], self._dtype)
        return region({name: filled}, name, offset, shape)


def _filled(rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`rows` [n, D] and their mean for what is missing, [count, D]."""
    filled = torch.empty(count, rows.shape[1], dtype=dtype)
    filled[: len(rows)] = rows.to(dtype)
    if len(rows) < count:
        filled[len(rows) :] = rows.double().mean(0).to(dtype)
    return filled


def _missing_rows(found: list[int], wanted: tuple[int, ...], file: Path, key: str) -> int | None:
    """How many rows a table of shape `found` has, if it has fewer than those that are `wanted`."""
    vocabulary, width = wanted
    if found[1:] != [width]:
        raise CheckpointError(f"{file}: key {key!r} has shape {found}, config.json asks for a width of {width}")
    if found[0] > vocabulary:
        raise CheckpointError(
            f"{file}: key {key!r} has {found[0]} rows, the model's vocabulary {vocabulary}; use the tokenizer of this "
            f"text model (data.tokenizer=FOLDER), and model.vocab_size={found[0]} if its rows are padded"
        )
    return None if found[0] == vocabulary else found[0]


def _check_sizes(c: Section, architecture: str, ours: ThinkerConfig) -> None:
    """CheckpointError if config.json differs from the Thinker; it has the override that makes the Thinker fit."""
    for place in ("rope_parameters", "rope_scaling"):
        if c.get(place, None):
            rope = c.section(place)
            rope.require("rope_type" if "rope_type" in rope.values else "type", "default")
    table = READ[architecture]
    theirs: dict[str, Any] = table.values(c, SHARED) | {"rope_theta": rope_theta(c, table.theta)}
    layers = theirs["layers"]
    with_experts: tuple[int, ...] = ()
    if architecture == SPARSE:
        dense, step = table.values(c, ("dense_layers", "sparse_step")).values()
        with_experts = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    if len(with_experts) < layers:
        theirs |= table.values(c, ("ffn",))
    if with_experts:
        theirs |= table.values(c, OF_EXPERTS)
    wrong = {name: value for name, value in theirs.items() if getattr(ours, name) != value}
    if with_experts != tuple(i for i in range(ours.layers) if ours.is_sparse(i)):
        wrong |= {"sparse_step": 1, "dense_layers": [i for i in range(layers) if i not in with_experts]}
    if not wrong:
        return
    mine = {name: list(x) if isinstance(x := getattr(ours, name), tuple) else x for name in wrong}
    said = ", ".join(f"{name} {value} (model: {mine[name]})" for name, value in wrong.items())
    if "layers" in wrong:
        wrong["accept_hidden_layer"] = layers // 2
    if "head_dim" in wrong:  # the public checkpoint's proportions of t, h and w, 24 : 20 : 20
        half = theirs["head_dim"] // 2
        side = half * 5 // 16
        wrong["mrope_sections"] = [half - 2 * side, side, side]
    override = ",".join(f"{name}:{str(value).replace(' ', '')}" for name, value in wrong.items())
    raise CheckpointError(
        f"{c.path}: the text model has other sizes than the Thinker: {said}. Write '+model.thinker={{{override}}}'"
    )
