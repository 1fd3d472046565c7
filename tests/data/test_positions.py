"""TM-RoPE ids against `get_rope_index` of transformers, exactly."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from omnitrain.data.positions import (
    AudioSpan,
    AudioVideoSpan,
    ImageSpan,
    Span,
    TextSpan,
    VideoSpan,
    audio_tokens,
    audio_video_order,
    tm_rope_positions,
    vision_tokens,
)

IMAGE, VIDEO, AUDIO, VISION_START, VISION_END, AUDIO_START, AUDIO_END, TEXT = 90, 91, 92, 93, 94, 95, 96, 5


@pytest.fixture(scope="module")
def reference():
    """The reference's `get_rope_index`, on the smallest model that has it."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as c
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
        Qwen3OmniMoeThinkerForConditionalGeneration,
    )

    config = c.Qwen3OmniMoeThinkerConfig(
        text_config=dict(
            vocab_size=100,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            intermediate_size=8,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 1, 1]),
        ),
        audio_config=dict(
            d_model=16,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=16,
            output_dim=16,
            downsample_hidden_size=4,
        ),
        vision_config=dict(
            depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=16, deepstack_visual_indexes=[0]
        ),
        position_id_per_seconds=13,
        audio_token_id=AUDIO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_start_token_id=AUDIO_START,
    )
    config.vision_start_token_id = VISION_START
    config.vision_end_token_id = VISION_END
    model = Qwen3OmniMoeThinkerForConditionalGeneration(config)

    def ids(spans: list[Span], with_sound: bool, ids_per_second: int = 13) -> np.ndarray:
        model.config.position_id_per_seconds = ids_per_second
        tokens: list[int] = []
        images, videos, seconds, audios = [], [], [], []
        for span in spans:
            match span:
                case TextSpan(n):
                    tokens += [TEXT] * n
                case AudioSpan(n):
                    tokens += [AUDIO_START, *[AUDIO] * n, AUDIO_END]
                    audios.append(n)
                case ImageSpan(grid):
                    tokens += [VISION_START, *[IMAGE] * vision_tokens(grid), VISION_END]
                    images.append(grid)
                case VideoSpan(grid, s):
                    tokens += [VISION_START, *[VIDEO] * vision_tokens(grid), VISION_END]
                    videos.append(grid), seconds.append(s)
                case AudioVideoSpan(grid, s, n):
                    order = audio_video_order(grid, s, n, ids_per_second=model.config.position_id_per_seconds)
                    tokens += [
                        VISION_START,
                        AUDIO_START,
                        *np.where(order, VIDEO, AUDIO).tolist(),
                        AUDIO_END,
                        VISION_END,
                    ]
                    videos.append(grid), seconds.append(s), audios.append(n)
        # the reference wants mel frames: any count that gives n tokens
        frames = [next(f for f in range(8 * n + 8) if audio_tokens(f) == n) for n in audios]
        input_ids = torch.tensor([tokens])
        out, _ = model.get_rope_index(
            input_ids,
            image_grid_thw=torch.tensor(images) if images else None,
            video_grid_thw=torch.tensor(videos) if videos else None,
            attention_mask=torch.ones_like(input_ids),
            use_audio_in_video=with_sound,
            audio_seqlens=torch.tensor(frames) if frames else None,
            second_per_grids=torch.tensor(seconds) if seconds else None,
        )
        return out[:, 0].numpy()

    return ids


@pytest.mark.parametrize("ids_per_second", [13, 25])
def test_ties_of_picture_and_sound(reference, ids_per_second: int) -> None:
    """Order of the processor's placeholders and ids of the model, where some ids of the two nearly agree."""
    from transformers import Qwen3OmniMoeProcessor

    writer = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2), audio_bos_token="", audio_eos_token="", video_token="v",
        audio_token="a",
    )  # fmt: skip
    for fps in range(1, 31):
        for grids, before in ((4, 1), (30, 1), (30, 77)):
            grid, per_grid = (grids, 2, 4), 2 / fps
            n_audio = round(grids * per_grid * ids_per_second) + 3
            placeholders = Qwen3OmniMoeProcessor.replace_video_with_audio_token(
                writer,
                {"video_grid_thw": [grid], "video_second_per_grid": [per_grid]}, 0,
                {"num_audio_tokens": [n_audio]}, 0, position_id_per_seconds=ids_per_second,
            )  # fmt: skip
            order = audio_video_order(grid, per_grid, n_audio, ids_per_second=ids_per_second)
            assert "".join(np.where(order, "v", "a")) == placeholders, (fps, grids)
            spans: list[Span] = [TextSpan(before), AudioVideoSpan(grid, per_grid, n_audio), TextSpan(3)]
            found = tm_rope_positions(marked(spans), ids_per_second=ids_per_second)
            np.testing.assert_array_equal(found, reference(spans, True, ids_per_second), err_msg=str((fps, grids)))


def marked(spans: list[Span]) -> list[Span]:
    """The same spans with the start and end tokens around media."""
    out: list[Span] = []
    for span in spans:
        n = 0 if isinstance(span, TextSpan) else 2 if isinstance(span, AudioVideoSpan) else 1
        out += [TextSpan(n), span, TextSpan(n)]
    return out


