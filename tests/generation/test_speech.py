"""Streamed speech against `generate` of transformers on the same random weights, and against itself."""

from __future__ import annotations

import asyncio
import copy
import io
import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omnitrain.data.batch import SpokenAnswers
from omnitrain.data.chat import train_bpe
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.features import AudioGeometry, VisionGeometry
from omnitrain.data.media import MediaLimits
from omnitrain.data.positions import AudioVideoSpan, ImageSpan, TextSpan, tm_rope_positions
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.talker_layout import UserTurns, talker_layout, user_turns
from omnitrain.generation.sampling import Sampling
from omnitrain.generation.speech import (
    AudioPiece,
    Done,
    Speaker,
    SpeechBatch,
    SpeechOptions,
    SpeechSession,
    TextPiece,
    speak_batch,
    speak_texts,
)
from omnitrain.interop.public_format import load_pretrained
from omnitrain.models.code2wav import Code2Wav, Code2WavConfig
from omnitrain.models.talker import TalkerInputs
from tests.interop import public_models

FRAMES = 16
GREEDY = Sampling()
PENALISED = Sampling(repetition_penalty=1.05)


def recording(seconds: float) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).standard_normal(int(16_000 * seconds)) / 8
    soundfile.write(file, noise, 16_000, format="WAV")
    return file.getvalue()


def picture() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def said(role: str, *parts: str | Segment) -> Message:
    segments = [Segment(type="text", text=part) if isinstance(part, str) else part for part in parts]
    return Message(role=role, segments=tuple(segments))


CHATS = {
    "text": [said("system", "be a cat"), said("user", "what is red?")],
    "audio": [said("system", "be a cat"), said("user", Segment(type="audio", media=recording(1.3)), "what?")],
    "several turns with a picture": [
        said("user", "look here", Segment(type="image", media=picture()), "red?"),
        said("assistant", "no"),
        said("user", Segment(type="audio", media=recording(0.9)), "and now what?"),
    ],
}


@pytest.fixture(scope="module", params=[0, 1])
def models(request, tmp_path_factory):
    """A full random model of transformers, the same in omnitrain, and the encoder of its prompts."""
    words = ["system\n", "user\n", "assistant\n"] * 50
    tokenizer = train_bpe(words, public_models.VOCABULARY)
    names = {"im_start": "<|im_start|>", "im_end": "<|im_end|>", "audio_start": "<|audio_start|>",
             "audio": "<|audio_pad|>", "audio_end": "<|audio_end|>", "image": "<|image_pad|>", "video": "<|video_pad|>",
             "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "tts_pad": "<tts_pad>",
             "tts_bos": "<tts_text_bos>", "tts_eos": "<tts_text_eod>"}  # fmt: skip
    special = {key: tokenizer.special_ids[name] for key, name in names.items()}
    for role in ("system", "user", "assistant"):
        (special[role],) = tokenizer.encode(role)
        assert len(tokenizer.encode(f"{role}\n")) == 2
    folder = tmp_path_factory.mktemp("public")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public_models, "SPECIAL", special)
        reference = public_models.save_public_model(folder, variant=request.param, kind="full", seed=request.param + 5)
    # The reference's Talker computes positions of sound beside pictures with a setting that it lacks.
    reference.talker.config.audio_config = reference.config.thinker_config.audio_config
    model = load_pretrained(folder).eval()
    config = model.config
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        audio=AudioGeometry(n_mels=config.aut.n_mels, chunk_frames=config.aut.chunk_frames),
        vision=VisionGeometry(patch=config.vision.patch, min_pixels=64, max_pixels=4096),
        limits=MediaLimits(),
        vocab_size=config.thinker.vocab_size,
    )
    speaker = Speaker(model, tokenizer)
    return SimpleNamespace(reference=reference, model=model, encoder=encoder, speaker=speaker, tokenizer=tokenizer)


