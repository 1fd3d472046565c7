"""Checkpoints in the public Qwen3-Omni layout, in and out.

A folder holds `config.json` and `model.safetensors`, or several files with `model.safetensors.index.json`. Two layouts
are read and written: "full" (`Qwen3OmniMoeForConditionalGeneration`, keys `thinker.model...`, `thinker.audio_tower...`,
and of the speaking parts `talker...`, `code2wav...`) and "thinker" (`Qwen3OmniMoeThinkerForConditionalGeneration`, the
Thinker's keys without the first part).

Where our tensors are joined (queries, keys and values; gate and up; all experts of a layer), one of ours is many of
theirs. `_pieces` says which, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnitrain.data.encode import SampleEncoder
from omnitrain.files import atomic, write_json
from omnitrain.interop.public_config import (
    FULL,
    MOST_PARAMETERS,
    CheckpointError,
    Layout,
    Section,
    public_config,
    read_config,
)
from omnitrain.interop.public_files import write_companions
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import OmniConfig

SPEECH_PARTS = ("talker.", "code2wav.")
"""How the keys of the speaking parts start, ours and the public ones; only a full checkpoint has them."""

Pieces = list[tuple[str, tuple[int | slice, ...]]]
"""Public key, and which part of our tensor it is."""

Track = Callable[[list[tuple[str, Any]]], Iterable[tuple[str, Any]]]
"""Passes named parameters on, one after the other, and may show how far it is."""


def load_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    speech: bool = True,
    track: Track = iter,
) -> OmniModel:
    """The Thinker with its encoders, and Talker and Code2Wav where they are, from a folder in the public layout.

    Args:
        dtype: None keeps the stored one.
        speech: False leaves Talker and Code2Wav out; they are not even read.
        track: shows progress.

    Raises CheckpointError: a file, key or field is missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    config, prefix = read_config(folder, speech=speech)
    model = empty_model(config, folder / "config.json")
    with TensorFiles(folder, prefix) as checkpoint:
        parameters = track(list(model.named_parameters()))
        tensors = {name: checkpoint.assemble(name, x, config, dtype, device) for name, x in parameters}
        checkpoint.check_all_read(left_out(config))
    model.load_state_dict(tensors, assign=True)
    model.source = folder
    return model.requires_grad_(True)


def load_code2wav(folder: str | Path) -> dict[str, Tensor]:
    """The weights of the Code2Wav in a folder in the public layout, fp32, by their names in `Code2Wav`; nothing else is
    read. Raises CheckpointError as `load_pretrained`, and if there is none."""
    folder = Path(folder)
    config, prefix = read_config(folder)
    code2wav = empty_model(config, folder / "config.json").code2wav
    if code2wav is None:
        raise CheckpointError(f"{folder / 'config.json'}: describes no Code2Wav; a full checkpoint ({FULL}) has one")
    with TensorFiles(folder, prefix) as checkpoint:
        named = ((name, x, f"code2wav.{name}") for name, x in code2wav.named_parameters())
        return {name: checkpoint.assemble(full, x, config, torch.float32, "cpu") for name, x, full in named}


def left_out(config: OmniConfig) -> tuple[str, ...]:
    """Of `SPEECH_PARTS` those that the model lacks."""
    return tuple(part for part in SPEECH_PARTS if getattr(config, part.removesuffix(".")) is None)


def empty_model(config: OmniConfig, path: Path) -> OmniModel:
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
    "aut": "thinker_config.audio_config", "visual": "thinker_config.vision_config",
    "thinker": "thinker_config.text_config", "talker": "talker_config", "code2wav": "code2wav_config",
}  # fmt: skip
"""Where `config.json` describes the parts of `OmniModel`."""


