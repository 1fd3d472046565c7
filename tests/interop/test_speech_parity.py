"""Talker, MTP and Code2Wav number for number against `transformers`, for two random full models, fp32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.data.talker_layout import SpeechTokens, TalkerDocument, talker_layout, user_turns
from omnitrain.generation.cache import PackedKVCache
from omnitrain.interop.public_format import load_pretrained, public_config, save_pretrained
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, count_parameters, init_weights
from omnitrain.models.talker import TalkerInputs
from tests.interop.public_models import SPECIAL, PublicSample, public_sample, save_public_model

CLOSE = dict(rtol=1e-4, atol=1e-4)
FRAMES = 12


def turn(role: str, *pieces: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """``<|im_start|>role`` and one token, the pieces, ``<|im_end|>`` and one token."""
    return [("special", "im_start", role), ("text", 1), *pieces, ("special", "im_end"), ("text", 1)]


CHATS = {
    "text": [*turn("system", ("text", 4)), *turn("user", ("text", 6))],
    "several_turns": [
        *turn("user", ("text", 3), ("image", (1, 4, 4)), ("text", 2)),
        *turn("assistant", ("text", 5)),
        *turn("user", ("text", 4)),
    ],
    "audio": [*turn("system", ("text", 4)), *turn("user", ("audio", 250), ("text", 2))],
    "image_and_audio": [
        *turn("system", ("text", 9)),
        *turn("user", ("text", 2), ("image", (1, 4, 6)), ("text", 3), ("audio", 130), ("text", 2)),
    ],
    "video_with_sound": [
        *turn("system", ("text", 2)),
        *turn("user", ("audio_video", (4, 4, 4), 0.5, 210), ("text", 5)),
    ],
    "tall_video_with_sound": [*turn("user", ("audio_video", (1, 40, 4), 0.5, 60), ("text", 1)), *turn("user")],
}


@pytest.fixture(scope="module", params=[0, 1])
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    reference = save_public_model(folder, variant=request.param, kind="full", seed=request.param + 5)
    # The reference's Talker computes positions of sound beside pictures with a setting that it lacks.
    reference.talker.config.audio_config = reference.config.thinker_config.audio_config
    return SimpleNamespace(reference=reference, ours=load_pretrained(folder).eval(), folder=folder, spoken={})


def prompt(models, name: str) -> PublicSample:
    pieces = [*CHATS[name], ("special", "im_start", "assistant"), ("text", 1)]
    return public_sample(models.reference.config, pieces, seed=sorted(CHATS).index(name))


def speak(models, name: str, **options: Any) -> SimpleNamespace:
    """The reference's `generate`, and what its Talker was given and gave."""
    key = (name, *options.items())
    if key in models.spoken:
        return models.spoken[key]
    reference, inputs = models.reference, prompt(models, name).reference_inputs
    if inputs.get("use_audio_in_video"):
        inputs["talker_use_audio_in_video"] = True  # `generate` forgets to hand it on
    seen: dict[str, Any] = {"positions": []}
    generate = reference.talker.generate

    def spy(**arguments: Any) -> Any:
        seen["arguments"], seen["result"] = arguments, generate(**arguments)
        return seen["result"]

    def positions(module: Any, args: Any, arguments: dict[str, Any]) -> None:
        seen["positions"].append(arguments["position_ids"][-3:, 0])

    hook = reference.talker.model.register_forward_pre_hook(positions, with_kwargs=True)
    reference.talker.generate = spy
    try:
        ids, waveform = reference.generate(
            **inputs,
            **{
                "speaker": "Ethan",
                "thinker_do_sample": False,
                "thinker_max_new_tokens": 7,
                "thinker_eos_token_id": SPECIAL["im_end"],
                "talker_do_sample": False,
                "talker_max_new_tokens": FRAMES + 1,
                "talker_repetition_penalty": 1.0,
                "talker_output_logits": True,
                **options,
            },
        )
    finally:
        reference.talker.generate = generate
        hook.remove()
    result = seen["result"]
    frames = [states[-1] for states in result.hidden_states if states[-1] is not None]
    spoken = SimpleNamespace(
        ids=ids[0],
        answer=ids[0, inputs["input_ids"].shape[1] : -1],  # the reference never speaks the last token
        waveform=waveform,
        prompt_embeds=seen["arguments"]["inputs_embeds"][0],
        position_ids=torch.cat(seen["positions"], dim=1),
        logits=torch.cat(result.logits),
        codes=torch.cat(frames),
        next_code=result.sequences[0, -1],
    )
    models.spoken[key] = spoken
    return spoken


