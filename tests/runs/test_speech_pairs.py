"""Pairs of takes: which two of several, what is written, and going on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnitrain.config.locations import PACK
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.codec_frames import AnswerFile
from omnitrain.data.media import encode_audio
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.generation.speech import Speaker
from omnitrain.models.presets import build, init_weights
from omnitrain.runs import speech_pairs
from omnitrain.runs.speech_pairs import PairMaker, PairOptions, Take, make_pairs, preferred

RATE = 24_000
OPTIONS = PairOptions(takes=3, temperature=1.0, seconds_limit=4.0)


def take(wer: float, failed: bool = False, similarity: float = 1.0) -> Take:
    return Take(codes=np.zeros((4, 2), np.int64), wer=wer, failed=failed, similarity=similarity)


@pytest.mark.parametrize(
    ("takes", "chosen"),
    [
        ([take(0.5), take(0.0), take(1.0)], (1, 2)),
        ([take(0.0, similarity=0.7), take(0.0), take(0.0, similarity=0.6)], (1, 2)),  # all understood: the voice tells
        ([take(0.1), take(0.1, failed=True)], (0, 1)),
        ([take(0.0), take(0.2)], None),  # nearly as good
        ([take(0.5), take(1.0)], None),  # even the better one is not understood
        ([take(3.0), take(0.0), take(1.0)], (1, 0)),  # beyond 1 all are as bad: the first of them
        ([take(0.0)], None),
        ([], None),
    ],
)
def test_the_best_and_the_worst_take(takes: list[Take], chosen: tuple[int, int] | None) -> None:
    found = preferred(takes, PairOptions())
    if chosen is None:
        assert found is None
    else:
        assert found is not None
        assert (found[0] is takes[chosen[0]], found[1] is takes[chosen[1]]) == (True, True)


class Judge:
    """Understands every other sound, by its bytes."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str:
        return "the red cat" if sum(wav.tobytes()) % 2 else "babble"

    language = hear


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    tokenizer = ChatTokenizer.from_file(PACK / "tokenizer.json")
    small: dict[str, Any] = {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16,
                             "mrope_sections": [4, 2, 2], "n_experts": 2, "top_k": 1, "expert_width": 16}  # fmt: skip
    model = build(
        "tiny", vocab_size=tokenizer.vocab_size, special_tokens=tokenizer.special_ids, thinker=small,
        aut={"d_model": 16, "layers": 1, "heads": 2, "ffn": 16, "conv_hidden": 4},
        vision={"d_model": 16, "layers": 2, "heads": 2, "ffn": 16, "deepstack_layers": [0]}, speech=True,
        talker={**small, "shared_expert_width": 16, "projection_width": 32, "codebooks": 2, "codebook_size": 16,
                "speakers": {"ann": 200}, "mtp": {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 16}},
        code2wav={"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn": 16, "decoder_dim": 16},
    )  # fmt: skip
    init_weights(model, 0)
    return Speaker(model.eval(), tokenizer)


@pytest.fixture
def source(tmp_path: Path) -> SampleSource:
    wave = encode_audio(0.3 * np.sin(np.arange(RATE) / 10).astype(np.float32), RATE, "flac")
    silent = encode_audio(np.zeros(RATE, np.float32), RATE, "flac")

    def row(i: int) -> Sample:
        said = Segment(type="speech", text="the red cat", media=silent if i == 2 else wave)
        asked = Segment(type="text", text=f"Say it, {i}.")
        return Sample(
            id=f"row/{i}", source="test", task="tts", languages=("en",), meta={"voice": "ann", "joined": "sentence"},
            messages=(Message(role="user", segments=(asked,)), Message(role="assistant", segments=(said,))),
        )  # fmt: skip

    write_shards([row(i) for i in range(7)], tmp_path / "shards", "rows", progress=False)
    return SampleSource(tmp_path / "shards")


def maker(speaker: Speaker) -> PairMaker:
    return PairMaker(speaker, "c0ffee00", Judge(), None, OPTIONS)  # type: ignore[arg-type]


