"""The whole model: presets, initial weights, packing, and what is said when placeholders and media do not fit."""

from __future__ import annotations

import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import PRESETS, build, count_parameters, init_weights
from tests.interop.public_models import public_sample


class Geometry:
    """What `public_sample` reads of a configuration."""

    class vision_config:
        spatial_merge_size, patch_size, in_channels, temporal_patch_size = 2, 16, 3, 2

    class audio_config:
        num_mel_bins, n_window = 128, 50


@pytest.fixture(scope="module")
def model() -> OmniModel:
    model = build("tiny", vocab_size=320, thinker={"layers": 3})
    init_weights(model, seed=0)
    return model


@pytest.fixture(scope="module")
def samples():
    pieces = (
        [("text", 9)],
        [("text", 3), ("image", (1, 4, 4)), ("text", 4)],
        [("audio", 120), ("text", 4)],
        [("text", 2), ("audio_video", (2, 4, 4), 1.0, 130), ("text", 3)],
    )
    return [public_sample(Geometry, p, seed).encoded for seed, p in enumerate(pieces)]


def test_packed_equals_alone(model: OmniModel, samples) -> None:
    together = model(**PackedBatch.pack(samples).model_inputs())
    alone = [model(**PackedBatch.pack([s]).model_inputs()) for s in samples]
    for field in ("hidden", "accept_hidden"):
        torch.testing.assert_close(
            getattr(together, field), torch.cat([getattr(a, field) for a in alone]), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(together.router_counts, sum(a.router_counts for a in alone))
    torch.testing.assert_close(together.router_prob_sums, sum(a.router_prob_sums for a in alone))
    tokens = sum(len(s) for s in samples)
    assert together.router_counts.sum(1).eq(tokens * model.config.thinker.top_k).all()


def test_a_document_sees_no_other_document_and_no_future(model: OmniModel, samples) -> None:
    batch = PackedBatch.pack(samples)
    before = model(**batch.model_inputs()).hidden
    batch.input_ids[-1] += 1  # the last word of the last document
    after = model(**batch.model_inputs()).hidden
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == [batch.n_tokens - 1]


def test_activation_checkpointing_changes_no_gradient(model: OmniModel, samples) -> None:
    batch = PackedBatch.pack(samples)

    def gradients() -> list[torch.Tensor]:
        output = model(**batch.model_inputs())
        loss = output.hidden.square().mean() + output.router_prob_sums.square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    plain = gradients()
    model.set_activation_checkpointing(["aut", "visual", "thinker"])
    checkpointed = gradients()
    model.set_activation_checkpointing([])
    for (name, _), a, b in zip(model.named_parameters(), plain, checkpointed, strict=True):
        if name == "thinker.lm_head.weight":
            continue
        assert a is not None, name
        torch.testing.assert_close(a, b)


def test_placeholders_and_media_must_fit(model: OmniModel, samples) -> None:
    inputs = PackedBatch.pack(samples[2:3]).model_inputs()
    with pytest.raises(ValueError, match="16 audio positions, but the encoder made 7 features of 1 recordings"):
        model(**{**inputs, "mel": inputs["mel"][:50], "mel_lengths": torch.tensor([50])})
    with pytest.raises(ValueError, match="mel and mel_lengths were not given"):
        model(**{**inputs, "mel": None})
    inputs = PackedBatch.pack(samples[1:2]).model_inputs()
    with pytest.raises(ValueError, match="patches and grid_thw were not given"):
        model(**{**inputs, "patches": None})


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    small, deep = build("tiny", thinker={"layers": 2}), build("tiny", thinker={"layers": 2}, aut={"layers": 3})
    init_weights(small, seed=0)
    init_weights(deep, seed=0)
    for name, p in small.thinker.named_parameters():
        assert torch.equal(p, deep.thinker.get_parameter(name)), name
    init_weights(deep, seed=1)
    assert not torch.equal(small.thinker.lm_head.weight, deep.thinker.lm_head.weight)


def test_training_starts_near_the_uniform_distribution(model: OmniModel, samples) -> None:
    logits = model.thinker.logits(model(**PackedBatch.pack(samples).model_inputs()).hidden)
    assert logits.std() < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(preset="tinny"), "no such preset; use one of tiny, small"),
        (dict(thinker={"layer": 3}), "model.thinker.layer: no such field; the fields are d_model"),
        (dict(thinker={"head_dim": 48}), "mrope_sections .* must sum to head_dim / 2 = 24"),
        (dict(aut={"out_dim": 7}), r"aut.out_dim \(7\) must equal thinker.d_model"),
        (dict(thinker={"layers": 1}), "deepstack_layers has 2 levels for 1 decoder layers"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_the_full_size_has_the_public_shapes() -> None:
    """On the meta device: shapes and counts of the public 30B-A3B checkpoint, without its 60 GB."""
    from omnitrain.interop.public_format import public_tensors

    with torch.device("meta"):
        model = build("qwen3_omni_30b_a3b")
    shapes = {name: tuple(t.shape) for name, t in public_tensors(model, "full")}
    layer, block, heard = "thinker.model.layers.47.", "thinker.visual.blocks.26.", "thinker.audio_tower."
    expected = {
        "thinker.model.embed_tokens.weight": (152064, 2048),
        "thinker.lm_head.weight": (152064, 2048),
        "thinker.model.norm.weight": (2048,),
        layer + "self_attn.q_proj.weight": (4096, 2048),
        layer + "self_attn.k_proj.weight": (512, 2048),
        layer + "self_attn.v_proj.weight": (512, 2048),
        layer + "self_attn.o_proj.weight": (2048, 4096),
        layer + "self_attn.q_norm.weight": (128,),
        layer + "self_attn.k_norm.weight": (128,),
        layer + "mlp.gate.weight": (128, 2048),
        layer + "mlp.experts.127.gate_proj.weight": (768, 2048),
        layer + "mlp.experts.127.up_proj.weight": (768, 2048),
        layer + "mlp.experts.127.down_proj.weight": (2048, 768),
        layer + "input_layernorm.weight": (2048,),
        heard + "conv2d1.weight": (480, 1, 3, 3),
        heard + "conv2d3.weight": (480, 480, 3, 3),
        heard + "conv_out.weight": (1280, 7680),
        heard + "layers.31.fc1.weight": (5120, 1280),
        heard + "layers.31.self_attn.q_proj.weight": (1280, 1280),
        heard + "proj2.weight": (2048, 1280),
        "thinker.visual.patch_embed.proj.weight": (1152, 3, 2, 16, 16),
        "thinker.visual.pos_embed.weight": (2304, 1152),
        block + "attn.qkv.weight": (3456, 1152),
        block + "mlp.linear_fc1.weight": (4304, 1152),
        "thinker.visual.merger.ln_q.weight": (1152,),
        "thinker.visual.merger_list.2.ln_q.weight": (4608,),
        "thinker.visual.merger_list.2.mlp.2.weight": (2048, 4608),
    }
    assert {k: shapes.get(k) for k in expected} == expected
    assert not [k for k in shapes if ".layers.48." in k or ".blocks.27." in k or "merger_list.3" in k]
    millions = {name: round(count_parameters(part) / 1e6) for name, part in model.named_children()}
    assert millions == {"aut": 648, "visual": 539, "thinker": 30533}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_consistent(preset: str) -> None:
    with torch.device("meta"):
        assert count_parameters(build(preset)) > 0
