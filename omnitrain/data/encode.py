"""One sample as numbers: media decoded, text tokenized, targets marked, TM-RoPE ids computed.

Nothing here is random: the same sample always gives the same numbers, which is what lets the stream keep positions
instead of data in its state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from omnitrain.data.batch import EncodedSample
from omnitrain.data.chat import ChatTokenizer, LossOn
from omnitrain.data.codec_frames import SpeechCodes, spoken_answers
from omnitrain.data.features import (
    AudioGeometry,
    VisionGeometry,
    image_patches,
    log_mel,
    log_mel_of_blocks,
    video_patches,
)
from omnitrain.data.media import MediaLimits, Video, audio_blocks, decode_image, decode_video
from omnitrain.data.positions import AudioSpan, AudioVideoSpan, ImageSpan, VideoSpan, audio_tokens, tm_rope_positions
from omnitrain.data.sample import MEDIA, BadSample, Sample, Segment


class _Medium(NamedTuple):
    """A decoded segment: the span of tokens that it takes, and its features."""

    span: AudioSpan | ImageSpan | VideoSpan | AudioVideoSpan
    mel: np.ndarray | None = None
    patches: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """`encoder(sample, media_bytes)` -> :class:`EncodedSample`.

    Args:
        audio, vision: geometry of mel frames and patches (numbers that must match the model's encoders).
        ids_per_second: TM-RoPE ids per second (Qwen3-Omni: 13).
        vocab_size: size of the model's embedding; a larger token id is ``token_out_of_range``. Default: no check.
        speech: how the Talker numbers codes and voices. None: a spoken answer is its text.
        thinking, skip_thoughts, loss_on: see `ChatTokenizer.render`.
        transcripts: also encode the conversation with the `text` of each recording in its place, for a teacher.
        augment: changes the waveform of a recording, (float32 [T], Hz) -> float32 [T'], before it becomes mel frames.
    """

    tokenizer: ChatTokenizer
    audio: AudioGeometry
    vision: VisionGeometry
    limits: MediaLimits
    ids_per_second: float = 13
    vocab_size: int | None = None
    speech: SpeechCodes | None = None
    thinking: bool = False
    skip_thoughts: bool = False
    loss_on: LossOn = "all"
    transcripts: bool = False
    augment: Callable[[np.ndarray, int], np.ndarray] | None = None

    def __call__(self, sample: Sample, media_bytes: Callable[[Segment], bytes]) -> EncodedSample:
        """Encode for training or for a loss: the whole conversation with its labels.

        Args:
            media_bytes: gives the encoded file bytes of a segment (`Source.media_bytes`).

        Raises BadSample: broken or oversized media; ``no_target`` if nothing in it is to be learnt;
        ``token_out_of_range``; ``tools_invalid``; ``text_not_utf8``; with `transcripts`, ``no_transcript``.
        """
        encoded = self._encode(sample, media_bytes, for_generation=False)
        if not (encoded.labels >= 0).any():
            raise BadSample("no_target", "no assistant message and no document text of two tokens: nothing to learn")
        if self.transcripts and any(segment.type == "audio" for segment in sample.segments):
            encoded = replace(encoded, read=self._encode(in_words(sample), media_bytes, for_generation=False))
        return encoded

    def encode_prompt(self, sample: Sample, media_bytes: Callable[[Segment], bytes]) -> EncodedSample:
        """Encode for generation: without a last assistant turn, ending in ``<|im_start|>assistant\\n``.
        Raises BadSample as above, except ``no_target``."""
        return self._encode(sample, media_bytes, for_generation=True)

    @torch.autocast("cpu", enabled=False)  # where a model is scored under autocast, media are read in fp32 all the same
    def _encode(
        self, sample: Sample, media_bytes: Callable[[Segment], bytes], *, for_generation: bool
    ) -> EncodedSample:
        left_out = for_generation and sample.messages and sample.messages[-1].role == "assistant"
        media = self._media(
            (segment, media_bytes(segment))  # one file at a time
            for message in (sample.messages[:-1] if left_out else sample.messages)
            for segment in message.segments
            if segment.type in MEDIA
        )
        spans = [medium.span for medium in media]
        geometry: Any = {"merge": self.vision.merge, "ids_per_second": self.ids_per_second}
        chat = self.tokenizer.render(
            sample.messages,
            spans,
            tools=_tools(sample),
            for_generation=for_generation,
            thinking=self.thinking,
            skip_thoughts=self.skip_thoughts,
            loss_on=self.loss_on,
            **geometry,
        )
        worst = int(chat.input_ids.max(initial=0))
        if self.vocab_size is not None and worst >= self.vocab_size:
            raise BadSample(
                "token_out_of_range",
                f"token id {worst} ({self.tokenizer.decode([worst], skip_special=False)!r}) does not fit the model's "
                f"vocabulary of {self.vocab_size}; use the tokenizer that the model was made for",
            )
        spoken = ()
        if self.speech is not None and not for_generation:
            spoken = spoken_answers(sample, chat, media_bytes, self.speech, self.tokenizer, **geometry)
        return EncodedSample(
            id=sample.id,
            source=sample.source,
            task=sample.task,
            modality=sample.modality,
            languages=sample.languages,
            input_ids=chat.input_ids,
            labels=chat.labels,
            token_types=chat.token_types,
            position_ids=tm_rope_positions(chat.spans, **geometry),
            mel=tuple(medium.mel for medium in media if medium.mel is not None),
            patches=tuple(medium.patches for medium in media if medium.patches is not None),
            grid_thw=np.array([s.grid_thw for s in spans if not isinstance(s, AudioSpan)], np.int64).reshape(-1, 3),
            target_bytes=chat.target_bytes,
            spoken=spoken,
            meta=sample.meta,
        )

    def _media(self, files: Iterable[tuple[Segment, bytes]]) -> list[_Medium]:
        if not self.audio.reference_padding:
            return [self._medium(segment, data) for segment, data in files]
        files = list(files)  # to be decoded twice: the longest recording is not known before
        longest = max((self._samples(segment, data) for segment, data in files), default=0)
        return [self._medium(segment, data, longest) for segment, data in files]

    def _samples(self, segment: Segment, data: bytes) -> int:
        if segment.type == "audio":
            return sum(map(len, self._recording(data)))
        sound = self._video(data).audio if segment.type == "video" and segment.with_audio else None
        return 0 if sound is None else len(sound)

    def _recording(self, data: bytes) -> Iterable[np.ndarray]:
        """Its waveform block after block, so that a long one is never whole in memory unless it is to be changed."""
        blocks = audio_blocks(data, self.audio.sample_rate, self.limits)
        return blocks if self.augment is None else [self.augment(np.concatenate([*blocks]), self.audio.sample_rate)]

    def _video(self, data: bytes) -> Video:
        return decode_video(data, self.vision.fps, self.limits, self.vision.sampling)

    def _medium(self, segment: Segment, data: bytes, longest: int = 0) -> _Medium:
        if segment.type == "audio":
            mel = log_mel_of_blocks(self._recording(data), self.audio, longest)
            return _Medium(AudioSpan(audio_tokens(len(mel), self.audio.chunk_frames)), mel)
        if segment.type == "image":
            patches, grid = image_patches(decode_image(data, self.limits), self.vision)
            return _Medium(ImageSpan(tuple(grid.tolist())), patches=patches)
        video = self._video(data)
        patches, grid = video_patches(video.frames, self.vision)
        place = tuple(grid.tolist()), self.vision.temporal_patch / video.fps
        if not segment.with_audio or video.audio is None:  # a silent clip is still a video
            return _Medium(VideoSpan(*place), patches=patches)
        mel = log_mel(video.audio, self.audio, longest)
        return _Medium(AudioVideoSpan(*place, audio_tokens(len(mel), self.audio.chunk_frames)), mel, patches)


def in_words(sample: Sample) -> Sample:
    """`sample` with the `text` of each audio segment in its place. Raises BadSample: ``no_transcript``."""

    def segment_in_words(segment: Segment) -> Segment:
        if segment.type != "audio":
            return segment
        if segment.text is None:
            detail = "an audio segment has no `text`; write its transcript there, or set data.transcripts=false"
            raise BadSample("no_transcript", detail)
        return Segment(type="text", text=segment.text)

    messages = (replace(m, segments=tuple(map(segment_in_words, m.segments))) for m in sample.messages)
    return replace(sample, messages=tuple(messages))


def _tools(sample: Sample) -> list[dict[str, Any]]:
    """Function signatures that the sample offers: ``meta["tools"]``, a JSON list of objects."""
    if "tools" not in sample.meta:
        return []
    try:
        tools = json.loads(sample.meta["tools"])
    except (ValueError, RecursionError) as error:
        raise BadSample("tools_invalid", f"meta 'tools' is no JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("tools_invalid", "meta 'tools' must be a JSON list of objects")
    return tools
