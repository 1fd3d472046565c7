"""Spoken answers, streamed: text and sound come out while the answer is still being thought (report sections 2.4, 2.5).

    session = SpeechSession(model, encoder, SpeechOptions(voice="ethan"))
    for event in session.answer(Message(role="user", segments=(...))): ...     # see docs/streaming.md

One round makes one frame:

    Thinker, if the Talker's next word is not written yet -> Talker: codebook 0 -> MTP: the others -> Code2Wav: 80 ms

So sound starts at the first word, and the codes are those that the finished text would have given: frame f is predicted
from the words 0 .. f, however far the Thinker has got. The Talker leaves the system prompt out, so that its voice does
not depend on the persona. Answers are rows of packed tensors with a cache each: any number can share a round
(`SpeechBatch`), and each gets what it gets alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from omnitrain.data.batch import EncodedSample, PackedBatch, SpokenAnswers
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.codec_frames import SpeechCodes
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.talker_layout import (
    SpeechTokens,
    SpokenWords,
    UserTurns,
    in_user_turns,
    talker_layout,
    word_of_frame,
)
from omnitrain.generation.cache import DocumentKVCache, JoinedKVCache
from omnitrain.generation.guides import AnswerGuide, guided
from omnitrain.generation.sampling import Sampling
from omnitrain.generation.text import occurring, passes, read_prompts, step
from omnitrain.models.code2wav import Code2Wav, Code2WavState, join_states, split_state
from omnitrain.models.omni import OmniModel
from omnitrain.models.talker import TalkerInputs
from omnitrain.vocabulary import TEXT


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """Whole characters of the answer's text. `ids`: their tokens.  `seconds`: since the answer was asked for."""

    text: str
    ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AudioPiece:
    """One frame of sound.

    wav: float32 [1920], 80 ms at 24 kHz; with `trim="public"` the first one is shorter (docs/streaming.md).
    codes: int64 [Q], what it was decoded from.  frame: its number, from 0.  seconds: since the answer was asked for.
    """

    wav: np.ndarray
    codes: np.ndarray
    frame: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end. reason: "end" (the Talker ended by itself), "max_frames", "interrupted", or "silent" (there was no text
    to speak)."""

    reason: str
    seconds: float


Event = TextPiece | AudioPiece | Done

EditText = Callable[[list[int], bool], list[int]]
"""Stands between Thinker and Talker: called with each new token that may be said (`data.talker_layout.SpokenWords`) as
it is written, and with no token and True at the text's end; returns the tokens to be spoken now. It may hold tokens
back, drop them or add others."""

GREEDY = Sampling()
CODES = Sampling(temperature=0.9, top_k=50, repetition_penalty=1.05)
RESIDUALS = Sampling(temperature=1.0, top_k=50, top_p=0.8)
"""How the public model samples codebook 0 and the other codebooks."""


@dataclass(frozen=True, kw_only=True)
class SpeechOptions:
    """How one answer is made.

    Attributes:
        voice: a name in `model.config.talker.speakers`, upper case or lower.
        text, codes, residuals: sampling of the text, of codebook 0 and of the other codebooks. The repetition penalty
            of `codes` is over the codes of codebook 0 of this answer, that of `residuals` is ignored.
        max_new_tokens: longest text, the token that ends it included. That one is not spoken, be it the end of the text
            or where it was cut off: the public model does not read it any more.
        max_frames: longest sound; 12.5 frames are a second.
        prefill_chunk: prompts are read so many positions at a time (less memory, the same result). None: at once.
        frames_per_piece: frames that are decoded together, after the first, which is decoded at once. More cost less
            each (Code2Wav reads its weights once for all), but are heard when the last is there. Several numbers, as
            (2, 4): of the second piece, the third, ..., the last number of all others: a listener never waits if a
            frame is made in half the time that it lasts. The same samples.
        seed: text and codes draw from generators of their own, so the result does not depend on who is faster.
        edit_text: see `EditText`.
        thinking_budget: at most so many tokens of thoughts, which nobody hears, then their end. None: no limit.
    """

    voice: str
    text: Sampling = GREEDY
    codes: Sampling = CODES
    residuals: Sampling = RESIDUALS
    max_new_tokens: int = 512
    max_frames: int = 1500
    prefill_chunk: int | None = None
    frames_per_piece: int | tuple[int, ...] = 1
    seed: int = 0
    edit_text: EditText | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_frames", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if min(self.later_pieces, default=0) < 1:
            raise ValueError(f"frames_per_piece is {self.frames_per_piece}; it must be at least 1")

    @property
    def later_pieces(self) -> tuple[int, ...]:
        """`frames_per_piece` as a tuple."""
        return (self.frames_per_piece,) if isinstance(self.frames_per_piece, int) else tuple(self.frames_per_piece)


@dataclass(frozen=True)
class Speech:
    """wav: float32 [samples] at 24 kHz.  codes: int64 [F, Q].  hit_limit: whether `max_frames` cut it off."""

    wav: np.ndarray
    codes: np.ndarray
    hit_limit: bool


@dataclass(eq=False)
class Answer:
    """One answer while it is being made (`Speaker.answer`, `ArrivingQuestion.finish`).

    prompt: the chat before it.  words: what the Talker reads, one a frame.  spoken: chooses them of what is written.
    guide: ends its thoughts.  frames_per_word: see `TalkerConfig`.
    written: the Thinker's tokens, without the one that ended it.  codes: frames so far, each [Q].  emitted: frames that
    were handed out.
    """

    options: SpeechOptions
    prompt: EncodedSample
    user: UserTurns
    speaker_code: int
    spoken: SpokenWords
    guide: AnswerGuide
    words: list[int]
    text_done: bool
    frames_per_word: int = 1
    interrupted: Callable[[], bool] = lambda: False
    written: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # tokens whose text is not out yet
    codes: list[Tensor] = field(default_factory=list)
    emitted: int = 0
    pieces: int = 0  # in which they were
    done: str | None = None
    begun: bool = False  # whether the Talker has read the prompt

    hidden: Tensor = field(init=False)  # [D] of the Thinker's last position that was read
    accept_hidden: Tensor | None = None  # [n, D], until the Talker has read the prompt
    position: Tensor = field(init=False)  # [], id of the Thinker's next token
    occurred: Tensor | None = None  # bool [V], for the text's repetition penalty
    talker_hidden: Tensor = field(init=False)  # [D], predicts the next frame
    talker_position: Tensor = field(init=False)  # []
    frame_embedding: Tensor = field(init=False)  # [D] of the last frame's codes
    said: Tensor = field(init=False)  # bool [codec_vocab], codes of codebook 0 so far
    wave: Code2WavState | None = None

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.thinker_cache = DocumentKVCache(2 * len(self.prompt) + 64)
        self.talker_cache = DocumentKVCache(len(self.user.ids) + 256)
        self.text_generator = torch.Generator().manual_seed(self.options.seed)
        self.code_generator = torch.Generator().manual_seed(self.options.seed + 2**32)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def lacks_word(self) -> bool:
        """Whether the word that the Talker reads next has still to be written."""
        return not self.text_done and self.next_word is not None and self.next_word >= len(self.words)

    @property
    def next_word(self) -> int | None:
        """Which of `words` the Talker reads next: the first with its header, then those of the frames."""
        return word_of_frame(len(self.codes) - 1, self.frames_per_word) if self.codes else 0

    @property
    def sound_is_due(self) -> bool:
        """Whether the frames that were not handed out yet are to be decoded now."""
        waiting, sizes = len(self.codes) - self.emitted, (1, *self.options.later_pieces)
        return waiting > 0 and (waiting >= sizes[min(self.pieces, len(sizes) - 1)] or self.done is not None)

    def take(self, token: int, stop_ids: Sequence[int]) -> None:
        """One token of the Thinker."""
        edit = self.options.edit_text
        ended = token in stop_ids
        self.text_done = ended or len(self.written) + 1 >= self.options.max_new_tokens
        if not ended:
            self.written.append(token)
            self.pending.append(token)
        if not self.text_done and (said := self.spoken.take([token])):
            self.words += said if edit is None else edit(said, False)
        if self.text_done and edit is not None:
            self.words += edit([], True)

    def new_text(self, tokenizer: ChatTokenizer) -> TextPiece | None:
        """The pending tokens once they are whole characters (4 bytes at most), or at the end."""
        if not self.pending:
            return None
        text = tokenizer.decode(self.pending)
        if text.endswith("\ufffd") and len(self.pending) < 4 and not self.text_done:
            return None
        ids, self.pending = tuple(self.pending), []
        return TextPiece(text=text, ids=ids, seconds=self.seconds)

    def spoken_text(self, tokenizer: ChatTokenizer) -> str:
        """The text as far as frames were handed out; the whole text if the Talker ended by itself. Frame f is made of
        the words 0 .. f, so words count as spoken when the Talker has read them. A voice is behind its text: this is
        the most that can have been heard."""
        if self.done in ("end", "silent"):
            return tokenizer.decode(self.written or self.words)
        read = 2 + (self.emitted - 2) // self.frames_per_word if self.emitted else 0  # by the frame before the last
        return tokenizer.decode(self.words[:read]).rstrip("\ufffd")


class WholeDecoder(Protocol):
    """Decodes whole answers, such as an `interop.mimi.MimiCodec`: the first codebooks of it are enough."""

    quantizers: int
    codebook_size: int
    samples_per_frame: int

    def decode(self, codes: Tensor) -> Tensor: ...


class Speaker:
    """A model that speaks, with the ids of its tokenizer: each method is one step of several answers at once.

    Args:
        compile: compile MTP and Code2Wav with `torch.compile`. They have fixed shapes (of one frame, and of a piece);
            the first frame then waits for the compiler.
        decoder: speaks in the place of the model's Code2Wav. An answer's sound is then made in one piece at its end.

    Raises ValueError: the model has no Talker or no Code2Wav, or they disagree on the codec.
    """

    def __init__(
        self,
        model: OmniModel,
        tokenizer: ChatTokenizer,
        *,
        compile: bool = False,
        decoder: WholeDecoder | None = None,
    ) -> None:
        speaks = model.code2wav if decoder is None else decoder
        if model.talker is None or speaks is None:
            lacks = " and ".join(n for n, part in (("Talker", model.talker), ("Code2Wav", speaks)) if not part)
            raise ValueError(f"the model has no {lacks}, so it cannot speak; build or load it with speech=true")
        self.model, self.tokenizer, self.decoder = model, tokenizer, decoder
        self.talker, self.code2wav = model.talker, model.code2wav
        c, wave = self.talker.config, speaks.config if isinstance(speaks, Code2Wav) else speaks
        self.samples_per_frame = wave.samples_per_frame
        enough = c.codebooks == wave.quantizers if decoder is None else c.codebooks <= wave.quantizers
        if not enough or wave.codebook_size != c.codebook_size:
            name = "Code2Wav" if decoder is None else "the codec"
            raise ValueError(
                f"{name} decodes {wave.quantizers} codebooks of {wave.codebook_size} codes, the Talker says "
                f"{c.codebooks} of {c.codebook_size}: they belong to different codecs"
            )
        self.codec = SpeechCodes(
            **c.special_codes(), codebooks=c.codebooks, speakers=c.speakers, frames_per_word=c.frames_per_word
        )
        self.special: SpeechTokens = self.codec.tokens(tokenizer)
        self.device = self.talker.codec_embedding.weight.device
        self.forbidden = torch.arange(c.codec_vocab, device=self.device) >= c.codebook_size
        self.forbidden[c.codec_eos] = False
        # Launching the small kernels of a step one by one would take longer on a GPU than they do.
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        compiled = partial(torch.compile, fullgraph=True, mode=mode)
        self._through = compiled(self.talker.mtp.through) if compile else None
        if self.code2wav is not None:
            self._decode_step = self.code2wav.decode_step
            if compile:
                later_piece = compiled(self.code2wav.decode_piece)
                self._decode_step = partial(self.code2wav.decode_step, later_piece=later_piece)

    def speaker_code(self, voice: str) -> int:
        """Code of a voice. Raises ValueError if there is no such voice; it lists those there are."""
        speakers: Mapping[str, int] = self.talker.config.speakers
        name = voice if voice in speakers else voice.lower()
        if name not in speakers:
            raise ValueError(f"voice {voice!r}: the model has no such voice; it has {', '.join(speakers) or 'none'}")
        return speakers[name]

    def answer(self, options: SpeechOptions, prompt: EncodedSample, words: Sequence[int] | None = None) -> Answer:
        """A new answer to `prompt`, to be thought, or with given `words`. Raises ValueError for an unknown voice, or if
        `words` is empty."""
        code = self.speaker_code(options.voice)
        if words is not None and not len(words):
            raise ValueError("the text has no token that could be spoken")
        spoken = SpokenWords(self.special)
        guide = AnswerGuide(self.tokenizer, thinking_budget=options.thinking_budget)
        given = list(words or ()), words is not None
        pace = self.codec.frames_per_word
        return Answer(options, prompt, self._user_turns(prompt), code, spoken, guide, *given, frames_per_word=pace)

    def _user_turns(self, prompt: EncodedSample) -> UserTurns:
        """`data.talker_layout.user_turns` of an encoded prompt, which has ids instead of spans: a turn keeps its ids
        but for where they start, and starts and ends in text, where the three ids are equal."""
        rows = np.flatnonzero(in_user_turns(prompt.input_ids, self.special.user_header))
        ids, position_ids = prompt.input_ids[rows], prompt.position_ids[:, rows].astype(np.float32)
        begin = np.float32(0)
        for start, end in pairwise([*np.flatnonzero(ids == self.special.user_header[0]), len(ids)]):
            position_ids[:, start:end] = position_ids[:, start:end] - position_ids[0, start] + begin
            begin = position_ids[:, end - 1].max() + np.float32(1)
        return UserTurns(ids, prompt.token_types[rows] != TEXT, rows, position_ids)

    def listen(self, answers: Sequence[Answer]) -> None:
        """The Thinker reads the prompts."""
        batch = PackedBatch.pack([a.prompt for a in answers]).to(self.device)
        cache = JoinedKVCache([a.thinker_cache for a in answers])
        hidden, accept_hidden = read_prompts(self.model, batch, cache, chunk=_smallest_chunk(answers))
        for a, h, heard in zip(answers, hidden, accept_hidden.split([len(a.prompt) for a in answers]), strict=True):
            self.heard(a, h, heard)

    def heard(self, a: Answer, hidden: Tensor, accept_hidden: Tensor) -> None:
        """The Thinker has read the prompt of `a`: hidden [D] of its last position, accept_hidden [n, D] of all."""
        a.hidden, a.accept_hidden = hidden, accept_hidden
        a.position = torch.tensor(a.prompt.position_ids.max() + 1, device=self.device)
        if a.options.text.repetition_penalty != 1:
            ids = torch.from_numpy(a.prompt.input_ids).to(self.device)
            a.occurred = occurring(ids, self.model.config.thinker.vocab_size)

    def write(self, answers: Sequence[Answer]) -> None:
        """The Thinker writes one token of each."""
        if behind := [a for a in answers if a.written]:
            # The last token is only now needed: not before the first word was on its way to the Talker.
            token = torch.tensor([a.written[-1] for a in behind], device=self.device)
            position = torch.stack([a.position for a in behind])
            cache = JoinedKVCache([a.thinker_cache for a in behind])
            for a, hidden in zip(behind, step(self.model, token, position, cache), strict=True):
                a.hidden, a.position = hidden, a.position + 1
        logits = guided(self.model.thinker.logits(torch.stack([a.hidden for a in answers])), [a.guide for a in answers])
        occurred = [a.occurred for a in answers]
        chosen = _choose([a.options.text for a in answers], logits, occurred, [a.text_generator for a in answers])
        for a, token in zip(answers, chosen.tolist(), strict=True):
            a.guide.wrote(token)
            a.take(token, self.tokenizer.stop_ids)
            if a.occurred is not None:
                a.occurred[token] = True

    def start(self, answers: Sequence[Answer]) -> None:
        """The Talker reads the user's turns, or what it has not yet read of them, and the header with the first
        word."""
        none = np.zeros((0, self.codec.codebooks), dtype=np.int64)
        documents = [
            talker_layout(*a.user, np.array(a.words[:1]), none, special=self.special, speaker_code=a.speaker_code)
            for a in answers
        ]
        spoken = SpokenAnswers.pack([replace(a.prompt, spoken=(d,)) for a, d in zip(answers, documents, strict=True)])
        assert spoken is not None
        inputs = TalkerInputs(**spoken.to(self.device).inputs())
        caches = [a.talker_cache for a in answers]
        left = torch.cat([torch.arange(len(d)) >= cache.length for d, cache in zip(documents, caches, strict=True)])
        lengths = [len(d) - cache.length for d, cache in zip(documents, caches, strict=True)]
        words = self.model.thinker.embed_tokens
        heard = [  # of text alone nothing is heard, and nobody reads its rows
            words.weight.new_zeros(len(a.prompt), words.embedding_dim) if a.accept_hidden is None else a.accept_hidden
            for a in answers
        ]
        x = self._read(inputs, left.to(self.device), lengths, torch.cat(heard), caches, _smallest_chunk(answers))
        for a, hidden, end in zip(answers, x, inputs.cu_seqlens[1:], strict=True):
            a.talker_hidden, a.accept_hidden, a.begun = hidden, None, True
            a.talker_position = inputs.position_ids[0, end - 1] + 1
            a.said = torch.zeros(self.talker.config.codec_vocab, dtype=torch.bool, device=self.device)

    def read_turns(self, turns: UserTurns, accept_hidden: Tensor, cache: DocumentKVCache) -> None:
        """The Talker reads the next positions of a user's turns, whose `rows` are those of accept_hidden [n, D]."""
        n = len(turns.ids)
        ids, is_media, rows, positions = (
            torch.from_numpy(np.ascontiguousarray(part)).to(self.device) for part in turns
        )
        none = torch.full_like(rows, -1)
        inputs = TalkerInputs(
            text_ids=ids.where(~is_media, none), hidden_rows=rows.where(is_media, none), codec_ids=none,
            frame_rows=none, labels=none, position_ids=positions, cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
            codes=none.new_zeros(0, self.codec.codebooks), frame_sources=none[:0],
        )  # fmt: skip
        self._read(inputs, torch.ones_like(is_media), [n], accept_hidden, [cache], None)

    def _read(
        self, inputs: TalkerInputs, left: Tensor, lengths: Sequence[int], heard: Tensor,
        caches: Sequence[DocumentKVCache], chunk: int | None,
    ) -> Tensor:  # fmt: skip
        """The Talker reads those positions that are `left`, bool [T], of each document so many: hidden [B, D] of each
        document's last one. `heard`: what `hidden_rows` counts."""
        kept = {name: getattr(inputs, name).masked_fill(~left, -1) for name in ("text_ids", "hidden_rows", "codec_ids")}
        x = self.talker.embed(replace(inputs, **kept), self.model.thinker.embed_tokens, heard)[left]
        position_ids, cache = inputs.position_ids[:, left], JoinedKVCache(caches)
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
        for rows, cut in passes(borders, chunk):
            x[rows] = self.talker(x[rows], position_ids[:, rows], cut, cache).hidden
        return x[borders[1:] - 1]

    def advance(self, answers: Sequence[Answer]) -> None:
        """The Talker reads each answer's last frame, and one more word."""
        words = torch.tensor([self._next_word(a) for a in answers], device=self.device)
        x = torch.stack([a.frame_embedding for a in answers])
        x = x + self.talker.text_projection(self.model.thinker.embed_tokens(words)).to(x.dtype)
        position = torch.stack([a.talker_position for a in answers])
        borders = torch.arange(len(answers) + 1, dtype=torch.int32, device=self.device)
        cache = JoinedKVCache([a.talker_cache for a in answers])
        for a, h in zip(answers, self.talker(x, position.expand(3, -1), borders, cache).hidden, strict=True):
            a.talker_hidden, a.talker_position = h, a.talker_position + 1

    def _next_word(self, a: Answer) -> int:
        if a.next_word is None or a.next_word > len(a.words):
            return self.special.tts_pad
        return self.special.tts_eos if a.next_word == len(a.words) else a.words[a.next_word]

    def frame(self, answers: Sequence[Answer]) -> None:
        """The next frame of each: the Talker's code, and MTP's; or its end."""
        hidden = torch.stack([a.talker_hidden for a in answers])
        logits = self.talker.logits(hidden).float().masked_fill(self.forbidden, -torch.inf)
        said = [a.said for a in answers]
        chosen = _choose([a.options.codes for a in answers], logits, said, [a.code_generator for a in answers])
        going = []
        for i, (a, code) in enumerate(zip(answers, chosen.tolist(), strict=True)):
            if code == self.codec.codec_eos:
                a.done = "end"
            else:
                a.said[code] = True
                going.append(i)
        if not going:
            return
        left, hidden, chosen = [answers[i] for i in going], hidden[going], chosen[going]
        residuals, generators = [a.options.residuals for a in left], [a.code_generator for a in left]
        none = [None] * len(left)
        first = self.talker.codec_embedding(chosen)
        codes, embedding = self.talker.mtp.generate(
            hidden, first, lambda scores: _choose(residuals, scores, none, generators), self._through
        )
        frames, embeddings = torch.cat([chosen[:, None], codes], dim=1), first + embedding
        for a, frame, vector in zip(left, frames, embeddings, strict=True):
            a.codes.append(frame)
            a.frame_embedding = vector
            if len(a.codes) >= a.options.max_frames:
                a.done = "max_frames"

    def sound(self, answers: Sequence[Answer]) -> list[np.ndarray]:
        """The samples that each answer's frames complete, of those that were not handed out yet."""
        if self.decoder is not None:  # `round` has waited for the last frame
            return [self.decode(torch.stack(a.codes)) for a in answers]
        assert self.code2wav is not None
        wavs: dict[Answer, np.ndarray] = {}
        groups: dict[tuple[int, int], list[Answer]] = defaultdict(list)
        for a in answers:  # streams that are equally old share a step
            groups[a.emitted, len(a.codes)].append(a)
        for (emitted, _), group in groups.items():
            states = [a.wave or self.code2wav.init_state(1) for a in group]
            state = states[0] if len(states) == 1 else join_states(states)
            frames = self.code2wav.embed(torch.stack([torch.stack(a.codes[emitted:]) for a in group]))
            wav = self._decode_step(frames, state)
            parts = [state] if len(states) == 1 else split_state(state, len(states))
            for a, part, samples in zip(group, parts, wav.float().cpu().numpy(), strict=True):
                a.wave = part
                wavs[a] = samples
        return [wavs[a] for a in answers]

    def decode(self, codes: Tensor) -> np.ndarray:
        """A whole answer: codes int64 [F, Q] -> float32 [samples] within [-1, 1]."""
        speak = self.code2wav if self.decoder is None else self.decoder.decode
        assert speak is not None
        return speak(codes[None])[0].float().clamp(-1, 1).cpu().numpy()