def tokens(model: OmniModel, newline: int = 0) -> SpeechTokens:
    c, special = model.config.talker, model.config.special_tokens
    assert c is not None
    return SpeechTokens(
        user_header=(special["<|im_start|>"], special["user"]),
        assistant_header=(special["<|im_start|>"], special["assistant"], newline),
        tts_pad=special["<tts_pad>"],
        tts_bos=special["<tts_text_bos>"],
        tts_eos=special["<tts_text_eod>"],
        **c.special_codes(),
    )


def document(models, name: str, answer: Tensor, codes: Tensor) -> tuple[TalkerDocument, Tensor]:
    """Our layout of a prompt and its answer, and the hidden states of the Thinker that it reads."""
    model, sample = models.ours, prompt(models, name)
    encoded = sample.encoded
    special = tokens(model, newline=int(encoded.input_ids[-1]))  # a random token stands for it
    end = len(encoded) - len(special.assistant_header)
    user = user_turns(encoded.input_ids[:end], encoded.token_types[:end], sample.spans, special=special)
    made = talker_layout(
        *user,
        answer.numpy(),
        codes.numpy(),
        special=special,
        speaker_code=model.config.talker.speakers["ethan"],
    )
    return made, model(**PackedBatch.pack([encoded]).model_inputs()).accept_hidden


def inputs_of(*documents: TalkerDocument, rows: tuple[int, ...] = (0,)) -> TalkerInputs:
    """Documents end to end; `rows`: where each one's sample starts among the Thinker's positions."""
    position, frame = 0, 0
    parts: dict[str, list[np.ndarray]] = {name: [] for name in vars(documents[0]) if name != "heard"}
    for d, row in zip(documents, rows, strict=True):
        shift = {"hidden_rows": row, "frame_rows": frame, "frame_sources": position}
        for name, array in ((name, getattr(d, name)) for name in parts):
            parts[name].append(np.where(array >= 0, array + shift[name], array) if name in shift else array)
        position, frame = position + len(d), frame + len(d.codes)
    joined = {k: torch.from_numpy(np.concatenate(v, axis=int(k == "position_ids"))) for k, v in parts.items()}
    return TalkerInputs(**joined, cu_seqlens=torch.tensor(np.cumsum([0, *map(len, documents)]), dtype=torch.int32))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", CHATS)
def test_talker_reads_and_predicts_the_same(models, name: str) -> None:
    """Embeddings of the prompt, positions, logits of codebook 0 at every frame."""
    spoken, talker = speak(models, name), models.ours.talker
    doc, accept_hidden = document(models, name, spoken.answer, spoken.codes)
    inputs = inputs_of(doc)
    x = talker.embed(inputs, models.ours.thinker.embed_tokens, accept_hidden)
    close(x[: len(spoken.prompt_embeds)], spoken.prompt_embeds)
    assert len(doc) == len(spoken.prompt_embeds) + len(spoken.codes)
    assert torch.equal(inputs.position_ids, spoken.position_ids)
    output = talker(x, inputs.position_ids, inputs.cu_seqlens)
    sources = torch.cat([inputs.frame_sources, torch.tensor([len(doc) - 1])])
    close(talker.logits(output.hidden[sources]), spoken.logits)
    assert torch.equal(inputs.labels[sources[:-1]], spoken.codes[:, 0])
    assert inputs.labels[-1] == talker.config.codec_eos


@torch.no_grad()
def test_an_answer_that_ends_by_itself(models) -> None:
    """The token that ends the answer is not spoken; the Talker reads end-of-text in its place."""
    talker = models.ours.talker
    answers = {name: speak(models, name).answer.tolist() for name in CHATS}
    name, n = next((k, i) for k, words in answers.items() for i in range(2, 6) if words[i] not in words[:i])
    spoken = speak(models, name, thinker_eos_token_id=answers[name][n])
    assert spoken.ids[-1] == answers[name][n]
    assert spoken.answer.tolist() == answers[name][:n]
    doc, accept_hidden = document(models, name, spoken.answer, spoken.codes)
    inputs = inputs_of(doc)
    x = talker.embed(inputs, models.ours.thinker.embed_tokens, accept_hidden)
    hidden = talker(x, inputs.position_ids, inputs.cu_seqlens).hidden
    close(talker.logits(hidden[inputs.frame_sources]), spoken.logits[:-1])