def quietly(title: str, total: int) -> Any:
    return nullcontext(lambda: None)


def pairs(folder: Path) -> list[tuple[str, list[Any], list[Any], dict[str, str]]]:
    found = SampleSource(folder)
    rows = []
    for row in (found[i] for i in range(len(found))):
        file = AnswerFile(row.messages[-1].segments[0].media or b"")
        rows.append((row.id, file.codes("c0ffee00").tolist(), file.rejected().tolist(), dict(row.meta)))
    return rows


def test_pairs_are_takes_that_the_judge_told_apart(
    speaker: Speaker, source: SampleSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech_pairs, "PER_SHARD", 2)
    said: list[list[list[Take]]] = []
    whole = maker(speaker)
    takes = whole.takes
    monkeypatch.setattr(whole, "takes", lambda *args: said.append(takes(*args)) or said[-1])
    counts = make_pairs(whole, source, tmp_path / "whole", made_with={"run": "r"}, progress=quietly)
    every = [t for part in said for of_text in part for t in of_text]
    assert (counts.texts, counts.bad, counts.takes) == (6, 1, len(every))
    assert {t.wer for t in every} == {0.0, 1.0}
    assert len({t.codes.tobytes() for t in every}) > len(every) - 3  # each with a seed of its own
    found = pairs(tmp_path / "whole")
    assert counts.pairs == len(found) >= 2
    by_text = [of_text for part in said for of_text in part]
    names = [name for name in (source[i].id for i in range(7)) if name != "row/2"]
    for name, better, worse, meta in found:
        of_text = by_text[names.index(name)]
        costs = [t.cost for t in of_text]
        assert better == of_text[costs.index(min(costs))].codes.tolist()
        assert worse == of_text[costs.index(max(costs))].codes.tolist()
        assert (meta["voice"], meta["chosen_wer"]) == ("ann", "0.000")
        assert float(meta["rejected_wer"]) + float(meta["rejected_failed"]) >= 1

    # Interrupted behind the first shard, and gone on with.
    @contextmanager
    def impatient(title: str, total: int) -> Generator[Callable[[], None]]:
        done = iter(range(3))

        def advance() -> None:
            if next(done) == 2:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        make_pairs(maker(speaker), source, tmp_path / "parts", made_with={"run": "r"}, progress=impatient)
    assert len(json.loads((tmp_path / "parts/pairs.json").read_text())["shards"]) == 2
    assert make_pairs(maker(speaker), source, tmp_path / "parts", made_with={"run": "r"}, progress=quietly) == counts
    assert pairs(tmp_path / "parts") == found
    with pytest.raises(ValueError, match="were made with run r, not s; choose another --out"):
        make_pairs(maker(speaker), source, tmp_path / "parts", made_with={"run": "s"}, progress=quietly)
    with pytest.raises(ValueError, match="that `data pairs` did not make"):
        make_pairs(maker(speaker), source, tmp_path / "shards", made_with={"run": "r"}, progress=quietly)


def test_a_take_without_an_end_is_none(speaker: Speaker, source: SampleSource, monkeypatch: pytest.MonkeyPatch) -> None:
    speak = speech_pairs.speak_texts
    endless: Callable[..., Sequence[Any]] = lambda *a, **k: [replace(s, hit_limit=True) for s in speak(*a, **k)]  # noqa: E731
    monkeypatch.setattr(speech_pairs, "speak_texts", endless)
    made = maker(speaker)
    reader = speech_pairs.UtteranceReader(sample_rate=RATE, limits=speech_pairs.MediaLimits())
    rows = [(source[i], reader(source[i], source.media_bytes)) for i in range(2)]
    found, counts = made(rows, 0)
    assert (found, counts.texts, counts.takes) == ([], 2, 0)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="--takes 1: two at least"):
        PairOptions(takes=1)
    with pytest.raises(ValueError, match="--temperature 0: above 0"):
        PairOptions(temperature=0)