def reference_speech(models, chat: list[Message], **options: Any) -> SimpleNamespace:
    """Text ids after the prompt, codes [F, Q] and waveform of the reference."""
    encoded = models.encoder.encode_prompt(Sample(id="", source="", messages=tuple(chat)), lambda s: s.media)
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(encoded.input_ids)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if encoded.patches:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(encoded.patches))
        inputs["image_grid_thw"] = torch.from_numpy(encoded.grid_thw)
    if encoded.mel:
        mel = encoded.mel[0]
        inputs["input_features"] = torch.from_numpy(mel.T.copy())[None]
        inputs["feature_attention_mask"] = torch.ones(1, len(mel), dtype=torch.long)
    seen, generate = [], models.reference.talker.generate

    def spy(**arguments: Any) -> Any:
        seen.append(generate(**arguments))
        return seen[0]

    models.reference.talker.generate = spy
    try:
        ids, waveform = models.reference.generate(
            **inputs,
            **{
                "speaker": "Ethan",
                "return_audio": True,
                "thinker_do_sample": False,
                "thinker_max_new_tokens": 8,
                "thinker_eos_token_id": list(models.tokenizer.stop_ids),
                "talker_do_sample": False,
                "talker_max_new_tokens": FRAMES + 1,
                **options,
            },
        )
    finally:
        models.reference.talker.generate = generate
    frames = [states[-1] for states in seen[0].hidden_states if states[-1] is not None]
    return SimpleNamespace(ids=ids[0, len(encoded) :].tolist(), codes=torch.cat(frames).numpy(), wav=waveform[0, 0])


def session(models, chat: list[Message] = (), **options: Any) -> SpeechSession:
    given = dict(voice="Ethan", codes=PENALISED, residuals=GREEDY, max_new_tokens=8, max_frames=FRAMES)
    speaker = options.pop("speaker", models.speaker)
    made = SpeechSession(models.model, models.encoder, SpeechOptions(**{**given, **options}), speaker=speaker)
    made.history = list(chat[:-1])
    return made


class Heard:
    """What came out of events."""

    def __init__(self, events) -> None:
        self.events = list(events)
        self.ids = [i for e in self.events if isinstance(e, TextPiece) for i in e.ids]
        self.text = "".join(e.text for e in self.events if isinstance(e, TextPiece))
        self.pieces = [e for e in self.events if isinstance(e, AudioPiece)]
        self.wav = np.concatenate([np.zeros(0, np.float32), *[e.wav for e in self.pieces]])
        self.codes = np.array([e.codes for e in self.pieces])
        self.reason = self.events[-1].reason if isinstance(self.events[-1], Done) else None


def same_sound(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=1e-4)


def a_stop(models, chat: list[Message]) -> tuple[list[int], int]:
    """The reference's greedy text, and the place of a token in it that did not occur before."""
    ids = reference_speech(models, chat).ids
    return ids, next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])


@pytest.mark.parametrize("name", CHATS)
def test_greedy_speech_is_the_reference_s(models, monkeypatch, name: str) -> None:
    """Same text, same codes, same samples. The reference does not speak the last token of a text, be it cut off or the
    one that ends it."""
    # The reference says calls and thoughts, too, and random weights write them.
    monkeypatch.setattr(models.speaker, "special", replace(models.speaker.special, silent=()))
    chat = CHATS[name]
    expected = reference_speech(models, chat)
    made = session(models, chat)
    found = Heard(made.answer(chat[-1]))
    assert found.ids == [i for i in expected.ids if i not in models.tokenizer.stop_ids]
    assert [p.frame for p in found.pieces] == list(range(len(expected.codes)))
    assert np.array_equal(found.codes, expected.codes)
    same_sound(found.wav, expected.wav.numpy())
    assert found.wav.std() > 1e-3


