"""AuT against the audio tower of transformers, with the same random weights."""

from __future__ import annotations

import pytest
import torch

from omnitrain.models.aut import AuTConfig, AuTEncoder

CONFIGS = {
    "two layers": AuTConfig(d_model=32, layers=2, heads=4, ffn=48, out_dim=24, conv_hidden=8, window_frames=800),
    "odd mels, short windows": AuTConfig(
        d_model=40, layers=3, heads=2, ffn=32, out_dim=16, conv_hidden=6, n_mels=37, window_frames=200
    ),
}


def reference_of(config: AuTConfig, seed: int = 0):
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

    torch.manual_seed(seed)
    reference = Qwen3OmniMoeAudioEncoder(
        Qwen3OmniMoeAudioEncoderConfig(
            num_mel_bins=config.n_mels,
            encoder_layers=config.layers,
            encoder_attention_heads=config.heads,
            encoder_ffn_dim=config.ffn,
            d_model=config.d_model,
            n_window=config.chunk_frames // 2,
            n_window_infer=config.window_frames,
            output_dim=config.out_dim,
            downsample_hidden_size=config.conv_hidden,
        )
    ).eval()
    for parameter in reference.parameters():  # its initial biases and norms are 0 and 1: errors there would not show
        torch.nn.init.normal_(parameter, std=0.2)
    return reference


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    config = CONFIGS[request.param]
    reference = reference_of(config)
    ours = AuTEncoder(config).eval()
    ours.load_state_dict(reference.state_dict())  # strict: the names are the same
    return ours, reference


@torch.no_grad()
@pytest.mark.parametrize(  # 6400 frames are the 64 chunks of a segment
    "lengths",
    [[1], [57], [99], [100], [101], [450], [812, 1030], [300, 163, 1712], [230, 40, 100, 8, 2005], [6399], [6400],
     [6401], [13000]],
    ids=str,
)  # fmt: skip
def test_features_equal_the_reference(pair, lengths):
    ours, reference = pair
    mel = torch.randn(sum(lengths), ours.config.n_mels, generator=torch.Generator().manual_seed(1))
    features = ours(mel, torch.tensor(lengths))
    # Recordings of 1 s and more come out of the reference alike alone and together; shorter ones are compared alone.
    expected = torch.cat(
        [
            reference(part.T, feature_lens=torch.tensor([len(part)])).last_hidden_state
            for part in mel.split(lengths)
        ]
    )  # fmt: skip
    assert features.shape == (int(ours.output_lengths(torch.tensor(lengths)).sum()), ours.config.out_dim)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    if min(lengths) >= 100:
        together = reference(mel.T, feature_lens=torch.tensor(lengths)).last_hidden_state
        torch.testing.assert_close(features, together, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seconds", [1, 3, 8])
def test_the_window_can_be_chosen_per_call(pair, seconds):
    ours, reference = pair
    mel = torch.randn(1234, ours.config.n_mels)
    reference.n_window_infer, before = 100 * seconds, reference.n_window_infer
    expected = reference(mel.T, feature_lens=torch.tensor([1234])).last_hidden_state
    reference.n_window_infer = before
    torch.testing.assert_close(ours(mel, torch.tensor([1234]), 100 * seconds), expected, atol=1e-4, rtol=1e-4)


def test_gradients_equal_the_reference_with_and_without_checkpointing(pair):
    ours, reference = pair
    lengths = torch.tensor([230, 705])
    mel = torch.randn(935, ours.config.n_mels)
    weight = torch.randn(int(ours.output_lengths(lengths).sum()), ours.config.out_dim)

    def gradients(model, features) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (features * weight).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(reference, reference(mel.T, feature_lens=lengths).last_hidden_state)
    for ours.activation_checkpointing in (True, False):
        found = gradients(ours, ours(mel, lengths))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_packed_equals_alone():
    encoder = AuTEncoder(CONFIGS["two layers"])
    parts = [torch.randn(n, 128) for n in (30, 250, 100, 99, 7, 1601)]
    alone = torch.cat([encoder(p, torch.tensor([len(p)])) for p in parts])
    packed = encoder(torch.cat(parts), torch.tensor([len(p) for p in parts]))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths", [[50], [300], [301], [400], [600], [900, 900], [1350], [50, 1300], [1300, 50], [100] * 7]
)
def test_long_recordings_are_encoded_in_segments(lengths, monkeypatch):
    """Shorter and longer than a window, which is more than three chunks; with and without a short recording."""
    encoder = AuTEncoder(CONFIGS["two layers"])
    mel, lengths = torch.randn(sum(lengths), 128), torch.tensor(lengths)
    whole = encoder(mel, lengths)
    monkeypatch.setattr("omnitrain.models.aut.CHUNKS_PER_SEGMENT", 3)
    torch.testing.assert_close(encoder(mel, lengths), whole, atol=1e-5, rtol=1e-5)


def test_no_recordings_give_no_features():
    encoder = AuTEncoder(CONFIGS["two layers"])
    assert encoder(torch.zeros(0, 128), torch.zeros(0, dtype=torch.int64)).shape == (0, 24)


