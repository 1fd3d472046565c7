"""Answers to prompts: packed by budget, generated together, decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from omnitrain.data.batch import EncodedSample, PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.packing import Budget
from omnitrain.evaluation.teacher_forced import DEFAULT_BUDGET, evaluating, packs
from omnitrain.generation.text import generate
from omnitrain.models.omni import OmniModel


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is generated; see `omnitrain.generation.text.generate`. Temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


def answer_prompts(
    model: OmniModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[EncodedSample],
    *,
    decoding: Decoding,
    budget: Budget = DEFAULT_BUDGET,
    strip: bool = True,
) -> list[str]:
    """The answer to each prompt (`SampleEncoder.encode_prompt`), in their order.

    Args:
        model: its training mode is restored.
        budget: of the prompts that are answered together; a prompt that is larger is answered alone.
        strip: without surrounding spaces.
    """
    answers = [""] * len(prompts)
    with evaluating(model):
        for pack in packs(prompts, budget):
            batch = PackedBatch.pack([prompt for _, prompt in pack])
            for (index, _), ids in zip(
                pack, generate(model, batch, stop_ids=tokenizer.stop_ids, **asdict(decoding)), strict=True
            ):
                text = tokenizer.decode(ids)
                answers[index] = text.strip() if strip else text
    return answers
