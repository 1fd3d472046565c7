"""`omnitrain data encode`: the codec's own codes, everything else as it was, and never a half shard."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from forked_runs import Kill, Runs

from omnitrain.cli.data import main
from omnitrain.config.compose import run_config
from omnitrain.config.locations import PACK
from omnitrain.config.saved import write_config
from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.codec_frames import AnswerFile, decode_codes
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_media_table, write_shards
from omnitrain.interop.mimi import MimiCodec
from omnitrain.models.code2wav import fingerprint
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel, thinker_fingerprint
from omnitrain.models.presets import build, build_codec, init_codec_weights, init_weights
from omnitrain.runs.load import SAMPLE_RATE, codec_fingerprint, load, load_codec
from omnitrain.vocabulary import AUDIO
from tests.interop.test_mimi import save_mimi

MODEL = {
    "preset": "tiny",
    "encoder_dim": 4,
    "layers": 1,
    "ffn": 16,
    "codebook_dim": 4,
    "decoder": {"codebook_size": 32, "layers": 1, "ffn": 16, "decoder_dim": 16, "quantizers": 3},
}


def tone(seconds: float, rate: int = SAMPLE_RATE, pitch: float = 200.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * pitch * time) * np.sin(2 * np.pi * 3 * time)).astype(np.float32)


def save_codec(run_dir: Path, seed: int = 0, fold: bool = True) -> Path:
    """The run folder of a codec whose codebooks come from one batch."""
    codec = build_codec(**MODEL)
    init_codec_weights(codec, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        codec.train()(torch.from_numpy(np.stack([tone(1.6, pitch=150 + 50 * i) for i in range(4)])))
        codec.quantizer.update()
    if fold:
        codec.fold_codebooks()
    state = {f"model.{name}": value for name, value in codec.state_dict().items()}
    (run_dir / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {**state, "content.weight": torch.ones(2)}}, run_dir / "checkpoints" / "last.ckpt")
    write_model(run_dir, "+recipe=codec", codec)
    return run_dir


def write_model(run_dir: Path, recipe: str, model: Codec | OmniModel) -> None:
    """The configuration of a run of `recipe` with another model."""
    config = run_config([recipe, f"paths.run_dir={run_dir}"])
    write_config(replace(config, model=replace(config.model, config=model.config)), run_dir)


def change_model(run_dir: Path, **changes: Any) -> None:
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    values["model"] |= changes
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))


def spoken(name: str, media: bytes | None = None, **changes) -> Sample:
    segment = Segment(**{"type": "speech", "text": f"it is {name}", "media": media, **changes})
    question = Message(role="user", segments=(Segment(type="text", text="Say it."),))
    meta = {"voice": "slt", "synthetic": "flite"}
    messages = (question, Message(role="assistant", segments=(segment,)))
    return Sample(id=name, source="toy/slt", task="tts", languages=("en",), concept=name, meta=meta, messages=messages)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec") / "run")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of three recordings each."""
    folder = tmp_path / "shards"
    samples = [spoken(f"s{i}", encode_audio(tone(0.5 + 0.13 * i, pitch=150 + 20 * i), 24_000, "wav")) for i in range(9)]
    write_shards(samples, folder, "toy", rows_per_shard=3, progress=False)
    return folder


def codes_of(sample: Sample, codec: str) -> np.ndarray:
    media = sample.messages[-1].segments[0].media
    assert media is not None
    return decode_codes(media, codec)


