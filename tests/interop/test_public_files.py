"""What stands beside the weights: transformers reads a folder of ours as we do, with nothing but what is in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import image_patches, log_mel, video_patches
from omnitrain.data.sample import Message, Segment
from omnitrain.data.settings import AudioGeometry, MediaLimits, VisionGeometry
from omnitrain.interop.public_files import PACK_TOKENIZER
from omnitrain.interop.public_format import load_pretrained, save_pretrained
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights
from omnitrain.runs.load import load

GEOMETRY = VisionGeometry(max_pixels=96 * 96, video_min_pixels=64 * 64, video_max_pixels=64 * 96, fps=4.0)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.from_file(PACK_TOKENIZER)


@pytest.fixture(scope="module")
def encoder(tokenizer) -> SampleEncoder:
    return SampleEncoder(tokenizer=tokenizer, audio=AudioGeometry(), vision=GEOMETRY, limits=MediaLimits())


@pytest.fixture(scope="module")
def model(tokenizer) -> OmniModel:
    small = {"thinker": {"layers": 2}, "aut": {"layers": 1}, "vision": {"layers": 2}}
    model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=tokenizer.special_ids, **small)
    init_weights(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(model, folder, encoder=encoder)
    return folder


TEXTS = [
    "Two cats asleep, don't wake them!  12\n\n  x\t",
    "пожарная машина 消防车 e\u0301",
    " a\r\nb",
    "it's THE'LL 2024",
]


def test_the_tokenizer(folder: Path, tokenizer: ChatTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.encode("<|im_start|>") == [tokenizer.id_of("<|im_start|>")]
    assert theirs.eos_token_id == tokenizer.id_of("<|im_end|>")
    assert theirs.pad_token_id == tokenizer.id_of("<|endoftext|>")
    assert theirs.image_token_id == tokenizer.id_of("<|image_pad|>")


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


CHATS = {
    "system": [said("system", "Be brief."), said("user", "a?"), said("assistant", "A."), said("user", " b? ")],
    "thoughts": [
        said("user", "a?"),
        said("assistant", "<think>\nhm\n</think>\n\nA."),
        said("user", "b?"),
        said("assistant", "<think>\nso\n</think>\n\nB."),
    ],
    "tools": [
        said("system", "Be brief."),
        said("user", "Weather?"),
        said("assistant", '<tool_call>\n{"name": "w", "arguments": {"at": "Köln"}}\n</tool_call>'),
        said("tool", "rain"),
        said("tool", "12 degrees"),
        said("assistant", "Rain."),
    ],
}


@pytest.mark.parametrize("tools", [(), ({"name": "w", "parameters": {"at": "Köln"}},)])
@pytest.mark.parametrize("chat", CHATS)
def test_the_chat_template(folder: Path, tokenizer: ChatTokenizer, chat: str, tools) -> None:
    from transformers import AutoTokenizer

    turns = CHATS[chat]
    messages = [Message(role=m["role"], segments=(Segment(type="text", text=m["content"]),)) for m in turns]
    theirs = AutoTokenizer.from_pretrained(folder)
    for_generation = turns[-1]["role"] == "user"
    shown = theirs.apply_chat_template(
        turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=for_generation
    )
    ours = tokenizer.render(messages, tools=tools, for_generation=for_generation)
    assert shown == tokenizer.decode(ours.input_ids, skip_special=False)


def test_the_template_writes_calls_as_the_standard_has_them(folder: Path) -> None:
    from transformers import AutoTokenizer

    call = {"type": "function", "function": {"name": "w", "arguments": {"at": "Köln"}}}
    turns = [said("user", "?"), {"role": "assistant", "content": "", "tool_calls": [call, call]}]
    shown = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=False)
    written = '<tool_call>\n{"name": "w", "arguments": {"at": "Köln"}}\n</tool_call>'
    assert shown.endswith(f"<|im_start|>assistant\n{written}\n{written}<|im_end|>\n")


def test_processor_and_model_give_our_logits(folder: Path, model: OmniModel, encoder: SampleEncoder) -> None:
    """A chat with a picture and a recording, from messages to logits, by both programs."""
    from transformers import AutoConfig, AutoProcessor, Qwen3OmniMoeProcessor
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Reference

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    sound = (0.3 * rng.standard_normal(20_000)).astype(np.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, Qwen3OmniMoeProcessor)
    content = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[picture], audio=[sound], return_tensors="pt")

    patches, grid = image_patches(picture, encoder.vision)
    mel = log_mel(sound, encoder.audio)
    np.testing.assert_allclose(inputs["pixel_values"], patches, atol=1e-6)
    assert inputs["image_grid_thw"][0].tolist() == grid.tolist()
    assert inputs["feature_attention_mask"].sum() == len(mel)
    np.testing.assert_allclose(inputs["input_features"][0, :, : len(mel)].T, mel, atol=1e-4)

    segments = (
        Segment(type="image", media=b"p"),
        Segment(type="audio", media=b"s"),
        Segment(type="text", text="What?"),
    )
    from omnitrain.data.positions import AudioSpan, ImageSpan, audio_tokens, tm_rope_positions

    spans = [ImageSpan(tuple(grid.tolist())), AudioSpan(audio_tokens(len(mel), encoder.audio.chunk_frames))]
    chat = encoder.tokenizer.render([Message(role="user", segments=segments)], spans, for_generation=True)
    assert inputs["input_ids"][0].tolist() == chat.input_ids.tolist()

    assert AutoConfig.from_pretrained(folder).model_type == "qwen3_omni_moe_thinker"
    reference = Reference.from_pretrained(folder).eval()
    assert reference.generation_config.eos_token_id == list(encoder.tokenizer.stop_ids)
    expected = reference(**inputs).logits[0]
    hidden = model(
        input_ids=torch.from_numpy(chat.input_ids),
        position_ids=torch.from_numpy(tm_rope_positions(chat.spans)),
        cu_seqlens=torch.tensor([0, len(chat)], dtype=torch.int32),
        token_types=torch.from_numpy(chat.token_types),
        mel=torch.from_numpy(mel),
        mel_lengths=torch.tensor([len(mel)]),
        patches=torch.from_numpy(patches),
        grid_thw=torch.from_numpy(grid)[None],
    ).hidden
    torch.testing.assert_close(model.thinker.logits(hidden), expected, rtol=0, atol=1e-4)


def test_videos_are_read_as_we_do(folder: Path, encoder: SampleEncoder) -> None:
    from transformers import AutoVideoProcessor

    video = np.random.default_rng(0).integers(0, 256, (5, 90, 130, 3), dtype=np.uint8)
    theirs = AutoVideoProcessor.from_pretrained(folder)
    assert theirs.fps == GEOMETRY.fps
    expected = theirs(torch.from_numpy(video).permute(0, 3, 1, 2), return_tensors="np", do_sample_frames=False)
    patches, grid = video_patches(video, encoder.vision)
    assert grid.tolist() == expected["video_grid_thw"][0].tolist()
    np.testing.assert_allclose(patches, expected["pixel_values_videos"], atol=1.01 / 127.5)


def test_we_read_our_own_folder_as_it_was(folder: Path, model: OmniModel, encoder: SampleEncoder) -> None:
    loaded, read = load(folder)
    assert read.vision == encoder.vision
    assert read.audio == encoder.audio
    assert read.tokenizer.vocabulary == encoder.tokenizer.vocabulary
    batch = PackedBatch.pack([read.encode_prompt(_question(), lambda _: b"")]).model_inputs()
    assert torch.equal(loaded(**batch).hidden, model(**batch).hidden)


def _question():
    from omnitrain.data.sample import Sample

    asked = Message(role="user", segments=(Segment(type="text", text="What?"),))
    return Sample(id="a", source="test", messages=(asked,))


def test_the_packs_tokenizer_is_found(model: OmniModel, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "pack")
    assert ChatTokenizer.from_dir(tmp_path / "pack").vocabulary == tokenizer.vocabulary
    other = build("tiny", vocab_size=500, special_tokens={"<|im_end|>": 499}, thinker={"layers": 2})
    init_weights(other, seed=0)
    save_pretrained(other, tmp_path / "none")
    assert not (tmp_path / "none" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "none" / "generation_config.json").read_text())["eos_token_id"] == [499]


def test_files_come_from_where_the_model_came_from(
    folder: Path, tokenizer: ChatTokenizer, encoder: SampleEncoder, tmp_path: Path
) -> None:
    """The source's own files go along, what it lacks is written; but no tokenizer that is not the model's."""
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("free")
    (source / "generation_config.json").unlink()
    (source / ".hidden").write_text("")
    loaded = load_pretrained(source)
    save_pretrained(loaded, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "free"
    assert not (out / ".hidden").exists()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    assert (out / "generation_config.json").exists()
    save_pretrained(loaded, source)  # into its own folder
    assert (source / "LICENSE").read_text() == "free"

    state = json.loads(tokenizer.to_json())
    first, second = list(state["model"]["vocab"])[300:302]
    ids = state["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    (source / "tokenizer.json").write_text(json.dumps(state))
    save_pretrained(loaded, tmp_path / "own", encoder=encoder)
    assert ChatTokenizer.from_dir(tmp_path / "own").vocabulary == tokenizer.vocabulary
    assert not (tmp_path / "own" / "LICENSE").exists()
