"""Moving stamps: short real videos (MP4: H.264, AAC where something sounds) that only order and sound explain.

    python -m data_prep.moving_stamps --out data/moving_stamps

One stamp after another moves, grows, shrinks or spins over a blurred photograph, and a stamp's own sound effect may
follow or come first: "A fire truck moves left, then a dog barks." Still frames do not give the answer away: a
movement to the left is one to the right in reverse, growing is shrinking in reverse, and the source of a sound need
not be visible. Everything is drawn from the hash of the clip's id.

An object's way of moving is a cell (concept, "video", action), and so is a sound; a clip is held out if any of its
cells is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from data_prep.edit import SPEECH_RATE, loudest, normalise_peak, on_white, trim_silence
from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.prompts import ask, prompt
from data_prep.splits import cell_split, concept_is_heldout, fraction, strictest
from data_prep.stamps import MEDIA, PACKAGE, Stamp, open_picture, read_stamps, usable
from omnitrain.data.media import decode_audio, encode_video
from omnitrain.data.sample import Sample, Segment
from omnitrain.data.shards import write_media_table, write_shards

ACTIONS: dict[str, str] = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "grow": "grows",
    "shrink": "shrinks",
    "spin": "spins",
}

SOUNDS: dict[str, str] = {
    "animals/amphibians/frog": "croaks",
    "animals/birds/blackbird": "sings",
    "animals/birds/crow": "caws",
    "animals/birds/cuckoo": "calls",
    "animals/birds/drake": "quacks",
    "animals/birds/duck": "quacks",
    "animals/birds/lark": "sings",
    "animals/birds/owl": "hoots",
    "animals/birds/penguin": "calls",
    "animals/birds/seagull": "screeches",
    "animals/birds/turkey": "gobbles",
    "animals/insects/bee": "buzzes",
    "animals/insects/grasshopper": "chirps",
    "animals/insects/hornet": "buzzes",
    "animals/mammals/apes/chimp": "shrieks",
    "animals/mammals/apes/gorilla": "grunts",
    "animals/mammals/aquatic/dolphin": "clicks",
    "animals/mammals/aquatic/sea_lion": "barks",
    "animals/mammals/aquatic/whale": "sings",
    "animals/mammals/bears/bear": "growls",
    "animals/mammals/bovines/bull": "snorts",
    "animals/mammals/bovines/cow": "moos",
    "animals/mammals/bovines/cow_white": "moos",
    "animals/mammals/bovines/goat": "bleats",
    "animals/mammals/bovines/sheep": "bleats",
    "animals/mammals/camel/camel": "groans",
    "animals/mammals/cats/lion": "roars",
    "animals/mammals/cats/tiger": "roars",
    "animals/mammals/dogs/dog": "barks",
    "animals/mammals/dogs/fox": "yelps",
    "animals/mammals/elephant": "trumpets",
    "animals/mammals/equines/donkey": "brays",
    "animals/mammals/equines/horse": "neighs",
    "animals/mammals/pig": "grunts",
    "animals/mammals/rodents/mouse": "squeaks",
    "hobbies/camera_35mm": "clicks",
    "hobbies/music/percussion/cymbal_crash": "crashes",
    "hobbies/music/percussion/drumkit": "plays",
    "hobbies/music/string/cello": "plays",
    "hobbies/music/string/violin": "plays",
    "hobbies/music/wind/bassoon": "plays",
    "household/Washing-machine": "runs",
    "household/kettle": "whistles",
    "household/rubberduck": "squeaks",
    "household/tools/hammer": "knocks",
    "household/tools/saw": "saws",
    "household/vacuum_cleaner": "hums",
    "naturalforces/lightningbolt": "thunders",
    "seasonal/halloween/blackcat": "meows",
    "seasonal/halloween/ghost": "howls",
    "vehicles/emergency/firetruck": "wails",
}
"""What a stamp's own sound effect is, as the verb of a sentence about it."""

_NOUN = re.compile(r"^(An? [A-Za-z-]+(?: [A-Za-z-]+){0,2})[.!]$")
_KINDS: tuple[tuple[str, float], ...] = (  # kind of clip and its share
    ("one", 0.40),
    ("two", 0.15),
    ("pair", 0.10),
    ("sound_after", 0.15),
    ("sound_before", 0.10),
    ("own_sound", 0.10),
)


def noun(stamp: Stamp) -> str | None:
    """The caption as a noun phrase (``"a fire truck"``), or None where it is not a short "A ..."."""
    match = _NOUN.match(stamp.captions["en"])
    if match is None or stamp.id.startswith("symbols/alphabets") or match[1].startswith("A pair"):
        return None
    return match[1][0].lower() + match[1][1:]


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


