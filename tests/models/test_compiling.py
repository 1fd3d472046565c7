"""What is compiled computes what is written, in one graph for packs of any length."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_codec_module import tiny_codec
from test_talker_module import talking_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_training import toy_model

from omnitrain.models.layers import compiling
from omnitrain.models.layers.compiling import compile_layers
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.layers.decoder import DenseMLP
from omnitrain.models.omni import OmniModel
from omnitrain.training.codec import COMPILED as BLOCKS
from omnitrain.training.losses import talker_loss
from omnitrain.training.thinker import COMPILED
from tests.models.test_host_reads import on_gpu
from tests.models.test_talker import inputs


def a_model() -> OmniModel:
    """A Thinker of one dense layer, and a Talker of one."""
    model = talking_model()
    torch.manual_seed(0)
    model.thinker.layers[0].mlp = DenseMLP(32, 16)
    del model.thinker.layers[1], model.talker.layers[1]
    return model


def speaking_loss(model: OmniModel, frames: int, compiled: bool) -> Tensor:
    """Of a text that is read, and an answer of so many frames about it."""
    c, n = model.talker.config, 4 + frames
    spoken = inputs(torch.arange(7 * c.codebooks).view(7, -1) % c.codebook_size)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
    spoken = replace(
        spoken, codec_ids=torch.full((n,), -1), labels=torch.arange(n) % 7, position_ids=spoken.position_ids[:, :n],
        cu_seqlens=cu_seqlens, codes=spoken.codes[:frames], text_ids=spoken.text_ids[:n],
        hidden_rows=torch.full((n,), -1), frame_rows=torch.arange(n) - 4, frame_sources=torch.arange(frames) + 3,
    )  # fmt: skip
    read = model.thinker(model.thinker.embed_tokens(torch.arange(n)), spoken.position_ids, cu_seqlens).hidden
    weights = torch.full((n,), 0.5)
    text = chunked_cross_entropy(
        read, model.output_embedding, torch.arange(n) + 1, weights, chunk=16, compiled=compiled
    )
    x = model.talker.embed(spoken, model.thinker.embed_tokens)
    output = model.talker(x, spoken.position_ids, spoken.cu_seqlens)
    speech = talker_loss(model.talker, output.hidden, spoken, chunk=16, compiled=compiled)[0]
    return text.total + speech + output.router_prob_sums.square().sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_layers_and_losses_equal_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense layer, one of the Talker with routed and shared experts, MTP's, and the losses; activations computed
    again, attention and experts kept. No graph is made for the second pack, of other lengths. (Encoders, and FSDP2:
    `training/test_mesh.py`.)"""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    plain = a_model()
    model = copy.deepcopy(plain)
    model.set_activation_checkpointing(["thinker", "talker"], ["attention", "experts"])
    compile_layers(model, COMPILED)
    assert model.state_dict().keys() == plain.state_dict().keys()
    graphs = []
    for frames in (3, 5):
        expected, found = (speaking_loss(m, frames, compiled) for m, compiled in ((plain, False), (model, True)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        wanted, got = gradients(plain, expected), gradients(model, found)
        assert wanted.keys() == got.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 4

    twin = copy.deepcopy(model)  # is compiled on its own
    assert vars(twin.talker.layers[0])["forward"].layer is twin.talker.layers[0]


def test_compiled_blocks_of_the_codec_equal_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the encoder's first rate and of the decoder's last; the others are made of the same layers."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    codec = tiny_codec()
    blocks = [block for block in (*codec.encoder.stages, *codec.decoder.decoder) if isinstance(block, BLOCKS)]
    assert len(blocks) == 8
    plain = nn.ModuleList([blocks[0], blocks[-1]])
    model = copy.deepcopy(plain)
    compile_layers(nn.ModuleList([model]), BLOCKS)
    graphs = []
    for samples in (90, 150):
        wav = torch.sin(torch.arange(4 * samples) / 40).view(2, 2, -1)
        for ours, theirs in zip(model, plain, strict=True):
            found, expected = ours(wav), theirs(wav)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            wanted, got = gradients(theirs, expected.square().sum()), gradients(ours, found.square().sum())
            assert wanted.keys() == got.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_on_a_gpu_too_a_layer_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of CUDA, traced on numbers that say they are there."""
    graphs: list[str] = []

    def noted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", noted)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, speaker = on_gpu(toy_model()), on_gpu(a_model())
        for part in (model, speaker):
            compile_layers(part, COMPILED)
        for n in (24, 40):
            borders, angles = torch.empty(3, dtype=torch.int32, device="cuda"), torch.empty(n, 4, device="cuda")
            for stack, rest in (
                (model.thinker.layers, ((angles, angles), borders, n // 2, None)),
                (speaker.thinker.layers, ((angles.repeat(1, 2), angles.repeat(1, 2)), borders, n // 2, None)),
                (speaker.talker.layers, ((angles.repeat(1, 2), angles.repeat(1, 2)), borders, n // 2, None)),
                (model.aut.layers, (borders, n // 2)),
                (model.visual.blocks, ((angles[:, None], angles[:, None]), borders, n // 2)),
            ):
                for layer in stack:
                    x = torch.empty(n, 16 if stack in (model.aut.layers, model.visual.blocks) else 32, device="cuda")
                    y = layer(x.requires_grad_(), *rest)
                    assert (y[0] if isinstance(y, tuple) else y).shape == x.shape
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])
    assert len(graphs) == 5  # of two lengths each
    assert all("_varlen_attn" in code for code in graphs)
    assert sum("grouped_mm" in code for code in graphs) == 2
