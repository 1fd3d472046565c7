"""Weights laid out for decoding, and steps that are compiled, speak as those that are not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omnitrain.generation import speech
from omnitrain.generation.decoding import for_decoding
from omnitrain.generation.speech import Speaker
from omnitrain.models.layers.int8 import FEW_ROWS, Int8Linear, Int8Matrices
from tests.generation.test_speech import CHATS, Heard, models, prompt_of, session

__all__ = ["models"]


def answer(models: Any, speaker: Speaker, chat: list[Any], **options: Any) -> Heard:
    return Heard(session(models, chat, speaker=speaker, **options).answer(chat[-1]))


def test_by_columns_the_weights_are_the_same_and_so_is_the_speech(models) -> None:
    model = copy.deepcopy(models.model)
    for_decoding(model)
    for name, p in model.state_dict().items():
        assert torch.equal(p, models.model.state_dict()[name]), name
    for matrix in (model.thinker.layers[0].attention.qkv.weight, model.talker.mtp.code_head):
        assert matrix.mT.is_contiguous()
    found, expected = (answer(models, Speaker(m, models.tokenizer), CHATS["audio"]) for m in (model, models.model))
    assert found.ids == expected.ids
    assert np.array_equal(found.codes, expected.codes)
    np.testing.assert_allclose(found.wav, expected.wav, atol=1e-4)


def test_in_8_bits_logits_are_close_and_answers_end(models) -> None:
    """Of a prompt (many rows) and of one token behind it (few)."""
    model = copy.deepcopy(models.model)
    before = sum(p.nbytes for p in model.thinker.layers.parameters())
    for_decoding(model, int8=True)
    for part in (model.thinker, model.talker):
        for name, module in part.named_modules():
            assert not isinstance(module, nn.Linear) or module.out_features < 8, name
            if isinstance(module, Int8Matrices):
                assert module.weight.dtype == torch.int8
    numbers = [m.weight.numel() for m in model.thinker.layers.modules() if isinstance(m, Int8Matrices)]
    assert sum(numbers) > 0.8 * before / 4  # all but norms and routers
    speaker = Speaker(model, models.tokenizer)
    logits = []
    with torch.no_grad():
        for spoken_by in (speaker, models.speaker):
            a = spoken_by.answer(session(models).options, prompt_of(models, CHATS["audio"]))
            assert len(a.prompt) > FEW_ROWS
            spoken_by.listen([a])
            first = spoken_by.model.thinker.logits(a.hidden[None])
            a.written.append(5)
            spoken_by.write([a])
            logits.append((first, spoken_by.model.thinker.logits(a.hidden[None])))
    for found, expected in zip(*logits, strict=True):
        error = (found - expected).square().mean().sqrt() / expected.std()
        assert 0 < error < 0.05
    found = answer(models, speaker, CHATS["audio"])
    assert found.reason in ("end", "max_frames")
    assert len(found.pieces) > 0
    assert np.isfinite(found.wav).all()
    with pytest.raises(ValueError, match="in 8 bits already"):
        for_decoding(model)
    with pytest.raises(ValueError, match="on meta: int8 is for decoding on the CPU"):
        for_decoding(copy.deepcopy(models.model).to("meta"), int8=True)


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
@pytest.mark.parametrize("width", [96, 37])
def test_a_product_in_8_bits_is_within_its_rounding(rows: int, width: int) -> None:
    """Half a step of the weights, and 16 bits of activations where there are few rows."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, 41).requires_grad_(False)
    x = torch.randn(rows, width, generator=generator)
    found = Int8Linear(linear)(x)
    step = linear.weight.abs().amax(1) / 127
    bound = x.abs().sum(1, keepdim=True) * step * 0.51 + (2**-8 * (x.abs() @ linear.weight.abs().T + 1))
    assert ((found - linear(x)).abs() < bound).all()
    assert (found - linear(x)).abs().max() > 1e-6


def test_compiled_each_part_is_one_graph_for_all_its_steps(models, monkeypatch) -> None:
    """MTP's first step reads two positions, the others one; Code2Wav's later pieces are of one size, but for the last.
    Several answers make no more."""
    graphs: list[Any] = []

    def noted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(
        speech.torch, "compile", lambda f, *, fullgraph, mode: compile(f, fullgraph=fullgraph, backend=noted)
    )
    assert not torch._dynamo.config.error_on_recompile
    speaker = Speaker(models.model, models.tokenizer, compile=True)
    chat, expected = CHATS["text"], answer(models, models.speaker, CHATS["text"])
    for _ in range(2):
        found = answer(models, speaker, chat)
        assert np.array_equal(found.codes, expected.codes)
        np.testing.assert_allclose(found.wav, expected.wav, atol=1e-4)
        assert len(graphs) == 3


def test_pieces_of_sound_may_grow(models, monkeypatch) -> None:
    speaker, chat = Speaker(models.model, models.tokenizer), CHATS["text"]
    sizes: list[int] = []
    step = speaker._decode_step
    monkeypatch.setattr(speaker, "_decode_step", lambda x, state: sizes.append(x.shape[1]) or step(x, state))
    found = answer(models, speaker, chat, frames_per_piece=(2, 4))
    expected = answer(models, models.speaker, chat)
    assert sizes == [1, 2, 4, 4, 4, 1]  # 16 frames
    assert np.array_equal(found.codes, expected.codes)
    np.testing.assert_allclose(found.wav, expected.wav, atol=1e-4)
    with pytest.raises(ValueError, match=r"frames_per_piece is \(2, 0\)"):
        session(models, frames_per_piece=(2, 0))
