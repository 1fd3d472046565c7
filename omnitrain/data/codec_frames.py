"""Codec frames: how they are kept, and how a spoken answer becomes what the Talker learns.

Codes are kept where the recording was: a `speech` segment's medium is then a small safetensors file with a tensor
`codes` [F, Q] and, in its metadata, the codec's fingerprint. So everything that moves media moves codes too. Where a
frozen Thinker was asked beforehand, a tensor `heard` [H, D] beside them holds its hidden states at the H positions of
media before the answer, and the metadata its fingerprint. A tensor `rejected` [F', Q] is another take of the answer,
to which `codes` is preferred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from omnitrain.data.batch import IGNORE, EncodedSample, TalkerDocument
from omnitrain.data.chat import ChatTokenizer, RenderedChat
from omnitrain.data.sample import BadSample, Message, Sample, Segment, has_medium
from omnitrain.data.talker_layout import SpeechTokens, SpokenWords, in_user_turns, talker_layout, user_turns
from omnitrain.vocabulary import TEXT, SpecialCodes

SILENT = ("think", "tool_call", "tool_response")
"""Markup around what is written, but never said."""

_CODEC, _THINKER = "omnitrain.codec", "omnitrain.thinker"


def encode_codes(
    codes: np.ndarray,
    codec: str,
    heard: Tensor | None = None,
    thinker: str = "",
    rejected: np.ndarray | None = None,
) -> bytes:
    """The file for codes [F, Q] of the codec with this fingerprint.

    Args:
        heard: [H, D], in the precision in which the Thinker with the fingerprint `thinker` computed them.
        rejected: [F', Q], a take that is worse.
    """
    takes = {"codes": codes} if rejected is None else {"codes": codes, "rejected": rejected}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(take, dtype=np.uint16)) for name, take in takes.items()}
    metadata = {_CODEC: codec}
    if heard is not None:
        tensors["heard"] = heard.contiguous()
        metadata[_THINKER] = thinker
    return save(tensors, metadata=metadata)


def holds_codes(data: bytes) -> bool:
    """Whether a medium is such a file, by its first bytes (no recording begins like it)."""
    return _header(data).startswith(b"{")


def _header(data: bytes) -> bytes:
    """The JSON text of a safetensors file, whose length stands before it; empty for another file."""
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    return data[8 : 8 + size] if 0 < size <= len(data) - 8 else b""


class AnswerFile:
    """Such a file, read once for all that it holds.

    Raises BadSample: ``no_codes`` (a recording, or nothing that can be read).
    """

    def __init__(self, data: bytes) -> None:
        if not holds_codes(data):
            raise BadSample(
                "no_codes",
                "the speech segment holds a recording, not codec frames; write them with "
                "`omnitrain data encode CODEC_RUN SHARDS --out FOLDER`",
            )
        try:
            self.tensors = load(data)
            self._codes = self.tensors["codes"].numpy().astype(np.int64)
        except (SafetensorError, KeyError, ValueError) as error:
            raise BadSample("no_codes", f"the codec frames cannot be read: {error}") from error
        self.metadata: dict[str, str] = json.loads(_header(data)).get("__metadata__", {})

    def codes(self, codec: str | None = None) -> np.ndarray:
        """Codes int64 [F, Q]. BadSample ``other_codec`` if their fingerprint is not `codec`; None accepts any."""
        if codec is not None and self.metadata.get(_CODEC) != codec:
            raise BadSample(
                "other_codec",
                f"the codec frames are not those of codec {codec}; encode the recordings again with the codec that the "
                "Talker speaks through",
            )
        return self._codes

    def rejected(self) -> np.ndarray:
        """Codes int64 [F', Q] of the other take. BadSample ``no_pair`` if there is none."""
        if "rejected" not in self.tensors:
            raise BadSample(
                "no_pair", "the codec frames are one take; write pairs of takes with `omnitrain data pairs RUN SHARDS`"
            )
        return self.tensors["rejected"].numpy().astype(np.int64)

    def heard(self, thinker: str) -> np.ndarray:
        """Hidden states float32 [H, D] of the Thinker with this fingerprint, or BadSample: ``no_hidden_states``,
        ``other_thinker``."""
        if "heard" not in self.tensors:
            raise BadSample(
                "no_hidden_states",
                "the codec frames have no hidden states of the Thinker beside them; write them with "
                "`omnitrain data encode --thinker RUN_DIR`, or set module.cached_thinker=false",
            )
        if (found := self.metadata.get(_THINKER)) != thinker:
            raise BadSample(
                "other_thinker",
                f"the hidden states are those of Thinker {found}, not of {thinker}; encode the shards again with the "
                "Thinker that the Talker is trained on, or set module.cached_thinker=false",
            )
        return self.tensors["heard"].float().numpy()


def decode_codes(data: bytes, codec: str | None = None) -> np.ndarray:
    """Codes int64 [F, Q] from such a file: see `AnswerFile`."""
    return AnswerFile(data).codes(codec)


def heard_rows(encoded: EncodedSample, tokenizer: ChatTokenizer) -> list[np.ndarray]:
    """Positions of a chat at which the Talker reads the Thinker's hidden states: one array for every assistant message,
    of the media in the user's turns before it."""
    users = in_user_turns(encoded.input_ids, user_header(tokenizer)) & (encoded.token_types != TEXT)
    return [np.flatnonzero(users[:first]) for first, _ in target_runs(encoded.labels)]


def user_header(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Ids that begin a user's turn, ``<|im_start|>user``."""
    return (tokenizer.special_ids["<|im_start|>"], *_word(tokenizer, "user"))


@dataclass(frozen=True, kw_only=True)
class SpeechCodes(SpecialCodes):
    """What the layout of spoken answers needs to know of the Talker.

    Attributes:
        codebooks: codes of a frame.
        speakers: code of each voice; a sample's voice is its ``meta["voice"]``.
        codec: fingerprint of the codec whose frames are learnt; None: any.
        thinker: fingerprint of the frozen Thinker whose hidden states lie beside the frames; None: they are not read.
        default_voice: of samples that name none.
        frames_per_word: see `TalkerConfig`.
        pairs: each answer is two documents, the preferred take and the other.
    """

    codebooks: int
    speakers: Mapping[str, int] = field(default_factory=dict)
    codec: str | None = None
    thinker: str | None = None
    default_voice: str | None = None
    frames_per_word: int = 1
    pairs: bool = False

    def tokens(self, tokenizer: ChatTokenizer) -> SpeechTokens:
        """With the ids of `tokenizer`."""
        special = tokenizer.special_ids
        return SpeechTokens(
            user_header=user_header(tokenizer),
            assistant_header=(special["<|im_start|>"], *tokenizer.encode("assistant\n")),
            tts_pad=special["<tts_pad>"],
            tts_bos=special["<tts_text_bos>"],
            tts_eos=special["<tts_text_eod>"],
            silent=tuple((special[f"<{name}>"], special[f"</{name}>"]) for name in SILENT),
            blank=tokenizer.blank_ids,
            frames_per_word=self.frames_per_word,
            **self.special_codes(),
        )

    def speaker(self, voice: str) -> int:
        """Code of a voice, or BadSample: ``unknown_voice``."""
        name = voice or self.default_voice or ""
        if name not in self.speakers:
            raise BadSample(
                "unknown_voice",
                f"voice {name!r} is none of {', '.join(self.speakers) or '(no voice is configured)'}; name the "
                "recording's voice in meta 'voice', and add it to model.talker.speakers",
            )
        return self.speakers[name]


def spoken_answers(
    sample: Sample,
    chat: RenderedChat,
    media_bytes: Callable[[Segment], bytes],
    codes: SpeechCodes,
    tokenizer: ChatTokenizer,
    *,
    merge: int,
    ids_per_second: float,
) -> tuple[TalkerDocument, ...]:
    """One document for every assistant message of `sample` with a recording, or two (`SpeechCodes.pairs`).

    Raises BadSample: see `AnswerFile`, `SpeechCodes.speaker` and `talker_layout`.
    """
    answers = [m for m in sample.messages if m.role == "assistant"]
    if not any(_recorded(message) for message in answers):
        return ()
    special = codes.tokens(tokenizer)
    documents = []
    for message, (first, end) in zip(answers, chat.answers, strict=True):
        segment = _recorded(message)
        if segment is None or chat.labels[first] == IGNORE:  # nothing of it is learnt (`ChatTokenizer.render`, loss_on)
            continue
        file = AnswerFile(media_bytes(segment))
        takes = [file.codes(codes.codec), *([file.rejected()] if codes.pairs else [])]
        header = first + 1 - len(special.assistant_header)  # the last id of the header predicts the first word
        asked = chat.input_ids[:header], chat.token_types[:header]
        before = user_turns(*asked, chat.spans, special=special, merge=merge, ids_per_second=ids_per_second)
        words = np.array(SpokenWords(special).take(chat.labels[first : end - 1]))  # without <|im_end|>
        speaker = codes.speaker(sample.meta.get("voice", ""))
        heard = None
        if codes.thinker is not None and before.is_media.any():
            heard = _heard(file, codes.thinker, int(before.is_media.sum()))
        for frames in takes:
            if frames.shape[1] < codes.codebooks:
                raise BadSample(
                    "speech_bad_codes",
                    f"frames have {frames.shape[1]} codes, the Talker says {codes.codebooks} (model.talker.codebooks)",
                )
            said = frames[:, : codes.codebooks]
            document = talker_layout(
                *before, words, said, special=special, speaker_code=speaker, may_end_early=codes.pairs
            )
            documents.append(document if heard is None else replace(document, heard=heard))
    return tuple(documents)


def _heard(file: AnswerFile, thinker: str, positions: int) -> np.ndarray:
    heard = file.heard(thinker)
    if len(heard) != positions:
        raise BadSample(
            "other_thinker",
            f"{len(heard)} hidden states for {positions} positions of media: the shards were encoded with other "
            "settings of data.vision or data.audio; encode them again",
        )
    return heard


def _recorded(message: Message) -> Segment | None:
    """The recording of an assistant message, or None."""
    segments = [s for s in message.segments if s.type == "speech" and has_medium(s)]
    if len(segments) > 1:
        raise BadSample("several_recordings", "an assistant message has several recordings; join them into one")
    return segments[0] if segments else None


def target_runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of every stretch of targets, one per assistant message."""
    is_target = np.concatenate([[False], labels != IGNORE, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(is_target))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _word(tokenizer: ChatTokenizer, role: str) -> Sequence[int]:
    """Ids of a role name where a newline follows. A vocabulary that joins the two gives the joint ids."""
    whole, alone = tokenizer.encode(f"{role}\n"), tokenizer.encode(role)
    return alone if whole[: len(alone)] == alone else whole
