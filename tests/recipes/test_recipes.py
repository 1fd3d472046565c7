"""Every recipe composes, builds its objects, trains a few steps, and ends with scores and a report; with PyTorch's
deterministic algorithms, which also fill memory that nobody has written with NaN."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_prep import dialogues, sound_captions
from data_prep.synthetic_speech import Voice
from omnitrain.__main__ import main
from omnitrain.config.locations import PACK, PACK_ANNOUNCEMENTS, PACK_SPEECH, RECIPES
from omnitrain.data.media import encode_audio
from omnitrain.data.sample import Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.generation.speech import Speech, speak_texts
from omnitrain.models.aut_decoder import AuT
from omnitrain.runs import speech_pairs
from omnitrain.runs.load import load, load_writer

NAMES = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
SPEECH = {
    "codec",
    "codec_finetune",
    "talker_pretrain",
    "talker_continue",
    "speaker_finetune",
    "speech_quickstart",
    "speech",
    "talker_ablation",
    "dialogue",
    "dialogue_thinker",
    "dialogue_talker",
}
"""These build on one another, and run as such below (`codec_finetune` in tests/runs/test_export_codec.py)."""
VOICES = {"codec_voices", "codec_ablation"}
"""Codecs on prepared data: recordings with texts and voices, which the pack of speech has too."""
PRETRAIN = {name for name in NAMES if name.startswith("pretrain")}
"""So do these, all in tests/cli/test_pretrain.py."""
SEARCH = {"nondegradation_lr", "nondegradation_lr_arm"}
"""Sweeps of `nondegradation`, in tests/cli/test_sweeps.py."""
FINETUNE = {"finetune"}
"""Needs a folder with weights: tests/cli/test_finetune.py."""

HEARING = {"aut", "aut_quickstart"}
"""Those of AuT."""
ANSWERING = {"aut_transfer", "captioner"}
"""Those of a Thinker that hears, and ends with the evaluation of transcripts."""

POST = {"distill_off_policy", "distill_on_policy", "gspo", "talker_dpo", "talker_post", "post"}
"""Of post-training: from one another's runs, below."""

EXACT = "trainer.deterministic=true"


@pytest.fixture(autouse=True)
def algorithms() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(NAMES - SPEECH - VOICES - PRETRAIN - SEARCH - FINETUNE - HEARING - ANSWERING - POST)
)
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A recipe's prepared data need not be there: the pack has rows of the same tasks and languages.
    (tmp_path / "long").mkdir()
    long = [f"long/{part}" for part in ("train", "validation", "test", "test30", "heldout")]
    for folder in ("stamps", "moving_stamps", "personas", "tools", "thoughts", *long):
        (tmp_path / folder).symlink_to(PACK)
    monkeypatch.chdir(tmp_path)
    few = [
        "trainer.deterministic=true",
        "data.num_workers=0",
        "data.max_tokens=512",
        "evaluation.max_samples=2",
        "evaluation.max_generated=1",
    ]
    line = ["fit", f"+recipe={name}", "+debug=fast", f"paths.data_dir={tmp_path}", "paths.run_dir=run", *few]
    assert main(line) == 0
    scores = json.loads((tmp_path / "run" / "eval" / "scores.json").read_text())
    assert {row["modality"] for row in scores["scores"]} >= {"image", "audio"}
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


