"""Number for number against `transformers`, for two different random models in the public format, fp32."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.interop.public_format import load_pretrained
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from tests.interop.public_models import public_sample, save_public_model

SAMPLES = {
    "text": [("text", 17)],
    "image": [("text", 4), ("image", (1, 4, 6)), ("text", 9), ("image", (1, 6, 4)), ("text", 2)],
    "video": [("text", 3), ("video", (3, 4, 4), 0.5), ("text", 5), ("video", (2, 2, 6), 1.0), ("text", 2)],
    "audio": [("text", 6), ("audio", 330), ("text", 3), ("audio", 1000), ("text", 4)],
    "audio_video": [("text", 6), ("audio_video", (4, 4, 4), 0.5, 210), ("text", 5)],
    "mixture": [("text", 2), ("audio", 150), ("image", (1, 4, 4)), ("video", (2, 4, 4), 1.0), ("text", 8)],
}
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=[0, 1])
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    reference = save_public_model(folder, variant=request.param, seed=request.param)
    samples = {
        name: public_sample(reference.config, pieces, seed=i) for i, (name, pieces) in enumerate(SAMPLES.items())
    }
    return SimpleNamespace(reference=reference, ours=load_pretrained(folder), samples=samples)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


def packed(models, *names: str) -> PackedBatch:
    return PackedBatch.pack([models.samples[name].encoded for name in names])


def test_position_ids(models) -> None:
    for sample in models.samples.values():
        inputs = sample.reference_inputs
        mask = inputs.get("feature_attention_mask")
        ids, _ = models.reference.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs["attention_mask"],
            inputs.get("use_audio_in_video", False),
            None if mask is None else mask.sum(-1),
            inputs.get("video_second_per_grid"),
        )
        assert torch.equal(torch.from_numpy(sample.encoded.position_ids), ids[:, 0])


def test_audio_features(models) -> None:
    inputs, batch = models.samples["audio"].reference_inputs, packed(models, "audio")
    expected = models.reference.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
    close(models.ours.aut(batch.mel, batch.mel_lengths), expected.last_hidden_state)


@pytest.mark.parametrize(
    ("name", "pixels", "grid"),
    [("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")],
)
def test_visual_features_with_deepstack(models, name: str, pixels: str, grid: str) -> None:
    inputs, batch = models.samples[name].reference_inputs, packed(models, name)
    expected = models.reference.model.visual(inputs[pixels], grid_thw=inputs[grid])
    features, deepstack = models.ours.visual(batch.patches, batch.grid_thw)
    close(features, expected.pooler_output)
    assert len(deepstack) == len(expected.deepstack_features) == len(models.ours.config.vision.deepstack_layers)
    for level, expected_level in zip(deepstack, expected.deepstack_features, strict=True):
        close(level, expected_level)


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_of_one_sample(models, name: str) -> None:
    expected = models.reference(**models.samples[name].reference_inputs).logits[0]
    output = models.ours(**packed(models, name).model_inputs())
    close(models.ours.thinker.logits(output.hidden), expected)


def test_logits_of_all_samples_in_one_pack(models) -> None:
    names = list(SAMPLES)
    expected = torch.cat([models.reference(**models.samples[n].reference_inputs).logits[0] for n in names])
    output = models.ours(**packed(models, *names).model_inputs())
    close(models.ours.thinker.logits(output.hidden), expected)


def test_hidden_states_for_the_talker(models) -> None:
    layer = models.ours.config.thinker.accept_hidden_layer
    inputs = models.samples["mixture"].reference_inputs
    hidden = models.reference(**inputs, output_hidden_states=True).hidden_states[layer]
    output = models.ours(**packed(models, "mixture").model_inputs())
    close(output.accept_hidden, hidden[0])


def test_the_reference_loss_of_one_sample(models) -> None:
    """Its own loss, labels and balance term included."""
    sample = models.samples["mixture"]
    labels = sample.reference_inputs["input_ids"].clone()
    labels[labels >= 300] = -100
    expected = models.reference(**sample.reference_inputs, labels=labels, output_router_logits=True)
    batch = packed(models, "mixture")
    loss, balance = loss_of(models.ours, batch, models.reference.config.text_config.router_aux_loss_coef)
    close(balance, expected.aux_loss)
    close(loss, expected.loss)


def loss_of(model, batch: PackedBatch, coefficient: float) -> tuple[Tensor, Tensor]:
    """Mean over target tokens plus the balance loss as the reference has it (layers pooled)."""
    output = model(**batch.model_inputs())
    nll = chunked_cross_entropy(output.hidden, model.thinker.lm_head.weight, batch.labels, chunk=16).total
    rows = batch.n_tokens * len(output.router_counts)
    share, probability = output.router_counts.sum(0) / rows, output.router_prob_sums.sum(0) / rows
    balance = len(share) * (share * probability).sum()
    return nll / (batch.labels != -100).sum() + coefficient * balance, balance


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_one_training_step(models, tmp_path, checkpointing: bool) -> None:
    """All samples in one pack, against the reference one sample at a time with the balance loss over all of them."""
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

    reference, ours = copy.deepcopy(models.reference), copy.deepcopy(models.ours)
    batch = packed(models, *SAMPLES)
    ours.set_activation_checkpointing(["aut", "visual", "thinker"] if checkpointing else [])
    loss, _ = loss_of(ours, batch, reference.config.text_config.router_aux_loss_coef)
    loss.backward()

    outputs = [reference(**s.reference_inputs, output_router_logits=True) for s in models.samples.values()]
    text = reference.config.text_config
    expected = F.cross_entropy(torch.cat([o.logits[0] for o in outputs]), batch.labels)
    layers = tuple(torch.cat(gates) for gates in zip(*(o.router_logits for o in outputs), strict=True))
    balance = load_balancing_loss_func(layers, text.num_experts, text.num_experts_per_tok)
    expected = expected + text.router_aux_loss_coef * balance
    expected.backward()
    close(loss, expected)

    # Gradients saved as if they were weights arrive in our layout.
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(p.grad)
    reference.save_pretrained(tmp_path)
    for name, gradient in load_pretrained(tmp_path).named_parameters():
        actual = ours.get_parameter(name).grad
        assert actual is not None, name
        scale = gradient.abs().max().clamp_min(1e-3)  # 1e-4 of the largest entry
        torch.testing.assert_close(
            actual / scale, gradient.detach() / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
