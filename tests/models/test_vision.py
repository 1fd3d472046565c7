"""The vision encoder against that of transformers, with the same random weights."""

from __future__ import annotations

import pytest
import torch

from omnitrain.models.vision import VisionConfig, VisionEncoder

CONFIGS = {
    "two levels": VisionConfig(
        d_model=32, layers=4, heads=4, ffn=48, out_dim=24, patch=4, grid_side=6, deepstack_layers=(0, 2)
    ),
    "three levels": VisionConfig(
        d_model=48, layers=3, heads=3, ffn=64, out_dim=16, patch=2, grid_side=11, deepstack_layers=(0, 1, 2)
    ),
}
GRIDS = {
    "picture": [(1, 4, 6)],
    "pictures": [(1, 2, 2), (1, 10, 4), (1, 6, 14), (1, 2, 2)],
    "video": [(3, 4, 6)],
    "everything": [(1, 4, 4), (4, 2, 6), (1, 16, 2), (2, 6, 4), (1, 2, 6)],
}


def reference_of(config: VisionConfig, seed: int = 0):
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeVisionEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder

    torch.manual_seed(seed)
    reference = Qwen3OmniMoeVisionEncoder(
        Qwen3OmniMoeVisionEncoderConfig(
            depth=config.layers,
            hidden_size=config.d_model,
            intermediate_size=config.ffn,
            num_heads=config.heads,
            in_channels=config.channels,
            patch_size=config.patch,
            spatial_merge_size=config.merge,
            temporal_patch_size=config.temporal_patch,
            out_hidden_size=config.out_dim,
            num_position_embeddings=config.grid_side**2,
            deepstack_visual_indexes=list(config.deepstack_layers),
        )
    ).eval()
    for parameter in reference.parameters():  # its initial biases and norms are 0 and 1: errors there would not show
        torch.nn.init.normal_(parameter, std=0.2)
    return reference


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    config = CONFIGS[request.param]
    reference = reference_of(config)
    ours = VisionEncoder(config).eval()
    ours.load_state_dict(reference.state_dict())  # strict: the names are the same
    return ours, reference


def inputs(config: VisionConfig, grids: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    grid_thw = torch.tensor(grids)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(grid_thw.prod(1).sum()), config.patch_dim, generator=generator), grid_thw


@torch.no_grad()
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_features_and_deepstack_equal_the_reference(pair, grids):
    ours, reference = pair
    patches, grid_thw = inputs(ours.config, grids)
    features, deepstack = ours(patches, grid_thw)
    expected = reference(patches, grid_thw)
    torch.testing.assert_close(features, expected.pooler_output, atol=1e-4, rtol=1e-4)
    assert len(deepstack) == len(expected.deepstack_features) == len(ours.config.deepstack_layers)
    for level, expected_level in zip(deepstack, expected.deepstack_features, strict=True):
        torch.testing.assert_close(level, expected_level, atol=1e-4, rtol=1e-4)


def test_gradients_equal_the_reference_with_and_without_checkpointing(pair):
    ours, reference = pair
    patches, grid_thw = inputs(ours.config, GRIDS["everything"])

    def gradients(model, features, deepstack) -> dict[str, torch.Tensor]:
        model.zero_grad()
        weight = torch.linspace(-1, 1, features.numel()).view_as(features)
        sum((level * weight * (i + 1)).mean() for i, level in enumerate([features, *deepstack])).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    out = reference(patches, grid_thw)
    expected = gradients(reference, out.pooler_output, out.deepstack_features)
    for ours.activation_checkpointing in (True, False):
        found = gradients(ours, *ours(patches, grid_thw))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_packed_equals_alone():
    encoder = VisionEncoder(CONFIGS["two levels"])
    patches, grid_thw = inputs(encoder.config, GRIDS["everything"])
    packed, deepstack = encoder(patches, grid_thw)
    alone = [encoder(p, g[None]) for p, g in zip(patches.split(grid_thw.prod(1).tolist()), grid_thw, strict=True)]
    torch.testing.assert_close(packed, torch.cat([f for f, _ in alone]), atol=1e-5, rtol=1e-5)
    for level, features in enumerate(deepstack):
        torch.testing.assert_close(features, torch.cat([d[level] for _, d in alone]), atol=1e-5, rtol=1e-5)


def test_no_media_give_no_features():
    encoder = VisionEncoder(CONFIGS["three levels"])
    features, deepstack = encoder(torch.zeros(0, encoder.config.patch_dim), torch.zeros(0, 3, dtype=torch.int64))
    assert features.shape == (0, 16)
    assert [level.shape for level in deepstack] == [(0, 16)] * 3


def test_public_size_has_the_public_shapes():
    with torch.device("meta"):
        ours, reference = VisionEncoder(VisionConfig()), reference_of(VisionConfig())
    shapes = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert shapes == {name: tuple(p.shape) for name, p in reference.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(540e6, rel=0.005)


def test_errors_name_what_is_wrong():
    encoder = VisionEncoder(CONFIGS["two levels"])
    with pytest.raises(ValueError, match=r"grid_thw\[1\] is \(1, 3, 2\)"):
        encoder(torch.zeros(10, 96), torch.tensor([[1, 2, 2], [1, 3, 2]]))
    with pytest.raises(ValueError, match=r"need \(4, 96\)"):
        encoder(torch.zeros(5, 96), torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="multiple of 4"):
        VisionConfig(d_model=36, heads=6)
    with pytest.raises(ValueError, match="deepstack_layers"):
        VisionConfig(layers=2)