class TensorFiles(ExitStack):
    """The safetensors files of a folder, opened lazily; remembers which keys were read."""

    def __init__(self, folder: Path, prefix: str) -> None:
        super().__init__()
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
        self.files: dict[Path, Any] = {}

    def get(self, key: str) -> Tensor:
        if key not in self.file_of:
            near = sorted(k for k in self.file_of if k.rpartition(".")[0] == key.rpartition(".")[0])
            beside = f"; beside it there are {', '.join(near[:4])}" if near else ""
            raise CheckpointError(f"{self.folder}: key {key!r} is missing{beside}")
        return self._ask(key, "get_tensor")

    def header(self, key: str) -> tuple[list[int], str]:
        """Shape and dtype of a tensor that is there; its numbers are not read."""
        stored = self._ask(key, "get_slice")
        return stored.get_shape(), stored.get_dtype()

    def _ask(self, key: str, method: str) -> Any:
        """What a method of the file that holds `key` says of it."""
        path = self.file_of[key]
        if path not in self.files:
            self.files[path] = self.enter_context(_open(path))
        self.read.add(key)
        try:
            return getattr(self.files[path], method)(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: key {key!r} cannot be read: {error}") from error

    def pieces(self, name: str, parameter: Tensor, config: OmniConfig) -> Pieces:
        """The keys that make up our tensor `name`. Experts are also read as one tensor per layer, as transformers has
        them in memory."""
        pieces = _pieces(name, parameter, config, self.prefix)
        stacked = f"{pieces[0][0].partition('.experts.')[0]}.experts.{name.rpartition('.')[2]}_proj"
        return [(stacked, ())] if stacked in self.file_of else pieces

    def assemble(
        self, name: str, parameter: Tensor, config: OmniConfig, dtype: torch.dtype | None, device: torch.device | str
    ) -> Tensor:
        """Our tensor `name` from its pieces."""
        out: Tensor | None = None
        for key, index in self.pieces(name, parameter, config):
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

    def unread(self, left_out: tuple[str, ...]) -> list[str]:
        """Keys that nobody asked for, but those of parts that are left out of a full checkpoint."""
        return [key for key in sorted(set(self.file_of) - self.read) if not (self.prefix and key.startswith(left_out))]

    def check_all_read(self, left_out: tuple[str, ...]) -> None:
        """Refuse keys that nobody asked for (`unread`)."""
        for key in self.unread(left_out):
            raise CheckpointError(
                f"{self.file_of[key]}: unknown key {key!r}; config.json describes no tensor of that name"
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


_PLACES = (
    ("aut.", "{thinker}audio_tower."),
    ("visual.", "{thinker}visual."),
    ("thinker.lm_head.", "{thinker}lm_head."),
    ("thinker.", "{thinker}model."),
    ("talker.mtp.code_embedding", "talker.code_predictor.model.codec_embedding"),
    ("talker.mtp.code_head", "talker.code_predictor.lm_head"),
    ("talker.mtp.", "talker.code_predictor.model."),
    *((f"talker.{part}.", f"talker.model.{part}.") for part in ("layers", "norm", "codec_embedding")),
)
"""How our names start and the public ones; the first that fits. All others, such as Code2Wav's, are the public ones."""

_RENAMED = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.router": "mlp.gate",
    "mlp.down": "mlp.down_proj",
    "mlp.shared_expert.down": "mlp.shared_expert.down_proj",
    "mlp.shared_gate": "mlp.shared_expert_gate",
}
"""Modules of a decoder layer that are one for one."""


def _pieces(name: str, parameter: Tensor, config: OmniConfig, prefix: str) -> Pieces:
    """The public keys that make up our parameter `name`, in order; `prefix` stands before those of the Thinker."""
    ours, theirs = next((place for place in _PLACES if name.startswith(place[0])), ("", ""))
    public = theirs.format(thinker=prefix) + name.removeprefix(ours)
    if name.startswith("talker.mtp.code_"):
        return [(f"{public}.{q}.weight", (q,)) for q in range(len(parameter))]
    match = re.fullmatch(r"(thinker|talker|talker\.mtp)\.layers\.\d+\.(.+)", name)
    if match is None:
        return [(public, ())]
    layer, (module, _, kind) = public.removesuffix(match[2]), match[2].rpartition(".")
    if module == "attention.qkv":
        talker = config.talker
        c = {"thinker": config.thinker, "talker": talker, "talker.mtp": talker and talker.mtp}[match[1]]
        assert c is not None
        q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
        rows = {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k)}
        return [(f"{layer}self_attn.{x}_proj.{kind}", (r,)) for x, r in rows.items()]
    if match[2] == "mlp.experts.down":
        return [(f"{layer}mlp.experts.{e}.down_proj.weight", (e,)) for e in range(len(parameter))]
    if "gate_up" in match[2]:
        width = parameter.shape[-2] // 2
        halves = {"gate": slice(0, width), "up": slice(width, None)}
        if module == "mlp.experts":
            experts = range(len(parameter))
            return [(f"{layer}mlp.experts.{e}.{x}_proj.weight", (e, r)) for e in experts for x, r in halves.items()]
        mlp = module.removesuffix("gate_up")
        return [(f"{layer}{mlp}{x}_proj.weight", (r,)) for x, r in halves.items()]
    return [(f"{layer}{_RENAMED[module]}.{kind}", ())]