def test_a_text_that_ends_by_itself_is_spoken_the_same(models, monkeypatch) -> None:
    chat = CHATS["text"]
    ids, n = a_stop(models, chat)
    expected = reference_speech(models, chat, thinker_eos_token_id=ids[n])
    monkeypatch.setattr(type(models.tokenizer), "stop_ids", (ids[n],))
    made = session(models, chat, max_new_tokens=50)
    found = Heard(made.answer(chat[-1]))
    assert [*found.ids, ids[n]] == expected.ids
    same_sound(found.wav, expected.wav.numpy())


def test_sound_comes_before_the_text_is_finished(models) -> None:
    """One word, one frame, one word, one frame."""
    kinds = [type(e) for e in session(models).answer(said("user", "what?")) if getattr(e, "text", "x")]
    assert kinds.index(AudioPiece) < 5
    last_text = max(i for i, kind in enumerate(kinds) if kind is TextPiece)
    assert kinds[:last_text].count(AudioPiece) >= 3


def test_streaming_equals_offline(models) -> None:
    """The frames of the stream, decoded in one piece; and the text before its last token, spoken as a given one."""
    chat = CHATS["text"]
    streamed = Heard(session(models, chat).answer(chat[-1]))
    whole = models.model.code2wav(torch.from_numpy(streamed.codes)[None])[0].detach().numpy()
    same_sound(streamed.wav, whole)
    options = models.speaker.answer(session(models).options, prompt_of(models, chat), streamed.ids[:-1])
    batch = [e for _, e in events_of(models, [options])]
    assert np.array_equal(Heard(batch).codes, streamed.codes)


def prompt_of(models, chat: list[Message]):
    return models.encoder.encode_prompt(Sample(id="", source="", messages=tuple(chat)), lambda s: s.media)


def events_of(models, answers):
    batch = SpeechBatch(models.speaker, answers)
    while batch.answers:
        yield from batch.round()


SAMPLED = dict(
    text=Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1),
    codes=Sampling(temperature=0.9, top_k=50, repetition_penalty=1.05),
    residuals=Sampling(temperature=1.0, top_k=50, top_p=0.8),
)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_side_by_side_equals_alone(models, options) -> None:
    """Chats of different lengths and kinds, answers that end at different times."""
    limits = (FRAMES, 5, 11)
    alone = [
        Heard(session(models, chat, max_frames=n, seed=i, **options).answer(chat[-1]))
        for i, (chat, n) in enumerate(zip(CHATS.values(), limits, strict=True))
    ]
    sessions = [
        session(models, chat, max_frames=n, seed=i, **options)
        for i, (chat, n) in enumerate(zip(CHATS.values(), limits, strict=True))
    ]
    events: list[list[Any]] = [[], [], []]
    for i, event in speak_batch(sessions, [chat[-1:] for chat in CHATS.values()]):
        events[i].append(event)
    for found, expected in zip(map(Heard, events), alone, strict=True):
        assert found.ids == expected.ids
        assert np.array_equal(found.codes, expected.codes)
        same_sound(found.wav, expected.wav)
        assert found.reason == expected.reason
    assert len({len(found.codes) for found in alone}) > 1


def test_an_answer_may_join_later(models) -> None:
    """Its Code2Wav stream is then younger than its neighbour's."""
    prompts = [prompt_of(models, chat) for chat in (CHATS["text"], CHATS["audio"])]
    options = session(models).options
    alone = [Heard(e for _, e in events_of(models, [models.speaker.answer(options, p)])) for p in prompts]
    first, second = (models.speaker.answer(options, p) for p in prompts)
    batch = SpeechBatch(models.speaker, [first])
    events: dict[int, list[Any]] = {id(first): [], id(second): []}
    rounds = 0
    while batch.answers:
        for a, event in batch.round():
            events[id(a)].append(event)
        rounds += 1
        if rounds == 3:
            batch.answers.append(second)
    for a, expected in zip((first, second), alone, strict=True):
        found = Heard(events[id(a)])
        assert np.array_equal(found.codes, expected.codes)
        same_sound(found.wav, expected.wav)


