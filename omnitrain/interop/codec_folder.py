"""A codec in a folder of its own: fp16 weights to be passed on, and what is to be known about them.

    codec.safetensors   encoder, decoder and the quantizer's projections and codebooks, in fp16
    codec.json          its sizes, what it was trained on and how, and how it scores (`runs.export_codec`)
    NOTICE.md           whose voices these are, for people

What follows from these is left out: the decoder's table of code embeddings (`Codec.fold_codebooks`) and the codebooks'
sums. The one that comes with omnitrain is called `BUILTIN` wherever a codec is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from omnitrain.files import read_json
from omnitrain.interop.public_config import CheckpointError
from omnitrain.models.codec import Codec

WEIGHTS, DESCRIPTION, NOTICE = "codec.safetensors", "codec.json", "NOTICE.md"
BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).resolve().parents[1] / "codec_builtin"
CODECS = (
    f"a codec is {BUILTIN}, the run folder of `omnitrain fit +recipe=codec`, a folder of `omnitrain convert to-codec`, "
    "or that of a Mimi in the layout of transformers"
)
"""What may be named as a codec."""

_TABLE = "decoder.code_embedding.weight"


def codec_folder(name: str | Path) -> Path:
    """The folder of the codec that is called so. Raises FileNotFoundError if it is `BUILTIN`, and there is none."""
    if str(name) != BUILTIN:
        return Path(name)
    if not is_codec_folder(BUILTIN_FOLDER):
        raise FileNotFoundError(
            f"{BUILTIN}: this installation brings no codec ({BUILTIN_FOLDER / DESCRIPTION} is missing); train one with "
            "`python -m omnitrain fit +recipe=codec`, and name its run folder"
        )
    return BUILTIN_FOLDER


def is_codec_folder(folder: Path) -> bool:
    """Whether a codec was written there."""
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """What its codec.json says. Raises CheckpointError if that is not what `convert to-codec` writes."""
    found = read_json(folder / DESCRIPTION)
    if not isinstance(found, dict) or not {"codec", "fingerprint"} <= found.keys():
        raise CheckpointError(f"{folder / DESCRIPTION}: describes no codec (it has no `codec` and `fingerprint`)")
    return found


def save_codec_weights(codec: Codec, path: Path) -> None:
    """Write the weights of a codec. Raises ValueError for one that fp16 cannot hold."""
    kept = {}
    for name, value in codec.state_dict().items():
        if name == _TABLE or name.endswith((".sums", ".initialised")):
            continue
        stored = value if name.endswith(".counts") else value.half()
        if not stored.isfinite().all():
            raise ValueError(f"{name} has values up to {value.abs().max():.3g}, and fp16 ends at 65504")
        kept[name] = stored.contiguous()
    path.write_bytes(save(kept))


def read_codec_weights(codec: Codec, folder: Path) -> dict[str, Tensor]:
    """The whole state dict of the codec in `folder`, in fp32, but for the table of code embeddings, which stays that of
    `codec` until it is folded. Raises CheckpointError if the file is damaged or something else."""
    path = folder / WEIGHTS
    try:
        weights = {name: value.float() for name, value in load_file(path).items()}
        for name in [name.removesuffix("codebooks") for name in weights if name.endswith(".codebooks")]:
            weights[f"{name}sums"] = weights[f"{name}codebooks"] * weights[f"{name}counts"][..., None]
            weights[f"{name}initialised"] = torch.tensor(True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found; it belongs beside {DESCRIPTION}") from error
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, or not the weights of a codec; get the folder again") from error
    return weights | {_TABLE: codec.decoder.code_embedding.weight.detach()}
