"""Text and ChatML: messages -> token ids, the loss mask, and the spans that positions are computed from.

One byte-level BPE serves every preset: small presets train their own (:func:`train_bpe`), full-size ones read Qwen's.
Both carry the same 33 special tokens, in Qwen's order, directly behind the BPE vocabulary (Qwen: ids 151643 to 151675).

Special tokens are written by the template alone. Text is always encoded by a tokenizer that does not know them, so a
caption that contains the characters ``<|im_end|>`` stays a caption. The one exception is what a model itself may write:
``<think>``, ``<tool_call>`` and their ends inside an *assistant* message become the tokens of that name.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from omnitrain.data.batch import IGNORE
from omnitrain.data.positions import (
    AudioSpan,
    AudioVideoSpan,
    ImageSpan,
    Span,
    TextSpan,
    VideoSpan,
    audio_video_order,
    vision_tokens,
)
from omnitrain.data.sample import BadSample, Message
from omnitrain.files import write_text
from omnitrain.vocabulary import AUDIO, IMAGE, TEXT, VIDEO

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>",
    "</tool_response>", "<think>", "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>",
    "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>",
)  # fmt: skip
"""Qwen3-Omni's special tokens in the order of their ids."""

MARKUP_TOKENS: tuple[str, ...] = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Special tokens that are part of what a reader should see: decoding keeps them."""

NO_THOUGHTS = "<think>\n\n</think>\n\n"
"""How a turn begins in which nothing is thought, of a model that thinks first."""

LossOn = Literal["all", "last"]

_ASSISTANT_MARKUP = re.compile("(<tool_call>|</tool_call>|<think>|</think>)")
_TEMPLATE_MARKUP = re.compile("(<tool_call>|</tool_call>|<tool_response>|</tool_response>)")

# How Qwen cuts text before BPE: English contractions, words with one leading mark, single digits, punctuation runs,
# line breaks, spaces.
PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation or document as tokens.

    Attributes:
        input_ids: int64 [n];  labels: int64 [n], shifted (``labels[i]`` is what position i predicts, or IGNORE)
        token_types: uint8 [n], TEXT / IMAGE / VIDEO / AUDIO
        spans: text and media spans in order, for `tm_rope_positions`; their lengths sum to n
        target_bytes: UTF-8 bytes that the target tokens stand for (special tokens count none)
        answers: (first, end) of the positions that predict each assistant message, ``<|im_end|>`` included
    """

    input_ids: np.ndarray
    labels: np.ndarray
    token_types: np.ndarray
    spans: tuple[Span, ...]
    target_bytes: int
    answers: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