@pytest.mark.parametrize("chunk", [1, 7])
def test_prefill_in_chunks_equals_prefill_at_once(models, chunk) -> None:
    for chat in CHATS.values():
        whole = Heard(session(models, chat, max_frames=4).answer(chat[-1]))
        pieces = Heard(session(models, chat, max_frames=4, prefill_chunk=chunk).answer(chat[-1]))
        assert pieces.ids == whole.ids
        assert np.array_equal(pieces.codes, whole.codes)


@pytest.mark.parametrize("size", [3, 4, 100])
def test_frames_decoded_together_are_the_same(models, monkeypatch, size: int) -> None:
    chat = CHATS["text"]
    single = Heard(session(models, chat).answer(chat[-1]))
    calls: list[int] = []
    step = models.speaker._decode_step
    monkeypatch.setattr(models.speaker, "_decode_step", lambda x, state: calls.append(x.shape[1]) or step(x, state))
    together = Heard(session(models, chat, frames_per_piece=size).answer(chat[-1]))
    assert [p.frame for p in together.pieces] == list(range(FRAMES))
    assert together.ids == single.ids
    assert np.array_equal(together.codes, single.codes)
    same_sound(together.wav, single.wav)
    rest, last = divmod(FRAMES - 1, size)
    assert calls == [1, *[size] * rest, *([last] if last else [])]  # the first alone; what is left at the end
    made = session(models, chat, frames_per_piece=size)
    heard = []
    for event in made.answer(chat[-1]):
        heard += [event.frame] if isinstance(event, AudioPiece) else []
        if len(heard) == 3:
            made.interrupt()
    assert heard == [0, 1, 2]  # the rest of the piece is not handed out
    assert made.history[-1].segments[0].text == models.tokenizer.decode(single.ids[:3]).rstrip("\ufffd")
    with pytest.raises(ValueError, match="frames_per_piece is 0"):
        session(models, frames_per_piece=0)


@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_an_interrupted_answer_keeps_what_was_said(models, how) -> None:
    chat = CHATS["text"]
    whole = Heard(session(models, chat).answer(chat[-1]))
    made = session(models, chat)
    events, frames, ids = made.answer(chat[-1]), 0, []
    for event in events:
        ids += event.ids if isinstance(event, TextPiece) else ()
        frames += isinstance(event, AudioPiece)
        if frames == 3 and how == "close":
            events.close()
        elif frames == 3 and isinstance(event, AudioPiece):
            made.interrupt()
        elif frames > 3:
            pytest.fail("went on after the current frame")
    if how == "interrupt":
        assert event.reason == "interrupted"
    assert [m.role for m in made.history] == ["system", "user", "assistant"]
    spoken = made.history[-1].segments[0].text
    assert spoken == models.tokenizer.decode(whole.ids[:3]).rstrip("\ufffd")
    again = Heard(made.answer(said("user", "go on")))  # and the conversation goes on
    assert again.pieces
    assert [m.role for m in made.history] == ["system", "user", "assistant", "user", "assistant"]
    fresh = Heard(session(models, [*made.history[:3], said("user", "go on")]).answer(said("user", "go on")))
    assert np.array_equal(fresh.codes, again.codes)


def test_interrupt_from_another_thread(models) -> None:
    made = session(models, max_frames=100_000, codes=SAMPLED["codes"], max_new_tokens=5)
    made.speaker.forbidden[models.speaker.codec.codec_eos] = True  # would go on for hours
    try:
        threading.Timer(0.5, made.interrupt).start()
        start = time.perf_counter()
        assert Heard(made.answer(said("user", "red?"))).reason == "interrupted"
        assert time.perf_counter() - start < 5
    finally:
        made.speaker.forbidden[models.speaker.codec.codec_eos] = False


