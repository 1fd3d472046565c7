"""One sample as numbers: media decoded, text tokenized, targets marked, TM-RoPE ids computed.

Row -> `media` (bytes -> arrays) -> `features` (mel frames, patches) -> `chat` (tokens, targets) -> `positions`.
Nothing here is random: the same sample always gives the same numbers, which is what lets the stream keep positions
instead of data in its state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from omnitrain.data.batch import EncodedSample, TalkerDocument
from omnitrain.data.chat import ChatTokenizer, RenderedChat
from omnitrain.data.codec_frames import SpeechCodes, spoken_answers
from omnitrain.data.features import AudioGeometry, VisionGeometry, image_patches, log_mel, video_patches
from omnitrain.data.media import MediaLimits, decode_audio, decode_image, decode_video
from omnitrain.data.positions import (
    AudioSpan,
    AudioVideoSpan,
    ImageSpan,
    Span,
    VideoSpan,
    audio_tokens,
    tm_rope_positions,
)
from omnitrain.data.sample import MEDIA, BadSample, Sample, Segment


@dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """`encoder(sample, media_bytes)` -> :class:`EncodedSample`.

    Args:
        tokenizer: text and chat template.
        audio, vision: geometry of mel frames and patches (numbers that must match the model's encoders).
        limits: largest pictures, longest recordings and so on that are accepted.
        ids_per_second: TM-RoPE ids per second (Qwen3-Omni: 13).
        vocab_size: size of the model's embedding; a larger token id is ``token_out_of_range``. Default: no check.
        speech: how the Talker numbers codes and voices. None: a spoken answer is its text.
    """

    tokenizer: ChatTokenizer
    audio: AudioGeometry
    vision: VisionGeometry
    limits: MediaLimits
    ids_per_second: float = 13
    vocab_size: int | None = None
    speech: SpeechCodes | None = None

    def __call__(self, sample: Sample, media_bytes: Callable[[Segment], bytes]) -> EncodedSample:
        """Encode for training or for a loss: the whole conversation with its labels.

        Args:
            media_bytes: gives the encoded file bytes of a segment (`Source.media_bytes`).

        Raises:
            BadSample: broken or oversized media; ``no_target`` if nothing in it is to be learnt;
                ``token_out_of_range``; ``tools_invalid``; ``text_not_utf8``.
        """
        encoded = self._encode(sample, media_bytes, for_generation=False)
        if not (encoded.labels >= 0).any():
            raise BadSample("no_target", "no assistant message and no document text of two tokens: nothing to learn")
        return encoded

    def encode_prompt(self, sample: Sample, media_bytes: Callable[[Segment], bytes]) -> EncodedSample:
        """Encode for generation: without a last assistant turn, ending in ``<|im_start|>assistant\\n``.

        Raises:
            BadSample: as above, except ``no_target``.
        """
        return self._encode(sample, media_bytes, for_generation=True)

    def _encode(
        self, sample: Sample, media_bytes: Callable[[Segment], bytes], *, for_generation: bool
    ) -> EncodedSample:
        mel: list[np.ndarray] = []
        patches: list[np.ndarray] = []
        grids: list[tuple[int, int, int]] = []
        spans: list[Span] = []
        left_out = for_generation and sample.messages and sample.messages[-1].role == "assistant"
        for message in sample.messages[:-1] if left_out else sample.messages:
            for segment in message.segments:
                if segment.type in MEDIA:
                    spans.append(self._medium(segment, media_bytes(segment), mel, patches, grids))
        chat = self.tokenizer.render(
            sample.messages,
            spans,
            tools=_tools(sample),
            for_generation=for_generation,
            merge=self.vision.merge,
            ids_per_second=self.ids_per_second,
        )
        if self.vocab_size is not None and len(chat) and int(chat.input_ids.max()) >= self.vocab_size:
            worst = int(chat.input_ids.max())
            raise BadSample(
                "token_out_of_range",
                f"token id {worst} ({self.tokenizer.decode([worst], skip_special=False)!r}) does not fit the model's "
                f"vocabulary of {self.vocab_size}; use the tokenizer that the model was made for",
            )
        return EncodedSample(
            id=sample.id,
            source=sample.source,
            task=sample.task,
            modality=sample.modality,
            languages=sample.languages,
            input_ids=chat.input_ids,
            labels=chat.labels,
            token_types=chat.token_types,
            position_ids=tm_rope_positions(chat.spans, merge=self.vision.merge, ids_per_second=self.ids_per_second),
            mel=tuple(mel),
            patches=tuple(patches),
            grid_thw=np.array(grids, dtype=np.int64).reshape(-1, 3),
            target_bytes=chat.target_bytes,
            spoken=self._spoken(sample, chat, media_bytes) if not for_generation else (),
        )

    def _spoken(
        self, sample: Sample, chat: RenderedChat, media_bytes: Callable[[Segment], bytes]
    ) -> tuple[TalkerDocument, ...]:
        if self.speech is None:
            return ()
        return spoken_answers(
            sample,
            chat,
            media_bytes,
            self.speech,
            self.tokenizer,
            merge=self.vision.merge,
            ids_per_second=self.ids_per_second,
        )

    def _medium(
        self,
        segment: Segment,
        data: bytes,
        mel: list[np.ndarray],
        patches: list[np.ndarray],
        grids: list[tuple[int, int, int]],
    ) -> Span:
        """Decode one segment, append its features, and say which span of tokens it takes."""
        if segment.type == "audio":
            mel.append(log_mel(decode_audio(data, self.audio.sample_rate, self.limits), self.audio))
            return AudioSpan(audio_tokens(len(mel[-1]), self.audio.chunk_frames))
        if segment.type == "image":
            features, grid = image_patches(decode_image(data, self.limits), self.vision)
            patches.append(features)
            grids.append(_grid(grid))
            return ImageSpan(grids[-1])
        video = decode_video(data, self.vision.fps, self.limits)
        features, grid = video_patches(video.frames, self.vision)
        patches.append(features)
        grids.append(_grid(grid))
        seconds_per_grid = self.vision.temporal_patch / video.fps
        if not segment.with_audio or video.audio is None:  # a silent clip is still a video
            return VideoSpan(grids[-1], seconds_per_grid)
        mel.append(log_mel(video.audio, self.audio))
        n_audio = audio_tokens(len(mel[-1]), self.audio.chunk_frames)
        return AudioVideoSpan(grids[-1], seconds_per_grid, n_audio)


def _grid(grid: np.ndarray) -> tuple[int, int, int]:
    t, h, w = (int(n) for n in grid)
    return t, h, w


def _tools(sample: Sample) -> list[dict[str, Any]]:
    """Function signatures that the sample offers: ``meta["tools"]``, a JSON list of objects."""
    if "tools" not in sample.meta:
        return []
    try:
        tools = json.loads(sample.meta["tools"])
    except json.JSONDecodeError as error:
        raise BadSample("tools_invalid", f"meta 'tools' is no JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("tools_invalid", "meta 'tools' must be a JSON list of objects")
    return tools
