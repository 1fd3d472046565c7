"""Answers to prompts: packed by budget, generated together, decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from omnitrain.data.batch import EncodedSample, PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.evaluation.teacher_forced import DEFAULT_BUDGET, Writer, evaluating, packs
from omnitrain.generation.rescore import Rescoring, rescored
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import generate
from omnitrain.generation.transcribe import BeamSearch, ctc_transcribe, transcribe
from omnitrain.models.aut_decoder import AuT


def answer_prompts(
    model: Writer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[EncodedSample],
    *,
    decoding: Decoding | BeamSearch | Rescoring | Literal["ctc"],
    aut_window_frames: int | None = None,
) -> list[str]:
    """The answer to each prompt (`SampleEncoder.encode_prompt`), in their order. Prompts are answered together within
    `DEFAULT_BUDGET`; one that is larger is answered alone. `decoding` "ctc": what the CTC head of an AuT
    hears; `Rescoring`: what it and the decoder write together. `aut_window_frames`: attention window of the audio
    encoder, default the configuration's."""
    answers = [""] * len(prompts)
    with evaluating(model):
        for pack in packs(prompts, DEFAULT_BUDGET):
            batch = PackedBatch.pack([prompt for _, prompt in pack])
            if decoding == "ctc":
                assert isinstance(model, AuT)
                written = ctc_transcribe(model, batch, aut_window_frames=aut_window_frames)
            elif isinstance(decoding, Rescoring):
                assert isinstance(model, AuT)
                encode, end = tokenizer.encode, tokenizer.stop_ids[0]
                written = rescored(model, batch, encode, end, decoding, aut_window_frames=aut_window_frames)
            else:
                ids = _write(model, batch, decoding, tokenizer.stop_ids, aut_window_frames)
                written = map(tokenizer.decode, ids)
            for (index, _), text in zip(pack, written, strict=True):
                answers[index] = text
    return answers


def _write(
    model: Writer,
    batch: PackedBatch,
    decoding: Decoding | BeamSearch,
    stop_ids: Sequence[int],
    aut_window_frames: int | None,
) -> list[list[int]]:
    if isinstance(model, AuT):
        return transcribe(model, batch, decoding, stop_ids=stop_ids, aut_window_frames=aut_window_frames)
    if isinstance(decoding, BeamSearch):
        raise ValueError("a Thinker writes greedily or by sampling; a beam search is AuT's alone")
    return generate(model, batch, decoding=decoding, stop_ids=stop_ids, aut_window_frames=aut_window_frames)


def answer_samples(
    model: Writer,
    encoder: SampleEncoder,
    asked: Sequence[tuple[Sample, Callable[[Segment], bytes]]],
    *,
    decoding: Decoding | BeamSearch | Rescoring | Literal["ctc"],
    on_bad: Callable[[BadSample, str], None],
    aut_window_frames: int | None = None,
) -> list[str | None]:
    """The answer to each sample, which stands beside what reads its media, without surrounding spaces; None for one
    that cannot be asked, whose error and id `on_bad` is told. The other arguments as in `answer_prompts`."""
    prompts: dict[int, EncodedSample] = {}
    for index, (sample, media_bytes) in enumerate(asked):
        try:
            prompts[index] = encoder.encode_prompt(sample, media_bytes)
        except BadSample as bad:
            on_bad(bad, sample.id)
    answers = answer_prompts(
        model, encoder.tokenizer, list(prompts.values()), decoding=decoding, aut_window_frames=aut_window_frames
    )
    found = {index: answer.strip() for index, answer in zip(prompts, answers, strict=True)}
    return [found.get(index) for index in range(len(asked))]