def test_the_talker_may_end_and_says_no_other_special_code(models, monkeypatch) -> None:
    chat, codec = CHATS["text"], models.speaker.codec
    logits = models.speaker.talker.logits

    def tempting(hidden: torch.Tensor) -> torch.Tensor:
        scores = logits(hidden)
        scores[:, [codec.codec_pad, codec.codec_bos]] = 2e4
        scores[:, codec.codec_eos] = 1e4
        return scores

    monkeypatch.setattr(models.speaker.talker, "logits", tempting)
    monkeypatch.setattr(models.speaker, "forbidden", Speaker(models.model, models.tokenizer).forbidden)  # untouched
    found = Heard(session(models, chat).answer(chat[-1]))
    assert (len(found.pieces), found.reason) == (0, "end")


def test_the_text_goes_on_where_the_talker_has_ended(models, monkeypatch) -> None:
    chat = CHATS["text"]
    plain = Heard(session(models, chat).answer(chat[-1]))
    only_the_end = torch.ones_like(models.speaker.forbidden)
    only_the_end[models.speaker.codec.codec_eos] = False
    events, made = [], session(models, chat)
    for event in made.answer(chat[-1]):
        events.append(event)
        if isinstance(event, AudioPiece) and event.frame == 1:
            monkeypatch.setattr(models.speaker, "forbidden", only_the_end)
    found = Heard(events)
    assert (len(found.pieces), found.reason, found.ids) == (2, "end", plain.ids)
    assert made.history[-1].segments[0].text == models.tokenizer.decode(plain.ids)


def test_only_one_answer_at_a_time(models) -> None:
    made = session(models)
    events = made.answer(said("user", "red?"))
    next(events)
    with pytest.raises(RuntimeError, match="has not ended"):
        next(made.answer(said("user", "blue?")))
    events.close()
    assert Heard(made.answer(said("user", "blue?"))).reason


def test_async_gives_the_same_and_leaves_the_loop_free(models) -> None:
    chat = CHATS["text"]

    async def listen() -> tuple[list[Any], int]:
        ticks, events = 0, []

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        other = asyncio.create_task(tick())
        async for event in session(models, chat).answer_async(chat[-1]):
            events.append(event)
        other.cancel()
        return events, ticks

    events, ticks = asyncio.run(listen())
    assert np.array_equal(Heard(events).codes, Heard(session(models, chat).answer(chat[-1])).codes)
    assert ticks > len(events)


def test_an_async_answer_can_be_cancelled(models) -> None:
    made = session(models, max_frames=500)

    async def some() -> None:
        events = made.answer_async(said("user", "red?"))
        async for event in events:
            if isinstance(event, AudioPiece) and event.frame == 2:
                break
        await events.aclose()

    asyncio.run(some())
    assert [m.role for m in made.history] == ["user", "assistant"]


def test_text_is_edited_on_its_way_to_the_talker(models) -> None:
    chat, calls = CHATS["text"], []
    (extra,) = models.tokenizer.encode("a")

    def edit(ids: list[int], last: bool) -> list[int]:
        calls.append((ids, last))
        return [extra, extra] if last else ids if len(calls) == 1 else []

    plain = Heard(session(models, chat).answer(chat[-1]))
    edited = Heard(session(models, chat, edit_text=edit).answer(chat[-1]))
    assert edited.ids == plain.ids
    assert [ids for ids, _ in calls[:-1]] == [[i] for i in plain.ids[:-1]]  # it was cut off: the last is not spoken
    assert calls[-1] == ([], True)
    answer = models.speaker.answer(session(models).options, prompt_of(models, chat), [plain.ids[0], extra, extra])
    assert np.array_equal(edited.codes, Heard(e for _, e in events_of(models, [answer])).codes)
    silent = Heard(session(models, chat, edit_text=lambda ids, last: []).answer(chat[-1]))
    assert (silent.reason, silent.ids) == ("silent", plain.ids)


