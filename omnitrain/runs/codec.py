"""A codec from a folder: of a run of `fit +recipe=codec`, or of a Mimi in the layout of `transformers`."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import cast

import torch
from torch import nn

from omnitrain.interop.mimi import MimiCodec
from omnitrain.interop.start_from import model_weights
from omnitrain.models.code2wav import fingerprint
from omnitrain.models.codec import Codec

SAMPLE_RATE = 24_000
"""Hz of the waveforms that every codec here takes and gives."""


def load_codec(path: str | Path) -> Codec | MimiCodec:
    """The codec in a folder, on the CPU, in eval mode and frozen; its decoder can speak codes by itself.

    Args:
        path: a run folder (config.yaml, checkpoints/last.ckpt), or a folder with a Mimi (config.json).

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it yet.
        ValueError: it holds something else than a codec, or one whose codebooks are still empty.
        ForbiddenTarget, MissingTarget: its configuration names code that may not run, or does not exist.
        ImportError: a Mimi without transformers.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        codec = _load_run(path)
    elif (path / "config.json").is_file():
        codec = MimiCodec.from_folder(path)
    elif not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; name the run folder of `omnitrain fit +recipe=codec`")
    else:
        raise ValueError(
            f"{path}: neither a run folder (no config.yaml) nor a Mimi (no config.json); name the run folder of "
            "`omnitrain fit +recipe=codec`"
        )
    return codec.eval().requires_grad_(False)


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


def bits_per_frame(codec: Codec | MimiCodec) -> float:
    """Bits that the codes of one frame hold."""
    if isinstance(codec, Codec):
        return codec.config.quantizers * math.log2(codec.config.codebook_size)
    return codec.quantizers * math.log2(codec.model.config.codebook_size)


def _load_run(run_dir: Path) -> Codec:
    """The last checkpoint of a run. The folder may have been moved: nothing outside it is read."""
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} does not exist: this run has not written a checkpoint yet")

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from omnitrain.config.targets import check_origins, check_targets

    cfg = OmegaConf.create({"model": OmegaConf.load(run_dir / "config.yaml").model})
    check_origins(check_targets(OmegaConf.to_container(cfg, resolve=True)))
    target = cfg.model.get("_target_")
    if target != "omnitrain.models.presets.build_codec":
        raise ValueError(
            f"{run_dir / 'config.yaml'}: model._target_ is {target}, which is no codec; name the run folder of "
            "`omnitrain fit +recipe=codec`"
        )
    codec: Codec = instantiate(cfg.model, _convert_="all")
    try:
        codec.load_state_dict(model_weights(checkpoint))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit the model of {run_dir / 'config.yaml'}: {error}") from error
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
