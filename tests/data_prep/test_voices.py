from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import butter, sosfilt
from torchaudio.functional import loudness as torchaudio_loudness

from data_prep import asterisk, stamps, voices
from data_prep.splits import Sides, sentence_key
from data_prep.synthetic_speech import PROMPTS
from data_prep.voices import LOUDNESS, PEAK, Spectrum, levelled, loudness, voice_of
from omnitrain.data.media import MediaLimits, decode_audio, probe
from omnitrain.data.sample import BadSample, Sample
from omnitrain.data.shards import SampleSource
from omnitrain.data.waveforms import UtteranceReader
from tests.data_prep.conftest import as_sources

RATE = 16_000


def sine(hertz: float, peak: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def folders(asterisk_trees: dict[str, Path], stamps_tree: Path, tmp_path: Path) -> list[str]:
    """Small shards of both sources, each as its own script makes them."""
    prompts, pictures = tmp_path / "asterisk", tmp_path / "stamps"
    arguments = ["--languages", "en", "fr", "it", *as_sources(asterisk_trees)]
    assert asterisk.main(["--out", str(prompts), "--no-progress", *arguments]) == 0
    assert stamps.main(["--out", str(pictures), "--no-progress", "--source", str(stamps_tree)]) == 0
    return [str(prompts), str(pictures)]


def transcripts(folders: list[str]) -> list[Sample]:
    sources = [SampleSource(folder, where={"task": "asr"}) for folder in folders]
    return [source[i] for source in sources for i in range(len(source))]


def made(out: Path) -> list[Sample]:
    source = SampleSource(out)
    return [source[i] for i in range(len(source))]


def test_loudness_is_that_of_the_recommendation() -> None:
    # BS.1770: a full-scale sine of 997 Hz on one channel has -3.01 LKFS.
    for rate in (RATE, 24_000, 48_000):  # torchaudio's filter is within 0.3 dB of the recommendation's
        assert loudness(sine(997, 1.0, rate=rate), rate) == pytest.approx(-3.01, abs=0.35)
        assert loudness(sine(997, 0.1, rate=rate), rate) == pytest.approx(-23.01, abs=0.35)
    short = loudness(sine(997, 0.1, 0.15), RATE)  # shorter than one block
    assert short == pytest.approx(loudness(sine(997, 0.1), RATE), abs=0.2)
    assert loudness(np.zeros(RATE, np.float32), RATE) == -np.inf
    # A gain is that many dB, also where the filter would pass full scale.
    loud = np.sign(sine(2500, 1.0))
    assert loudness(loud, RATE) - loudness(loud * np.float32(0.01), RATE) == pytest.approx(40, abs=0.01)


def test_recordings_are_brought_to_one_level_below_the_peak() -> None:
    for peak in (0.01, 0.3, 1.0):
        wave = levelled(sine(440, peak), RATE)
        assert float(torchaudio_loudness(torch.from_numpy(wave)[None], RATE)) == pytest.approx(LOUDNESS, abs=0.05)
    click = sine(440, 0.01)
    click[8000] = 0.9  # speech this quiet beside its peak cannot be brought to the level
    wave = levelled(click, RATE)
    assert np.abs(wave).max() == pytest.approx(PEAK)
    assert loudness(wave, RATE) < LOUDNESS
    assert np.corrcoef(wave, click)[0, 1] == pytest.approx(1)  # one gain, nothing compressed
    with pytest.raises(BadSample, match="audio_silent"):
        levelled(sine(440, 1e-5), RATE)


def test_the_bandwidth_is_measured() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    spectrum = Spectrum()
    spectrum.add(sosfilt(butter(16, 3400, fs=RATE, output="sos"), noise).astype(np.float32), RATE)
    assert 3400 < spectrum.highest < 5000
    spectrum.add(noise.astype(np.float32), RATE)
    assert spectrum.highest == 8000
    spectrum.add(np.zeros(3, np.float32), RATE)
    assert spectrum.highest == 8000


def test_each_transcript_becomes_a_sentence_of_its_voice(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "voices"
    assert voices.main([*folders, "--out", str(out), "--least", "1", "--no-progress"]) == 0
    rows = made(out)
    given = {(voice_of(row), row.reference, row.split, row.licence) for row in transcripts(folders)}
    assert {(r.meta["voice"], r.messages[1].segments[0].text, r.split, r.licence) for r in rows} <= given
    assert {row.meta["voice"] for row in rows} >= {"asterisk_en", "asterisk_fr", "asterisk_it", "stamps_es"}
    assert len({row.id for row in rows}) == len(rows)
    reader = UtteranceReader(sample_rate=24_000, limits=MediaLimits())
    source = SampleSource(out, where={"source": "voices/asterisk_fr"})
    assert len(source) == sum(row.meta["voice"] == "asterisk_fr" for row in rows) > 2
    for i in range(len(source)):
        row = source[i]
        spoken = row.messages[1].segments[0]
        heard = reader(row, source.media_bytes)
        assert (heard.voice, heard.text, heard.languages) == ("asterisk_fr", spoken.text, ("fr",))
        assert (row.task, row.meta["speaker"], row.languages) == ("tts", "June", ("fr",))
        assert heard.question in {prompt.format(text=spoken.text) for prompt in PROMPTS}
        facts = probe(spoken.media or b"", "audio")
        assert facts.format == "flac"
        assert facts.seconds == pytest.approx(0.5 + 2 * voices.MARGIN, abs=0.03)  # a tone of 0.5 s amid silence
        assert loudness(decode_audio(spoken.media or b"", RATE), RATE) == pytest.approx(LOUDNESS, abs=0.6)


def test_no_sentence_stands_on_two_sides(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "voices"
    assert voices.main([*folders, "--out", str(out), "--least", "1", "--no-progress"]) == 0
    sides = defaultdict(set)
    for row in made(out):
        sides[sentence_key(row.messages[1].segments[0].text or "")].add(row.split)
    assert all(len(found) == 1 for found in sides.values())
    # Those that stood on two in the folders are listed, on the less strict of them.
    everywhere = Sides()
    for row in transcripts(folders):
        everywhere.add(row.split, [row.reference])
    wrong = {row.reference for row in transcripts(folders) if not everywhere.admit(row.split, [row.reference])}
    dropped = json.loads((out / "dropped.json").read_text())
    assert {one["text"] for one in dropped if "another side" in one["reason"]} == wrong


def test_what_the_judge_did_not_hear_is_dropped_and_listed(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    misfit = {"recording": "speech/digits/0/fr", "heard": "Noise.", "cer": 1.2, "judge": "fake", "language": "fr"}
    (tmp_path / "misfits.json").write_text(json.dumps([misfit]))
    out = tmp_path / "voices"
    options = ["--without", str(tmp_path / "misfits.json"), "--voices", "asterisk_fr", "asterisk_it", "--no-progress"]
    assert voices.main([folders[0], "--out", str(out), *options]) == 0
    rows = made(out)
    assert {row.meta["voice"] for row in rows} == {"asterisk_fr", "asterisk_it"}
    assert "voices/asterisk_fr/digits/0/fr" not in {row.id for row in rows}
    assert "voices/asterisk_it/digits/0/it" in {row.id for row in rows}
    (listed,) = [one for one in json.loads((out / "dropped.json").read_text()) if "--without" in one["reason"]]
    assert (listed["heard"], listed["cer"], listed["text"], listed["voice"]) == ("Noise.", 1.2, "zéro", "asterisk_fr")
    printed = capsys.readouterr().out
    french = next(line for line in printed.splitlines() if "asterisk_fr" in line)
    assert [cell.strip() for cell in french.split("│")][2:4] == ["fr", str(sum(r.languages == ("fr",) for r in rows))]
    assert "-23.0 ± 0.0" in french
    assert voices.main([folders[0], "--out", str(out), *options]) == 0
    assert "is complete" in capsys.readouterr().out


def test_the_notice_names_licences_and_the_bandwidth(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "voices"
    assert voices.main([*folders, "--out", str(out), "--least", "1", "--no-progress"]) == 0
    notice = (out / "NOTICE.md").read_text()
    for part in ("asterisk-core-sounds-fr-g722", "CC-BY-SA-3.0", "GPL-2.0-only", "above 8 kHz", "June Wallack"):
        assert part in notice
    assert (out / "licences/asterisk-core-sounds-fr.txt").read_text() == "Copyright: somebody"


def test_what_cannot_be_is_named(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "voices"), "--no-progress"]

    def said(*arguments: str) -> str:
        assert voices.main([*arguments, *out]) == 1
        return " ".join(capsys.readouterr().out.split())

    assert "no such voice; there are asterisk_en, asterisk_fr" in said(*folders[:1], "--voices", "asterisk_de")
    assert "fewer than 100" in said(*folders)
    (tmp_path / "odd.json").write_text("[1]")
    assert "no list by data_prep.check_speech" in said(*folders, "--without", str(tmp_path / "odd.json"))
    row = transcripts(folders)[0]
    with pytest.raises(ValueError, match="fillets is none of asterisk, stamps"):
        voice_of(Sample(**{**vars(row), "source": "fillets"}))
