"""Tiny random models in the public Qwen3-Omni format, and samples that both they and omnitrain can read.

from tests.interop.public_models import save_public_model, public_sample
reference = save_public_model(tmp_path, variant=0)              # transformers model, its directory written
sample = public_sample(reference.config, [("text", 5), ("image", (1, 4, 6)), ("text", 3)], seed=1)
reference(**sample.reference_inputs).logits                     # one sample, batch of one
PackedBatch.pack([sample.encoded, ...])                         # the same sample for omnitrain
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnitrain.data import positions as tm
from omnitrain.data.batch import IGNORE, EncodedSample
from omnitrain.vocabulary import AUDIO, IMAGE, TEXT, VIDEO

VOCABULARY = 320
FIRST_SPECIAL = 300
SPECIAL = {
    "im_start": 300, "im_end": 301, "user": 302, "system": 303, "assistant": 304,
    "audio_start": 305, "audio": 306, "audio_end": 307, "image": 308, "video": 309,
    "vision_start": 310, "vision_end": 311, "tts_pad": 312, "tts_bos": 313, "tts_eos": 314,
}  # fmt: skip

Piece = tuple[Any, ...]
"""("text", n), ("special", names in SPECIAL ...), ("audio", mel frames), ("image", grid),
("video", grid, seconds per grid), or ("audio_video", grid, seconds per grid, mel frames); grids count patches
(t, h, w)."""

_TEXT = (
    dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        mlp_only_layers=[], decoder_sparse_step=1,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
    dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=1,
        head_dim=24, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False,
        mlp_only_layers=[3], decoder_sparse_step=2, rms_norm_eps=1e-5, router_aux_loss_coef=0.01,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4], mrope_interleaved=True),
    ),
)  # fmt: skip
_AUDIO = (
    dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, downsample_hidden_size=8),
    dict(d_model=48, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=56, downsample_hidden_size=6,
         n_window_infer=200),
)  # fmt: skip
_VISION = (
    dict(depth=3, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=4, num_position_embeddings=16,
         deepstack_visual_indexes=[0, 1]),
    dict(depth=4, hidden_size=48, num_heads=3, intermediate_size=64, patch_size=6, num_position_embeddings=36,
         deepstack_visual_indexes=[0, 1, 3]),
)  # fmt: skip
# Transformers forbids the last 1024 codec ids but the end: a vocabulary of codebook + 1024 loses none.
_TALKER = (
    dict(
        text=dict(
            vocab_size=64 + 1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, moe_intermediate_size=24, shared_expert_intermediate_size=40,
            num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
        ),
        mtp=dict(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, num_code_groups=4,
        ),
        num_code_groups=4, accept_hidden_layer=2, codec_pad_id=64, codec_bos_id=65, codec_eos_token_id=66,
        codec_nothink_id=67, codec_think_bos_id=68, codec_think_eos_id=69, speaker_id={"ethan": 70},
    ),
    dict(
        text=dict(
            vocab_size=40 + 1024, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=24, moe_intermediate_size=16, shared_expert_intermediate_size=32,
            num_experts=6, num_experts_per_tok=3, norm_topk_prob=False, rms_norm_eps=1e-5, router_aux_loss_coef=0.01,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4], mrope_interleaved=True),
        ),
        mtp=dict(
            vocab_size=40, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=3, head_dim=16, num_code_groups=6, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=1e5),
        ),
        num_code_groups=6, accept_hidden_layer=3, codec_pad_id=140, codec_bos_id=141, codec_eos_token_id=142,
        codec_nothink_id=147, codec_think_bos_id=148, codec_think_eos_id=149,
        speaker_id={"chelsie": 293, "ethan": 294},
    ),
)  # fmt: skip
_CODE2WAV = (
    dict(
        codebook_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
        num_hidden_layers=2, num_quantizers=4, decoder_dim=48, upsample_rates=[2, 2], upsampling_ratios=[2],
    ),
    dict(
        codebook_size=40, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        num_hidden_layers=3, num_quantizers=6, decoder_dim=64, upsample_rates=[3, 2, 2], upsampling_ratios=[2, 2],
        sliding_window=5, rms_norm_eps=1e-6, layer_scale_initial_scale=0.1,
    ),
)  # fmt: skip


def public_config(variant: int = 0):
    """A tiny `Qwen3OmniMoeConfig` (Thinker, Talker, Code2Wav). Variants 0 and 1 differ in every size, in dense layers,
    in the router's normalisation, in the audio window and in the number of deepstack levels."""
    from transformers import Qwen3OmniMoeConfig

    out = _TEXT[variant]["hidden_size"]
    tokens = {f"{k}_token_id": SPECIAL[k] for k in ("audio_start", "audio", "image", "video", "user")}
    thinker = dict(
        text_config=dict(vocab_size=VOCABULARY, **_TEXT[variant]),
        audio_config=dict(output_dim=out, **_AUDIO[variant]),
        vision_config=dict(out_hidden_size=out, **_VISION[variant]),
        position_id_per_seconds=13,
        vision_start_token_id=SPECIAL["vision_start"],
        vision_end_token_id=SPECIAL["vision_end"],
        **tokens,
    )
    sizes = copy.deepcopy(_TALKER[variant])
    talker = dict(
        text_config=sizes.pop("text"), code_predictor_config=sizes.pop("mtp"), thinker_hidden_size=out, **sizes,
        spatial_merge_size=2, position_id_per_seconds=13, vision_start_token_id=SPECIAL["vision_start"],
        audio_token_id=SPECIAL["audio"], image_token_id=SPECIAL["image"], video_token_id=SPECIAL["video"],
        audio_start_token_id=SPECIAL["audio_start"],
    )  # fmt: skip
    others = ("im_start", "im_end", "tts_pad", "tts_bos", "tts_eos", "system", "user", "assistant")
    return Qwen3OmniMoeConfig(
        thinker_config=thinker,
        talker_config=talker,
        code2wav_config=copy.deepcopy(_CODE2WAV[variant]),
        **{f"{name}_token_id": SPECIAL[name] for name in others},
    )