CASES: dict[str, list[Span]] = {
    "text": [TextSpan(7)],
    "image": [TextSpan(3), ImageSpan((1, 4, 6)), TextSpan(4)],
    "image first": [ImageSpan((1, 2, 2))],
    "two images": [TextSpan(1), ImageSpan((1, 8, 4)), ImageSpan((1, 2, 10)), TextSpan(4)],
    "audio": [TextSpan(2), AudioSpan(26), TextSpan(2)],
    "video": [TextSpan(2), VideoSpan((3, 4, 4), 1.0), TextSpan(3)],
    "video at 4 frames/s": [TextSpan(2), VideoSpan((5, 4, 6), 0.5), TextSpan(3)],
    "wide video": [TextSpan(2), VideoSpan((1, 4, 40), 1.0), TextSpan(3)],
    "several": [
        TextSpan(2), AudioSpan(9), TextSpan(1), ImageSpan((1, 6, 4)), AudioSpan(14), VideoSpan((2, 2, 4), 2.0),
        TextSpan(3), ImageSpan((1, 2, 2)), VideoSpan((4, 4, 2), 0.25), AudioSpan(1), TextSpan(2),
    ],
    "sound ends first": [TextSpan(2), AudioVideoSpan((3, 4, 4), 1.0, 20), TextSpan(3)],
    "video ends first": [TextSpan(2), AudioVideoSpan((2, 4, 4), 1.0, 40), TextSpan(3)],
    "fractions in sound": [TextSpan(2), AudioVideoSpan((4, 2, 4), 0.5, 30), TextSpan(3)],
    "sides longer than the sound": [TextSpan(2), AudioVideoSpan((1, 40, 60), 1.0, 5), TextSpan(3)],
    "sound among others": [
        TextSpan(1), ImageSpan((1, 4, 4)), TextSpan(2), AudioVideoSpan((3, 4, 4), 0.8, 31), AudioSpan(12), TextSpan(1),
        AudioVideoSpan((2, 2, 2), 2.0, 13), TextSpan(3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_the_reference(name, reference):
    spans = CASES[name]
    with_sound = any(isinstance(s, AudioVideoSpan) for s in spans)
    ours = tm_rope_positions(marked(spans))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference(spans, with_sound))


@pytest.mark.parametrize("seed", range(20))
def test_random_samples_equal_the_reference(seed, reference):
    rng = np.random.default_rng(seed)
    spans: list[Span] = []
    with_sound = bool(seed % 2)
    for _ in range(rng.integers(2, 8)):
        grid = (int(rng.integers(1, 6)), 2 * int(rng.integers(1, 9)), 2 * int(rng.integers(1, 9)))
        seconds = float(rng.choice([0.25, 0.5, 1.0, 2.0]))
        n = int(rng.integers(1, 60))
        video = AudioVideoSpan(grid, seconds, n) if with_sound else VideoSpan(grid, seconds)
        spans += [TextSpan(n), AudioSpan(n), ImageSpan((1, *grid[1:])), video][(i := rng.integers(0, 4)) : i + 1]
    np.testing.assert_array_equal(tm_rope_positions(marked(spans)), reference(spans, with_sound))


def test_a_worked_example():
    ids = tm_rope_positions([TextSpan(2), VideoSpan((2, 4, 4), 1.0), TextSpan(2)])
    assert ids.T.astype(int).tolist() == [
        [0, 0, 0], [1, 1, 1],
        [2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3],
        [15, 2, 2], [15, 2, 3], [15, 3, 2], [15, 3, 3],
        [16, 16, 16], [17, 17, 17],
    ]  # fmt: skip


def test_the_example_of_the_documentation():
    """docs/positions.md"""
    ids = tm_rope_positions([TextSpan(2), AudioVideoSpan((2, 4, 4), 1.0, 15), TextSpan(2)])
    t, h, w = ids.astype(int).tolist()
    assert t == [0, 1, *[2] * 4, *range(2, 15), *[15] * 4, 15, 16, 17, 18]
    assert h == [0, 1, 2, 2, 3, 3, *range(2, 15), 2, 2, 3, 3, 15, 16, 17, 18]
    assert w == [0, 1, 2, 3, 2, 3, *range(2, 15), 2, 3, 2, 3, 15, 16, 17, 18]


def test_positions_are_exact_to_the_end_of_forty_minutes():
    """In float32, as they are kept: against exact fractions."""
    n = audio_tokens(240_000)
    ids = tm_rope_positions([TextSpan(9), AudioSpan(n), TextSpan(3)])
    assert n == 31_200
    assert ids.dtype == np.float32
    assert [[Fraction(float(x)) for x in axis] for axis in ids] == [[Fraction(i) for i in range(n + 12)]] * 3
    grids = 4800  # of 0.5 s, 6.5 ids each
    video = tm_rope_positions([TextSpan(9), AudioVideoSpan((grids, 2, 2), 0.5, n), TextSpan(3)])
    expected = sorted([9 + Fraction(13, 2) * i for i in range(grids)] + [Fraction(9 + i) for i in range(n)])
    assert [Fraction(float(x)) for x in video[0, 9:-3]] == expected
    assert video[:, -1].tolist() == [9 + n + 2] * 3


def test_video_goes_first_on_ties():
    order = audio_video_order((2, 2, 2), 1.0, 15)
    assert order.tolist() == [True, *[False] * 13, True, False, False]


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 99, 100, 101, 163, 200, 1234])
def test_audio_tokens_equal_the_reference(frames):
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    assert audio_tokens(frames) == int(_get_feat_extract_output_lengths(torch.tensor(frames)))


def test_nothing_and_nonsense():
    assert tm_rope_positions([]).shape == (3, 0)
    assert tm_rope_positions([TextSpan(0), AudioSpan(0)]).shape == (3, 0)
    assert audio_tokens(0) == 0
    with pytest.raises(ValueError, match="multiples of merge"):
        tm_rope_positions([ImageSpan((1, 3, 4))])
    with pytest.raises(ValueError, match="mel_frames"):
        audio_tokens(-1)
    with pytest.raises(TypeError, match="not a span"):
        tm_rope_positions(["text"])  # type: ignore[list-item]
