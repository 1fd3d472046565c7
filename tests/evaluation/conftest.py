"""A model small enough to see through, and held-out samples whose answers lie in their media.

The picture of a sample is one grey level and its answer spells that level. `Reader` puts nearly all probability on the
right answer when told to read the picture; when not, it knows the answers' tokens but ignores the picture.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import AudioGeometry, VisionGeometry
from omnitrain.data.media import MediaLimits, encode_image
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.models.thinker import ThinkerOutput

LEVELS = [16 * i for i in range(16)]
WORDS = [f"{chr(97 + i)}" for i in range(16)]


class Samples:
    """A source in memory."""

    def __init__(self, samples: list[Sample], name: str = "memory") -> None:
        self.samples, self.name = samples, name

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def locate(self, index: int) -> tuple[str, int]:
        return self.name, index

    def media_bytes(self, segment: Segment) -> bytes:
        assert segment.media is not None
        return segment.media


class Reader(nn.Module):
    """Logits for the word that the picture's grey level stands for (`reads`), or the same for every word."""

    def __init__(self, tokenizer: ChatTokenizer, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.words = [tokenizer.encode(word)[0] for word in WORDS]
        size = tokenizer.vocab_size
        self.output_embedding = nn.Parameter(torch.eye(size))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        token_types: Tensor,
        mel: Tensor | None = None,
        mel_lengths: Tensor | None = None,
        patches: Tensor | None = None,
        grid_thw: Tensor | None = None,
    ) -> ThinkerOutput:
        n, size = len(input_ids), len(self.output_embedding)
        hidden = torch.zeros(n, size)
        hidden[:, self.words] += 6.0
        if self.reads and patches is not None and grid_thw is not None:
            level = torch.stack([p.mean() for p in patches.split(grid_thw.prod(1).tolist())])
            word = ((level * 127.5 + 127.5) / 16).round().long()
            for b, w in enumerate(word.tolist()):
                hidden[cu_seqlens[b] : cu_seqlens[b + 1], self.words[w]] += 6.0
        counts = torch.ones(2, 4)
        return ThinkerOutput(hidden=hidden, accept_hidden=hidden, router_counts=counts, router_prob_sums=counts)


def grey_sample(i: int, *, split: str = "heldout_concept", task: str = "caption") -> Sample:
    level = i % 16
    picture = encode_image(np.full((64, 64, 3), LEVELS[level], dtype=np.uint8))
    return Sample(
        id=f"grey/{i:03d}",
        source="grey",
        split=split,
        task=task,
        languages=("en",),
        concept=f"level {level}",
        messages=(
            Message(
                role="user",
                segments=(Segment(type="image", media=picture), Segment(type="text", text="Which level is this?")),
            ),
            Message(role="assistant", segments=(Segment(type="text", text=WORDS[level]),)),
        ),
    )


def text_sample(i: int, *, split: str = "heldout_concept", language: str = "en") -> Sample:
    text = f"{WORDS[i % 16]} {WORDS[(i * 7) % 16]} {WORDS[(i * 3) % 16]}"
    return Sample(
        id=f"text/{split}/{i:03d}",
        source="text",
        split=split,
        task="text",
        languages=(language,),
        messages=(Message(role="document", segments=(Segment(type="text", text=text),)),),
    )


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return train_bpe(["a b c d e f g h i j k l m n o p", "Which level is this?"] * 3, vocab_size=320)


@pytest.fixture(scope="session")
def encoder(tokenizer: ChatTokenizer) -> SampleEncoder:
    return SampleEncoder(
        tokenizer=tokenizer, audio=AudioGeometry(), vision=VisionGeometry(min_pixels=64 * 64), limits=MediaLimits()
    )
