"""Models from folders: the one loader of run folders and of folders in public formats.

A run folder may have been moved: nothing outside it is read. Its configuration is checked before anything is built.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from omnitrain.config.codec_sizes import codec_folder_sizes
from omnitrain.config.run_config import PretrainedConfig
from omnitrain.config.saved import read_config
from omnitrain.config.targets import build
from omnitrain.config.typed import Named
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.settings import MediaLimits
from omnitrain.files import CONFIG, LAST_CHECKPOINT, PUBLIC, TOKENIZER
from omnitrain.interop.codec_folder import CODECS, codec_folder, is_codec_folder
from omnitrain.interop.mimi import MimiCodec
from omnitrain.interop.public_config import FILE
from omnitrain.interop.public_config import read_config as read_public_config
from omnitrain.interop.public_files import public_geometry
from omnitrain.interop.public_format import empty_model, load_pretrained
from omnitrain.interop.start_from import load_codec_folder, load_weights, model_weights
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.code2wav import fingerprint
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import CodecConfig, OmniConfig

SAMPLE_RATE = 24_000
"""Hz of the waveforms that every codec here takes and gives."""


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    speech: bool = False,
    as_reference: bool = False,
) -> tuple[OmniModel, SampleEncoder]:
    """A model with a Thinker; arguments and errors as of `load_writer`, and ValueError for the run of an AuT."""
    model, encoder = load_writer(folder, device=device, dtype=dtype, speech=speech, as_reference=as_reference)
    if not isinstance(model, OmniModel):
        raise ValueError(
            f"{folder} is the run of an AuT, which has no Thinker; put its encoder into one with "
            f"module.init_from={{aut: {folder}}}"
        )
    return model, encoder


def load_writer(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    speech: bool = False,
    as_reference: bool = False,
) -> tuple[OmniModel | AuT, SampleEncoder]:
    """A model that writes, in eval mode, and the encoder of its prompts, from a run folder (its last checkpoint) or a
    folder in the public format.

    Args:
        device: "auto" is a GPU if there is one.
        dtype: of the weights, as "float32" or `torch.float32`; None keeps the stored one, "auto" is float32 on a CPU
            and bfloat16 elsewhere.
        speech: also load what speaks from a folder in the public format. A run has what it was trained with.
        as_reference: read media as `transformers` does where omnitrain does otherwise: recordings padded together
            (`AudioGeometry.reference_padding`), videos sampled by number of frames (`VisionGeometry.sampling`).

    Raises:
        FileNotFoundError: there is no such folder, or something in it is missing.
        ValueError: it holds something else, or something damaged; there is no such device. One line that says which.
        ForbiddenTarget, MissingTarget: its configuration names code that may not run, or does not exist.
    """
    folder, device = Path(folder), usable_device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if is_run(folder):
        model, encoder = _load_run(folder)
    else:
        model, encoder = _load_public(folder, device, dtype, speech)
    if as_reference:
        audio, vision = replace(encoder.audio, reference_padding=True), replace(encoder.vision, sampling="reference")
        encoder = replace(encoder, audio=audio, vision=vision)
        model.aut.reference_padding = True
    return model.to(device=device, dtype=dtype).eval(), encoder


def load_codec(name: str | Path) -> Codec | MimiCodec:
    """The codec that `interop.codec_folder.CODECS` says how to name: on the CPU, in eval mode and frozen. The decoder
    of one of ours can speak codes by itself. Raises as `load`; ValueError also if its codebooks are still empty,
    ImportError for a Mimi without transformers."""
    folder = codec_folder(name)
    if is_codec_folder(folder):
        codec = Codec(codec_folder_sizes(folder))
        load_codec_folder(codec, folder)
    elif is_run(folder, "a Mimi", f"; {CODECS}"):
        codec = _load_codec_run(folder)
    else:
        codec = MimiCodec.from_folder(folder)
    return codec.eval().requires_grad_(False)


def load_decoder(model: OmniModel, folder: str | Path, codec: str | None = None) -> MimiCodec | None:
    """What speaks for the `model` of a folder where it has no Code2Wav: the Mimi that its run was made with, or the
    one in `codec`. None for a model that speaks by itself. Raises ValueError if the Mimi is not there, or not needed.
    """
    if model.code2wav is not None:
        if codec is not None:
            raise ValueError(f"--codec {codec}: the model in {folder} speaks through its own Code2Wav; leave it out")
        return None
    if codec is None and (Path(folder) / CONFIG).is_file():
        codec = read_config(Path(folder)).codec
    if codec is None:
        raise ValueError(f"{folder} has a Talker, but no Code2Wav; name the Mimi whose codes it says with --codec DIR")
    try:
        decoder = load_codec(codec)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} speaks through the Mimi in {codec}, and {error}; give --codec DIR") from error
    if not isinstance(decoder, MimiCodec):
        raise ValueError(f"{folder} says the codes of a Mimi, and {codec} is none; give --codec DIR")
    return decoder.to(next(model.parameters()).device)


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. Raises ValueError if this machine has none such."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.cpu()
        return probe.device
    except Exception as error:  # each kind of device has its own
        gpus = torch.cuda.device_count()
        there = "cpu" + (f" and cuda:0 to cuda:{gpus - 1}" if gpus > 1 else " and cuda" if gpus else " alone")
        raise ValueError(f"device {device}: it cannot be used here; this machine has {there}") from error


def codec_fingerprint(codec: Codec | MimiCodec) -> str:
    """8 hex digits that tell codecs apart: of our own codec those of its decoder (`models.code2wav.fingerprint`), of a
    Mimi the CRC-32 of its quantizer."""
    if isinstance(codec, Codec):
        return fingerprint(codec.decoder)
    quantizer = cast(nn.Module, codec.model.quantizer)
    crc = 0
    for _, value in sorted(quantizer.state_dict().items()):
        crc = zlib.crc32(value.float().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def is_run(folder: Path, public: str = "a folder in the public format", hint: str = "") -> bool:
    """Whether `folder` is that of a run with a checkpoint; if not, it has a config.json. Raises as `load`."""
    if (folder / CONFIG).is_file():
        if not (folder / LAST_CHECKPOINT).exists():
            raise FileNotFoundError(f"{folder / LAST_CHECKPOINT} is missing: this run has not written a checkpoint yet")
        return True
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder{hint}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: neither a run folder (no {CONFIG}) nor {public} (no config.json){hint}")
    return False


def _load_run(folder: Path) -> tuple[OmniModel | AuT, SampleEncoder]:
    from omnitrain.runs.experiment import build_data

    tokenizer = run_tokenizer(folder)
    config = read_config(folder)
    config = replace(config, data=replace(config.data, config=replace(config.data.config, tokenizer=str(tokenizer))))
    if isinstance(config.model.config, PretrainedConfig):  # its weights are in the checkpoint, the folder is not read
        sizes = run_sizes(config.model.config, folder)
        config = replace(config, model=Named(target="omnitrain.models.omni.OmniModel", config=sizes))
        model, assign = empty_model(sizes, folder / CONFIG), True
    else:
        model, assign = build(config.model, place="model"), False
    if not isinstance(model, OmniModel | AuT):
        raise ValueError(f"{folder} is the run of a codec, which has no language model to ask")
    encoder: SampleEncoder = build_data(config).encoder
    load_weights(model, model_weights(folder / LAST_CHECKPOINT), folder / LAST_CHECKPOINT, assign=assign)
    return model, encoder


def run_sizes(config: PretrainedConfig, run: Path) -> OmniConfig:
    """The sizes of the model of a run that began as a public folder, from the run's own copy of its config.json."""
    own = run / PUBLIC
    return read_public_config(own if (own / FILE).is_file() else config.folder, speech=config.speech)[0]


