"""Checkpoints in the public Qwen3-Omni layout, in and out.

A folder holds `config.json` and `model.safetensors`, or several files with `model.safetensors.index.json`. Two layouts
are read and written: "full" (`Qwen3OmniMoeForConditionalGeneration`, keys `thinker.model...`, `thinker.audio_tower...`,
and of the speaking parts `talker...`, `code2wav...`) and "thinker" (`Qwen3OmniMoeThinkerForConditionalGeneration`, the
Thinker's keys without the first part).

Where our tensors are joined (queries, keys and values; gate and up; all experts of a layer), one of ours is many
of theirs. `_pieces` says which, and serves both directions.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnitrain.files import atomic, write_json
from omnitrain.interop.public_config import (
    FULL,
    MOST_PARAMETERS,
    CheckpointError,
    Layout,
    Section,
    public_config,
    read_config,
    read_json,
)
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import MTPConfig, OmniConfig, TalkerConfig, ThinkerConfig

SPEECH_PARTS = ("talker.", "code2wav.")
"""How the keys of the speaking parts start, ours and the public ones; only a full checkpoint has them."""

Index = tuple[int | slice, ...]
Pieces = list[tuple[str, Index]]
"""Public key, and which part of our tensor it is."""


def load_pretrained(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", speech: bool = True
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
    model = _empty_model(config, folder / "config.json")
    with TensorFiles(folder, prefix) as checkpoint:
        tensors = {
            name: checkpoint.assemble(name, parameter, config, dtype, device)
            for name, parameter in model.named_parameters()
        }
        absent = {"talker.": config.talker is None, "code2wav.": config.code2wav is None}
        checkpoint.check_all_read(tuple(part for part in SPEECH_PARTS if absent[part]))
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def _empty_model(config: OmniConfig, path: Path) -> OmniModel:
    """The model on `meta`: no memory is needed yet."""
    try:
        with torch.device("meta"):
            model = OmniModel(config)
    except RuntimeError as error:  # more numbers than 64 bits count
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: describes a model that cannot be built: {reason}") from error
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    if (total := sum(sizes.values())) > MOST_PARAMETERS:
        largest = max(sizes, key=sizes.__getitem__)
        raise CheckpointError(
            f"{path}: describes {total:.2g} parameters, most of them in {SECTIONS[largest]}; at most "
            f"{MOST_PARAMETERS:.0e} are built"
        )
    return model


SECTIONS = {
    "aut": "thinker_config.audio_config",
    "visual": "thinker_config.vision_config",
    "thinker": "thinker_config.text_config",
    "talker": "talker_config",
    "code2wav": "code2wav_config",
}
"""Where `config.json` describes the parts of `OmniModel`."""


class TensorFiles:
    """The safetensors files of a folder, opened lazily; remembers which keys were read."""

    def __init__(self, folder: Path, prefix: str) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = Section.of(index).section("weight_map").values
            if strange := [name for name in weight_map.values() if name != Path(str(name)).name]:
                raise CheckpointError(f"{index}: weight_map names {strange[0]!r}; expected a file of the same folder")
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

    def __enter__(self) -> TensorFiles:
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
        self, name: str, parameter: Tensor, config: OmniConfig, dtype: torch.dtype | None, device: torch.device | str
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
            checkpoint = stack.enter_context(TensorFiles(base, prefix))
            theirs = tuple(part for part in SPEECH_PARTS if part.removesuffix(".") not in own)
            others = ((k, checkpoint.get(k)) for k in sorted(checkpoint.file_of) if k.startswith(theirs))
            config = read_json(base / "config.json")
            for path in base.iterdir():
                if path.is_file() and path.name != "config.json" and "safetensors" not in path.name:
                    shutil.copy2(path, folder / path.name)
        else:
            config = public_config(model.config, layout, dtype)
        _write_shards(folder, [public_tensors(model, layout), others], max_shard_bytes)
    write_json(folder / "config.json", config)


_SIZES = ("thinker", "aut", "vision", "talker", "code2wav")
"""Fields of `OmniConfig` that describe a part."""


def _write_shards(folder: Path, sources: list[Iterator[tuple[str, Tensor]]], limit: int) -> None:
    """Replace the weights in `folder`. Those that stand there stay until all of the new ones are on disk."""
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    total, size, pending = 0, 0, dict[str, Tensor]()

    def flush() -> None:
        shards.append(folder / f"model-{len(shards) + 1:05d}.safetensors.partial")
        with atomic(shards[-1]) as partial:
            save_file(pending, partial, metadata={"format": "pt"})
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
    for old in set(folder.glob("model*.safetensors*")) - set(shards):
        old.unlink()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {k: names[i] for k, i in sorted(weight_map.items())}}
    write_json(folder / "model.safetensors.index.json", index)