class ChatTokenizer:
    """Byte-level BPE with Qwen's special tokens and chat template.

    Args:
        tokenizer: a byte-level BPE whose added tokens contain all of :data:`SPECIAL_TOKENS`.

    Raises ValueError: a special token is missing; the message names it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._full = tokenizer
        state = json.loads(tokenizer.to_str())
        added = {token["content"]: int(token["id"]) for token in state["added_tokens"]}
        missing = [name for name in SPECIAL_TOKENS if name not in added]
        if missing:
            raise ValueError(
                f"tokenizer lacks the special tokens {missing}; Qwen3-Omni's tokenizer has them, and "
                "train_bpe() or ChatTokenizer.from_dir() of a plain vocabulary adds them"
            )
        # Text is encoded without added tokens: data can never spell a special token.
        self._plain: Tokenizer = Tokenizer.from_str(json.dumps({**state, "added_tokens": [], "post_processor": None}))
        self.special_ids: dict[str, int] = {name: added[name] for name in SPECIAL_TOKENS}
        self._special_names = {index: name for name, index in added.items()}
        self.vocab_size: int = 1 + max(max(added.values()), max(self._plain.get_vocab().values()))
        # Byte-level BPE spells each byte as one character, so a token's length is its number of bytes.
        self._token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        space = {characters[byte] for characters in [_byte_characters()] for byte in b" \t\r\n"}
        self.blank_ids: frozenset[int] = frozenset(i for t, i in self._plain.get_vocab().items() if space.issuperset(t))
        """Tokens of nothing but space and line breaks."""
        for token, index in self._plain.get_vocab().items():
            self._token_bytes[index] = len(token)
        self._token_bytes[list(self._special_names)] = 0

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | Path) -> ChatTokenizer:
        """Read a ``tokenizer.json`` (`tokenizers` library) or a ``*.tiktoken`` rank file. Raises FileNotFoundError: no
        such file. ValueError: it is no byte-level BPE, or special tokens are missing."""
        path = Path(path)
        if path.is_dir():
            return cls.from_dir(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer file {path} does not exist")
        try:
            if path.suffix == ".tiktoken":
                return cls(_with_special_tokens(*_read_tiktoken(path)))
            return cls(Tokenizer.from_file(str(path)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # the tokenizers library raises bare Exception for malformed JSON
            raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from error

    @classmethod
    def from_dir(cls, folder: str | Path) -> ChatTokenizer:
        """Read ``tokenizer.json``, else ``vocab.json`` + ``merges.txt``, else one ``*.tiktoken`` file in `folder`.
        Raises FileNotFoundError: none of these is there."""
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            return cls.from_file(folder / "tokenizer.json")
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line[:9] != "#version:") if b]
            return cls(_with_special_tokens(vocab, merges))
        ranks = sorted(folder.glob("*.tiktoken"))
        if ranks:
            return cls.from_file(ranks[0])
        raise FileNotFoundError(f"{folder}: neither tokenizer.json, nor vocab.json + merges.txt, nor *.tiktoken")

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``; `from_file` and `transformers.PreTrainedTokenizerFast` read it."""
        write_text(path, self.to_json())

    def to_json(self) -> str:
        """The content of its ``tokenizer.json``."""
        return self._full.to_str(pretty=False)

    # --- text ----------------------------------------------------------------------------------------------------

    def id_of(self, name: str) -> int:
        """Id of a special token, e.g. ``"<|im_end|>"``."""
        return self.special_ids[name]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, special ones among them, by its spelling."""
        return self._full.get_vocab()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return (self.special_ids["<|im_end|>"], self.special_ids["<|endoftext|>"])

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. Strings that look like special tokens stay text. Raises BadSample: ``text_not_utf8``
        for lone surrogates, which no UTF-8 text contains."""
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise BadSample("text_not_utf8", f"text cannot be written as UTF-8: {error}") from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. With `skip_special`, special tokens vanish, except the markup a reader should see
        (:data:`MARKUP_TOKENS`); without it every one is spelled out. Ids outside the vocabulary vanish."""
        pieces: list[str] = []
        run: list[int] = []
        for index in (int(i) for i in ids):
            name = self._special_names.get(index)
            if name is None:
                run.append(index)
                continue
            if not skip_special or name in MARKUP_TOKENS:
                pieces += [self._plain.decode(run, skip_special_tokens=False), name]
                run = []
        return "".join([*pieces, self._plain.decode(run, skip_special_tokens=False)])

    def n_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes that `ids` stand for; special tokens count none."""
        return int(self._token_bytes[ids].sum())

    # --- conversations -------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        media: Sequence[Span] = (),
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        for_generation: bool = False,
        thinking: bool = False,
        skip_thoughts: bool = False,
        loss_on: LossOn = "all",
        merge: int = 2,
        ids_per_second: float = 13,
    ) -> RenderedChat:
        """Qwen's ChatML, token by token.

        Targets are what an assistant says and the ``<|im_end|>`` that ends it; of a document, every token and the
        final ``<|endoftext|>``. Media are read, never predicted. A `speech` segment stands as its transcript.

        Args:
            messages: the conversation. A first message of role `system` is the persona. Consecutive `tool` messages
                share one user turn, each in ``<tool_response>``. What the assistant thought before a later question
                of the user is left out, as the public template does.
            media: one span per image, audio and video segment, in order.
            tools: function signatures (JSON objects), announced in the system turn.
            for_generation: leave out a last assistant turn and end with the opening of one
                (a document: without its end).
            thinking: of a model that thinks first: a last answer without thoughts begins with empty ones, as the public
                template writes it.
            skip_thoughts: for generation: the answer opens with empty thoughts, so that a model that thinks first does
                not (the public template's ``enable_thinking=False``).
            loss_on: targets are "all" that an assistant says, or the "last": what it says, and calls, after the user's
                last question.
            merge: patches per token side; ids_per_second: TM-RoPE ids per second (order of audio-in-video tokens).

        Raises ValueError: `media` does not match the segments.
        """
        build = _Builder(self, merge=merge, ids_per_second=ids_per_second)
        turns = list(messages)
        spans = iter(media)
        is_chat = any(message.role != "document" for message in turns) or not turns
        if for_generation and turns and turns[-1].role == "assistant":
            turns.pop()
        if tools:
            build.special("<|im_start|>")
            build.text("system\n")
            if turns and turns[0].role == "system":
                self._contents(build, turns.pop(0), spans)
                build.text("\n\n")
            signatures = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            build.text(_TOOLS_BEFORE)
            build.text(signatures)
            build.text(_TOOLS_AFTER, markup=_TEMPLATE_MARKUP)
            build.special("<|im_end|>")
            build.text("\n")
        for i, message in enumerate(turns):
            if message.role == "document":
                self._contents(build, message, spans, target=True)
                if not for_generation:
                    build.special("<|endoftext|>", target=True)
                continue
            if message.role == "tool":
                if i == 0 or turns[i - 1].role != "tool":
                    build.special("<|im_start|>")
                    build.text("user")
                build.text("\n")
                build.special("<tool_response>")
                build.text("\n")
                self._contents(build, message, spans)
                build.text("\n")
                build.special("</tool_response>")
                if i + 1 < len(turns) and turns[i + 1].role == "tool":
                    continue
                build.special("<|im_end|>")
                build.text("\n")
                continue
            answer = message.role == "assistant"
            earlier = answer and any(later.role == "user" for later in turns[i:])
            if earlier:
                message = _without_thought(message)
            target = answer and not (earlier and loss_on == "last")
            build.special("<|im_start|>")
            build.text(f"{message.role}\n")
            first = 0
            if answer:
                build.flush()  # the header is tokenized as a prompt would be, apart from the answer
                first = len(build.ids) - 1
                if thinking and i + 1 == len(turns) and not any("</think>" in (s.text or "") for s in message.segments):
                    build.text(NO_THOUGHTS, target=True, markup=_ASSISTANT_MARKUP)
            self._contents(build, message, spans, target=target, markup=_ASSISTANT_MARKUP if answer else None)
            build.special("<|im_end|>", target=target)
            if answer:
                build.answers.append((first, len(build.ids) - 1))
            build.text("\n")
        if for_generation and is_chat:
            build.special("<|im_start|>")
            build.text("assistant\n")
            if skip_thoughts:
                build.flush()
                build.text(NO_THOUGHTS, markup=_ASSISTANT_MARKUP)
        if left := sum(1 for _ in spans):
            raise ValueError(f"{left} media spans more than image, audio and video segments")
        return build.finish()

    @staticmethod
    def _contents(
        build: _Builder,
        message: Message,
        spans: Iterable[Span],
        *,
        target: bool = False,
        markup: re.Pattern[str] | None = None,
    ) -> None:
        for segment in message.segments:
            if segment.type in ("text", "speech"):
                build.text(segment.text or "", target=target, markup=markup)
                continue
            span = next(iter(spans), None)
            if span is None:
                raise ValueError(f"no media span for a {segment.type} segment")
            build.media(span)


