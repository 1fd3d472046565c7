from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep import moving_stamps
from data_prep.moving_stamps import Clip, Event, Renderer, noun, plan, rows
from data_prep.splits import cell_split
from data_prep.stamps import Stamp, read_stamps
from omnitrain.data.media import decode_video
from omnitrain.data.shards import SampleSource


@pytest.fixture
def found(stamps_tree: Path) -> dict[str, Stamp]:
    return {stamp.id.rpartition("/")[2]: stamp for stamp in read_stamps(stamps_tree)}


@pytest.fixture
def renderer(found: dict[str, Stamp]) -> Renderer:
    return Renderer([found["rose"]], size=48, fps=8)


def one(stamp: Stamp, action: str, **more) -> Clip:
    return Clip(id="same", seconds=1.0, events=(Event(stamp=stamp, action=action, start=0, stop=1),), **more)


def test_what_is_told_is_in_order(found: dict[str, Stamp]) -> None:
    truck, dog = found["firetruck"], found["dog"]
    first, second = (
        Event(stamp=truck, action="left", start=0, stop=0.5),
        Event(stamp=truck, action="grow", start=0.5, stop=1),
    )
    other = Event(stamp=dog, action="spin", start=0.5, stop=1)
    assert one(truck, "left").sentence == "A fire truck moves left."
    assert Clip(id="x", seconds=2, events=(first, second)).sentence == "A fire truck moves left, then grows."
    assert Clip(id="x", seconds=2, events=(first, other)).sentence == "A fire truck moves left, then a dog spins."
    after = Clip(id="x", seconds=2, events=(first,), sound=dog, sound_at=(0.5, 1.0))
    assert after.sentence == "A fire truck moves left, then a dog barks."
    before = Clip(id="x", seconds=2, events=(second,), sound=dog, sound_at=(0.0, 0.5))
    assert before.sentence == "A dog barks, then a fire truck grows."
    assert one(dog, "up", sound=dog).sentence == "A dog moves up and barks."


@pytest.mark.parametrize(("there", "back"), [("left", "right"), ("up", "down"), ("grow", "shrink")])
def test_a_movement_is_its_opposite_in_reverse(
    found: dict[str, Stamp], renderer: Renderer, there: str, back: str
) -> None:
    frames = renderer.frames(one(found["firetruck"], there)), renderer.frames(one(found["firetruck"], back))
    assert frames[0].shape == (8, 48, 48, 3)
    assert np.abs(np.diff(frames[0].astype(int), axis=0)).max() > 50
    np.testing.assert_array_equal(frames[0], frames[1][::-1])


def test_the_object_moves_where_it_is_said_to(found: dict[str, Stamp], renderer: Renderer) -> None:
    def centre(frame: np.ndarray) -> np.ndarray:
        red = (frame[..., 0].astype(int) - frame[..., 1:].max(-1)).clip(60) - 60
        return np.array([(red.sum(axis) * np.arange(48)).sum() / red.sum() for axis in (0, 1)])  # x, y

    for action, axis, sign in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        frames = renderer.frames(one(found["firetruck"], action))
        way = centre(frames[-1]) - centre(frames[0])
        assert sign * way[axis] > 15, action
        assert abs(way[1 - axis]) < 2, action


def test_the_sound_is_heard_when_it_is_told(found: dict[str, Stamp], renderer: Renderer) -> None:
    event = Event(stamp=found["firetruck"], action="left", start=0, stop=0.5)
    for at, quiet, loud in (((0.5, 1.0), 0, 1), ((0.0, 0.5), 1, 0)):
        clip = Clip(id="x", seconds=2.0, events=(event,), sound=found["tiger"], sound_at=at)
        video = decode_video(renderer.encode(clip), fps=8)
        assert video.frames.shape == (16, 48, 48, 3)
        assert video.audio is not None
        halves = [np.sqrt((half**2).mean()) for half in np.array_split(video.audio, 2)]
        assert halves[loud] > 0.05 > 0.01 > halves[quiet]
    assert decode_video(renderer.encode(one(found["dog"], "spin")), fps=8).audio is None


def test_plans_are_pure_and_keep_splits_apart(found: dict[str, Stamp]) -> None:
    stamps = list(found.values())
    clips = plan(stamps, 30, (1.0, 2.0))
    assert clips == plan(stamps, 30, (1.0, 2.0))
    assert {clip.kind for clip in clips} == {"silent", "sound_before", "sound_after", "own_sound"}
    assert {len(clip.events) for clip in clips} == {1, 2}
    assert noun(found["7"]) is None
    assert not any("seven" in clip.sentence.lower() for clip in clips)
    for clip in clips:
        cells = {cell_split(event.stamp.concept, "video", event.action) for event in clip.events}
        assert clip.split != "train" or cells == {"train"}
        for row in rows(clip):
            assert row.split == clip.split
            assert row.modality == ("audio_video" if clip.sound else "video")


def test_the_script(stamps_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--source", str(stamps_tree), "--no-progress"]
    assert moving_stamps.main([*arguments, "--size", "32", "--fps", "4", "--clips-per-stamp", "2"]) == 0
    source = SampleSource(out)
    assert {"video", "video_action"} <= {source[i].task for i in range(len(source))}
    segment = next(s for s in source[0].messages[0].segments if s.type == "video")
    assert decode_video(source.media_bytes(segment), fps=4).frames.shape[1:] == (32, 32, 3)