@dataclass(frozen=True, kw_only=True)
class Event:
    """One stamp does one thing in a share of the clip's time (`start`, `stop` in [0, 1])."""

    stamp: Stamp
    action: str
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What is to be drawn. `sound_at` is the (start, stop) of the sound, as shares of the clip's time."""

    id: str
    seconds: float
    events: tuple[Event, ...]
    sound: Stamp | None = None
    sound_at: tuple[float, float] = (0.0, 1.0)

    @property
    def kind(self) -> Literal["silent", "sound_before", "sound_after", "own_sound"]:
        if self.sound is None:
            return "silent"
        if self.sound_at == (0.0, 1.0):
            return "own_sound"
        return "sound_before" if self.sound_at[0] == 0 else "sound_after"

    @property
    def sentence(self) -> str:
        """What happens, in order: ``"A fire truck moves left, then a dog barks."``"""
        told: list[str] = []
        for before, event in zip((None, *self.events), self.events, strict=False):
            same = before is not None and before.stamp.id == event.stamp.id
            told.append(ACTIONS[event.action] if same else f"{noun(event.stamp)} {ACTIONS[event.action]}")
        if self.sound is not None:
            verb = SOUNDS[self.sound.id]
            if self.kind == "own_sound":
                return _sentence(f"{told[0]} and {verb}")
            told.insert(0 if self.kind == "sound_before" else len(told), f"{noun(self.sound)} {verb}")
        return _sentence(", then ".join(told))

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(e.stamp.concept for e in self.events)) + (
            (self.sound.concept,) if self.sound is not None else ()
        )

    @property
    def split(self) -> str:
        cells = [cell_split(event.stamp.concept, "video", event.action) for event in self.events]
        if self.sound is not None:
            cells.append(cell_split(self.sound.concept, "video", "sound"))
        return strictest(cells)


def plan(stamps: Sequence[Stamp], clips_per_stamp: int, seconds: Sequence[float], seed: str = "") -> list[Clip]:
    """Clips for each stamp that has a `noun`, drawn from hashes: the same stamps give the same clips.

    The other stamps in a clip (a second object, the source of a sound) are on the same side of the concept split, so
    that the held-out clips of one concept do not take others out of training.
    """
    objects = [stamp for stamp in stamps if noun(stamp) is not None]
    sounding = [stamp for stamp in objects if stamp.id in SOUNDS and stamp.effect is not None]
    names = list(ACTIONS)
    clips = []
    for stamp in objects:
        offset = int(fraction("first action", stamp.id) * len(names))
        for number in range(clips_per_stamp):
            key = f"{seed}{stamp.id}/{number}"

            def draw(what: str, choices: Sequence, key: str = key):
                return choices[int(fraction("clip", key, what) * len(choices))]

            kind = _kind(fraction("clip", key, "kind"))
            # Going around the actions gives each stamp as many different ones as it has clips.
            action = names[(offset + number) % len(names)]
            if kind == "own_sound" and (stamp.effect is None or stamp.id not in SOUNDS):
                kind = "one"
            side = concept_is_heldout(stamp.concept)
            others = [s for s in objects if s.concept != stamp.concept and concept_is_heldout(s.concept) == side]
            heard = [s for s in sounding if s.concept != stamp.concept and (side or not concept_is_heldout(s.concept))]
            if (kind == "pair" and not others) or (kind.startswith("sound") and not heard):
                kind = "one"
            first = Event(stamp=stamp, action=action, start=0, stop=1 if kind in ("one", "own_sound") else 0.5)
            events: tuple[Event, ...] = (first,)
            sound, at = None, (0.0, 1.0)
            if kind in ("two", "pair"):
                second = draw("second", [name for name in names if name != action])
                other = stamp if kind == "two" else draw("other", others)
                events = (first, Event(stamp=other, action=second, start=0.5, stop=1))
            elif kind == "sound_after":
                sound, at = draw("sound", heard), (0.5, 1.0)
            elif kind == "sound_before":
                sound, at = draw("sound", heard), (0.0, 0.5)
                events = (Event(stamp=stamp, action=action, start=0.5, stop=1),)
            elif kind == "own_sound":
                sound = stamp
            clips.append(Clip(id=key, seconds=draw("seconds", seconds), events=events, sound=sound, sound_at=at))
    return clips


def _kind(place: float) -> str:
    for kind, share in _KINDS:
        if place < share:
            return kind
        place -= share
    return _KINDS[0][0]


# ---------------------------------------------------------------------------------------------------------- drawing


