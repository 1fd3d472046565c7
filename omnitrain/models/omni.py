"""The parts wired together: encoders' features take the places that were left for them among the word embeddings.

The only file of `models/` that knows all of the parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from omnitrain.models.aut import AuTEncoder
from omnitrain.models.code2wav import Code2Wav
from omnitrain.models.layers.moe import SwiGLUExperts
from omnitrain.models.layers.transfer import sent
from omnitrain.models.sizes import OmniConfig
from omnitrain.models.talker import Talker
from omnitrain.models.thinker import Thinker, ThinkerOutput
from omnitrain.models.vision import VisionEncoder
from omnitrain.vocabulary import AUDIO, IMAGE, VIDEO


class OmniModel(nn.Module):
    """Audio encoder, vision encoder and Thinker, and where there is speech, Talker and Code2Wav (report figure 2).

    `forward` runs the Thinker's side; Talker and Code2Wav are called on their own, since their inputs depend on what
    is to be said.

    With `encodes_always` an encoder that has nothing to read reads a moment of silence, or a grey tile, and adds its
    features nought times: where encoders are spread over processes, all must take part in gathering each layer.

    `source` is the public folder that the weights were read from, if it was one: whoever writes them takes the other
    files (tokenizer, chat template) from there.
    """

    source: Path | None = None

    def __init__(self, config: OmniConfig) -> None:
        super().__init__()
        self.config = config
        self.aut = AuTEncoder(config.aut)
        self.visual = VisionEncoder(config.vision)
        self.thinker = Thinker(config.thinker)
        self.encodes_always = False
        self.talker = None if config.talker is None else Talker(config.talker)
        self.code2wav = None if config.code2wav is None else Code2Wav(config.code2wav)

    @property
    def output_embedding(self) -> Tensor:
        """[vocabulary, D]: hidden states of the Thinker times it are logits."""
        return self.thinker.lm_head.weight

    def set_activation_checkpointing(self, parts: Collection[str], kept: Collection[str] = ()) -> None:
        """In which parts (`aut`, `visual`, `thinker`, `talker`, `mtp`, `code2wav`) activations are computed again in
        the backward pass, layer by layer, or of long recordings segment by segment; in the others they are kept. So is
        what `kept` names of the parts' layers: the outputs of `attention`, the products of `experts`."""
        mtp = None if self.talker is None else self.talker.mtp
        for name, part in {**dict(self.named_children()), "mtp": mtp}.items():
            if part is None:
                continue
            vars(part).update(activation_checkpointing=name in parts, kept_activations=kept)
            for module in part.modules():
                if isinstance(module, SwiGLUExperts):
                    module.grouped = name in parts and "experts" in kept

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        token_types: Tensor,
        mel: Tensor | None = None,
        mel_lengths: Tensor | None = None,
        patches: Tensor | None = None,
        grid_thw: Tensor | None = None,
        *,
        aut_window_frames: int | None = None,
    ) -> ThinkerOutput:
        """Hidden states of packed documents; the arguments are `PackedBatch.model_inputs()`. With `cu_seqlens`,
        `token_types`, `mel_lengths` and `grid_thw` on the host, nothing is read back from the device.

        Args:
            input_ids: int64 [N].  position_ids: [3, N].  cu_seqlens: int32 [B + 1].  token_types: [N].
            mel: [F, n_mels].  mel_lengths: int64 [A].  patches: [P, patch_dim].  grid_thw: int64 [M, 3].
            aut_window_frames: attention window of the audio encoder (1 to 8 s), default the configuration's.

        Raises ValueError: if the encoders make more or fewer features than `token_types` has places for.
        """
        x, visual_mask, deepstack = self.embed(
            input_ids, token_types, mel, mel_lengths, patches, grid_thw, aut_window_frames=aut_window_frames
        )
        return self.thinker(x, position_ids, cu_seqlens, visual_mask, deepstack)

    def embed(
        self,
        input_ids: Tensor,
        token_types: Tensor,
        mel: Tensor | None = None,
        mel_lengths: Tensor | None = None,
        patches: Tensor | None = None,
        grid_thw: Tensor | None = None,
        *,
        aut_window_frames: int | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
        """What the Thinker reads, before its first layer; arguments and errors as in `forward`.

        Returns:
            inputs_embeds [N, D], and if there are pictures or videos: visual_mask bool [N], deepstack features per
            level [visual_mask.sum(), D]; else None, None.
        """
        x = self.thinker.embed_tokens(input_ids)
        visual_mask, deepstack = None, None
        if mel is not None and mel_lengths is not None:
            features = self.aut(mel, mel_lengths, aut_window_frames)
            x = _place(x, features, token_types == AUDIO, "audio", f"{mel_lengths.numel()} recordings")
        elif bool((token_types == AUDIO).any()):
            raise ValueError("token_types has audio positions, but mel and mel_lengths were not given")
        elif self.encodes_always:
            x = x + 0.0 * self.aut(*self.aut.silence()).sum().to(x.dtype)
        if patches is not None and grid_thw is not None:
            features, deepstack = self.visual(patches, grid_thw)
            visual_mask = (token_types == IMAGE) | (token_types == VIDEO)
            x = _place(x, features, visual_mask, "image and video", f"{len(grid_thw)} pictures and videos")
        elif bool(((token_types == IMAGE) | (token_types == VIDEO)).any()):
            raise ValueError("token_types has image or video positions, but patches and grid_thw were not given")
        elif self.encodes_always:
            features, levels = self.visual(*self.visual.grey_tile())
            x = x + 0.0 * torch.stack([part.sum() for part in (features, *levels)]).sum().to(x.dtype)
        return x, visual_mask, deepstack


def _place(x: Tensor, features: Tensor, mask: Tensor, kind: str, media: str) -> Tensor:
    """x [N, D] with `features` [n, D] in order at the n positions of `mask` [N]."""
    rows = mask.nonzero().squeeze(1)
    if len(rows) != len(features):
        raise ValueError(
            f"token_types has {len(rows)} {kind} positions, but the encoder made {len(features)} features of {media}: "
            "placeholders and media of a sample do not belong together"
        )
    return x.index_copy(0, sent(rows, x.device), features.to(x.dtype))


def thinker_fingerprint(model: OmniModel) -> str:
    """8 hex digits that tell apart what a Talker may hear: CRC-32 over up to 1,024 numbers of each tensor of the
    Thinker and its encoders, as fp32."""
    crc = 0
    for part in (model.thinker, model.aut, model.visual):
        for name, _, numbers in sampled_weights(part, 1024):
            crc = zlib.crc32(name.encode() + numbers, crc)
    return f"{crc:08x}"


def sampled_weights(module: nn.Module, count: int) -> Iterator[tuple[str, Tensor, bytes]]:
    """Name and tensor of all that is in the state of `module`, by name, with up to `count` of its numbers, evenly
    spaced, as the bytes of fp32: what fingerprints are made of."""
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        numbers = flat[:: max(1, len(flat) // count)][:count].to("cpu", torch.float32)
        yield name, tensor, numbers.numpy().tobytes()