FEW = [
    "trainer.deterministic=true",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "data.num_workers=0",
    "evaluation.max_samples=2",
]
BRIEF = ["data.max_tokens=256", "evaluation.window_seconds=[1,8]", "evaluation.max_new_tokens=6"]
SHORT = ["data.max_frames=120", "evaluation.players=1", "evaluation.seconds_limit=0.4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HEARING))
def test_hearing_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains, scores by language and window, reports; and what it leaves can be asked, and put into a Thinker."""
    monkeypatch.chdir(tmp_path)
    overrides = [*FEW, *BRIEF, "module.validation_transcripts=4", f"paths.data_dir={tmp_path}"]
    if name == "aut":  # of the three sources one is like the pack's
        (tmp_path / "stamps").symlink_to(PACK)
        absent = ("prompts", "dialogues", "prompts_translated", "dialogues_translated")
        overrides += [f"data.{which}.{source}=null" for which in ("sources", "test_sources") for source in absent]
        overrides += [f"data.validation_sources.{source}=null" for source in absent[:2]]
        overrides += [f"data.tokenizer={PACK / 'tokenizer.json'}"]
    assert main(["fit", f"+recipe={name}", "paths.run_dir=run", *overrides]) == 0
    scores = json.loads((tmp_path / "run/eval/transcripts.json").read_text())
    assert {row["window"] for row in scores["scores"]} >= {1, 8}
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    assert main(["predict", "run", "trainer.limit_predict_batches=1"]) == 0
    assert isinstance(load_writer("run")[0], AuT)
    recording = SampleSource(PACK, split="heldout_concept", where={"task": ["asr"]})
    heard = next(segment for segment in recording[0].messages[0].segments if segment.type == "audio")
    Path("said.ogg").write_bytes(recording.media_bytes(heard))
    assert main(["generate", "run", "--audio", "said.ogg", "Transcribe this recording.", "--max-new-tokens", "5"]) == 0
    with pytest.raises(ValueError, match=r"module\.init_from=\{aut"):
        load("run")
    if name == "aut":
        return  # what its encoder is good for, is the same
    encoder = load_writer("run")[0].aut.state_dict()
    for choice in ("aut_frozen", "random"):
        line = ["fit", "+recipe=aut_transfer", "aut_run=run", f"encoder={choice}", f"paths.run_dir={choice}/seed=0"]
        assert main([*line, *FEW, *BRIEF]) == 0
        inside = load(f"{choice}/seed=0")[0].aut.state_dict()
        same = all(torch.equal(inside[k], v) for k, v in encoder.items() if not k.startswith("ln_post"))
        assert same == (choice == "aut_frozen")
    assert main(["report", "random/seed=0", "aut_frozen/seed=0", "--out", "report.html"]) == 0
    assert "aut_frozen − random" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_captioner_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sound_captions.main([str(PACK), "--languages", "es", "--out", "captions", "--no-progress"]) == 0
    line = ["fit", "+recipe=captioner", "captions=captions", "paths.run_dir=run", *FEW, *BRIEF]
    assert main(line) == 0
    scores = json.loads((tmp_path / "run/eval/transcripts.json").read_text())["scores"]
    assert {row["system"] for row in scores} == {"model", "most frequent", "best constant"}
    assert "hallucinating_captions" in scores[0]["measures"]
    assert (tmp_path / "run/report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_post_training_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards first; what comes out is base and teacher of the whole ladder but for the Talker's rungs, which
    `talker_post` has, too."""
    monkeypatch.chdir(tmp_path)
    for folder in ("personas", "tools"):
        (tmp_path / folder).symlink_to(PACK)  # whose rows would be tested twice
    few = [*FEW, "data.max_tokens=192", "evaluation.max_generated=1", "data.test_sources.text=null"]
    few += ["data.validation_sources.text=null"]
    sampled = [*few, "module.rollout.max_new_tokens=4"]
    assert main(["fit", "+recipe=gspo", "paths.run_dir=gspo", *sampled, "module.answers=2"]) == 0
    table = pq.read_table("gspo/rollouts/step=0000002.parquet")
    assert {"prompt", "answer", "reward", "reward/transcript", "ratio", "tokens"} <= set(table.column_names)
    assert "rollout/reward" in Path("gspo/metrics.csv").read_text().splitlines()[0]

    asked = f"data.predict_sources.asked={{path:{PACK},split:heldout_cell,limit:6}}"
    more = {
        "sft": [*few, "data.test_sources.tools=null"],
        "predictions": [asked, "module.generation.max_new_tokens=4"],
        "answers": ["--split", "heldout_cell"],
        "off_policy": [*few, "data.test_sources.tools=null"],
        "on_policy": [*sampled, "module.on_policy=1.0", "data.test_sources.tools=null"],
        "gspo": [*sampled, "module.answers=2", "data.test_sources.tools=null"],
    }
    line = ["fit", "+recipe=post", "paths.run_dir=run", "base=gspo", "teacher=gspo", "judge=base"]
    line += [f"stage_overrides.{stage}=[{','.join(words)}]" for stage, words in more.items()]
    line += [f"stage_overrides.{stage}=null" for stage in ("codes", "talker", "pairs", "preferred")]
    assert main([*line, f"paths.data_dir={tmp_path}"]) == 0
    answers, said = SampleSource(Path("run/answers")), pq.read_table("gspo/predictions.parquet").to_pylist()
    assert [answers[i].reference for i in range(len(answers))] == [row["text"] for row in said]
    assert all(answers.media_bytes(s) for i in range(len(answers)) for s in answers[i].segments if s.type != "text")
    for rung in ("sft", "off_policy", "on_policy", "gspo"):
        assert (tmp_path / "run" / rung / "report.html").stat().st_size > 10_000
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "gspo − before" in page
    off_policy = ["fit", "+recipe=distill_off_policy", "paths.run_dir=none", "answers=run/answers", *FEW]
    assert main(off_policy) == 1


@pytest.mark.slow
def test_codecs_on_voices_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both with discriminators; the arms of the ablation side by side."""
    (tmp_path / "voices").mkdir()
    names = {"synthetic_speech/slt": "voices/asterisk_en", "synthetic_speech/rms": "voices/stamps_be"}
    for shard in sorted(PACK_SPEECH.glob("*.parquet")):
        table = pq.read_table(shard)
        sources = [names[source] for source in table["source"].to_pylist()]
        at = table.column_names.index("source")
        named = table.set_column(at, table.schema.field("source"), pa.array(sources, table.schema.field("source").type))
        pq.write_table(named, tmp_path / "voices" / shard.name)
    monkeypatch.chdir(tmp_path)
    here = [f"paths.data_dir={tmp_path}", *FEW, "module.loss.adversarial_after=1", "evaluation.players=1"]
    assert main(["fit", "+recipe=codec_voices", *here]) == 0
    for arm in ("base", "small_decoder"):
        assert main(["fit", "+recipe=codec_ablation", f"arm={arm}", *here]) == 0
    arms = [f"runs/codec_ablation/{arm}/seed=0" for arm in ("base", "small_decoder")]
    assert main(["report", *arms, "--out", "report.html"]) == 0
    assert "| small_decoder (1 seed) |" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_codec_and_talker_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+recipe=codec", "paths.run_dir=codec", *FEW, "data.rows=1"]) == 0
    assert main(["data", "encode", "codec", str(PACK_SPEECH), "--out", "codes"]) == 0
    made = ["codec=codec", "codes=codes", *FEW, *SHORT]
    assert main(["fit", "+recipe=talker_pretrain", "paths.run_dir=talker_pretrain", *made]) == 0
    for later in ("talker_continue", "speaker_finetune"):
        start = ["module.init_from=talker_pretrain", *made]
        assert main(["fit", f"+recipe={later}", f"paths.run_dir={later}", *start]) == 0
    for run in ("codec", "talker_pretrain", "talker_continue", "speaker_finetune"):
        speech = heard_in(tmp_path / run, signals=2 if run == "codec" else 3)
        assert speech["wer"]["open"]["reference"]["mean"] < 1


@pytest.mark.slow
def test_speech_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "+recipe=speech_quickstart", *FEW, *SHORT]) == 0
    assert heard_in(tmp_path / "runs" / "speech_quickstart", signals=3)["stoi"]["mean"] > 0.85  # of the embedded codec
    for arm in ("sentences_alone", "spelled"):
        words = [f"arm={arm}", f"paths.run_dir={arm}", "evaluation.after_fit=false", *FEW, *SHORT]
        assert main(["fit", "+recipe=talker_ablation", *words]) == 0
    speech = tmp_path / "announcements"  # as data_prep.announcements leaves them
    shutil.copytree(PACK_ANNOUNCEMENTS / "recordings", speech)
    shutil.copy(PACK_ANNOUNCEMENTS / "tokenizer.json", speech)
    words = ["data.sources.speech.split=validation", "evaluation.other_voices=true", *FEW, *SHORT]
    overrides = f"stage_overrides.talker=[{','.join(words)}]"
    assert main(["fit", "+recipe=speech", "paths.run_dir=run", f"speech={speech}", overrides]) == 0
    assert heard_in(tmp_path / "run" / "talker", signals=5)["other_voices"]["n"] == 2


class Hears:
    """In place of `Whisper`: understands every other take."""

    def __init__(self, model: str) -> None:
        self.calls = 0

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str:
        self.calls += 1
        return ("hm", "message from extension")[self.calls % 2]

    def language(self, wav: np.ndarray, sample_rate: int) -> str:
        return "en"


def briefly(*args: Any, **options: Any) -> list[Speech]:
    """Of a Talker that has not learnt to end."""
    return [replace(said, hit_limit=False) for said in speak_texts(*args, **{**options, "max_frames": 12})]


@pytest.mark.slow
def test_the_talkers_four_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`talker_post`, with `data pairs` in this process, where a stand-in for the judge hears."""
    monkeypatch.chdir(tmp_path)
    speech = tmp_path / "announcements"
    shutil.copytree(PACK_ANNOUNCEMENTS / "recordings", speech)
    shutil.copy(PACK_ANNOUNCEMENTS / "tokenizer.json", speech)
    every = ["evaluation.judge=null", *FEW, *SHORT]
    quiet = "evaluation.after_fit=false"
    voices = [
        f"++data.sources.{name}.{key}"
        for name, voice in (("new_voice", "fr"), ("old_voice", "en"))
        for key in ("split=validation", f"where.source=[announcements/asterisk_{voice}]")
    ]
    voices += ["++data.test_sources.speech.where.source=[announcements/asterisk_en]"]
    held = "data.sources.speech.split=validation"  # what the pack has recordings of
    line = ["fit", "+recipe=talker_post", "paths.run_dir=run", f"speech={speech}", "judge=base"]
    line += [f"stage_overrides.all=[{','.join(every)}]", "stage_overrides.pairs=null"]
    line += [f"stage_overrides.{stage}=[{held},{quiet}]" for stage in ("talker", "clean")]
    assert main([*line, "stage_overrides.preferred=null", "stage_overrides.voice=null"]) == 0

    monkeypatch.setattr("omnitrain.evaluation.judges.Whisper", Hears)
    monkeypatch.setattr(speech_pairs, "speak_texts", briefly)
    asked = ["--split", "validation", "--judge", "base", "--understood", "1.5", "--margin", "0.01", "--most", "4"]
    assert main(["data", "pairs", "run/clean", str(speech), "--out", "run/pairs", *asked]) == 0
    made = SampleSource(Path("run/pairs"))
    assert 0 < len(made) <= 4
    assert all(row.meta["chosen_wer"] <= row.meta["rejected_wer"] for row in (made[i] for i in range(len(made))))

    line += [f"stage_overrides.preferred=[{held},{quiet},{held.replace('sources', 'validation_sources')}]"]
    assert main([*line, f"stage_overrides.voice=[{','.join(voices)}]"]) == 0
    rows = Path("run/preferred/metrics.csv").read_text().splitlines()[0]
    assert {"preference/accuracy", "preference/margin"} <= set(rows.split(","))
    assert heard_in(tmp_path / "run" / "voice", signals=3)["kind"] == "talker"


@pytest.mark.slow
def test_a_dialogue_is_learnt_and_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dialogue` on a few rows made as `data_prep.dialogues` makes them, with noise for who asks aloud."""
    monkeypatch.chdir(tmp_path)
    source = SampleSource(PACK_ANNOUNCEMENTS / "recordings", where={"source": "announcements/asterisk_en"})
    rows = [row for row in (source[i] for i in range(len(source))) if dialogues.question_of(row.concept)]
    noise = encode_audio(np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32), 16_000, "flac")
    splits = ("train", "train", "validation", "heldout_concept", "heldout_cell")
    awb = (Voice.parse("awb"), noise)
    asked = []
    for i, row in enumerate(rows[:10]):
        said = replace(row.segments[-1], media=source.media_bytes(row.segments[-1]), path=None)
        made = dialogues.dialogue(said, row, i, awb if i % 2 else None, "Who?")
        written = dialogues.dialogue(Segment(type="text", text=row.concept), row, i, None, "Who?")
        asked += [replace(made, split=splits[i % 5]), replace(written, split="train")]
    write_shards(asked, tmp_path / "dialogues", "dialogues", progress=False)
    shutil.copy(PACK_ANNOUNCEMENTS / "tokenizer.json", tmp_path / "dialogues")
    thinker = [*FEW, "evaluation.after_fit=false"]
    talker = [*FEW, *SHORT, "evaluation.max_new_tokens=6"]
    stages = [f"stage_overrides.thinker=[{','.join(thinker)}]", f"stage_overrides.talker=[{','.join(talker)}]"]
    assert main(["fit", "+recipe=dialogue", "paths.run_dir=run", f"dialogues={tmp_path / 'dialogues'}", *stages]) == 0
    found = heard_in(tmp_path / "run/talker", signals=1)["dialogue"]
    assert found["n"] == 2
    Path("digits.png").write_bytes(dialogues.picture("4729", "x"))
    line = ["talk", "run/talker", "--image", "digits.png", "Who?", "--out", "said.wav", "--max-seconds", "1"]
    assert main([*line, "--max-new-tokens", "4"]) == 0
    assert Path("said.wav").stat().st_size > 1_000


def heard_in(run: Path, signals: int) -> dict[str, Any]:
    """The scores of two sentences, each of which has a player for every signal."""
    speech = json.loads((run / "eval" / "speech.json").read_text())
    assert speech["n"] == 2
    assert (run / "report.html").read_text().count("<audio") >= signals
    return speech
