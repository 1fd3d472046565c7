"""`omnitrain generate` on a run folder and on a folder in the public format, from files to printed text."""

from __future__ import annotations

import shutil
import wave
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from omnitrain.__main__ import main
from omnitrain.cli.generate import _OrderedOutput, _transcribe
from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.generation.sampling import Decoding
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights
from tests.models.whisper_reference import small_aut, spoken_sample

SMALL = {"thinker": {"layers": 2}, "aut": {"layers": 1}, "vision": {"layers": 2}}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    texts = ["a red fire engine", "un camion de pompiers rouge", "пожарная машина", "消防车"] * 20
    return train_bpe(texts, 400)


@pytest.fixture(scope="module")
def model(tokenizer) -> OmniModel:
    model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=tokenizer.special_ids, **SMALL)
    init_weights(model, seed=0)
    return model


@pytest.fixture(scope="module")
def model_overrides() -> list[str]:
    return [f"model.{part}.{key}={value}" for part, d in SMALL.items() for key, value in d.items()]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / "noise.png")
    with wave.open(str(folder / "noise.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes(rng.integers(-9999, 9999, 16_000, dtype=np.int16).tobytes())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    return {path.name: path for path in folder.iterdir()}


def run(capsys, *arguments: object) -> str:
    status = main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def fail(capsys, *arguments: object) -> str:
    assert main(["generate", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


LESS = ("--max-new-tokens", 8, "--device", "cpu")


def test_run_folder_and_public_folder_agree(capsys, run_dir, public_dir, media):
    arguments = [*LESS, "--image", media["noise.png"], "--audio", media["noise.wav"], "--system", "Be brief.", "What?"]
    answer = run(capsys, run_dir, *arguments)
    assert answer.strip()
    assert answer == run(capsys, public_dir, *arguments)


def test_media_and_prompt_matter(capsys, run_dir, media):
    answers = [
        run(capsys, run_dir, *LESS, *more)
        for more in (
            ["What?"],
            ["How?"],
            ["--image", media["noise.png"], "What?"],
            ["--audio", media["noise.wav"], "What?"],
            ["--audio", media["noise.wav"], "--image", media["noise.png"], "What?"],
            ["--image", media["noise.png"], "--audio", media["noise.wav"], "What?"],
            ["--plain", "What?"],
            ["What?", "--image", media["noise.png"], "How?"],
        )
    ]
    assert len(set(answers)) == len(answers)


def test_several_prompts_streamed_or_not_print_the_same(capsys, run_dir):
    arguments = [*LESS, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.1, "a", "b", "c"]
    whole = run(capsys, run_dir, *arguments)
    assert [line for line in whole.splitlines() if line.startswith("[")][:1] == ["[1] a"]
    assert "[3] c" in whole
    assert whole == run(capsys, run_dir, "--stream", *arguments)
    assert whole == run(capsys, run_dir, "--prefill-chunk", 3, *arguments)
    assert whole != run(capsys, run_dir, "--seed", 7, *arguments)


def test_a_long_recording_is_read_in_pieces_and_shows_how_far(capsys, run_dir, tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.flac", rng.uniform(-0.1, 0.1, 70 * 16_000), 16_000)
    arguments = [run_dir, *LESS, "--audio", tmp_path / "long.flac", "Transcribe."]
    assert main(["generate", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert "hearing 1:10 of sound, reading 9" in err  # hundred tokens and some
    for more in (["--stream"], ["--prefill-chunk", 200]):
        assert run(capsys, *arguments, *more) == out


def test_streamed_text_waits_for_whole_characters_and_for_its_turn(tokenizer):
    text = "é消a"
    tokens = [token for byte in text for token in tokenizer.encode(byte)]
    stop = tokenizer.stop_ids[0]
    out = StringIO()
    output = _OrderedOutput(tokenizer, ["p", "q"], tokenizer.stop_ids, 100, out)
    output(1, tokenizer.encode("z")[0])
    assert out.getvalue() == "[1] p\n"
    for token in tokens:
        output(0, token)
        assert "\ufffd" not in out.getvalue()
    output(0, stop)
    output(1, stop)
    assert out.getvalue() == f"[1] p\n{text}\n[2] q\nz\n"


def test_functions_may_be_called(capsys, run_dir, tmp_path):
    """A random model calls nothing, or something: either way it ends, and says so."""
    tools = tmp_path / "tools.py"
    docstring = "Finds.\n\n    Args:\n        what: things\n    "
    tools.write_text(f'def find(what: str) -> str:\n    """\n    {docstring}"""\n    return what\n')
    arguments = [*LESS, "--tools", tools, "--tool-rounds", 1, "--thinking-budget", 2, "--no-thinking", "a?"]
    assert run(capsys, run_dir, *arguments)
    assert "no such file of functions" in fail(capsys, run_dir, "--tools", tmp_path / "none.py", "a?")
    assert "give --tools" in fail(capsys, run_dir, "--constrained-calls", "a?")
    assert "--plain knows no turns" in fail(capsys, run_dir, "--tools", tools, "--plain", "a?")
    assert "--thinking-budget -1" in fail(capsys, run_dir, "--thinking-budget", -1, "a?")


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("--image", "--audio", "--video", "--temperature", "--stream", "examples:"))


def test_errors_say_what_to_do(capsys, run_dir, media, tmp_path):
    assert "no such folder" in fail(capsys, tmp_path / "nowhere", "hello")
    assert "neither a run folder" in fail(capsys, tmp_path, "hello")
    assert "--image gone.png: no such file" in fail(capsys, run_dir, "--image", "gone.png", "hello")
    broken = fail(capsys, run_dir, *LESS, "--image", media["broken.png"], "hello")
    assert "broken.png: image_" in broken
    assert "wrong_type: the audio is a png" in fail(capsys, run_dir, *LESS, "--audio", media["noise.png"], "hello")
    assert "top_p is 3.0" in fail(capsys, run_dir, *LESS, "--top-p", 3, "hello")
    (tmp_path / "config.yaml").write_text("model: {}\ndata: {}\n")
    assert "has not written a checkpoint yet" in fail(capsys, tmp_path, "hello")


def test_a_device_that_is_not_there(capsys, run_dir):
    gone = fail(capsys, run_dir, "--device", "cuda:77", "hello")
    assert "device cuda:77: it cannot be used here; this machine has cpu" in gone
    assert "device nonsense: it cannot" in fail(capsys, run_dir, "--device", "nonsense", "hello")
    assert "device meta: it cannot" in fail(capsys, run_dir, "--device", "meta", "hello")


def test_a_damaged_checkpoint_is_one_line(capsys, run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5000])
    said = fail(capsys, folder, *LESS, "hello")
    assert f"{checkpoint}: " in said
    assert said.count("\n") == 1


def test_names_from_outside_do_not_steer_the_terminal(capsys, tmp_path):
    assert "red\\x1b[31m" in fail(capsys, tmp_path / "red\x1b[31m", "hello")


def test_a_strangers_run_folder_cannot_run_code(capsys, run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    config = (folder / "config.yaml").read_text()
    target = "omnitrain.models.omni.OmniModel"
    assert target in config
    (folder / "config.yaml").write_text(config.replace(target, "os.system"))
    assert "os.system" in fail(capsys, folder, *LESS, "hello")


def test_weights_that_do_not_fit_are_refused(capsys, run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("    layers: 2\n", "    layers: 3\n", 1))
    assert "does not fit the model" in fail(capsys, folder, *LESS, "hello")


def test_an_aut_prints_what_is_final_as_it_comes(capsys, monkeypatch) -> None:
    """Five seconds in windows of two: with --stream several pieces, together the line that is printed else."""
    written = []

    class Letters:
        stop_ids = ()

        def decode(self, ids) -> str:
            return "".join("abcdé"[i % 5] for i in ids)

    model, prompt = small_aut(seed=1), spoken_sample(0, frames=500, before=2, after=3)
    for stream in (False, True):
        _transcribe(model, [prompt], Decoding(max_new_tokens=6), Letters(), stream=stream)
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert len(written[0].strip()) > 6
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *texts, **_: pieces.extend(filter(None, texts)))
    _transcribe(model, [prompt], Decoding(max_new_tokens=6), Letters(), stream=True)
    assert len(pieces) > 1
    assert "".join(pieces) == written[0].strip()