def _smallest_chunk(answers: Sequence[Answer]) -> int | None:
    return min((a.options.prefill_chunk for a in answers if a.options.prefill_chunk), default=None)


def _choose(
    samplings: Sequence[Sampling],
    logits: Tensor,
    occurred: Sequence[Tensor | None],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """`Sampling.choose` for rows of logits [B, V] that each have their own."""
    if len(set(samplings)) > 1:
        rows = zip(samplings, logits, occurred, generators, strict=True)
        return torch.cat([_choose([s], row[None], [seen], [g]) for s, row, seen, g in rows])
    given = [o for o in occurred if o is not None]
    return samplings[0].choose(logits, torch.stack(given) if given else None, generators)


class SpeechBatch:
    """Answers that are spoken side by side. They may join between any two rounds, and leave when they are done.

    Args:
        stream: give sound as it is made. False: codes only, to be decoded in one piece afterwards.
    """

    def __init__(self, speaker: Speaker, answers: Sequence[Answer] = (), *, stream: bool = True) -> None:
        self.speaker, self.answers, self.stream = speaker, list(answers), stream

    @torch.no_grad()
    def round(self) -> Iterator[tuple[Answer, Event]]:
        """One frame of every answer, and the text that it needs."""
        speaker = self.speaker
        for a in self.answers:
            if a.interrupted():
                a.done = "interrupted"
        yield from self._leave()
        unheard = [a for a in self.answers if not a.thinker_cache.length]
        if new := [a for a in unheard if a.user.is_media.any() or not a.text_done]:  # the Talker hears media alone
            speaker.listen(new)
        writing = [a for a in self.answers if not a.text_done and (a.done is not None or a.lacks_word)]
        while writing:
            speaker.write(writing)
            for a in writing:
                if (piece := a.new_text(speaker.tokenizer)) is not None:
                    yield a, piece
            writing = [a for a in self.answers if a.done is None and a.lacks_word]
        for a in self.answers:
            if not a.words:
                a.done = "silent"
        speaking = [a for a in self.answers if a.done is None]
        if starting := [a for a in speaking if not a.begun]:
            speaker.start(starting)
        if going := [a for a in speaking if a.codes]:
            speaker.advance(going)
        if speaking:
            speaker.frame(speaking)
        due = [a for a in speaking if a.sound_is_due and (speaker.decoder is None or a.done is not None)]
        if self.stream and due:
            for a, wav in zip(due, speaker.sound(due), strict=True):
                frames = a.codes[a.emitted :]
                a.pieces += 1
                for codes, samples in zip(frames, np.split(wav, len(frames)), strict=True):
                    if a.emitted and a.interrupted():
                        break
                    piece = AudioPiece(wav=samples, codes=codes.cpu().numpy(), frame=a.emitted, seconds=a.seconds)
                    a.emitted += 1
                    yield a, piece
        yield from self._leave()

    def _leave(self) -> Iterator[tuple[Answer, Event]]:
        # A Talker may end before its text does; the text is then written to its end all the same.
        done = [a for a in self.answers if a.done == "interrupted" or (a.done is not None and a.text_done)]
        self.answers = [a for a in self.answers if a not in done]
        for a in done:
            yield a, Done(reason=a.done or "", seconds=a.seconds)


class SpeechSession:
    """A conversation that is answered aloud.

    Args:
        encoder: of its prompts.  options: voice, sampling and limits of its answers.
        system: the persona, for the Thinker alone.
        speaker: made of the model by default. Sessions of one batch need one `Speaker`.

    Attributes:
        history: the conversation so far. An answer that was interrupted, or whose iterator was closed, is cut to the
            text that had been spoken by then (`Answer.spoken_text`).

    Raises ValueError: the model cannot speak, or has no such voice.
    """

    def __init__(
        self,
        model: OmniModel,
        encoder: SampleEncoder,
        options: SpeechOptions,
        *,
        system: str | None = None,
        speaker: Speaker | None = None,
    ) -> None:
        self.encoder = encoder
        self.speaker = speaker or Speaker(model, encoder.tokenizer)
        self.options = options
        self.speaker.speaker_code(options.voice)
        self.history: list[Message] = []
        if system is not None:
            self.history.append(Message(role="system", segments=(Segment(type="text", text=system),)))
        self._stop = threading.Event()
        self._current: Answer | None = None

    def answer(self, *messages: Message, say: str | None = None) -> Generator[Event, None, None]:
        """Events of the answer to `messages`, which are added to the history at the first event; the answer is when it
        ends. `say` is what is said; the Thinker then does not write (and does not run, unless it has media to hear).

        Raises:
            RuntimeError: the last answer has not ended; close its iterator.
            BadSample: a medium cannot be used.  ValueError: `say` has no token.
        """
        with closing(speak_batch([self], [messages], texts=[say])) as events:
            for _, event in events:
                yield event

    async def answer_async(self, *messages: Message) -> AsyncIterator[Event]:
        """`answer` for an event loop: every step runs in a thread, so that the loop stays responsive."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="speech")
        events = self.answer(*messages)
        try:
            while (event := await loop.run_in_executor(thread, next, events, None)) is not None:
                yield event
        finally:  # after a step that may still be running, since it is the same thread
            await loop.run_in_executor(thread, events.close)
            thread.shutdown(wait=False)

    def interrupt(self) -> None:
        """Stop after the current frame. May be called from any thread."""
        self._stop.set()

    def _begin(self, messages: Sequence[Message], text: str | None) -> Answer:
        if self._current is not None:
            raise RuntimeError("the last answer has not ended: read its events to the end, or close their iterator")
        self._stop.clear()
        chat = [*self.history, *messages]
        prompt = self.encoder.encode_prompt(Sample(id="session", source="session", messages=tuple(chat)), _media_bytes)
        words = None if text is None else self.encoder.tokenizer.encode(text)
        answer = self.speaker.answer(self.options, prompt, words)
        answer.interrupted = self._stop.is_set
        self.history, self._current = chat, answer
        return answer

    def _end(self, answer: Answer) -> None:
        if self._current is answer:
            self._current = None
            said = Segment(type="text", text=answer.spoken_text(self.encoder.tokenizer))
            self.history.append(Message(role="assistant", segments=(said,)))


def _media_bytes(segment: Segment) -> bytes:
    return segment.media if segment.media is not None else Path(segment.path or "").read_bytes()


def speak_batch(
    sessions: Sequence[SpeechSession],
    messages: Sequence[Sequence[Message]],
    *,
    texts: Sequence[str | None] | None = None,
) -> Generator[tuple[int, Event], None, None]:
    """Answers of several sessions side by side, one packed call per component and frame: yields (session, event). Each
    session's events are those that it has alone, up to rounding.

    Args:
        sessions: of one model: give them the same `speaker`.
        messages: what each is asked.  texts: what each says, or None where the Thinker writes.

    Raises ValueError: the sessions have several `Speaker`s.  Others as `SpeechSession.answer`.
    """
    if any(session.speaker is not sessions[0].speaker for session in sessions):
        raise ValueError("sessions of a batch must share one Speaker: SpeechSession(..., speaker=Speaker(model, ...))")
    answers: list[Answer] = []
    try:
        for session, asked, text in zip(sessions, messages, texts or [None] * len(sessions), strict=True):
            answers.append(session._begin(asked, text))
        index = {a: i for i, a in enumerate(answers)}
        batch = SpeechBatch(sessions[0].speaker, answers)
        while batch.answers:
            for a, event in batch.round():
                if isinstance(event, Done):
                    sessions[index[a]]._end(a)
                yield index[a], event
    finally:
        for session, a in zip(sessions, answers, strict=False):
            session._end(a)


@torch.no_grad()
def speak_texts(
    model: OmniModel | Speaker,
    tokenizer: ChatTokenizer,
    texts: Sequence[str],
    voices: str | Sequence[str],
    *,
    questions: Sequence[str] | None = None,
    codes: Sampling = CODES,
    residuals: Sampling = RESIDUALS,
    max_frames: int = 1500,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Speech]:
    """Speak given texts, without the Thinker.

    Args:
        voices: one for all, or one per text.
        questions: text of a user's turn before each. A Talker that was trained on answers only expects one.
        codes, residuals, max_frames: see `SpeechOptions`.
        seed: text i draws with `seed` + i, so that it sounds the same in any batch.
        batch_size: texts spoken side by side.

    Raises ValueError: unknown voice, a text without a token, or not one voice or question per text.
    """
    speaker = model if isinstance(model, Speaker) else Speaker(model, tokenizer)
    named = [voices] * len(texts) if isinstance(voices, str) else list(voices)
    if len(named) != len(texts) or (questions is not None and len(questions) != len(texts)):
        asked = "" if questions is None else f" and {len(questions)} questions"
        raise ValueError(f"{len(named)} voices{asked} for {len(texts)} texts; give one for each")
    answers = []
    for i, (text, voice) in enumerate(zip(texts, named, strict=True)):
        options = SpeechOptions(voice=voice, codes=codes, residuals=residuals, max_frames=max_frames, seed=seed + i)
        words = tokenizer.encode(text)
        if not words:
            raise ValueError(f"texts[{i}] is {text!r}: it has no token that could be spoken")
        answers.append(speaker.answer(options, _text_prompt(tokenizer, questions[i] if questions else None), words))
    for first in range(0, len(answers), batch_size):
        batch = SpeechBatch(speaker, answers[first : first + batch_size], stream=False)
        while batch.answers:
            for _ in batch.round():
                pass
    spoken = []
    for a in answers:
        frames = torch.stack(a.codes) if a.codes else torch.zeros(0, speaker.codec.codebooks, dtype=torch.int64)
        wav = speaker.decode(frames) if a.codes else np.zeros(0, dtype=np.float32)
        spoken.append(Speech(wav=wav, codes=frames.cpu().numpy(), hit_limit=a.done == "max_frames"))
    return spoken


def _text_prompt(tokenizer: ChatTokenizer, question: str | None) -> EncodedSample:
    messages = [] if question is None else [Message(role="user", segments=(Segment(type="text", text=question),))]
    chat = tokenizer.render(messages, for_generation=True)
    positions = np.broadcast_to(np.arange(len(chat), dtype=np.float32), (3, len(chat)))
    return EncodedSample(
        id="text", source="text", task="tts", modality="text", languages=(), input_ids=chat.input_ids,
        labels=chat.labels, token_types=chat.token_types, position_ids=positions,
    )  # fmt: skip