class Renderer:
    """Draws clips.

    Args:
        backgrounds: stamps whose pictures, cropped and blurred, are the photographs behind.
        size: side of the square frames, pixels (even).
        fps: frames per second.
    """

    def __init__(self, backgrounds: Sequence[Stamp], size: int, fps: int) -> None:
        self.backgrounds, self.size, self.fps = list(backgrounds), size, fps
        self._sprites: dict[str, Image.Image] = {}
        self._scenes: dict[str, Image.Image] = {}
        self._waves: dict[str, np.ndarray] = {}

    def sprite(self, stamp: Stamp) -> Image.Image:
        """The stamp, RGBA with premultiplied alpha, longer side `size`."""
        if stamp.id not in self._sprites:
            picture = open_picture(stamp.picture, 2 * self.size)
            picture = picture.crop(picture.getchannel("A").getbbox() or (0, 0, *picture.size))
            scale = self.size / max(picture.size)
            shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            self._sprites[stamp.id] = picture.convert("RGBa").resize(shape, Image.Resampling.LANCZOS)
        return self._sprites[stamp.id]

    def scene(self, stamp: Stamp) -> Image.Image:
        """The background made of this stamp: its middle, enlarged, blurred and made paler."""
        if stamp.id not in self._scenes:
            photo = on_white(open_picture(stamp.picture, 256), 256)
            w, h = photo.size
            side = max(2, int(min(w, h) * 0.5))
            middle = photo.crop(((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2))
            middle = middle.resize((self.size, self.size), Image.Resampling.BICUBIC)
            middle = middle.filter(ImageFilter.GaussianBlur(self.size / 16))
            self._scenes[stamp.id] = Image.blend(middle, Image.new("RGB", middle.size, "white"), 0.55)
        return self._scenes[stamp.id]

    def effect(self, stamp: Stamp) -> np.ndarray:
        """The stamp's sound effect, trimmed, at `SPEECH_RATE`."""
        if stamp.id not in self._waves:
            assert stamp.effect is not None
            self._waves[stamp.id] = trim_silence(decode_audio(stamp.effect.read_bytes(), SPEECH_RATE))
        return self._waves[stamp.id]

    def frames(self, clip: Clip) -> np.ndarray:
        """uint8 [T, H, W, 3]."""
        scene = self.scene(self.backgrounds[int(fraction("background", clip.id) * len(self.backgrounds))])
        count = round(clip.seconds * self.fps)
        pictures = []
        for index in range(count):
            time = index / max(1, count - 1)
            canvas = scene.convert("RGBA")
            self._draw(canvas, clip, time)
            pictures.append(np.asarray(canvas.convert("RGB")))
        return np.stack(pictures)

    def _draw(self, canvas: Image.Image, clip: Clip, time: float) -> None:
        """Draw what stands at `time`: an object rests before and after its event; a second one replaces the first."""
        current = clip.events[0]
        for event in clip.events[1:]:
            if time >= event.start:
                current = event
        # A second action of the same object begins where the first one ended.
        x, y, scale, angle = self._pose(clip, current, time)
        sprite = self.sprite(current.stamp)
        shape = (max(2, round(sprite.width * scale)), max(2, round(sprite.height * scale)))
        sprite = sprite.resize(shape, Image.Resampling.BILINEAR).convert("RGBA")
        if angle:
            sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        corner = (round(x * self.size - sprite.width / 2), round(y * self.size - sprite.height / 2))
        layer = Image.new("RGBA", canvas.size)
        layer.paste(sprite, corner)
        canvas.alpha_composite(layer)

    def _pose(self, clip: Clip, event: Event, time: float) -> tuple[float, float, float, float]:
        """(x, y) of the centre and the longer side as shares of the frame, and the angle in degrees."""
        number = clip.events.index(event)
        if number and clip.events[number - 1].stamp.id == event.stamp.id:
            before = clip.events[number - 1]
            x, y, scale, _ = self._pose(clip, before, before.stop)
        else:
            x = 0.35 + 0.3 * fraction("x", clip.id, str(number))
            y = 0.35 + 0.3 * fraction("y", clip.id, str(number))
            scale = 0.42 + 0.16 * fraction("scale", clip.id, str(number))
            if event.action in ("left", "right"):
                x = 0.78 if event.action == "left" else 0.22
            elif event.action in ("up", "down"):
                y = 0.78 if event.action == "up" else 0.22
            elif event.action in ("grow", "shrink"):
                scale = 0.25 if event.action == "grow" else 0.8
        done = float(np.clip((time - event.start) / (event.stop - event.start), 0, 1))
        angle = 0.0
        if event.action in ("left", "right"):
            x += ((0.22 if event.action == "left" else 0.78) - x) * done
        elif event.action in ("up", "down"):
            y += ((0.22 if event.action == "up" else 0.78) - y) * done
        elif event.action in ("grow", "shrink"):
            scale += ((0.8 if event.action == "grow" else 0.25) - scale) * done
        else:
            angle = -360.0 * done
        return x, y, scale, angle

    def wave(self, clip: Clip) -> np.ndarray | None:
        """float32 [S] at `SPEECH_RATE`, the length of the clip; None for a silent clip."""
        if clip.sound is None:
            return None
        track = np.zeros(round(clip.seconds * SPEECH_RATE), dtype=np.float32)
        start, stop = (round(share * len(track)) for share in clip.sound_at)
        piece = normalise_peak(loudest(self.effect(clip.sound), (stop - start) / SPEECH_RATE)).copy()
        fade = min(len(piece), SPEECH_RATE // 20)
        piece[len(piece) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
        track[start : start + len(piece)] = piece
        return track

    def encode(self, clip: Clip, crf: int = 24, audio_bit_rate: int = 32_000) -> bytes:
        """The clip as an MP4 file."""
        return encode_video(
            self.frames(clip),
            self.fps,
            self.wave(clip),
            SPEECH_RATE,
            crf=crf,
            preset="slow",
            audio_bit_rate=audio_bit_rate,
        )


# ------------------------------------------------------------------------------------------------------------- rows


def rows(clip: Clip, licence: str = PACKAGE.licence, source: str = "moving_stamps") -> Iterator[Sample]:
    """The questions about one clip: what happens; what it is and how it moves, for single events; what is heard."""
    asked = [("video", clip.sentence)]
    if len(clip.events) == 1:
        asked.append(("video_action", f"It {ACTIONS[clip.events[0].action]}."))
        if clip.sound is None:
            asked.append(("video_object", _sentence(f"{noun(clip.events[0].stamp)}")))
    if clip.sound is not None:
        asked.append(("video_sound", _sentence(f"{noun(clip.sound)} {SOUNDS[clip.sound.id]}")))
    medium = Segment(type="video", path=f"{MEDIA}#video/{clip.id}", with_audio=clip.sound is not None)
    for task, answer in asked:
        sample_id = f"{source}/{clip.id}/{task}"
        yield Sample(
            id=sample_id,
            source=source,
            messages=ask(sample_id, prompt(task, sample_id), answer, medium),
            split=clip.split,
            task=task,
            licence=licence,
            languages=("en",),
            concept=clip.events[0].stamp.concept,
            meta={"concepts": "; ".join(clip.concepts), "actions": " ".join(event.action for event in clip.events)},
        )


def backgrounds(stamps: Sequence[Stamp]) -> list[Stamp]:
    """The stamps that serve as photographs: flowers and planets that are not held out (else any stamp)."""
    photos = [
        stamp
        for stamp in stamps
        if stamp.id.startswith(("plants/flowers/", "space/planets/", "plants/trees/", "animals/fish/"))
        and stamp.picture.suffix == ".png"
        and not concept_is_heldout(stamp.concept)
    ]
    return photos or list(stamps)


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    stamps = list(usable(read_stamps(opened[PACKAGE.name].root), counts))
    drawable = []
    for stamp in stamps:
        try:
            open_picture(stamp.picture, options.size)
        except ValueError:
            counts.left_out["stamps: the picture cannot be drawn"] += 1
        else:
            drawable.append(stamp)
    clips = plan(drawable, options.clips_per_stamp, (2.0, 3.0, 4.0))
    renderer = Renderer(backgrounds(drawable), options.size, options.fps)
    bar = track(clips, description="drawing clips", disable=not options.progress)
    write_media_table(((f"video/{clip.id}", renderer.encode(clip)) for clip in bar), options.out / MEDIA)
    # By hash, so that the first rows of a split are a fair sample of it.
    samples = (row for clip in sorted(clips, key=lambda clip: fraction("row", clip.id)) for row in rows(clip))
    write_shards(counts.watch(samples), options.out, "moving_stamps", progress=options.progress)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=128, help="side of the square frames, pixels (default 128)")
    parser.add_argument("--fps", type=int, default=12, help="frames per second (default 12)")
    parser.add_argument("--clips-per-stamp", type=int, default=7, help="clips per stamp (default 7)")


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name="moving_stamps",
        description=__doc__ or "",
        packages=[PACKAGE],
        build=_build,
        add_options=_add_options,
    )


if __name__ == "__main__":
    sys.exit(main())