CALL = '<tool_call>\n{"name": "a red cat", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (f"a cat{CALL}\n{CALL}\nno", "a catno"),
        ("<think>\nred\n</think>\n\na cat", "a cat"),
        (f"a cat<think>what {CALL} is</think>is red", "a catis red"),  # a thought about calls
        (f"what<think>is{CALL}", "what"),  # never closed
        ("a cat</think>\n\nis red</tool_call>", "a catis red"),  # never begun
        ("a<thi cat <tool_cal", "a<thi cat <tool_cal"),  # characters that only begin like it
    ],
)
def test_calls_and_thoughts_are_written_but_never_said(models, monkeypatch, written: str, said: str) -> None:
    """Token by token, as the Thinker writes them: the codes are those of the other words alone."""
    chat = CHATS["text"]
    script(models, monkeypatch, written)
    heard = Heard(session(models, chat, max_new_tokens=999).answer(chat[-1]))
    assert heard.text == written
    monkeypatch.undo()
    words = [i for part in re.split("(a cat|is red)", said) for i in models.tokenizer.encode(part)]
    answer = models.speaker.answer(session(models).options, prompt_of(models, chat), words)
    assert np.array_equal(heard.codes, Heard(e for _, e in events_of(models, [answer])).codes)
    assert len(heard.pieces) > 0


@pytest.mark.parametrize("written", [CALL, f"<think>a cat</think>\n\n{CALL}", "<think>a cat is"])
def test_a_call_alone_is_answered_in_silence(models, monkeypatch, written: str) -> None:
    chat = CHATS["text"]
    script(models, monkeypatch, written)
    made = session(models, chat, max_new_tokens=999)
    heard = Heard(made.answer(chat[-1]))
    assert (heard.reason, heard.text, len(heard.pieces)) == ("silent", written, 0)
    assert made.history[-1].segments[0].text == written  # it can be answered by a tool


def script(models, monkeypatch, written: str) -> None:
    """The Thinker writes just this."""
    said = Message(role="assistant", segments=(Segment(type="text", text=written),))
    chat = models.tokenizer.render([said])
    first, end = chat.answers[0]
    left = chat.input_ids[first + 1 : end + 1].tolist()
    whole = models.model.config.thinker.vocab_size

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([left.pop(0)]), whole).float()

    monkeypatch.setattr(models.model.thinker, "logits", logits)


def test_given_texts_are_spoken_without_the_thinker(models, monkeypatch) -> None:
    monkeypatch.setattr(models.model.thinker, "forward", None)
    texts = ["a red cat", "no", "what is the matter with the blue cat?"]
    options = dict(codes=PENALISED, residuals=GREEDY, max_frames=10)
    together = speak_texts(models.model, models.tokenizer, texts, "ethan", **options)
    for i, (text, speech) in enumerate(zip(texts, together, strict=True)):
        (alone,) = speak_texts(models.speaker, models.tokenizer, [text], ["ethan"], seed=i, **options)
        assert np.array_equal(speech.codes, alone.codes)
        same_sound(speech.wav, alone.wav)
        assert speech.hit_limit == (len(speech.codes) == 10)
        streamed = Heard(session(models, max_frames=10).answer(say=text))
        assert np.array_equal(streamed.codes, speech.codes)
        same_sound(streamed.wav, speech.wav)
    (asked,) = speak_texts(models.speaker, models.tokenizer, texts[:1], "ethan", questions=["say it"], **options)
    assert not np.array_equal(asked.codes, together[0].codes)