@torch.no_grad()
def test_mtp_predicts_the_same(models) -> None:
    """Logits of every codebook, teacher-forced, and the codes that the reference generated from them."""
    spoken, talker = speak(models, "several_turns"), models.ours.talker
    doc, accept_hidden = document(models, "several_turns", spoken.answer, spoken.codes)
    inputs = inputs_of(doc)
    x = talker.embed(inputs, models.ours.thinker.embed_tokens, accept_hidden)
    hidden = talker(x, inputs.position_ids, inputs.cu_seqlens).hidden
    logits = talker.mtp.logits(talker.residual_hidden(hidden, inputs))

    predictor, sources = models.reference.talker.code_predictor, inputs.frame_sources
    known = [models.reference.talker.model.codec_embedding(inputs.codes[:, 0])]
    known += [predictor.model.codec_embedding[q - 1](inputs.codes[:, q]) for q in range(1, inputs.codes.shape[1] - 1)]
    states = predictor.model(inputs_embeds=torch.stack([hidden[sources], *known], dim=1)).last_hidden_state
    for q, head in enumerate(predictor.lm_head):
        close(logits[:, q], head(states[:, q + 1]))
    assert torch.equal(logits.argmax(-1), spoken.codes[:, 1:])

    codes, embedding = talker.mtp.generate(hidden[sources], known[0], lambda scores: scores.argmax(-1))
    assert torch.equal(codes, spoken.codes[:, 1:])
    close(known[0] + embedding, talker.embed_frames(inputs.codes))


@torch.no_grad()
def test_documents_in_one_pack(models) -> None:
    """Three answers of different length end to end give what each gives alone."""
    names, talker = ("text", "image_and_audio", "audio"), models.ours.talker
    spoken = [speak(models, name) for name in names]
    cut = [s.codes[: len(s.codes) - 2 * i] for i, s in enumerate(spoken)]
    made = [document(models, n, s.answer, c) for n, s, c in zip(names, spoken, cut, strict=True)]
    rows = np.cumsum([0, *(len(hidden) for _, hidden in made)])[:-1].tolist()
    inputs = inputs_of(*(doc for doc, _ in made), rows=tuple(rows))
    x = talker.embed(inputs, models.ours.thinker.embed_tokens, torch.cat([hidden for _, hidden in made]))
    output = talker(x, inputs.position_ids, inputs.cu_seqlens)
    expected = torch.cat([s.logits[: len(c)] for s, c in zip(spoken, cut, strict=True)])
    close(talker.logits(output.hidden[inputs.frame_sources]), expected)
    logits = talker.mtp.logits(talker.residual_hidden(output.hidden, inputs))
    assert torch.equal(logits.argmax(-1), torch.cat(cut)[:, 1:])
    assert output.router_counts.sum() == len(x) * talker.config.top_k * talker.config.layers


@torch.no_grad()
def test_code2wav(models) -> None:
    """The reference decodes in pieces of 300 frames; here there is one."""
    spoken = speak(models, "text")
    waveform = models.ours.code2wav(spoken.codes[None])
    close(waveform, spoken.waveform[:, 0])
    assert waveform.std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.05])
