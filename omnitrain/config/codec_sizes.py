"""Sizes that follow a codec: what a model must have to speak its codes, before anything of it is loaded."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from omnitrain.config.saved import read_config
from omnitrain.config.typed import typed
from omnitrain.files import CONFIG
from omnitrain.interop.codec_folder import DESCRIPTION, codec_folder, is_codec_folder, read_description
from omnitrain.interop.mimi import QUANTIZERS, mimi_codebook_size
from omnitrain.interop.public_config import FILE as PUBLIC_CONFIG
from omnitrain.interop.public_config import read_config as read_public_config
from omnitrain.models.sizes import Code2WavConfig, CodecConfig, TransformerConfig


def codec_folder_sizes(folder: Path) -> CodecConfig:
    """The sizes of a codec that `convert to-codec` wrote. Raises ConfigError, which names the file, if it has none."""
    return typed(CodecConfig, read_description(folder)["codec"], f"{folder / DESCRIPTION}: codec")


def codec_size(name: str | None, field: str, otherwise: Any) -> Any:
    """One size of the codec that is called so: a field of `CodecConfig`, such as ``decoder.layers``. A Mimi has two of
    them, ``decoder.quantizers`` and ``decoder.codebook_size``; of a folder in the public format see `mirrored`.

    `otherwise` without a codec, and for a folder in which there is none yet: an earlier stage may be going to make it,
    and loading it says what is wrong. Raises ValueError for the run of something else.
    """
    sizes = None if name is None else _sizes(name)
    value = sizes.get(field) if isinstance(sizes, dict) else otherwise if sizes is None else attrgetter(field)(sizes)
    value = otherwise if value is None else value
    return list(value) if isinstance(value, tuple) else value


def _sizes(name: str) -> CodecConfig | dict[str, int] | None:
    try:
        folder = codec_folder(name)
    except FileNotFoundError:
        return None
    described = [folder / DESCRIPTION, folder / CONFIG, folder / PUBLIC_CONFIG]
    return _read(folder, tuple(path.stat().st_mtime_ns if path.is_file() else None for path in described))


@cache
def _read(folder: Path, changed: tuple[int | None, ...]) -> CodecConfig | dict[str, int] | None:
    """Those of the codec in `folder`, read again only if a file of it has `changed` since."""
    if is_codec_folder(folder):
        return codec_folder_sizes(folder)
    if (folder / CONFIG).is_file():
        model = read_config(folder).model
        if not isinstance(model.config, CodecConfig):
            raise ValueError(f"{folder} is the run of {model.target}, which is no codec")
        return model.config
    if (size := mimi_codebook_size(folder)) is not None:
        return {"decoder.quantizers": QUANTIZERS, "decoder.codebook_size": size}
    if (folder / PUBLIC_CONFIG).is_file() and (wave := read_public_config(folder)[0].code2wav) is not None:
        return mirrored(wave)
    return None


def mirrored(wave: Code2WavConfig) -> CodecConfig:
    """A codec around a Code2Wav that has none, as of a folder in the public format: an encoder with its transformer and
    its rates, in reverse."""
    alike = {f.name: getattr(wave, f.name) for f in fields(TransformerConfig)}
    rates = {"downsample_rates": wave.upsample_rates[::-1], "downsampling_ratios": wave.upsampling_ratios[::-1]}
    return CodecConfig(**alike, **rates, decoder=wave)
