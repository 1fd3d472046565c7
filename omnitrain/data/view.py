"""To look at samples, in a terminal and in a browser: `omnitrain data inspect`, reports and W&B panels."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from omnitrain.data.codec_frames import decode_codes, holds_codes
from omnitrain.data.features import AudioGeometry, log_mel
from omnitrain.data.media import (
    MediaLimits,
    decode_audio,
    decode_image,
    decode_video,
    encode_audio,
    encode_image,
    encode_video,
    sniff,
)
from omnitrain.data.sample import BadSample, Sample, Segment, has_medium
from omnitrain.files import printable

# Five colours of a dark-to-bright map whose lightness rises evenly.
_HEAT = np.array([[0, 0, 20], [72, 18, 110], [180, 40, 110], [245, 130, 60], [252, 250, 190]], dtype=np.float32)


def spectrogram(wave: np.ndarray, columns: int | None = None, rows: int | None = None) -> np.ndarray:
    """A picture uint8 [rows, columns, 3] of a recording at 16 kHz (log-mel, low frequencies at the bottom).

    Default size: one column per frame of 10 ms (at most 1200), one row per mel bin.
    """
    mel = log_mel(wave, AudioGeometry())
    mel = _binned(mel, columns or min(1200, len(mel)), axis=0)
    mel = _binned(mel, rows, axis=1) if rows else mel
    low, high = mel.min(), mel.max()
    level = (mel - low) / max(high - low, 1e-6) * (len(_HEAT) - 1)
    below = np.minimum(level.astype(int), len(_HEAT) - 2)
    rest = (level - below)[..., None]
    colours = _HEAT[below] * (1 - rest) + _HEAT[below + 1] * rest
    return np.ascontiguousarray(colours.astype(np.uint8).transpose(1, 0, 2)[::-1])


def _binned(values: np.ndarray, bins: int, axis: int) -> np.ndarray:
    """Means over `bins` even stretches of `axis`; values are repeated where there are too few."""
    edges = np.linspace(0, values.shape[axis], bins + 1)
    starts = np.minimum(edges[:-1].astype(int), values.shape[axis] - 1)
    pieces = [
        values.take(range(start, max(start + 1, int(end))), axis=axis).mean(axis=axis)
        for start, end in zip(starts, edges[1:], strict=True)
    ]
    return np.stack(pieces, axis=axis)


def contact_strip(frames: np.ndarray, count: int = 4) -> np.ndarray:
    """`count` frames of uint8 [T, H, W, 3], evenly spaced, side by side."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.concatenate([frames[i] for i in chosen], axis=1)


def block_text(picture: np.ndarray, columns: int, rows: int) -> Any:
    """A picture uint8 [H, W, 3] as rich text of half blocks that fits into `columns` x `rows` characters."""
    from PIL import Image
    from rich.text import Text

    height, width = picture.shape[:2]
    scale = min(columns / width, 2 * rows / height)
    size = (max(1, round(width * scale)), max(2, round(height * scale / 2) * 2))
    small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
    text = Text(no_wrap=True)
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for (r, g, b), (r2, g2, b2) in zip(upper, lower, strict=True):
            text.append("▀", style=f"rgb({r},{g},{b}) on rgb({r2},{g2},{b2})")
        text.append("\n")
    return text


@dataclass(frozen=True)
class Shown:
    """A segment made ready to be looked at: either `text`, or a `picture` and one line about the medium."""

    type: str
    text: str = ""
    line: str = ""
    picture: np.ndarray | None = None
    bad: str = ""
    data: bytes = b""


def show(segment: Segment, media_bytes: Callable[[Segment], bytes], limits: MediaLimits) -> Shown:
    """Decode a segment for a person's eyes; what is wrong with it is said in `bad`, never raised."""
    text = segment.text or ""
    if not has_medium(segment):
        return Shown(segment.type, text)
    try:
        data = media_bytes(segment)
        if segment.type == "speech" and holds_codes(data):
            frames, codes = decode_codes(data).shape
            line = f"{frames} codec frames of {codes} codes, {len(data) / 1000:,.1f} kB"
            return Shown(segment.type, text, line, data=data)
        size = f"{sniff(data)[0]}, {len(data) / 1000:,.1f} kB"
        if segment.type == "image":
            picture = decode_image(data, limits)
            return Shown(segment.type, text, f"{picture.shape[1]} x {picture.shape[0]}, {size}", picture, data=data)
        if segment.type == "video":
            video = decode_video(data, 2.0, limits)
            height, width = video.frames.shape[1:3]
            sound = "no sound" if video.audio is None else "sound heard" if segment.with_audio else "sound not heard"
            line = f"{width} x {height}, {len(video.frames) / video.fps:.1f} s, {sound}, {size}"
            return Shown(segment.type, text, line, contact_strip(video.frames), data=data)
        wave = decode_audio(data, limits=limits)
        return Shown(segment.type, text, f"{len(wave) / 16_000:.2f} s, {size}", spectrogram(wave), data=data)
    except BadSample as error:
        return Shown(segment.type, text, bad=str(error))