def public_model(variant: int = 0, kind: str = "thinker", seed: int = 0):
    """A random fp32 model of `transformers`, in eval mode: `Qwen3OmniMoeThinkerForConditionalGeneration`, or with
    kind="full" `Qwen3OmniMoeForConditionalGeneration`. Every parameter is drawn wide enough to matter."""
    from transformers import Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeThinkerForConditionalGeneration

    config = public_config(variant)
    if kind == "full":
        model = Qwen3OmniMoeForConditionalGeneration(config)
    else:
        model = Qwen3OmniMoeThinkerForConditionalGeneration(copy.deepcopy(config.thinker_config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.1 * noise + (1.0 if "norm" in name or "ln_" in name else 0.0))
            else:
                fan_in = p.shape[-1] if "experts" in name else p[0].numel()
                p.copy_(noise / fan_in**0.5)
            if name.startswith("code2wav.decoder.") and p.ndim > 1:
                p.mul_(0.5)  # or most samples would be clamped
    return model.eval()


def save_public_model(folder: Path | str, variant: int = 0, kind: str = "thinker", seed: int = 0):
    """`public_model`, written to `folder` as `config.json` and `model.safetensors`."""
    model = public_model(variant, kind, seed)
    model.save_pretrained(folder)
    return model


def save_small_folder(folder: Path | str) -> Path:
    """A small random Thinker of our own as a public folder, with the pack's tokenizer; without transformers."""
    from omnitrain.config.locations import PACK
    from omnitrain.data.chat import ChatTokenizer
    from omnitrain.interop.public_format import save_pretrained
    from omnitrain.models.presets import build, init_weights

    tokenizer = ChatTokenizer.from_dir(PACK)
    thinker = {"layers": 2, "d_model": 32, "heads": 2, "kv_heads": 1, "expert_width": 16}
    aut, vision = {"d_model": 16, "layers": 1, "heads": 2, "ffn": 16, "conv_hidden": 4}, {"d_model": 32, "layers": 3}
    sizes = {"vocab_size": tokenizer.vocab_size, "special_tokens": tokenizer.special_ids}
    model = build("tiny", **sizes, thinker=thinker, aut=aut, vision=vision)
    init_weights(model, seed=0)
    save_pretrained(model, folder)
    return Path(folder)


@dataclass
class PublicSample:
    """`reference_inputs`: keyword arguments of the transformers Thinker, batch of one. `encoded`: for omnitrain."""

    reference_inputs: dict[str, Any]
    encoded: EncodedSample
    spans: list[tm.Span] = field(default_factory=list)


def public_sample(config: Any, pieces: list[Piece], seed: int = 0) -> PublicSample:
    """Random content for `pieces`, with the markup that the public chat template puts around media.

    `config`: a Thinker configuration of transformers, or the whole model's.
    """
    config = getattr(config, "thinker_config", config)
    rng = np.random.default_rng(seed)
    merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    pixels_per_patch = config.vision_config.in_channels * config.vision_config.temporal_patch_size * patch**2
    ids: list[int] = []
    types: list[int] = []
    spans: list[tm.Span] = []
    mel: list[np.ndarray] = []
    patches: list[np.ndarray] = []
    grids: list[tuple[int, int, int]] = []
    kinds: list[int] = []
    seconds: list[float] = []

    def add(tokens: list[int], kind: int = TEXT) -> None:
        ids.extend(tokens)
        types.extend([kind] * len(tokens))

    def markup(*names: str) -> None:
        add([SPECIAL[n] for n in names])
        spans.append(tm.TextSpan(len(names)))

    def sound(frames: int) -> int:
        mel.append(rng.standard_normal((frames, config.audio_config.num_mel_bins), dtype=np.float32))
        return tm.audio_tokens(frames, config.audio_config.n_window * 2)

    def picture(grid: tuple[int, int, int], kind: int) -> int:
        patches.append(rng.standard_normal((int(np.prod(grid)), pixels_per_patch), dtype=np.float32))
        grids.append(grid)
        kinds.append(kind)
        return tm.vision_tokens(grid, merge)

    for piece in pieces:
        match piece:
            case ("text", n):
                add(rng.integers(0, FIRST_SPECIAL, n).tolist())
                spans.append(tm.TextSpan(n))
            case ("special", *names):
                markup(*names)
            case ("audio", frames):
                markup("audio_start")
                n = sound(frames)
                add([SPECIAL["audio"]] * n, AUDIO)
                spans.append(tm.AudioSpan(n))
                markup("audio_end")
            case ("image", grid):
                markup("vision_start")
                add([SPECIAL["image"]] * picture(grid, IMAGE), IMAGE)
                spans.append(tm.ImageSpan(grid))
                markup("vision_end")
            case ("video", grid, per_grid):
                markup("vision_start")
                add([SPECIAL["video"]] * picture(grid, VIDEO), VIDEO)
                seconds.append(per_grid)
                spans.append(tm.VideoSpan(grid, per_grid))
                markup("vision_end")
            case ("audio_video", grid, per_grid, frames):
                markup("vision_start", "audio_start")
                picture(grid, VIDEO)
                n = sound(frames)
                seconds.append(per_grid)
                for is_video in tm.audio_video_order(grid, per_grid, n, merge):
                    add([SPECIAL["video" if is_video else "audio"]], VIDEO if is_video else AUDIO)
                spans.append(tm.AudioVideoSpan(grid, per_grid, n))
                markup("audio_end", "vision_end")
            case _:
                raise ValueError(f"unknown piece {piece}")

    def reference_pixels(kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = [i for i, k in enumerate(kinds) if k == kind]
        return torch.from_numpy(np.concatenate([patches[i] for i in chosen])), torch.tensor([grids[i] for i in chosen])

    input_ids = np.array(ids, dtype=np.int64)
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if IMAGE in kinds:
        inputs["pixel_values"], inputs["image_grid_thw"] = reference_pixels(IMAGE)
    if VIDEO in kinds:
        inputs["pixel_values_videos"], inputs["video_grid_thw"] = reference_pixels(VIDEO)
        inputs["video_second_per_grid"] = torch.tensor(seconds)
    if mel:
        longest = max(len(m) for m in mel)
        features = torch.zeros(len(mel), mel[0].shape[1], longest)
        mask = torch.zeros(len(mel), longest, dtype=torch.long)
        for i, m in enumerate(mel):
            features[i, :, : len(m)] = torch.from_numpy(m).T
            mask[i, : len(m)] = 1
        inputs["input_features"], inputs["feature_attention_mask"] = features, mask
    if any(p[0] == "audio_video" for p in pieces):
        inputs["use_audio_in_video"] = True

    labels = np.append(input_ids[1:], IGNORE)
    labels[labels >= FIRST_SPECIAL] = IGNORE
    encoded = EncodedSample(
        id=f"sample-{seed}",
        source="random",
        task="text",
        modality="text",
        languages=(),
        input_ids=input_ids,
        labels=labels,
        token_types=np.array(types, dtype=np.uint8),
        position_ids=tm.tm_rope_positions(spans, merge),
        mel=tuple(mel),
        patches=tuple(patches),
        grid_thw=np.array(grids, dtype=np.int64).reshape(-1, 3),
    )
    return PublicSample(inputs, encoded, spans)
