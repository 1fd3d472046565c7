"""`omnitrain talk` on a run folder and on a folder in the public format, from files to a WAV file."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from omnitrain.__main__ import main
from omnitrain.cli.talk import GrowingWav
from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.interop.public_format import save_pretrained
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights

VOICES = {"slt": 509, "rms": 510, "kal16": 511}  # those of model=tiny_speech
SMALL = {
    "thinker": {"layers": 2},
    "aut": {"layers": 1},
    "vision": {"layers": 2},
    "talker": {"layers": 1, "codebooks": 3, "speakers": VOICES},
    "code2wav": {"layers": 1, "decoder_dim": 32, "d_model": 32},
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    roles = ["system\n", "user\n", "assistant\n"]
    return train_bpe(["a red fire engine", "un camion de pompiers rouge", "消防车", *roles] * 20, 400)


@pytest.fixture(scope="module")
def model(tokenizer) -> OmniModel:
    ids = {**tokenizer.special_ids, **{role: tokenizer.encode(role)[0] for role in ("system", "user", "assistant")}}
    model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=ids, speech=True, **SMALL)
    init_weights(model, seed=1)  # one that has something to say
    return model


@pytest.fixture(scope="module")
def model_overrides() -> list[str]:
    given = [(part, key, value) for part, d in SMALL.items() for key, value in d.items() if key != "speakers"]
    return ["model=tiny_speech", *(f"model.{part}.{key}={value}" for part, key, value in given)]


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("media") / "noise.wav"
    with GrowingWav(path, 16_000) as file:
        file.write(np.random.default_rng(0).uniform(-0.3, 0.3, 16_000))
    return path


def run(capsys, *arguments: object) -> str:
    status = main(["talk", *map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def fail(capsys, *arguments: object) -> str:
    assert main(["talk", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


LESS = ("--max-new-tokens", 6, "--max-seconds", 0.8)


def test_run_folder_and_public_folder_say_the_same(capsys, run_dir, public_dir, noise, tmp_path):
    arguments = [*LESS, "--speech-temperature", 0, "--audio", noise, "--system", "Be brief.", "What?"]
    text = run(capsys, run_dir, *arguments, "--out", tmp_path / "a.wav")
    assert text.strip()
    assert text == run(capsys, public_dir, *arguments, "--out", tmp_path / "b.wav")
    a, b = samples(tmp_path / "a.wav"), samples(tmp_path / "b.wav")
    assert len(a) % 1920 == 0
    assert 0 < len(a) <= 10 * 1920
    assert np.abs(a.astype(int) - b).max() <= 1


def test_events_as_json(capsys, run_dir, tmp_path):
    out = tmp_path / "a.wav"
    lines = run(capsys, run_dir, *LESS, "--seed", 3, "--json", "What?", "--out", out).splitlines()
    events = [json.loads(line) for line in lines]
    done = events[-1]
    audio = [e for e in events if e["event"] == "audio"]
    assert [e["frame"] for e in audio] == list(range(len(audio)))
    assert [e["event"] for e in events[:2]] == ["text", "audio"]
    assert done["event"] == "done"
    assert done["reason"] in ("end", "max_frames")
    assert done["first_audio_seconds"] == audio[0]["seconds"]
    assert done["audio_seconds"] == pytest.approx(0.08 * len(audio))
    assert done["rtf"] == pytest.approx(done["seconds"] / done["audio_seconds"], rel=0.01)
    assert [e["seconds"] for e in events] == sorted(e["seconds"] for e in events)
    assert sum(e["samples"] for e in audio) == len(samples(out))
    again = tmp_path / "b.wav"
    run(capsys, run_dir, *LESS, "--seed", 3, "What?", "--out", again)
    assert np.array_equal(samples(out), samples(again))
    run(capsys, run_dir, *LESS, "--seed", 4, "What?", "--out", again)
    assert not np.array_equal(samples(out), samples(again))


def test_a_given_text_is_spoken(capsys, run_dir, tmp_path):
    arguments = ["--speech-temperature", 0, "--max-seconds", 0.8]
    say = ["--say", "a red engine"]
    assert run(capsys, run_dir, *arguments, *say, "--out", tmp_path / "a.wav").strip() == "a red engine"
    run(capsys, run_dir, *arguments, *say, "Say: a red engine", "--voice", "Kal16", "--out", tmp_path / "b.wav")
    run(capsys, run_dir, *arguments, *say, "--voice", "slt", "--out", tmp_path / "c.wav")
    a, b, c = (samples(tmp_path / f"{name}.wav") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_the_file_is_valid_at_any_time(tmp_path):
    wav, path = np.linspace(-1, 1, 1920, dtype=np.float32), tmp_path / "a.wav"
    with GrowingWav(path, 24_000) as file:
        assert len(samples(path)) == 0
        for i in range(3):
            file.write(wav)
            assert len(samples(path)) == 1920 * (i + 1)
            assert path.stat().st_size == 44 + 2 * 1920 * (i + 1)
    assert np.abs(samples(path)[:1920] / 32767 - wav).max() < 1e-4


def test_what_was_said_before_ctrl_c_stays(capsys, run_dir, tmp_path, monkeypatch):
    written = GrowingWav.write

    def interrupt(self, wav):
        written(self, wav)
        if self.samples == 3 * 1920:
            raise KeyboardInterrupt

    monkeypatch.setattr(GrowingWav, "write", interrupt)
    arguments = ["What?", "--max-seconds", 9, "--device", "cpu", "--out", tmp_path / "a.wav"]
    assert main(["talk", str(run_dir), *map(str, arguments)]) == 130
    assert len(samples(tmp_path / "a.wav")) == 3 * 1920


def test_errors_say_what_to_do(capsys, run_dir, tokenizer, tmp_path):
    out = ("--out", tmp_path / "a.wav", "--device", "cpu")
    assert "nothing is asked" in fail(capsys, run_dir, *out)
    assert "'nobody': the model has no such voice; it has " in fail(capsys, run_dir, *out, "hello", "--voice", "nobody")
    assert "--audio gone.wav: no such file" in fail(capsys, run_dir, *out, "--audio", "gone.wav", "hello")
    assert "no such folder" in fail(capsys, tmp_path / "nowhere", *out, "hello")
    assert "has no token" in fail(capsys, run_dir, *out, "--say", "")
    assert "is not positive" in fail(capsys, run_dir, *out, "hello", "--max-seconds", 0)
    silent = build(
        "tiny",
        vocab_size=tokenizer.vocab_size,
        special_tokens=tokenizer.special_ids,
        **{k: SMALL[k] for k in ("thinker", "aut", "vision")},
    )
    init_weights(silent, seed=0)
    save_pretrained(silent, tmp_path / "silent")
    tokenizer.save(tmp_path / "silent" / "tokenizer.json")
    assert "has no Talker and Code2Wav" in fail(capsys, tmp_path / "silent", *out, "hello")
