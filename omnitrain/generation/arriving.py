"""A spoken question that is read while it is being asked, so that little is left to read when it ends.

    question = ArrivingQuestion(speaker, options, prompt)     # what stands before the sound is read
    for mel in pieces: question.push(mel)                    # AuT, then the Thinker, then the Talker, as far as it goes
    batch = SpeechBatch(speaker, [question.finish()])         # the rest of the sound, and the text behind it

What comes before a sound is known from the start, and a position depends on nothing behind it: so the answer is that to
the whole prompt, up to rounding. AuT's attention sees a window both ways, which is therefore read when it is full.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from omnitrain.data.batch import EncodedSample, PackedBatch
from omnitrain.data.talker_layout import UserTurns
from omnitrain.generation.cache import DocumentKVCache, JoinedKVCache
from omnitrain.generation.speech import Answer, Speaker, SpeechOptions
from omnitrain.generation.text import read_prompts
from omnitrain.vocabulary import AUDIO, TEXT


class ArrivingQuestion:
    """One prompt whose last recording is still arriving.

    Args:
        prompt: as `SampleEncoder.encode_prompt` gives it, with any short recording where the arriving one will stand
            (what is in it does not matter). Other media may come before it, none behind.
        window_frames: attention window of the audio encoder, in mel frames; default: the configuration's. The shorter,
            the less is left to read at the end; the answer is that of this window.

    Raises ValueError: the prompt has no recording of its own, or media behind it; others as `Speaker.answer`.
    """

    @torch.no_grad()
    def __init__(
        self, speaker: Speaker, options: SpeechOptions, prompt: EncodedSample, *, window_frames: int | None = None
    ) -> None:
        self.speaker, self.options = speaker, options
        speaker.speaker_code(options.voice)
        self._aut = speaker.model.aut.init_state(window_frames)
        rows = np.flatnonzero(prompt.token_types == AUDIO)
        held = int(speaker.model.aut.output_lengths(torch.tensor(len(prompt.mel[-1])))) if prompt.mel else 0
        if not held or rows[-held] != rows[-1] - held + 1:
            raise ValueError(
                "the prompt has no recording that could arrive: give it one of its own, not a video's sound"
            )
        start, end = int(rows[-held]), int(rows[-1]) + 1
        if (prompt.token_types[end:] != TEXT).any():
            raise ValueError("media stand behind the arriving recording; put them before it")
        self._behind = _cut(prompt, slice(end, None), mel=(), patches=(), grid_thw=prompt.grid_thw[:0])
        self._sound = prompt.input_ids[start], prompt.position_ids[:, start]
        self._known = _cut(prompt, slice(0, start), mel=prompt.mel[:-1])  # as far as the Thinker has read
        self._thinker_cache, self._talker_cache = DocumentKVCache(4096), DocumentKVCache(4096)
        x, accept = read_prompts(
            speaker.model, PackedBatch.pack([self._known]).to(speaker.device), JoinedKVCache([self._thinker_cache])
        )
        self._hidden, self._accept_hidden = x[0], [accept]
        self._pieces = 0  # of these, how many the Talker has read
        self._features = 0  # of the sound so far

    @torch.no_grad()
    def push(self, mel: Tensor) -> int:
        """The next mel frames [F, n_mels], any number; returns how many prompt positions have been read by now. Raises
        ValueError as `AuTEncoder.step`."""
        self._hear(self.speaker.model.aut.step(mel.to(self.speaker.device), self._aut))
        return len(self._known)

    @torch.no_grad()
    def finish(self) -> Answer:
        """The recording is over: reads what is left, and returns the answer that can now be spoken (`SpeechBatch`).
        Raises ValueError: nothing had arrived, or it was finished before."""
        if self._aut.finished or not self._aut.frames:
            raise ValueError("the recording has no mel frame" if not self._aut.finished else "it was finished before")
        started = time.perf_counter()
        self._hear(self.speaker.model.aut.finish(self._aut))
        _, first = self._sound
        shift = first[0] + np.float32(self._features) - self._behind.position_ids[0, 0]
        behind = replace(self._behind, position_ids=self._behind.position_ids + shift)
        ids = torch.from_numpy(behind.input_ids).to(self.speaker.device)
        self._read(self.speaker.model.thinker.embed_tokens(ids), behind)
        answer = self.speaker.answer(self.options, self._known)
        answer.started = started
        answer.thinker_cache, answer.talker_cache = self._thinker_cache, self._talker_cache
        self.speaker.heard(answer, self._hidden, torch.cat(self._accept_hidden))
        return answer

    def _hear(self, features: Tensor) -> None:
        """The next features [n, D] of the sound."""
        if not (n := len(features)):
            return
        token, first = self._sound
        place = np.arange(self._features, self._features + n, dtype=np.float32)
        self._features += n
        piece = replace(
            self._behind,
            input_ids=np.full(n, token),
            labels=np.full(n, self._behind.labels[0]),
            token_types=np.full(n, AUDIO, dtype=self._behind.token_types.dtype),
            position_ids=first[:, None] + place,
        )
        self._read(features, piece)
        turns = self.speaker._user_turns(self._known)
        unread = UserTurns(*(part[..., self._talker_cache.length :] for part in turns))
        hidden = torch.cat(self._accept_hidden[self._pieces :])  # those before have been read by the Talker
        unread = unread._replace(rows=unread.rows - (len(self._known) - len(hidden)))
        self.speaker.read_turns(unread, hidden, self._talker_cache)
        self._pieces = len(self._accept_hidden)

    def _read(self, x: Tensor, piece: EncodedSample) -> None:
        """The Thinker's next positions, embedded [n, D]."""
        thinker, cache = self.speaker.model.thinker, JoinedKVCache([self._thinker_cache])
        positions = torch.from_numpy(piece.position_ids).to(x.device)
        borders = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        out = thinker(x.to(thinker.embed_tokens.weight.dtype), positions, borders, cache=cache)
        self._hidden = out.hidden[-1]
        self._accept_hidden.append(out.accept_hidden)
        joined = {name: np.concatenate([getattr(self._known, name), getattr(piece, name)], -1) for name in PER_POSITION}
        self._known = replace(self._known, **joined)


PER_POSITION = ("input_ids", "labels", "token_types", "position_ids")


def _cut(prompt: EncodedSample, positions: slice, **media: object) -> EncodedSample:
    """Some positions of a prompt, with `media`."""
    cut = {name: getattr(prompt, name)[..., positions] for name in PER_POSITION}
    return replace(prompt, **cut, **media)