def assert_encoded(folder: Path, shards: Path, codec) -> None:
    made, source = SampleSource(folder), SampleSource(shards)
    assert [file.name for file in made.files] == [file.name for file in source.files]
    for new, old in zip(made, source, strict=True):
        segment = old.messages[-1].segments[0]
        wav = decode_audio(source.media_bytes(segment), SAMPLE_RATE)
        expected = codec.encode(torch.from_numpy(wav)[None])[0].numpy()
        assert np.array_equal(codes_of(new, codec_fingerprint(codec)), expected)
        assert len(expected) == -(-len(wav) // 1920)
        assert new.messages[-1].segments[0].text == segment.text
        facts = [(s.id, s.source, s.split, s.task, s.concept, s.languages, s.meta, s.messages[0]) for s in (new, old)]
        assert facts[0] == facts[1]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_codes_are_the_codecs_and_all_else_stays(run_dir, shards, tmp_path, capsys, workers) -> None:
    out = tmp_path / "out"
    assert main(["encode", str(run_dir), str(shards), "--out", str(out), "--workers", workers]) == 0
    assert_encoded(out, shards, load_codec(run_dir))
    printed = capsys.readouterr().out
    seconds = sum(0.5 + 0.13 * i for i in range(9))
    frames = sum(len(codes_of(sample, codec_fingerprint(load_codec(run_dir)))) for sample in SampleSource(out))
    row = next(line for line in printed.splitlines() if " all " in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        "9", "0", "0", f"{seconds:.1f}", str(frames), f"{frames * 15 / seconds / 1000:.2f}",
    ]  # fmt: skip
    assert "SI-SDR" in printed
    assert len([line for line in printed.splitlines() if line.startswith("│ s")]) == 4
    # Those who look at data know the frames.
    assert main(["verify", str(out), "--threads", "1"]) == 0
    assert f"9 rows, 0 bad, {frames} codec frames" in capsys.readouterr().out
    assert main(["inspect", str(out), "--count", "1"]) == 0
    assert "7 codec frames of 3 codes" in capsys.readouterr().out
    assert main(["inspect", str(out), "--count", "1", "--html", str(tmp_path / "page.html")]) == 0
    assert "7 codec frames of 3 codes" in (tmp_path / "page.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["stats", str(out), "--json"]) == 0
    [group] = json.loads(capsys.readouterr().out)
    assert (group["codec_frames"], group["audio_seconds"], group["bad"]) == (frames, 0, 0)
    # Frames are not recordings.
    assert main(["encode", str(run_dir), str(out), "--out", str(tmp_path / "again"), "--workers", "1"]) == 1
    assert "already_codes" in capsys.readouterr().err


def test_a_mimi(shards, tmp_path, capsys) -> None:
    save_mimi(tmp_path / "mimi")
    out = tmp_path / "out"
    assert main(["encode", str(tmp_path / "mimi"), str(shards), "--out", str(out), "--workers", "1"]) == 0
    codec = load_codec(tmp_path / "mimi")
    assert isinstance(codec, MimiCodec)
    assert_encoded(out, shards, codec)
    assert "SI-SDR" in capsys.readouterr().out
    # A Mimi with other weights is another codec.
    before = codec_fingerprint(codec)
    codec.model.quantizer.acoustic_residual_vector_quantizer.layers[3].codebook.embed_sum[0, 0] += 1
    assert len(before) == 8
    assert codec_fingerprint(codec) != before


def test_a_killed_run_continues_behind_the_last_shard(run_dir, shards, tmp_path, capsys, runs: Runs) -> None:
    """Four kills: amid the second shard, three times, and between that shard and its record."""
    out, here = tmp_path / "out", "omnitrain.runs.encode_shards"
    line = ["encode", str(run_dir), str(shards), "--out", str(out), "--workers", "1"]

    def killed(kill: Kill) -> None:
        assert runs.start(tmp_path / "printed", kill=kill, argv=["data", *line]).wait() == [kill.status]

    killed(Kill(f"{here}:SampleEncoder._encode", 5))
    [first] = out.glob("*.parquet")
    assert first.name == "toy-00000-of-00003.parquet"
    written = first.stat().st_mtime_ns
    killed(Kill(f"{here}:SampleEncoder._encode", 2, signal.SIGTERM))
    killed(Kill(f"{here}:write_json"))
    killed(Kill(f"{here}:SampleEncoder._encode", 2, signal.SIGINT))
    assert main(line) == 0
    assert "1 of 3 shards are there already" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written
    assert_encoded(out, shards, load_codec(run_dir))
    assert sorted(path.name for path in out.iterdir()) == [
        "encode.json", *(f"toy-0000{i}-of-00003.parquet" for i in range(3)),
    ]  # fmt: skip
    whole = tmp_path / "whole"
    assert main([*line[:3], "--out", str(whole), "--workers", "1"]) == 0
    for file in out.iterdir():
        assert file.read_bytes() == (whole / file.name).read_bytes(), file.name


def test_a_folder_keeps_to_its_codec_and_source(run_dir, shards, tmp_path, capsys) -> None:
    out, other = tmp_path / "out", save_codec(tmp_path / "other", seed=1)
    line = ["--out", str(out), "--workers", "1"]
    assert main(["encode", str(run_dir), str(shards), *line]) == 0
    assert main(["encode", str(other), str(shards), *line]) == 1
    error = capsys.readouterr().err
    assert codec_fingerprint(load_codec(run_dir)) in error
    assert codec_fingerprint(load_codec(other)) in error
    assert "choose another --out" in error
    assert main(["encode", str(run_dir), str(shards), *line, "--where", "task=tts"]) == 1
    assert "made with rows" in capsys.readouterr().err
    write_shards([spoken("new", encode_audio(tone(0.5), 24_000, "wav"))] * 3, shards, "toy", 1, progress=False)
    assert main(["encode", str(run_dir), str(shards), *line]) == 1
    assert "was made from another toy-00000-of-00003.parquet" in capsys.readouterr().err
    assert main(["encode", str(run_dir), str(shards), "--out", str(shards)]) == 1
    assert "is the folder of the recordings" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere"
    write_shards([spoken("x")], elsewhere, "x", progress=False)
    assert main(["encode", str(run_dir), str(shards), "--out", str(elsewhere)]) == 1
    assert "`data encode` did not make" in capsys.readouterr().err


def test_recordings_of_all_kinds(run_dir, tmp_path, capsys) -> None:
    """Another rate, two channels, a file beside the shard; damaged ones are left out by reason."""
    folder, out = tmp_path / "shards", tmp_path / "out"
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([tone(0.7, 44_100), tone(0.7, 44_100, 300)], axis=1), 44_100, format="FLAC")
    good = [
        spoken("stereo", stereo.getvalue()),
        spoken("slow", encode_audio(tone(0.6, 16_000), 16_000, "wav")),
        spoken("beside", path="beside.wav"),
        spoken("in_table", path="media.parquet#blob"),
    ]
    wav = encode_audio(tone(0.5), 24_000, "wav")
    bad = [
        spoken("cut", wav[:5000]),
        spoken("lost", path="lost.wav"),
        spoken("text", b"no recording at all"),
        spoken("none", encode_audio(np.zeros(0, np.float32), 24_000, "wav")),
    ]
    silent = Message(role="user", segments=(Segment(type="audio", path="beside.wav"),))
    unspoken = [spoken("unspoken"), Sample(id="heard", source="toy", messages=(silent,))]
    write_shards([*good, *bad, *unspoken], folder, "toy", progress=False)
    (folder / "beside.wav").write_bytes(wav)
    write_media_table([("blob", wav)], folder / "media.parquet")

    line = ["encode", str(run_dir), str(folder), "--out", str(out), "--workers", "1"]
    assert main(line) == 1  # more than 1 % are bad
    printed = capsys.readouterr()
    for reason in ("1 audio_corrupt", "1 audio_empty", "1 media_missing", "1 wrong_type"):
        assert f"skipped: {reason}" in printed.out
    assert "row 4 id cut: audio_corrupt: cut off" in printed.err
    assert main([*line, "--max-bad-fraction", "0.9"]) == 0  # and nothing is made again
    made = {sample.id: sample for sample in SampleSource(out)}
    assert list(made) == ["stereo", "slow", "beside", "in_table", "unspoken", "heard"]
    source, codec = SampleSource(folder), load_codec(run_dir)
    for name in ("stereo", "slow", "beside", "in_table"):
        segment = next(sample for sample in source if sample.id == name).messages[-1].segments[0]
        samples = decode_audio(source.media_bytes(segment), SAMPLE_RATE)
        expected = codec.encode(torch.from_numpy(samples)[None])[0].numpy()
        assert np.array_equal(codes_of(made[name], codec_fingerprint(codec)), expected)
    assert made["unspoken"] == spoken("unspoken")
    assert made["heard"].messages[0].segments[0] == Segment(type="audio", media=wav)

    only = tmp_path / "only"
    assert main([*line[:3], "--out", str(only), "--only-speech", "--workers", "1", "--max-bad-fraction", "1"]) == 0
    assert [sample.id for sample in SampleSource(only)] == list(made)[:4]


def save_thinker(run_dir: Path) -> Path:
    """The run folder of an untrained Thinker."""
    tokenizer = ChatTokenizer.from_file(PACK / "tokenizer.json")
    loaded = build(
        "tiny",
        vocab_size=tokenizer.vocab_size,
        thinker={"layers": 2, "ffn": 32, "expert_width": 16, "n_experts": 2, "top_k": 1},
        aut={"layers": 1, "ffn": 32},
    )
    init_weights(loaded, 0)
    (run_dir / "checkpoints").mkdir(parents=True)
    state = {f"model.{name}": value for name, value in loaded.state_dict().items()}
    torch.save({"state_dict": state}, run_dir / "checkpoints" / "last.ckpt")
    (run_dir / "tokenizer.json").write_bytes((PACK / "tokenizer.json").read_bytes())
    write_model(run_dir, "+recipe=quickstart", loaded)
    return run_dir


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_a_thinker_hears_is_written_beside_the_codes(run_dir, tmp_path, capsys, workers) -> None:
    def asked(name: str, *media: Segment) -> Sample:
        sample = spoken(name, encode_audio(tone(0.6), 24_000, "wav"))
        question = Message(role="user", segments=(*media, Segment(type="text", text="Repeat it.")))
        return replace(sample, messages=(question, sample.messages[-1]))

    def sound(seconds: float) -> Segment:
        return Segment(type="audio", media=encode_audio(tone(seconds, 16_000), 16_000, "wav"))

    write_shards([asked("a", sound(0.7)), asked("b"), asked("c", sound(1.3), sound(0.4))], tmp_path / "in", "toy")
    thinker = save_thinker(tmp_path / "thinker")
    line = ["encode", str(run_dir), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", workers]
    assert main([*line, "--thinker", str(thinker)]) == 0
    model, encoder = load(thinker)
    source, made = SampleSource(tmp_path / "in"), SampleSource(tmp_path / "out")
    for old, new in zip(source, made, strict=True):
        codes_of(new, codec_fingerprint(load_codec(run_dir)))
        medium = new.messages[-1].segments[0].media
        assert medium is not None
        if old.id == "b":
            with pytest.raises(BadSample, match="no_hidden_states"):
                AnswerFile(medium).heard(thinker_fingerprint(model))
            continue
        encoded = encoder(old, source.media_bytes)
        with torch.no_grad():
            states = model(**PackedBatch.pack([encoded]).model_inputs()).accept_hidden
        expected = states[torch.from_numpy(encoded.token_types == AUDIO)]
        heard = AnswerFile(medium).heard(thinker_fingerprint(model))
        assert len(heard) > 5
        np.testing.assert_allclose(heard, expected.numpy(), atol=1e-5)
    # A folder keeps to its Thinker.
    capsys.readouterr()
    assert main(line) == 1
    assert "were made with thinker" in capsys.readouterr().err
    assert main([*line, "--thinker", str(run_dir)]) == 1


def test_a_part_of_the_rows(run_dir, shards, tmp_path) -> None:
    """Every shard of a numbered series is written, with rows or without."""
    out = tmp_path / "out"
    line = ["encode", str(run_dir), str(shards), "--out", str(out), "--workers", "1", "--where", "concept=s1,s8"]
    assert main(line) == 0
    assert [sample.id for sample in SampleSource(out)] == ["s1", "s8"]
    assert len(list(out.glob("*.parquet"))) == 3


def test_two_shards_of_one_name(run_dir, shards, tmp_path, capsys) -> None:
    write_shards([spoken("x")], tmp_path / "a", "x", progress=False)
    write_shards([spoken("y")], tmp_path / "b", "x", progress=False)
    line = ["encode", str(run_dir), str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert main(line) == 1
    assert "two shards are called x-00000-of-00001.parquet" in capsys.readouterr().err


def test_what_is_no_codec(run_dir, shards, tmp_path, capsys) -> None:
    def error(folder: Path) -> str:
        assert main(["encode", str(folder), str(shards), "--out", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "no such folder" in error(tmp_path / "nothing")
    assert "neither a run folder (no config.yaml) nor a Mimi" in error(shards)
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "config.json").write_text('{"model_type": "qwen3_omni_moe"}')
    assert "expected 'mimi'" in error(tmp_path / "public")
    run = save_codec(tmp_path / "run")
    write_model(run, "+recipe=quickstart", load(save_thinker(tmp_path / "thinker"))[0])
    assert "which is no codec" in error(run)
    change_model(run, _target_="os.system")
    assert "'os.system' is not allowed" in error(run)
    write_model(run, "+recipe=codec", build_codec(**{**MODEL, "layers": 2}))
    assert "does not fit the model" in error(run)
    (run / "checkpoints" / "last.ckpt").unlink()
    assert "has not written a checkpoint yet" in error(run)
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_stays_with_the_decoder(run_dir, tmp_path) -> None:
    codec = load_codec(run_dir)
    stored = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(codec.decoder.code_embedding.weight, stored["model.decoder.code_embedding.weight"])
    copied = build_codec(**MODEL).decoder
    assert fingerprint(copied) != codec_fingerprint(codec)
    copied.load_state_dict(codec.decoder.state_dict())
    assert fingerprint(copied) == codec_fingerprint(codec)
    # A checkpoint whose table was not written by the trainer gets it when it is read.
    unfolded = load_codec(save_codec(tmp_path / "unfolded", fold=False))
    assert codec_fingerprint(unfolded) == codec_fingerprint(codec)
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
