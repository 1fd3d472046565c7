"""A codec as a folder that is passed on: the same codes on every load, and the scores that it says it has."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from omnitrain.__main__ import main
from omnitrain.config.compose import run_config
from omnitrain.config.locations import PACK_SPEECH
from omnitrain.config.saved import read_config, write_config
from omnitrain.config.typed import ConfigError
from omnitrain.data.codec_frames import decode_codes
from omnitrain.data.shards import SampleSource
from omnitrain.evaluation import listening
from omnitrain.evaluation.judges import JUDGES
from omnitrain.interop import codec_folder
from omnitrain.interop.codec_folder import BUILTIN_FOLDER, is_codec_folder, read_description
from omnitrain.interop.public_config import CheckpointError
from omnitrain.models.code2wav import Code2Wav, fingerprint
from omnitrain.models.codec import Codec
from omnitrain.models.presets import build, init_weights
from omnitrain.models.sizes import SPEECH_PRESETS
from omnitrain.runs.experiment import give_voice
from omnitrain.runs.export_codec import measure
from omnitrain.runs.load import load_codec
from tests.interop.public_models import save_public_model

SMALL = [
    *("model.layers=1", "model.ffn=16", "model.encoder_dim=4", "model.codebook_dim=4", "model.decoder.layers=1"),
    *("model.decoder.ffn=16", "model.decoder.decoder_dim=16", "model.decoder.codebook_size=32"),
    *("model.decoder.d_model=32", "model.decoder.quantizers=3"),
]
DISCRIMINATORS = [
    *("module.discriminator.periods=[2]", "module.discriminator.period_width=4"),
    *("module.discriminator.stft_windows=[256]", "module.discriminator.stft_width=4"),
]
FEW = [
    *("data.rows=1", "data.num_workers=0", "data.validation_rows=1", "trainer.max_steps=2"),
    *("trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "evaluation.max_samples=2"),
    *("+data.sources.voices.limit=4", "+data.test_sources.voices.limit=3", "evaluation.players=1"),
]


@pytest.fixture(scope="module", autouse=True)
def unjudged() -> object:
    """What no judge says is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listening, "missing_judges", lambda: tuple(JUDGES))
        patch.setattr("omnitrain.runs.export_codec.missing_judges", lambda: tuple(JUDGES))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "run"
    assert main(["fit", "+recipe=codec", f"paths.run_dir={folder}", *SMALL, *DISCRIMINATORS, *FEW]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    assert main(["convert", "to-codec", str(run), str(out)]) == 0
    return out


@pytest.fixture
def builtin(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package brought the exported codec."""
    monkeypatch.setattr(codec_folder, "BUILTIN_FOLDER", exported)


def assert_scores_as_recorded(folder: Path) -> None:
    recorded = read_description(folder)["sentences"]
    assert len(recorded) == 3
    for before, now in zip(recorded, measure(_own(load_codec(folder))), strict=True):
        assert now["id"] == before["id"]
        assert now["mel_db"] == pytest.approx(before["mel_db"], abs=0.02)
        assert now["si_sdr_db"] == pytest.approx(before["si_sdr_db"], abs=0.1)


def _own(codec: object) -> Codec:
    assert isinstance(codec, Codec)
    return codec


SHIPPED = [pytest.param(BUILTIN_FOLDER, id="builtin")] if is_codec_folder(BUILTIN_FOLDER) else []


@pytest.mark.parametrize("folder", ["exported", *SHIPPED])
def test_weights_have_their_recorded_scores(folder: Path | str, exported: Path) -> None:
    assert_scores_as_recorded(exported if folder == "exported" else Path(folder))


def test_other_weights_have_other_scores(exported: Path, tmp_path: Path) -> None:
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "codec.safetensors")
    name = next(name for name in weights if name.startswith("decoder.decoder.") and weights[name].ndim == 3)
    weights[name] = weights[name] * 1.1
    save_file(weights, tmp_path / "codec.safetensors")
    with pytest.raises(AssertionError):
        assert_scores_as_recorded(tmp_path)
    weights["quantizer.semantic.codebooks"][0, 0, 0] += 0.01
    save_file(weights, tmp_path / "codec.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_codec(tmp_path)
    (tmp_path / "codec.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"codec\.safetensors: damaged"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"codec\.json: describes no codec"):
        load_codec(tmp_path)


def test_it_is_the_codec_of_the_run(run: Path, exported: Path) -> None:
    before, after = load_codec(run).state_dict(), load_codec(exported).state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if not name.endswith((".sums", "code_embedding.weight")):
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-6, msg=name)
    stored = load_file(exported / "codec.safetensors")
    assert {value.dtype for name, value in stored.items() if not name.endswith(".counts")} == {torch.float16}
    assert not any("code_embedding" in name for name in stored)


def test_the_table_of_codes_is_exact(exported: Path) -> None:
    """So that it has no machine's rounding in it: each number is the exact sum, rounded once."""
    codec = _own(load_codec(exported))
    books, table = codec.quantizer.acoustic, codec.decoder.code_embedding.weight
    for code, column in ((0, 0), (5, 7), (31, 31)):
        pairs = zip(books.codebooks[1, code].tolist(), books.output_proj.weight[column].tolist(), strict=True)
        exact = 3 * sum(Fraction(a) * Fraction(b) for a, b in pairs)
        assert table[2 * 32 + code, column] == torch.tensor(float(exact), dtype=torch.float32)
    assert fingerprint(codec.decoder) == read_description(exported)["fingerprint"]


def test_what_is_written_beside_the_weights(run: Path, exported: Path) -> None:
    said = read_description(exported)
    assert said["recipe"] == "codec"
    assert said["steps"] == 2
    assert said["scores"]["n"] == json.loads((run / "eval/speech.json").read_text())["n"] == 2
    assert said["scores_by_voice"]["slt"]["n"] == 3
    (row,) = said["voices"]  # four of the 360 recordings
    assert (row["voice"], row["licence"], row["recordings"]) == ("slt", "MIT-Festival", 4)
    assert str(run.parent) not in (exported / "codec.json").read_text()
    assert "| synthetic_speech/slt | slt | en | MIT-Festival | 4 |" in (exported / "NOTICE.md").read_text()


def test_what_cannot_be_written(run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(source: Path, *more: object) -> str:
        assert main(["convert", "to-codec", str(source), str(tmp_path / "out"), *map(str, more)]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "allow more with --megabytes 1" in refused(run, "--megabytes", 0.001)
    assert "no such folder" in refused(tmp_path / "gone")
    assert "no run of `omnitrain fit +recipe=codec`" in refused_public(refused, tmp_path)
    scores = run / "eval/speech.json"
    kept = scores.rename(run / "kept.json")
    assert "score the run first, omnitrain test" in refused(run)
    kept.rename(scores)


def refused_public(refused: object, tmp_path: Path) -> str:
    save_public_model(tmp_path / "public")
    assert callable(refused)
    return refused(tmp_path / "public")


@pytest.mark.usefixtures("builtin")
def test_sizes_follow_the_codec(exported: Path, run: Path) -> None:
    for codec in ("builtin", exported, run):
        sizes = run_config(["model=small_speech", f"codec={codec}"]).model.config
        assert sizes.code2wav == _own(load_codec(codec)).config.decoder
        assert (sizes.talker.codebooks, sizes.talker.mtp.codebook_size) == (3, 32)
    tiny = run_config(["model=tiny_speech", "codec=builtin"]).model.config.talker
    assert tiny.speakers == {"slt": 32 + 253, "rms": 32 + 254, "kal16": 32 + 255}
    # What the user gives, stays: then the two do not fit, and that is said.
    given = run_config(["model=tiny_speech", "codec=builtin", "model.code2wav.layers=2"]).model.config
    assert given.code2wav.layers == 2
    changed = {"codebooks": 3, "codebook_size": 32}
    model = build("tiny", speech=True, talker=changed, code2wav={"layers": 2})
    with pytest.raises(ConfigError, match=r"its decoder is .*leave out what you have given of model\.code2wav"):
        give_voice(model, "builtin")
    assert run_config(["model=tiny_speech"]).model.config.code2wav == SPEECH_PRESETS["tiny"][1]
    assert run_config(["model=tiny_speech", "codec=still/to/be/made"]).model.config.talker.codebooks == 8


@pytest.mark.usefixtures("builtin")
def test_a_model_speaks_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = run_config(["model=tiny_speech", "codec=builtin"]).model.config
    model = build(
        "tiny", speech=True, talker={"codebooks": 3, "codebook_size": 32}, code2wav=vars(sizes.code2wav)
    )  # fmt: skip
    init_weights(model, seed=0)
    codes, codec = give_voice(model, "builtin"), _own(load_codec("builtin"))
    assert model.code2wav is not None
    assert codes.codec == fingerprint(model.code2wav) == fingerprint(codec.decoder)
    frames = torch.randint(0, 32, (1, 5, 3))
    torch.testing.assert_close(model.code2wav.eval()(frames), codec.decode(frames), atol=1e-5, rtol=0)
    # Its first two codebooks alone, which a smaller Talker says.
    fewer = build(
        "tiny", speech=True, talker={"codebooks": 2, "codebook_size": 32},
        code2wav={**vars(sizes.code2wav), "quantizers": 2},
    )  # fmt: skip
    init_weights(fewer, seed=0)
    assert give_voice(fewer, "builtin").codec == codes.codec
    assert fewer.code2wav is not None
    torch.testing.assert_close(fewer.code2wav.eval()(frames[..., :2]), codec.decode(frames[..., :2]), atol=1e-5, rtol=0)
    out = tmp_path / "codes"
    line = ["data", "encode", "builtin", str(PACK_SPEECH), "--out", str(out), "--split", "validation"]
    assert main([*line, "--workers", "1"]) == 0
    assert f"codec {codes.codec}" in capsys.readouterr().out
    assert main([*line[:5], str(tmp_path / "two"), *line[6:], "--codebooks", "2", "--workers", "1"]) == 0
    sources = [SampleSource(folder, split="validation") for folder in (out, tmp_path / "two")]
    every, two = (decode_codes(of.media_bytes(of[0].segments[-1]), codes.codec) for of in sources)
    assert np.array_equal(two, every[:, :2])
    capsys.readouterr()
    assert main([*line[:5], str(tmp_path / "four"), "--codebooks", "4"]) == 1
    assert "--codebooks 4: the codec has 3" in capsys.readouterr().err


def test_what_is_no_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_folder, "BUILTIN_FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"this installation brings no codec .*fit \+recipe=codec"):
        load_codec("builtin")
    with pytest.raises(FileNotFoundError, match=r"no such folder; a codec is builtin, the run folder .*Mimi"):
        load_codec("bultin")
    with pytest.raises(ValueError, match=r"neither a run folder .* a codec is builtin"):
        load_codec(tmp_path)
    write_config(run_config(["model=tiny"]), tmp_path)
    with pytest.raises(ConfigError, match=r"is the run of .*OmniModel, which is no codec"):
        run_config(["model=tiny_speech", f"codec={tmp_path}"])


# --------------------------------------------------------------------------------------------------------- fine-tuning


def finetune(start: str | Path, folder: Path, *more: str) -> Codec:
    line = ["fit", "+recipe=codec_finetune", f"speech={PACK_SPEECH}", f"module.init_from={start}", *DISCRIMINATORS]
    assert main([*line, f"paths.run_dir={folder}", *FEW, *more]) == 0
    return _own(load_codec(folder))


@pytest.mark.usefixtures("builtin")
@pytest.mark.parametrize("kind", ["builtin", "run"])
def test_a_decoder_learns_and_codes_stay(kind: str, run: Path, tmp_path: Path) -> None:
    start = "builtin" if kind == "builtin" else run
    before, after = _own(load_codec(start)), finetune(start, tmp_path / "run")
    assert read_config(tmp_path / "run").model.config == before.config
    assert fingerprint(after.decoder) == fingerprint(before.decoder)
    for name, value in before.state_dict().items():
        moved = not torch.equal(value, after.state_dict()[name])
        learns = name.startswith("decoder.") and not name.startswith("decoder.code_embedding")
        assert not (moved and not learns), name
    assert not torch.equal(after.decoder.decoder[0].conv.weight, before.decoder.decoder[0].conv.weight)
    rows = (tmp_path / "run/metrics.csv").read_text()
    assert "train/discriminators" in rows.splitlines()[0]


@pytest.mark.usefixtures("builtin")
def test_all_of_a_codec_learns(exported: Path, tmp_path: Path) -> None:
    before = _own(load_codec(exported))
    after = finetune(exported, tmp_path / "run", "module.train=[encoder,quantizer,decoder]")
    assert fingerprint(after.decoder) != fingerprint(before.decoder)
    codebooks = after.quantizer.semantic.codebooks
    assert not torch.equal(codebooks, before.quantizer.semantic.codebooks)
    assert math.isfinite(float(codebooks.abs().sum()))


def test_a_public_code2wav_gets_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = save_public_model(tmp_path / "public", kind="full").code2wav.state_dict()
    sizes = run_config(["+recipe=codec_finetune", "speech=s", f"module.init_from={tmp_path / 'public'}"]).model.config
    assert sizes.downsample_rates == sizes.decoder.upsample_rates[::-1]
    assert sizes.decoder.trim == "public"
    with torch.device("meta"):
        wave = Code2Wav(sizes.decoder)
    assert {n: p.shape for n, p in wave.state_dict().items()} == {n: x.shape for n, x in reference.items()}
    line = ["fit", "+recipe=codec_finetune", f"speech={PACK_SPEECH}", f"module.init_from={tmp_path / 'public'}"]
    assert main([*line, f"paths.run_dir={tmp_path / 'run'}", *FEW]) == 1
    assert "module.train: the codebooks are empty" in capsys.readouterr().err