def public_tensors(model: OmniModel, layout: Layout = "thinker", track: Track = iter) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under their public names, as views; without Talker and Code2Wav in layout "thinker"."""
    prefix = "thinker." if layout == "full" else ""
    for name, parameter in track(list(model.named_parameters())):
        if layout == "full" or not name.startswith(SPEECH_PARTS):
            for key, index in _pieces(name, parameter, model.config, prefix):
                yield key, parameter.detach()[index]


def save_pretrained(
    model: OmniModel,
    folder: str | Path,
    *,
    layout: Layout | None = None,
    base: str | Path | None = None,
    encoder: SampleEncoder | None = None,
    max_shard_bytes: int = 5 * 10**9,
    track: Track = iter,
) -> None:
    """Write the model in the public layout, with tokenizer, chat template, preprocessors and generation settings: those
    of the folder that the model was loaded from (`OmniModel.source`), or made for it (`public_files`).

    Args:
        layout: "full", or "thinker" (then without Talker and Code2Wav). Default: "full" if the model can speak.
        base: a full checkpoint that the model was loaded from. What the model was loaded without (Talker, Code2Wav),
            configuration and other files (tokenizer, chat template) go along, so that the folder replaces it. Sets
            layout "full".
        encoder: of the model's prompts, which says its tokenizer and how media are read. Without it, and without a
            folder that the model came from, the tokenizer is that of the embedded pack, if it has the model's size and
            special tokens, or none is written.
        max_shard_bytes: weights beyond this many bytes go to several files with an index.
        track: shows progress.

    Raises CheckpointError: `base` is no full checkpoint, or one of other sizes than the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    speaks = model.talker is not None or model.code2wav is not None
    layout = layout or ("full" if speaks else "thinker")
    with ExitStack() as stack:
        others: Iterator[tuple[str, Tensor]] = iter(())
        if base is not None:
            base, layout = Path(base), "full"
            base_config, prefix = read_config(base)
            if not prefix:
                raise CheckpointError(f"{base / 'config.json'}: base must be a full checkpoint ({FULL})")
            sizes = {part: getattr(model.config, part) for part in ("thinker", "aut", "vision", "talker", "code2wav")}
            if any(size is not None and size != getattr(base_config, part) for part, size in sizes.items()):
                raise CheckpointError(f"{base / 'config.json'}: describes a model of other sizes than the one to save")
            checkpoint = stack.enter_context(TensorFiles(base, prefix))
            theirs = left_out(model.config)
            others = ((k, checkpoint.get(k)) for k in sorted(checkpoint.file_of) if k.startswith(theirs))
            config = Section.of(base / "config.json").values
        else:
            config = public_config(model.config, layout, model.thinker.lm_head.weight.dtype)
        _write_shards(folder, chain(public_tensors(model, layout, track), others), max_shard_bytes)
    write_json(folder / "config.json", config)
    write_companions(folder, model.config, model.source if base is None else Path(base), encoder)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """Replace the weights in `folder`. Those that stand there stay until all of the new ones are on disk."""
    shards: dict[Path, list[str]] = {}  # file -> its keys
    total, size, pending = 0, 0, dict[str, Tensor]()

    def flush() -> None:
        path = folder / f"model-{len(shards) + 1:05d}.safetensors.partial"
        with atomic(path) as partial:
            save_file(pending, partial, metadata={"format": "pt"})
        shards[path] = list(pending)
        pending.clear()

    for key, tensor in tensors:
        if pending and size + tensor.nbytes > limit:
            flush()
            size = 0
        pending[key] = tensor.to("cpu", copy=not tensor.is_contiguous()).contiguous().clone()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    for old in set(folder.glob("model*.safetensors*")) - shards.keys():
        old.unlink()
    if len(shards) == 1:
        next(iter(shards)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (shard, keys) in enumerate(shards.items(), start=1):
        path = shard.rename(folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors")
        weight_map |= dict.fromkeys(keys, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