def test_a_text_that_keeps_step_is_read_as_it_was_learnt(models) -> None:
    """With a word at every third frame the Talker reads, frame by frame, what the layout of its answer holds: greedy
    codes are those that it gives to the whole answer at once."""
    model = copy.copy(models.model)
    model.talker = copy.copy(models.model.talker)
    model.talker.config = replace(models.model.talker.config, frames_per_word=3)
    speaker = Speaker(model, models.tokenizer)
    text, options = "a cat", dict(codes=GREEDY, residuals=GREEDY, max_frames=14)
    ids = np.array(models.tokenizer.encode(text))
    (heard,) = speak_texts(speaker, models.tokenizer, [text], "ethan", **options)
    assert len(ids) >= 4
    assert len(heard.codes) > 9
    nobody = UserTurns(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64), np.zeros((3, 0), np.float32))
    voice = speaker.speaker_code("ethan")
    document = talker_layout(*nobody, ids, heard.codes, special=speaker.special, speaker_code=voice)
    asked = Sample(id="", source="", messages=(said("user", "red?"),))
    prompt = models.encoder.encode_prompt(asked, lambda s: s.media)
    inputs = TalkerInputs(**SpokenAnswers.pack([replace(prompt, spoken=(document,))]).inputs())
    with torch.no_grad():
        x = model.talker.embed(inputs, model.thinker.embed_tokens)
        hidden = model.talker(x, inputs.position_ids, inputs.cu_seqlens).hidden
        logits = model.talker.logits(hidden[document.frame_sources]).masked_fill(speaker.forbidden, -torch.inf)
    assert logits.argmax(-1).tolist() == heard.codes[:, 0].tolist()
    (every,) = speak_texts(models.speaker, models.tokenizer, [text], "ethan", **options)
    assert not np.array_equal(every.codes, heard.codes)
    streamed = Heard(session(models, speaker=speaker, **options).answer(say=text))
    assert np.array_equal(streamed.codes, heard.codes)


def test_users_turns_are_those_of_the_layout(models) -> None:
    """Also behind a video whose ids are fractions and whose span ends below its largest id."""
    tokens, special = models.tokenizer, models.speaker.special
    turn = [*special.user_header, *tokens.encode("\nred")]
    video = AudioVideoSpan((3, 40, 4), 0.5, 9)
    n_video, n_image = 3 * 20 * 2 + 9, 4
    other = [tokens.special_ids["<|im_start|>"], *tokens.encode("assistant\nno\n")]
    ids = [*turn, *[0] * n_video, 5, *other, *turn, *[0] * n_image, 5, *other]
    types = np.zeros(len(ids), dtype=np.uint8)
    types[len(turn) : len(turn) + n_video] = 2
    at = len(turn) + n_video + 1 + len(other) + len(turn)
    types[at : at + n_image] = 1
    spans = [TextSpan(len(turn)), video, TextSpan(1 + len(other) + len(turn)), ImageSpan((1, 4, 4)),
             TextSpan(1 + len(other))]  # fmt: skip
    encoded = SimpleNamespace(
        input_ids=np.array(ids), token_types=types, position_ids=tm_rope_positions(spans, ids_per_second=13)
    )
    expected = user_turns(encoded.input_ids, types, spans, special=special)
    for a, b in zip(models.speaker._user_turns(encoded), expected, strict=True):
        assert np.array_equal(a, b)


def test_what_cannot_be_spoken_is_refused(models) -> None:
    with pytest.raises(ValueError, match=r"'nobody': the model has no such voice; it has .*ethan"):
        session(models, voice="nobody")
    with pytest.raises(ValueError, match="max_frames is 0"):
        session(models, max_frames=0)
    with pytest.raises(ValueError, match=r"texts\[1\] is '': it has no token"):
        speak_texts(models.speaker, models.tokenizer, ["a", ""], "ethan")
    with pytest.raises(ValueError, match="2 voices for 1 texts"):
        speak_texts(models.speaker, models.tokenizer, ["a"], ["ethan", "ethan"])
    silent = copy.copy(models.model)
    silent._modules = {**silent._modules, "talker": None, "code2wav": None}
    with pytest.raises(ValueError, match="has no Talker and Code2Wav"):
        Speaker(silent, models.tokenizer)
    other = copy.copy(models.model)
    wave = Code2WavConfig(quantizers=2, codebook_size=8, d_model=16, layers=1, heads=2, kv_heads=2, decoder_dim=32)
    other._modules = {**other._modules, "code2wav": Code2Wav(wave)}
    with pytest.raises(ValueError, match=r"2 codebooks of 8 codes, the Talker says .*different codecs"):
        Speaker(other, models.tokenizer)
    with pytest.raises(ValueError, match="must share one Speaker"):
        next(speak_batch([session(models), session(models, speaker=None)], [[], []]))
