"""A Talker on a Mimi's codes, 16 codebooks of 2,048: from recordings to speech, with a small random Mimi."""

from __future__ import annotations

import csv
import json
import math
import shutil
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from omnitrain.__main__ import main
from omnitrain.config.compose import run_config
from omnitrain.config.saved import read_config, write_config
from omnitrain.config.typed import ConfigError
from omnitrain.data.codec_frames import decode_codes
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import Sample
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.evaluation import listening
from omnitrain.evaluation.judges import JUDGES
from omnitrain.generation.sampling import Sampling
from omnitrain.generation.speech import Speaker, speak_texts
from omnitrain.runs.experiment import build_experiment, settle_decoder
from omnitrain.runs.load import load, load_codec, load_decoder
from tests.interop.public_models import save_public_model
from tests.interop.test_mimi import save_mimi
from tests.runs.test_encode_shards import save_codec, spoken

SMALL = [
    "model=tiny_speech",
    "model.thinker.layers=2",
    "model.aut.layers=1",
    "model.vision.layers=2",
    "model.talker.layers=2",
    "model.talker.mtp.layers=1",
]
"""Nothing of codebooks: they follow the codec."""
GREEDY = Sampling()
TEXTS = ("one red cat", "two dogs")


@pytest.fixture(scope="module")
def mimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mimi")
    save_mimi(folder, codebook_size=2048)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sentences, said as noise."""
    folder, random = tmp_path_factory.mktemp("speech") / "shards", np.random.default_rng(0)
    wavs = [random.uniform(-0.4, 0.4, n * 1920).astype(np.float32) for n in (9, 12)]
    said = [spoken(t, encode_audio(w, 24_000, "wav"), text=t) for t, w in zip(TEXTS, wavs, strict=True)]
    write_shards(said, folder, "noise")
    return folder


@pytest.fixture(scope="module")
def codes(mimi: Path, recordings: Path) -> Path:
    out = recordings.parent / "codes"
    assert main(["data", "encode", str(mimi), str(recordings), "--out", str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def run(mimi: Path, recordings: Path, codes: Path) -> Path:
    """What `fit` leaves, scored by no judge."""
    folder, both = recordings.parent / "talker", ("path", "split")
    data = {"validation": (codes, "train"), "test": (recordings, "train"), "voice": (recordings, "train")}
    line = [
        "fit", "+recipe=talker_pretrain", *SMALL, f"codec={mimi}", f"codes={codes}", f"paths.run_dir={folder}",
        *(f"data.{which}_sources.speech.{k}={v}" for which, of in data.items() for k, v in zip(both, of, strict=True)),
        "data.num_workers=0", "data.max_tokens=64", "module.train=[mtp,talker_router,talker]",
        "module.frame_dropout=0", "optim.lr=3e-3", "optim.warmup_steps=5", "trainer.max_steps=60",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=60", "evaluation.seconds_limit=2", "evaluation.temperature=0",
        "callbacks.checkpoint.every_n_steps=1000",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listening, "missing_judges", lambda: tuple(JUDGES))
        assert main(line) == 0
    return folder


def answers(folder: Path) -> list[tuple[Sample, bytes]]:
    source = SampleSource(folder)
    return [(sample, source.media_bytes(sample.segments[-1])) for sample in source]


def test_it_learns_both_sentences_by_heart(run: Path, mimi: Path, codes: Path) -> None:
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert losses[0] == pytest.approx(math.log(2048), abs=0.5)  # a mean over all codebooks
    assert losses[-1] < 0.05
    model, encoder = load(run)
    assert model.talker is not None
    assert (model.talker.config.codebooks, model.talker.config.codebook_size) == (16, 2048)
    speaker = Speaker(model, encoder.tokenizer, decoder=load_decoder(model, run))
    learnt = answers(codes)
    texts, asked = [s.segments[-1].text or "" for s, _ in learnt], [s.segments[0].text or "" for s, _ in learnt]
    said = speak_texts(
        speaker, encoder.tokenizer, texts, "slt", questions=asked, codes=GREEDY, residuals=GREEDY, max_frames=30
    )
    reference = load_codec(mimi).model
    for (_, media), speech in zip(learnt, said, strict=True):
        assert np.array_equal(speech.codes, decode_codes(media))
        with torch.no_grad():
            expected = reference.decode(torch.from_numpy(speech.codes.T.copy())[None]).audio_values[0, 0]
        np.testing.assert_allclose(speech.wav, expected.clamp(-1, 1).numpy(), atol=1e-5)


def test_the_run_has_no_code2wav_and_says_so(run: Path) -> None:
    config = read_config(run)
    assert config.model.config.code2wav is None
    assert not any("code2wav" in name for name in load(run)[0].state_dict())


def test_evaluation_speaks_through_the_mimi(run: Path, mimi: Path, codes: Path) -> None:
    assert json.loads((run / "eval/speech.json").read_text())["n"] == 2
    rows = pq.read_table(run / "eval/speech.parquet").to_pylist()
    codec, by_id = load_codec(mimi), {sample.id: media for sample, media in answers(codes)}
    for row in rows:
        learnt = codec.decode(torch.from_numpy(decode_codes(by_id[row["id"]]))[None])[0].numpy()
        for name in ("generated", "round_trip"):  # the Talker has learnt the codes of the round trip
            np.testing.assert_allclose(decode_audio(row[name], 24_000), learnt.clip(-1, 1), atol=2e-4, err_msg=name)


def test_talk(run: Path, mimi: Path, codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.wav"
    line = ["talk", str(run), "--say", TEXTS[0], "Say it.", "--speech-temperature", "0", "--out", str(out)]
    assert main([*line, "--json", "--device", "cpu"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    frames = [event["frame"] for event in events if event["event"] == "audio"]
    assert frames == list(range(9))
    with wave.open(str(out)) as file:
        assert file.getframerate() == 24_000
        heard = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32767
    learnt = load_codec(mimi).decode(torch.from_numpy(decode_codes(answers(codes)[0][1]))[None])[0].numpy()
    np.testing.assert_allclose(heard, learnt.clip(-1, 1), atol=1e-4)  # a random Mimi is loud

    moved = tmp_path / "mimi"
    mimi.rename(moved)  # as on another machine
    try:
        assert main(line) == 1
        assert f"speaks through the Mimi in {mimi}" in (error := capsys.readouterr().err)
        assert "--codec DIR" in error
        assert main([*line, "--codec", str(moved)]) == 0
    finally:
        moved.rename(mimi)


def test_fewer_codebooks_and_other_sizes(mimi: Path, recordings: Path, codes: Path, tmp_path: Path) -> None:
    line = ["+recipe=talker_pretrain", *SMALL, f"codec={mimi}", f"codes={codes}", f"paths.run_dir={tmp_path}"]
    line += ["data.validation_sources.speech.split=train", f"data.test_sources.speech.path={recordings}"]
    line += ["data.test_sources.speech.split=train", f"data.voice_sources.speech.path={recordings}"]
    eight = build_experiment(run_config([*line, "model.talker.codebooks=8"]), "fit")
    model: Any = eight.module.model
    assert model.code2wav is None
    assert model.talker.mtp.config.codebooks == 8
    source = eight.datamodule.opened("sources")["speech"]
    encoded = eight.datamodule.encoder(source[0], source.media_bytes)
    assert encoded.spoken[0].codes.shape == (9, 8)
    Speaker(model, eight.datamodule.tokenizer, decoder=load_decoder(model, "unused", str(mimi)))
    with pytest.raises(ConfigError, match="a Mimi of 16 codebooks of 2048 codes, but the model's Talker has 17 of"):
        build_experiment(run_config([*line, "model.talker.codebooks=17"]), "fit")
    with pytest.raises(ConfigError, match="has 16 of 256; leave out"):
        build_experiment(run_config([*line, "model.talker.codebook_size=256"]), "fit")


def test_public_weights_keep_their_code2wav(mimi: Path, run: Path, tmp_path: Path) -> None:
    """Of the public Code2Wav alone it is known that it decodes Mimi's codes."""
    public, thinker = tmp_path / "public", tmp_path / "thinker"
    save_public_model(public, kind="full")
    save_public_model(thinker)
    config = run_config(["model=tiny_speech", "module=talker", f"codec={mimi}"])

    def speaks_itself(start: Any, codec: Path | None = mimi) -> bool:
        module = replace(config.module, config=replace(config.module.config, init_from=start))
        settled = settle_decoder(replace(config, module=module, codec=None if codec is None else str(codec)))
        return settled.model.config.code2wav is not None

    assert speaks_itself(str(public))
    assert not speaks_itself(str(thinker))
    assert not speaks_itself(str(run))
    assert not speaks_itself(None)
    assert not speaks_itself({"thinker": str(public)})
    assert speaks_itself(None, codec=None)
    begun = tmp_path / "begun"  # a run that began as the public folder, whose files it keeps
    shutil.copytree(public, begun / "public")
    write_config(config, begun)
    assert speaks_itself(str(begun))
    write_config(replace(config, codec=str(save_codec(tmp_path / "codec"))), begun)  # and was given another decoder
    assert not speaks_itself(str(begun))