def _without_thought(message: Message) -> Message:
    """An assistant's turn from behind its last ``</think>`` on."""
    for place, segment in reversed(list(enumerate(message.segments))):
        _, end, said = (segment.text or "").rpartition("</think>")
        if end:
            return replace(message, segments=(replace(segment, text=said.lstrip("\n")), *message.segments[place + 1 :]))
    return message


_PLACEHOLDERS = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", AUDIO: "<|audio_pad|>"}


class _Builder:
    """Collects tokens, their types, which of them are targets, and the spans between text and media."""

    def __init__(self, tokenizer: ChatTokenizer, *, merge: int, ids_per_second: float) -> None:
        self.tokenizer, self.merge, self.ids_per_second = tokenizer, merge, ids_per_second
        self.ids: list[int] = []
        self.types: list[int] = []
        self.targets: list[bool] = []
        self.spans: list[Span] = []
        self.answers: list[tuple[int, int]] = []
        self._text: list[str] = []
        self._text_target = False
        self._text_tokens = 0  # text tokens since the last medium

    def text(self, text: str, *, target: bool = False, markup: re.Pattern[str] | None = None) -> None:
        if markup is not None:
            for piece in markup.split(text):
                if markup.fullmatch(piece):
                    self.special(piece, target=target)
                else:
                    self.text(piece, target=target)
            return
        # Neighbouring text is tokenized as one string, as it would be in the rendered template.
        if target != self._text_target:
            self.flush()
            self._text_target = target
        self._text.append(text)

    def flush(self) -> None:
        text, self._text = "".join(self._text), []
        if text:
            self._extend(self.tokenizer.encode(text), self._text_target)

    def special(self, name: str, *, target: bool = False) -> None:
        self.flush()
        self._extend([self.tokenizer.special_ids[name]], target)

    def _extend(self, ids: list[int], target: bool) -> None:
        self.ids += ids
        self.types += [TEXT] * len(ids)
        self.targets += [target] * len(ids)
        self._text_tokens += len(ids)

    def _close_text(self) -> None:
        if self._text_tokens:
            self.spans.append(TextSpan(self._text_tokens))
            self._text_tokens = 0

    def media(self, span: Span) -> None:
        """Start tokens, one placeholder per token of `span`, end tokens."""
        heard = seen = False
        match span:
            case AudioSpan():
                heard, kinds = True, [AUDIO] * span.n
            case ImageSpan():
                seen, kinds = True, [IMAGE] * vision_tokens(span.grid_thw, self.merge)
            case VideoSpan():
                seen, kinds = True, [VIDEO] * vision_tokens(span.grid_thw, self.merge)
            case AudioVideoSpan():
                order = audio_video_order(
                    span.grid_thw, span.seconds_per_grid, span.n_audio, self.merge, self.ids_per_second
                )
                heard = seen = True
                kinds = [VIDEO if is_video else AUDIO for is_video in order]
            case _:
                raise TypeError(f"{span!r} is no media span")
        if seen:
            self.special("<|vision_start|>")
        if heard:
            self.special("<|audio_start|>")
        self.flush()
        self._close_text()
        pads = {kind: self.tokenizer.special_ids[name] for kind, name in _PLACEHOLDERS.items()}
        self.ids += [pads[kind] for kind in kinds]
        self.types += kinds
        self.targets += [False] * len(kinds)
        self.spans.append(span)
        if heard:
            self.special("<|audio_end|>")
        if seen:
            self.special("<|vision_end|>")

    def finish(self) -> RenderedChat:
        self.flush()
        self._close_text()
        ids = np.array(self.ids, dtype=np.int64)
        targets = np.array(self.targets, dtype=bool)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        labels[:-1][targets[1:]] = ids[1:][targets[1:]]
        return RenderedChat(
            input_ids=ids,
            labels=labels,
            token_types=np.array(self.types, dtype=np.uint8),
            spans=tuple(self.spans),
            target_bytes=self.tokenizer.n_bytes(labels[labels != IGNORE]),
            answers=tuple(self.answers),
        )


