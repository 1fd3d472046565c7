"""The counted operations against torch's counter of what really ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_talker_module import talking_model
from torch.utils.flop_counter import FlopCounterMode
from toy_training import step_samples, toy_model

from omnitrain.data.batch import EncodedSample, PackedBatch
from omnitrain.data.work import Work
from omnitrain.models.aut_decoder import text_of
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.training.flops import (
    BatchSizes,
    aut_forward_flops,
    aut_training_flops_by_part,
    aut_work,
    forward_flops,
    peak_flops,
    talker_work,
    thinker_work,
    training_flops,
    training_flops_by_part,
)
from tests.models.whisper_reference import small_aut, spoken_sample


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
        chunked_cross_entropy(output.hidden, model.thinker.lm_head.weight, batch.labels).total.backward()
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


def test_forward_flops_of_an_aut() -> None:
    """As above: torch's count of each part, attention added, whole seconds of sound."""
    model = small_aut(ctc_slots=3)
    shapes = [(200, 3, 4), (500, 1, 2), (100, 2, 6)]
    batch = PackedBatch.pack(
        [spoken_sample(i, frames=f, before=b, after=a, answer=3) for i, (f, b, a) in enumerate(shapes)]
    )
    with torch.no_grad():
        output = model(**batch.model_inputs(), aut_window_frames=200)
        with FlopCounterMode(display=False) as whole:
            model(**batch.model_inputs(), aut_window_frames=200)
        with FlopCounterMode(display=False) as encoding:
            model.aut.encode(batch.mel, batch.mel_lengths, 200)
        with FlopCounterMode(display=False) as by_ctc:
            model.ctc_log_probs(output.encoded, output.cu_seqlens_audio)
    encoded, decoded = encoding.get_total_flops(), whole.get_total_flops() - encoding.get_total_flops()
    targets = int((batch.labels >= 0).sum())
    text, heard = text_of(batch.cu_seqlens, batch.token_types)[2].diff(), output.cu_seqlens_audio.diff()
    # In windows of 2 s, thus of 26 features: 1; 2, and one of 1 s; one of 1 s.
    in_windows = 26**2 + 2 * 26**2 + 13**2 + 13**2
    in_decoder = float((text * (text + 1) / 2 + text * heard).sum())
    found = aut_forward_flops(model, batch, window_frames=200)
    assert found["ctc"] == by_ctc.get_total_flops()
    assert found["aut"] == pytest.approx(encoded + 4 * in_windows * 32 * 2, rel=0.003)  # 25 columns become 13
    head = 2 * targets * model.output_embedding.numel()
    assert found["decoder"] == decoded + head + 4 * in_decoder * 32 * 3
    assert sum(aut_training_flops_by_part(model, batch, 200).values()) == 3 * sum(found.values())
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    trained = aut_training_flops_by_part(model, batch, 200)
    assert sum(trained.values()) == 3 * found["decoder"] + found["aut"] + found["ctc"]


def _operations(work: Work, samples: Sequence[EncodedSample]) -> float:
    for sample in samples:
        whole, *parts = work.of(sample)
        assert whole == sum(parts)
    return sum(work.of(sample)[0] for sample in samples)


def test_work_of_a_sample() -> None:
    """That of the samples of a pack adds up to what the pack costs, whatever learns; recordings last whole windows."""
    model, batch = toy_model(), PackedBatch.pack(samples := [*step_samples(0), *step_samples(2)])
    frames = model.aut.config.window_frames
    samples = [replace(s, mel=tuple(np.zeros((frames, 16)) for _ in s.mel)) for s in samples]
    sizes = replace(BatchSizes.of(batch), mel_lengths=[frames for s in samples for _ in s.mel])
    assert _operations(thinker_work(model), samples) == pytest.approx(training_flops(model, sizes))
    model.requires_grad_(False)
    model.visual.requires_grad_(True)
    assert _operations(thinker_work(model), samples) == pytest.approx(training_flops(model, sizes))


def test_work_of_an_aut() -> None:
    """But for the attention of the decoder, which is left out."""
    model = small_aut(ctc_slots=3)
    frames = model.aut.config.window_frames
    samples = [spoken_sample(i, frames=n * frames, before=3, after=4, answer=20) for i, n in enumerate((1, 2))]
    batch = PackedBatch.pack(samples)
    text = text_of(batch.cu_seqlens, batch.token_types)[2].diff()
    pairs = float((text * (text + 1) / 2 + text * (batch.cu_seqlens.diff() - text)).sum())
    for learning in (True, False):
        model.aut.requires_grad_(learning)
        expected = sum(aut_training_flops_by_part(model, batch).values()) - 3 * 4 * pairs * 32 * 3
        assert _operations(aut_work(model), samples) == pytest.approx(expected)


def test_work_of_a_frame_of_speech() -> None:
    """What ten frames more cost, by torch's count, forward; text and the beginning of an answer are the same."""
    model = talking_model()
    assert model.talker is not None
    work = talker_work(model, model.talker, joint=False, listens=False)
    counts = []
    for frames in (10, 20):
        hidden = torch.zeros(frames, model.talker.config.d_model)
        codes = torch.zeros(frames, model.talker.config.codebooks, dtype=torch.int64)
        borders = torch.tensor([0, frames], dtype=torch.int32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = model.talker(hidden, torch.zeros(3, frames), borders)
            model.talker.logits(output.hidden)
            model.talker.mtp.logits(model.talker.mtp(output.hidden, hidden, codes))
        counts.append(counter.get_total_flops())
    assert work.frame == pytest.approx(3 * (counts[1] - counts[0]) / 10)
    assert not any(work.of(step_samples(0)[0]))