def run_tokenizer(folder: Path) -> Path:
    """The file of the tokenizer in a run folder. Raises FileNotFoundError if it has none."""
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file():
        raise FileNotFoundError(f"{tokenizer} does not exist: copy the tokenizer that the run was trained with there")
    return tokenizer


def _load_codec_run(folder: Path) -> Codec:
    model, checkpoint = read_config(folder).model, folder / LAST_CHECKPOINT
    if not isinstance(model.config, CodecConfig):
        raise ValueError(
            f"{folder / CONFIG}: model._target_ is {model.target}, which is no codec; name the run folder of "
            "`omnitrain fit +recipe=codec`"
        )
    codec: Codec = build(model, place="model")
    load_weights(codec, model_weights(checkpoint), checkpoint)
    if not codec.quantizer.semantic.initialised:
        raise ValueError(f"{checkpoint}: its codebooks are empty; train the codec for a step at least")
    stored = codec.decoder.code_embedding.weight.detach().clone()
    codec.fold_codebooks()
    with torch.no_grad():
        # The trainer has folded them already. Its table is kept to the bit, since the fingerprint is made from it and
        # another machine's product would round otherwise.
        if torch.allclose(stored, codec.decoder.code_embedding.weight, rtol=1e-3, atol=1e-5):
            codec.decoder.code_embedding.weight.copy_(stored)
    return codec


def _load_public(
    folder: Path, device: torch.device, dtype: torch.dtype | None, speech: bool
) -> tuple[OmniModel, SampleEncoder]:
    tokenizer = ChatTokenizer.from_dir(folder)
    model = load_pretrained(folder, dtype=dtype, device=device, speech=speech)
    return model, public_encoder(folder, model.config, tokenizer)


def public_encoder(folder: Path, config: OmniConfig, tokenizer: ChatTokenizer) -> SampleEncoder:
    """The encoder of prompts for the model in a folder in the public format."""
    audio, vision = public_geometry(folder, config)
    return SampleEncoder(
        tokenizer=tokenizer,
        audio=audio,
        vision=vision,
        limits=MediaLimits(),
        ids_per_second=config.position_id_per_seconds,
        vocab_size=config.thinker.vocab_size,
    )