@pytest.mark.parametrize("name", ["text", "image_and_audio"])
def test_greedy_speech_is_the_same(models, name: str, penalty: float) -> None:
    """The whole way, one frame at a time with a cache: the same codes as the reference's `generate`."""
    spoken, model = speak(models, name, talker_repetition_penalty=penalty), models.ours
    talker, c = model.talker, model.config.talker
    empty = torch.zeros(0, c.codebooks, dtype=torch.int64)
    doc, accept_hidden = document(models, name, spoken.answer, empty)
    inputs, cache = inputs_of(doc), PackedKVCache()
    x = talker.embed(inputs, model.thinker.embed_tokens, accept_hidden)
    hidden = talker(x, inputs.position_ids, inputs.cu_seqlens, cache).hidden[-1:]
    special = tokens(model)
    words = torch.tensor([*spoken.answer[1:].tolist(), special.tts_eos] + [special.tts_pad] * FRAMES)
    words = talker.text_projection(model.thinker.embed_tokens(words))
    forbidden = torch.arange(c.codec_vocab) >= c.codec_vocab - 1024
    forbidden[c.codec_eos] = False
    chosen, frames = [], []
    for step in range(FRAMES + 1):
        logits = talker.logits(hidden)[0]
        said = torch.tensor(sorted(set(chosen)), dtype=torch.int64)
        logits[said] = torch.where(logits[said] < 0, logits[said] * penalty, logits[said] / penalty)
        code = logits.masked_fill(forbidden, -torch.inf).argmax()
        chosen.append(int(code))
        if code == c.codec_eos or step == FRAMES:
            break
        first = talker.codec_embedding(code[None])
        residuals, embedding = talker.mtp.generate(hidden, first, lambda scores: scores.argmax(-1))
        frames.append(torch.cat([code[None], residuals[0]]))
        position = inputs.position_ids[:, -1:] + 1 + step
        x = first + embedding + words[step]
        hidden = talker(x, position, torch.tensor([0, 1], dtype=torch.int32), cache).hidden
    assert len(frames) > 3
    assert torch.equal(torch.stack(frames), spoken.codes)
    assert chosen[-1] == spoken.next_code


def test_saved_by_us_loaded_by_transformers(models, tmp_path) -> None:
    """Saved in several files: the same tensors under the same names, and the same speech."""
    from transformers import Qwen3OmniMoeForConditionalGeneration

    save_pretrained(models.ours, tmp_path, max_shard_bytes=300_000)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    ours = {k: v for file in files for k, v in load_file(file).items()}
    theirs = load_file(models.folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)

    back = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert back.has_talker
    back.talker.config.audio_config = back.config.thinker_config.audio_config
    again = SimpleNamespace(reference=back, spoken={})
    expected, actual = speak(models, "image_and_audio"), speak(again, "image_and_audio")
    assert torch.equal(actual.codes, expected.codes)
    close(actual.waveform, expected.waveform)


def test_loaded_again_or_without_speech(models, tmp_path) -> None:
    save_pretrained(models.ours, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config == models.ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), models.ours.parameters(), strict=True))
    silent = load_pretrained(models.folder, speech=False)
    assert silent.talker is None
    assert silent.code2wav is None
    assert silent.config.thinker == models.ours.config.thinker
    save_pretrained(models.ours, tmp_path / "thinker", layout="thinker")
    assert load_pretrained(tmp_path / "thinker").talker is None


def test_a_trained_talker_replaces_the_one_of_the_base(models, tmp_path) -> None:
    """`base` gives what the model was loaded without, and only that."""
    model = load_pretrained(models.folder)
    with torch.no_grad():
        model.talker.norm.weight.mul_(2)
    save_pretrained(model, tmp_path, base=models.folder)
    before, after = load_file(models.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"talker.model.norm.weight"}


@pytest.mark.parametrize("trim", ["public", "causal"])
def test_our_own_model_goes_out_and_comes_back(tmp_path, trim: str) -> None:
    from transformers import Qwen3OmniMoeForConditionalGeneration

    special = {"<|im_start|>": 300, "<|audio_pad|>": 306, "<|image_pad|>": 308, "<|video_pad|>": 309, "user": 302}
    sizes = dict(thinker={"layers": 3}, aut={"layers": 1}, talker={"layers": 1}, code2wav={"trim": trim})
    model = build("tiny", vocab_size=320, special_tokens=special, speech=True, **sizes)
    init_weights(model, seed=0)
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    reference = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(reference.talker.codec_head.weight, model.talker.codec_head.weight)


def test_the_full_size_is_the_reference_s() -> None:
    """`config.json` of our 30B preset, built by transformers on the meta device: every parameter count agrees."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    with torch.device("meta"):
        ours = build("qwen3_omni_30b_a3b", speech=True)
        config = Qwen3OmniMoeConfig.from_dict(public_config(ours.config, "full"))
        reference = Qwen3OmniMoeForConditionalGeneration(config)
    assert count_parameters(ours.talker) == count_parameters(reference.talker)
    assert count_parameters(ours.talker.mtp) == count_parameters(reference.talker.code_predictor)
    assert count_parameters(ours.code2wav) == count_parameters(reference.code2wav)
    assert count_parameters(ours) == count_parameters(reference)