def test_public_size_has_the_public_shapes():
    with torch.device("meta"):
        ours, reference = AuTEncoder(AuTConfig()), reference_of(AuTConfig())
    shapes = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert shapes == {name: tuple(p.shape) for name, p in reference.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(650e6, rel=0.005)


def test_errors_name_what_is_wrong():
    encoder = AuTEncoder(CONFIGS["two layers"])
    with pytest.raises(ValueError, match=r"expected \[12, 128\]"):
        encoder(torch.zeros(10, 128), torch.tensor([12]))
    with pytest.raises(ValueError, match=r"mel_lengths\[1\] is 0"):
        encoder(torch.zeros(10, 128), torch.tensor([10, 0]))
    with pytest.raises(ValueError, match="multiple of 100"):
        encoder(torch.zeros(10, 128), torch.tensor([10]), window_frames=150)
    with pytest.raises(ValueError, match="heads"):
        AuTConfig(d_model=30, heads=4)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_segments_change_neither_features_nor_gradients(checkpointed, monkeypatch):
    """Recordings of which one ends within a segment, one is cut by it and one is shorter than a chunk."""
    encoder = AuTEncoder(CONFIGS["odd mels, short windows"])
    lengths = torch.tensor([730, 1630, 57, 250])
    mel, weight = torch.randn(2667, 37), torch.randn(int(encoder.output_lengths(lengths).sum()), 16)

    def features_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = encoder(mel, lengths)
        return features, list(torch.autograd.grad((features * weight).mean(), list(encoder.parameters())))

    features, gradients = features_and_gradients()
    monkeypatch.setattr("omnitrain.models.aut.CHUNKS_PER_SEGMENT", 5)
    encoder.activation_checkpointing = checkpointed
    by_segments, their_gradients = features_and_gradients()
    assert relative_difference(by_segments, features) < 1e-6
    total = torch.cat([g.flatten() for g in gradients]).norm()
    for found, expected in zip(their_gradients, gradients, strict=True):
        assert float((found - expected).norm()) < 1e-6 * float(total)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_kept_for_the_backward_pass_are_those_of_one_segment(checkpointed):
    encoder = AuTEncoder(CONFIGS["two layers"])
    encoder.activation_checkpointing = checkpointed

    def kept(seconds: int) -> int:
        sizes: list[int] = []

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        mel = torch.zeros(100 * seconds, 128)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            encoder(mel, torch.tensor([len(mel)]))
        return sum(sizes)

    growth = kept(256) - kept(128)
    assert (growth == 128 * 100 * 128) == checkpointed  # the mel frames themselves, which are there anyway


@torch.no_grad()
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("window", [100, 300, 800])
def test_step_by_step_equals_at_once(window, projected):
    encoder = AuTEncoder(CONFIGS["two layers"])
    draw = torch.Generator().manual_seed(window)
    for frames in (1, 57, 99, 100, 101, 799, 800, 2430, 6400):
        mel = torch.randn(frames, 128, generator=draw)
        whole = (encoder if projected else encoder.encode)(mel, torch.tensor([frames]), window)
        for longest in (7, 130, 2000):
            state, features, at = encoder.init_state(window, projected=projected), [], 0
            while at < frames:
                size = int(torch.randint(0, longest, (1,), generator=draw))
                features.append(encoder.step(mel[at : at + size], state))
                at += size
                assert len(state.waiting) < window
                assert state.waiting.untyped_storage().nbytes() < window * 128 * 4  # nothing else is kept with it
                final = min(at, frames) // window * window
                assert sum(map(len, features)) == int(encoder.output_lengths(torch.tensor(final)))
            features.append(encoder.finish(state))
            torch.testing.assert_close(torch.cat(features), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seconds", [3, 8, 64])
def test_pieces_of_whole_windows_give_the_same_bits(seconds):
    """Those of whole segments by construction, others as far as matrix products of other heights round alike."""
    encoder = AuTEncoder(CONFIGS["two layers"])
    window = 800 if seconds == 64 else 100 * seconds
    mel = torch.randn(13_050, 128)
    state = encoder.init_state(window)
    features = [encoder.step(piece, state) for piece in mel.split(100 * seconds)]
    whole = encoder(mel, torch.tensor([len(mel)]), window)
    assert torch.equal(torch.cat([*features, encoder.finish(state)]), whole)


def test_a_loss_per_piece_gives_the_gradient_of_the_whole():
    """So that the backward pass of a long recording takes no more memory than that of one piece."""
    encoder = AuTEncoder(CONFIGS["two layers"])
    mel = torch.randn(2430, 128)
    expected = torch.autograd.grad(encoder(mel, torch.tensor([2430])).square().sum(), list(encoder.parameters()))
    state = encoder.init_state()
    for piece in mel.split(1000):
        if len(features := encoder.step(piece, state)):
            features.square().sum().backward()
    encoder.finish(state).square().sum().backward()
    for parameter, gradient in zip(encoder.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-5)


def test_a_finished_recording_takes_no_more():
    encoder = AuTEncoder(CONFIGS["two layers"])
    state = encoder.init_state()
    with pytest.raises(ValueError, match=r"expected \[F, 128\]"):
        encoder.step(torch.zeros(10, 127), state)
    assert encoder.finish(state).shape == (0, 24)
    with pytest.raises(ValueError, match="init_state"):
        encoder.step(torch.zeros(10, 128), state)
    with pytest.raises(ValueError, match="multiple of 100"):
        encoder.init_state(150)
