"""Answers to prompts: packed by budget, generated together, decoded."""

from __future__ import annotations

from collections.abc import Sequence

from omnitrain.data.batch import EncodedSample, PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.packing import Budget
from omnitrain.evaluation.teacher_forced import DEFAULT_BUDGET, evaluating, packs
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import generate
from omnitrain.models.omni import OmniModel


def answer_prompts(
    model: OmniModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[EncodedSample],
    *,
    decoding: Decoding,
    budget: Budget = DEFAULT_BUDGET,
    strip: bool = True,
) -> list[str]:
    """The answer to each prompt (`SampleEncoder.encode_prompt`), in their order. Prompts are answered together within
    `budget`; one that is larger is answered alone. `strip`: without surrounding spaces."""
    answers = [""] * len(prompts)
    with evaluating(model):
        for pack in packs(prompts, budget):
            batch = PackedBatch.pack([prompt for _, prompt in pack])
            written = generate(model, batch, decoding=decoding, stop_ids=tokenizer.stop_ids)
            for (index, _), ids in zip(pack, written, strict=True):
                text = tokenizer.decode(ids)
                answers[index] = text.strip() if strip else text
    return answers
