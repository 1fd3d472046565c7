"""What stands beside config.json and weights in a public folder: tokenizer, chat template, preprocessors, generation.

They are copied from the folder that the model came from; what it lacks, or a model of our own, gets what `transformers`
needs to read as `SampleEncoder` does.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.settings import AudioGeometry, VisionGeometry
from omnitrain.files import TOKENIZER, read_json, write_json, write_text
from omnitrain.interop.public_config import Section
from omnitrain.models.sizes import OmniConfig

RECORD = "conversion.json"
"""Says that `omnitrain convert` has made a folder; belongs to that folder alone."""
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf")
PROCESSOR = "Qwen3OmniMoeProcessor"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
PACK_TOKENIZER = Path(__file__).parents[1] / "pack" / TOKENIZER


def write_companions(
    folder: Path, config: OmniConfig, source: Path | None = None, encoder: SampleEncoder | None = None
) -> None:
    """Write all files of a public folder but configuration and weights.

    Args:
        source: the public folder that the model came from, whose files are copied, unless it has another tokenizer than
            `encoder`.
        encoder: of the model's prompts: tokenizer and sizes of media. Default: those of `source`; else the sizes that
            the model asks for, and the embedded pack's tokenizer if size and special tokens are the model's.
    """
    given: set[str] = set()
    if source is not None and source.is_dir() and (encoder is None or _tells_the_same(source, encoder.tokenizer)):
        given = copy_companions(source, folder)
    has_tokenizer = bool(given & {TOKENIZER, "vocab.json"}) or any(name.endswith(".tiktoken") for name in given)
    tokenizer = None if encoder is None else encoder.tokenizer
    if not has_tokenizer and encoder is None:
        # one that the user has put there is better than a guess
        tokenizer = None if (folder / TOKENIZER).exists() else _pack_tokenizer(config)
    if not has_tokenizer and tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    if (has_tokenizer or tokenizer is not None) and "tokenizer_config.json" not in given:
        write_json(folder / "tokenizer_config.json", _tokenizer_config(config))
    if not given & {"chat_template.jinja", "chat_template.json"} and not _has_template(folder):
        write_text(folder / "chat_template.jinja", TEMPLATE.read_text(encoding="utf-8"))
    if not given & {"preprocessor_config.json", "processor_config.json"}:
        c = config.vision
        vision = VisionGeometry(patch=c.patch, temporal_patch=c.temporal_patch, merge=c.merge)
        audio = AudioGeometry(n_mels=config.aut.n_mels, chunk_frames=config.aut.chunk_frames)
        if encoder is not None:
            vision, audio = encoder.vision, encoder.audio
        write_json(folder / "preprocessor_config.json", _picture_and_sound(vision, audio))
        write_json(folder / "video_preprocessor_config.json", _video(vision))
    if "generation_config.json" not in given:
        if tokenizer is None and has_tokenizer:
            with suppress(ValueError):  # one without our special tokens
                tokenizer = ChatTokenizer.from_dir(folder)
        ids = config.special_tokens if tokenizer is None else tokenizer.special_ids
        if stops := [ids[name] for name in ("<|im_end|>", "<|endoftext|>") if name in ids]:
            generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[-1]}
            write_json(folder / "generation_config.json", generation)


def copy_companions(source: Path, folder: Path) -> set[str]:
    """Copy what stands beside configuration and weights in `source`; the names of these files."""
    folder.mkdir(exist_ok=True)
    files = [path for path in source.iterdir() if path.is_file() and path.name not in ("config.json", RECORD)]
    files = [path for path in files if "safetensors" not in path.name and not path.name.startswith(".")]
    files = [path for path in files if path.suffix not in _OTHER_WEIGHTS]
    for path in files:
        if source.resolve() != folder.resolve():
            shutil.copy2(path, folder / path.name)
    return {path.name for path in files}


def public_geometry(folder: Path, config: OmniConfig) -> tuple[AudioGeometry, VisionGeometry]:
    """How media are read for the model in a public folder, whose sizes are `config`."""
    sizes = config.vision
    bounds = _pixel_bounds(folder / "preprocessor_config.json")
    bounds |= _video_bounds(folder / "video_preprocessor_config.json")
    audio = AudioGeometry(n_mels=config.aut.n_mels, chunk_frames=config.aut.chunk_frames)
    vision = VisionGeometry(patch=sizes.patch, temporal_patch=sizes.temporal_patch, merge=sizes.merge, **bounds)
    return audio, vision


def _pixel_bounds(path: Path) -> dict[str, Any]:
    """`min_pixels` and `max_pixels` of the public preprocessor's configuration, where it states them."""
    if not path.is_file():
        return {}
    stored = Section.of(path)
    size = stored.section("size", optional=True)
    bounds = {
        "min_pixels": stored.get("min_pixels", size.get("shortest_edge", None)),
        "max_pixels": stored.get("max_pixels", size.get("longest_edge", None)),
    }
    return {name: int(value) for name, value in bounds.items() if value}