# --- making tokenizers ---------------------------------------------------------------------------------------------


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens(
        [AddedToken(name, special=name not in MARKUP_TOKENS, normalized=False) for name in SPECIAL_TOKENS]
    )
    return tokenizer


def _with_special_tokens(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    return _add_special_tokens(_byte_level(models.BPE(vocab=vocab, merges=merges)))


def train_bpe(texts: Iterable[str], vocab_size: int) -> ChatTokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016) on `texts`, with Qwen's pre-tokenizer and NFC.

    Deterministic: the same texts in any order give the same tokenizer. `vocab_size` includes the 256 bytes and the 33
    special tokens, which take the last ids. If the texts hold fewer merges than fit, the vocabulary is smaller
    (`.vocab_size` says how large). Raises ValueError: `vocab_size` leaves no room for bytes and special tokens.
    """
    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 256:
        raise ValueError(f"vocab_size {vocab_size} is below {256 + len(SPECIAL_TOKENS)} (bytes and special tokens)")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return ChatTokenizer(_add_special_tokens(tokenizer))


def _byte_characters() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019): printable Latin-1 bytes
    stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _read_tiktoken(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a rank file (lines of base64 bytes and rank).

    A rank file names the result of each merge, not its two parts. The parts of a token are what the merges of lower
    rank make of its bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"line {number} is not 'BASE64 RANK'") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"no rank for {len(missing)} of the 256 bytes, e.g. {missing[0]}")
    characters = _byte_characters()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(
                range(len(parts) - 1),
                key=lambda i: (r if (r := ranks.get(parts[i] + parts[i + 1], rank)) < rank else len(ranks), i),
            )
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                raise ValueError(f"token {token!r} (rank {rank}) cannot be made by merges of lower rank")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((spell(parts[0]), spell(parts[1])))
    return {spell(token): rank for token, rank in ranks.items()}, merges