def sample_panel(sample: Sample, place: tuple[str, int], shown: Iterable[list[Shown]], width: int) -> Any:
    """One sample as a rich panel. `shown`: for each message its segments, see `show`."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    def line(text: str, style: str = "") -> Text:
        return Text(printable(text, keep="\n\t"), style=style)

    lines: list[Any] = []
    for message, segments in zip(sample.messages, shown, strict=True):
        lines.append(line(message.role, "bold cyan"))
        for part in segments:
            if part.bad:
                lines.append(line(f"  [{part.type}] {part.bad}", "bold red"))
            elif part.line:
                lines.append(line(f"  [{part.type}] {part.line}", "dim"))
            if part.picture is not None:
                rows = 6 if part.type in ("audio", "speech") else 12
                lines.append(block_text(part.picture, min(72, width - 6), rows))
            if part.text:
                lines.append(line("  " + (part.text if len(part.text) <= 2000 else part.text[:2000] + " ...")))
    return Panel(
        Group(*lines),
        title=Text(printable(sample.id), style="bold"),
        subtitle=Text(printable(_facts(sample, place))),
        title_align="left",
        subtitle_align="left",
    )


def _facts(sample: Sample, place: tuple[str, int], *more: str) -> str:
    """Where a sample lies and what it is, on one line, with `more` before the rest."""
    facts = [*more, sample.task, sample.split, " > ".join(sample.languages), sample.concept, sample.licence]
    return " · ".join(fact for fact in (f"{place[0].rpartition('/')[2]} row {place[1]}", *facts) if fact)


# Formats that browsers know, and their MIME types.
_PICTURES = {name: f"image/{name}" for name in ("png", "jpeg", "webp", "gif")}
_SOUNDS = {"wav": "audio/wav", "ogg": "audio/ogg", "mp3": "audio/mpeg", "flac": "audio/flac"}


def data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def browser_media(part: Shown) -> dict[str, str]:
    """Data URIs that browsers play: `image`, `audio` or `video`, and `spectrogram` or `strip`. A format that they do
    not know is written anew as PNG, WAV or MP4."""
    if part.picture is None:
        return {}
    name = sniff(part.data)[0]
    if part.type == "image":
        data = part.data if name in _PICTURES else encode_image(part.picture)
        return {"image": data_uri(data, _PICTURES.get(name, "image/png"))}
    picture = data_uri(encode_image(part.picture), "image/png")
    if part.type == "video":
        data = part.data
        if name != "mp4":
            video = decode_video(data, 8.0)
            frames = video.frames[:, : video.frames.shape[1] // 2 * 2, : video.frames.shape[2] // 2 * 2]
            data = encode_video(frames, video.fps, video.audio)
        return {"video": data_uri(data, "video/mp4"), "strip": picture}
    data = part.data if name in _SOUNDS else encode_audio(decode_audio(part.data), 16_000, "wav")
    return {"audio": data_uri(data, _SOUNDS.get(name, "audio/wav")), "spectrogram": picture}


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
 :root { color-scheme: light dark; --line: #8884; --soft: #8882; }
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
 article { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; padding: .5rem 1rem; }
 h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
 .facts, .line { color: gray; font-size: .85rem; }
 .role { font-size: .8rem; font-weight: 600; margin-top: .5rem; }
 .segment { background: var(--soft); border-radius: 6px; margin: .25rem 0; padding: .4rem .6rem; overflow-x: auto; }
 .text { white-space: pre-wrap; overflow-wrap: anywhere; }
 .bad { color: #c22; font-weight: 600; }
 img, video { display: block; max-width: 100%; max-height: 20rem; }
 img.spectrogram { width: 100%; height: 8rem; image-rendering: auto; }
 audio { width: 100%; }
</style>
<h1>{{ title }}</h1>
<p>{{ samples | length }} of {{ total }} samples.</p>
{% for sample in samples %}
<article>
 <h2>{{ sample.id }}</h2>
 <div class="facts">{{ sample.facts }}</div>
 {% for role, segments in sample.messages %}
 <div class="role">{{ role }}</div>
 {% for part in segments %}
 <div class="segment">
  {% if part.bad %}<div class="bad">{{ part.type }}: {{ part.bad }}</div>{% endif %}
  {% if part.image %}<img src="{{ part.image }}" alt="{{ part.type }}" loading="lazy">{% endif %}
  {% if part.video %}<video src="{{ part.video }}" controls preload="metadata"></video>{% endif %}
  {% if part.strip %}<img src="{{ part.strip }}" alt="frames" loading="lazy">{% endif %}
  {% if part.spectrogram %}<img class="spectrogram" src="{{ part.spectrogram }}" alt="spectrogram">{% endif %}
  {% if part.audio %}<audio src="{{ part.audio }}" controls preload="none"></audio>{% endif %}
  {% if part.line %}<div class="line">{{ part.type }}: {{ part.line }}</div>{% endif %}
  {% if part.text %}<div class="text" dir="auto">{{ part.text }}</div>{% endif %}
 </div>
 {% endfor %}{% endfor %}
</article>
{% endfor %}
</html>
"""


def html_page(title: str, total: int, rows: Iterable[tuple[Sample, tuple[str, int], list[list[Shown]]]]) -> str:
    """Samples as one HTML page that needs no other file: pictures, players, spectrograms. All text is escaped."""
    import jinja2

    samples = []
    for sample, place, shown in rows:
        messages = [
            (message.role, [vars(part) | browser_media(part) for part in segments])
            for message, segments in zip(sample.messages, shown, strict=True)
        ]
        facts = _facts(sample, place, sample.source, sample.modality)
        samples.append({"id": sample.id, "facts": facts, "messages": messages})
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return page.render(title=title, total=total, samples=samples)
