"""The counted operations against torch's counter of what really ran."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_training import step_samples, toy_model

from omnitrain.data.batch import PackedBatch
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.training.flops import BatchSizes, forward_flops, peak_flops, training_flops, training_flops_by_part


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_forward_flops(step: int) -> None:
    """Equal to torch's count, to which attention is added (it does not count the processor's attention kernel). Audio
    only nearly: the encoder convolves the last second of short recordings to its end, which nothing asks for; its share
    of that is taken off."""
    model, batch = toy_model(), PackedBatch.pack(step_samples(step))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(**batch.model_inputs())
        chunked_cross_entropy(output.hidden, model.thinker.lm_head.weight, batch.labels)
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    head = 2 * int((batch.labels >= 0).sum()) * model.thinker.lm_head.weight.numel()

    def attention(lengths: torch.Tensor, width: int, causal: bool) -> float:
        pairs = lengths * (lengths + 1) / 2 if causal else lengths**2
        return 4.0 * float(pairs.sum()) * width

    forward = forward_flops(model, BatchSizes.of(batch))
    lengths = batch.cu_seqlens.diff().double()
    assert forward["thinker"] == counts["OmniModel.thinker"] + head + attention(lengths, 2 * 32, causal=True)
    if batch.grid_thw is not None:
        frames = batch.grid_thw.prod(1).double()
        assert forward["visual"] == counts["OmniModel.visual"] + attention(frames, 16, causal=False)
    if batch.mel_lengths is not None:
        tokens = model.aut.output_lengths(batch.mel_lengths).double()
        convolved = sum(flops for name, flops in counts.items() if name.startswith("OmniModel.aut.conv"))
        unasked = 1 - float(batch.mel_lengths.sum() / (batch.mel_lengths / 100).ceil().sum() / 100)
        expected = counts["OmniModel.aut"] + attention(tokens, 16, causal=False) - unasked * convolved
        assert forward["aut"] == pytest.approx(expected, rel=0.003)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_training_flops(step: int) -> None:
    """Forward and backward pass against torch's count, by part."""
    model, batch = toy_model(), PackedBatch.pack(step_samples(step))
    with FlopCounterMode(display=False) as counter:
        output = model(**batch.model_inputs())
        chunked_cross_entropy(output.hidden, model.thinker.lm_head.weight, batch.labels).sum().backward()
    counted = counter.get_total_flops()
    # Attention, which torch does not count on a processor, is in ours three times: forward, and twice backward.
    lengths = batch.cu_seqlens.diff().double()
    attention = 4.0 * float((lengths * (lengths + 1) / 2).sum()) * 2 * 32
    if batch.grid_thw is not None:
        attention += 4.0 * float((batch.grid_thw.prod(1).double() ** 2).sum()) * 16
    if batch.mel_lengths is not None:
        attention += 4.0 * float((model.aut.output_lengths(batch.mel_lengths).double() ** 2).sum()) * 16
    head = 2.0 * int((batch.labels >= 0).sum()) * model.thinker.lm_head.weight.numel()
    ours = training_flops_by_part(model, BatchSizes.of(batch))
    expected = sum(ours.values()) - 3 * attention - head  # its gradient is added in place, which torch does not count
    if "visual" in ours or "aut" in ours:  # the encoders' first layers have no gradient to pass on; see also above
        assert counted == pytest.approx(expected, rel=0.02)
    else:
        assert counted == expected
    assert ours == pytest.approx(
        {part: 3 * flops for part, flops in forward_flops(model, BatchSizes.of(batch)).items()}
    )


def test_frozen_parts_cost_less() -> None:
    model, batch = toy_model(), PackedBatch.pack(step_samples(0))
    forward = forward_flops(model, BatchSizes.of(batch))
    assert training_flops(model, BatchSizes.of(batch)) == pytest.approx(3 * sum(forward.values()))
    model.requires_grad_(False)
    assert training_flops(model, BatchSizes.of(batch)) == pytest.approx(sum(forward.values()))
    model.aut.requires_grad_(True)
    assert training_flops(model, BatchSizes.of(batch)) == pytest.approx(
        3 * forward["aut"] + 2 * forward["thinker"] + forward["visual"]
    )


def test_peak_is_measured_on_a_processor() -> None:
    peak, source = peak_flops(torch.device("cpu"), seconds=0.05)
    assert source == "measured"
    assert peak > 1e8