def _video_bounds(path: Path) -> dict[str, Any]:
    """How videos are read, from a file such as `_video` writes. One that does not bound each frame by itself counts
    otherwise and is not followed."""
    stored = Section.of(path) if path.is_file() else Section({}, path)
    if not stored.get("cap_pixels_per_frame", False):
        return {}
    bounds = {f"video_{name}": value for name, value in _pixel_bounds(path).items()}
    tokens, side = stored.get("max_video_tokens", None), stored.get("patch_size", 16) * stored.get("merge_size", 2)
    if tokens:
        bounds["video_total_pixels"] = round(0.9 * tokens * side**2)
    return bounds | ({"fps": float(fps)} if (fps := stored.get("fps", None)) else {})


def _tells_the_same(source: Path, tokenizer: ChatTokenizer) -> bool:
    """Whether `source` has the same vocabulary, or none."""
    try:
        return ChatTokenizer.from_dir(source).vocabulary == tokenizer.vocabulary
    except FileNotFoundError:
        return True


def _pack_tokenizer(config: OmniConfig) -> ChatTokenizer | None:
    """The embedded pack's tokenizer, if the model's size and special tokens are its own."""
    tokenizer = ChatTokenizer.from_file(PACK_TOKENIZER)
    same_size = config.thinker.vocab_size == tokenizer.vocab_size
    return tokenizer if same_size and tokenizer.special_ids.items() <= config.special_tokens.items() else None


def _has_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def _tokenizer_config(config: OmniConfig) -> dict[str, Any]:
    media = {
        f"{kind}_token": f"<|{name}|>"
        for kind, name in (
            ("image", "image_pad"), ("audio", "audio_pad"), ("video", "video_pad"), ("vision_bos", "vision_start"),
            ("vision_eos", "vision_end"), ("audio_bos", "audio_start"), ("audio_eos", "audio_end"),
        )
    }  # fmt: skip
    return {
        "tokenizer_class": "Qwen2Tokenizer", "processor_class": PROCESSOR, "add_bos_token": False,
        "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "errors": "replace", "clean_up_tokenization_spaces": False, "split_special_tokens": False,
        "model_max_length": config.thinker.max_positions, **media,
    }  # fmt: skip


def _patches(vision: VisionGeometry) -> dict[str, Any]:
    half = [0.5, 0.5, 0.5]
    return {
        "processor_class": PROCESSOR, "patch_size": vision.patch, "temporal_patch_size": vision.temporal_patch,
        "merge_size": vision.merge, "image_mean": half, "image_std": half,
    }  # fmt: skip


def _picture_and_sound(vision: VisionGeometry, audio: AudioGeometry) -> dict[str, Any]:
    """One file for both, as in the public folders."""
    return _patches(vision) | {
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": vision.min_pixels,
        "max_pixels": vision.max_pixels, "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": audio.n_mels, "sampling_rate": audio.sample_rate, "hop_length": audio.hop, "n_fft": audio.n_fft,
        "chunk_length": 300, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": True,
        "dither": 0.0,
    }  # fmt: skip


def _video(vision: VisionGeometry) -> dict[str, Any]:
    # The processor lets all frames of a video take 0.9 of this many tokens (`features.video_patches`).
    tokens = round(vision.video_total_pixels / (0.9 * (vision.patch * vision.merge) ** 2))
    return _patches(vision) | {
        "video_processor_type": "Qwen2VLVideoProcessor", "cap_pixels_per_frame": True, "max_video_tokens": tokens,
        "size": {"shortest_edge": vision.video_min_pixels, "longest_edge": vision.video_max_pixels}, "fps": vision.fps,
    }  # fmt: skip
