"""Transcripts of recordings that are still going on: text comes out while more is being said.

    live = StreamingTranscriber(model, prompt, stop_ids=tokenizer.stop_ids)
    for mel in pieces: print(tokenizer.decode(live.push(mel)), end="")
    print(tokenizer.decode(live.finish()))

Each time the encoder has heard a whole window, the text is written anew from all windows so far, behind what is final
already. What two such texts in a row begin with alike becomes final (LocalAgreement-2: Liu et al. 2020, arXiv
2005.11185; Macháček et al. 2023, arXiv 2307.14743). So a token is said two windows after its sound at best, and never
taken back. After `segment_windows` windows everything written is final, and the next segment begins with nothing heard
and nothing written: memory and time per window are bounded, and a word on such a border is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import write
from omnitrain.generation.transcribe import Transcripts
from omnitrain.models.aut_decoder import AuT


@dataclass(frozen=True, kw_only=True)
class StreamingOptions:
    """How a recording that goes on is transcribed.

    Attributes:
        window_frames: mel frames of 10 ms that are heard at once, the encoder's attention window: whole seconds.
        segment_windows: windows after which all is final and a new segment begins. One segment should not be longer
            than the recordings that the model was trained on.
        max_new_tokens: of a segment.
    """

    window_frames: int = 100
    segment_windows: int = 16
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.segment_windows < 1:
            raise ValueError(f"segment_windows is {self.segment_windows}; a segment has at least 1 window")
        Decoding(max_new_tokens=self.max_new_tokens)  # says what is wrong with it


class StreamingTranscriber:
    """Writes what one recording says, greedily. How the recording is cut into pieces changes nothing.

    A recording of one window gets what `transcribe` writes. In a longer one, what was agreed upon early may differ from
    what would be written after hearing everything; what follows it is the likeliest continuation after hearing
    everything of the segment.

    Args:
        prompt: text tokens of a prompt, its recording left out (`SampleEncoder.encode_prompt`, where TEXT stands).
        stop_ids: the text of a segment ends before one of these.

    Raises ValueError: an empty prompt, or a window of no whole number of chunks.
    """

    def __init__(
        self,
        model: AuT,
        prompt: Sequence[int],
        *,
        stop_ids: Iterable[int] = (),
        options: StreamingOptions | None = None,
    ) -> None:
        options = options or StreamingOptions()
        if not prompt:
            raise ValueError("the prompt has no token; it needs at least one")
        self.model, self.prompt, self.options = model, list(prompt), options
        self.segments: list[list[int]] = [[]]
        """What is final, segment by segment; a space belongs between the texts of two of them."""
        self._stop = frozenset(stop_ids)
        self._state = model.aut.init_state(options.window_frames, projected=False)
        self._window = int(model.aut.output_lengths(torch.tensor(options.window_frames)))  # features
        self._features: list[Tensor] = []  # of this segment's windows
        self._written: list[int] = []  # of this segment, when it was last written

    @torch.no_grad()
    def push(self, mel: Tensor) -> list[int]:
        """Hear the next mel frames [F, n_mels], any number; returns the tokens that became final. Raises ValueError as
        `AuTEncoder.step`."""
        features = self.model.aut.step(mel.to(self.model.output_embedding.device), self._state)
        return self._hear(features)

    @torch.no_grad()
    def finish(self) -> list[int]:
        """The recording is over: returns the remaining tokens."""
        return self._hear(self.model.aut.finish(self._state)) + self._close_segment()

    def _hear(self, features: Tensor) -> list[int]:
        """The features [T, D] of the next windows -> the tokens that became final."""
        new = []
        for window in features.split(self._window) if len(features) else ():
            self._features.append(window)
            before, self._written = self._written, self._write()
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(before, self._written, strict=False))
            new += self._finalise([token for token, _ in alike])
            if len(self._features) == self.options.segment_windows:
                new += self._close_segment()
        return new

    def _finalise(self, text: list[int]) -> list[int]:
        """`text`, of which what was final before is the beginning, is final; returns what is new in it."""
        new = text[len(self.segments[-1]) :]
        self.segments[-1] += new
        return new

    def _close_segment(self) -> list[int]:
        if not self._features:
            return []
        new = self._finalise(self._written)
        self._features, self._written = [], []
        self.segments.append([])
        return new

    def _write(self) -> list[int]:
        """The text of this segment: what is final, and greedily what follows it, before the first stop token."""
        final, decoder = self.segments[-1], self.model.decoder
        left = self.options.max_new_tokens - len(final)
        if left < 1:
            return list(final)
        device = self.model.output_embedding.device
        ids = torch.tensor([*self.prompt, *final], device=device)
        encoded = torch.cat(self._features)
        memory = decoder.memory(encoded, torch.tensor([0, len(encoded)], dtype=torch.int32, device=device))
        one = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        texts = Transcripts(decoder, memory, ids, torch.arange(len(ids), device=device), one)
        (new,) = write(texts, [ids], Decoding(max_new_tokens=left), [torch.Generator()], self._stop)
        return [*final, *takewhile(lambda token: token not in self._stop, new)]
