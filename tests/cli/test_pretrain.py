"""The recipes pretrain*: a few steps of every stage, killed in each and continued; the report; the mix of tokens."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omnitrain.__main__ import main
from omnitrain.config.compose import run_config
from omnitrain.config.locations import PACK
from omnitrain.config.resolvers import sample_weight
from omnitrain.config.run_config import RunConfig
from omnitrain.models.sizes import PRESETS
from omnitrain.reports.mixture import by_language, by_modality, by_source
from omnitrain.runs.chain import stages_of
from omnitrain.runs.experiment import build_data

STAGES = ["s0_text", "s1_audio_adapter", "s1_audio_encoder", "s1_vision_adapter", "s1_vision_encoder", "s2", "s3"]
SMALL = [
    "+model.thinker={layers:2,accept_hidden_layer:1,d_model:32,heads:2,kv_heads:1,ffn:32,expert_width:16}",
    "+model.aut={d_model:16,layers:1,heads:2,ffn:16,conv_hidden:4}",
    "+model.vision={d_model:32,layers:2,heads:2,ffn:32,deepstack_layers:[0]}",
    "data.max_tokens=160", "optim.warmup_steps=1", "trainer.max_steps=6", "trainer.val_check_interval=3",
    "trainer.limit_val_batches=2", "callbacks.checkpoint.every_n_steps=2", "trainer.deterministic=true",
]  # fmt: skip


def line(run_dir: Path, *more: str) -> list[str]:
    words = f"stage_overrides.all=[{','.join([*SMALL, *more])}]"
    return ["fit", "+recipe=pretrain", f"paths.run_dir={run_dir}", words]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, six steps each, with scores and reports."""
    folder = tmp_path_factory.mktemp("pretrain") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(line(folder, "evaluation.max_samples=2", "evaluation.max_generated=1")) == 0
    torch.use_deterministic_algorithms(False)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_each_stage_trains_its_parts_from_the_last(uninterrupted: Path) -> None:
    """What a stage does not train is, bit for bit, what the one before left; all that it trains has moved."""
    trained = {
        "s1_audio_adapter": r"model\.aut\.(proj|ln_post)", "s1_audio_encoder": r"model\.aut\.",
        "s1_vision_adapter": r"model\.visual\.(merger|deepstack)", "s1_vision_encoder": r"model\.visual\.",
        "s2": r"model\.", "s3": r"model\.",
    }  # fmt: skip
    before = weights(uninterrupted / "s0_text")
    for stage, pattern in trained.items():
        after = weights(uninterrupted / stage)
        moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
        assert moved, stage
        assert [name for name in moved if not re.match(pattern, name)] == [], stage
        before = after


@pytest.mark.slow
def test_report_over_all_stages(uninterrupted: Path) -> None:
    page = (uninterrupted / "report.html").read_text(encoding="utf-8")
    assert "7 of 7 stages" in page
    assert 'class="missing"' not in page
    for name in STAGES:
        assert f'href="{name}/report.html"' in page
        assert (uninterrupted / name / "report.html").stat().st_size > 10_000
        scores = json.loads((uninterrupted / name / "eval" / "scores.json").read_text())
        assert {row["modality"] for row in scores["scores"]} >= {"text", "image", "audio"}
    assert page.count("<svg") == 1
    assert page.count("tokens asked") == 2  # s2 and s3 have a mix of tokens
    # The whole run's tokens are those of the stages.
    tokens = sum(json.loads((uninterrupted / name / "data.json").read_text())["tokens"] for name in STAGES)
    assert f"<dd>{tokens:,}</dd>" in page


@pytest.mark.slow
def test_the_mixture_kept_its_bound(uninterrupted: Path) -> None:
    for name in STAGES:
        data = json.loads((uninterrupted / name / "data.json").read_text())
        rows = [*by_source(data), *by_modality(data), *by_language(data)]
        assert [row.name for row in rows if row.kept is not True] == [], name
        assert all(row.bound == 1 for row in by_source(data))
    assert {row.name for row in by_modality(data)} == {"text", "audio", "image", "video", "audio_video"}


@pytest.mark.slow
def test_killed_in_stages_of_each_kind(uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Kill -9 in a stage that learns all from nothing, in one that learns a part, in one that goes on with the whole:
    the same line after each; the weights are those of the run that was left alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_dir = uninterrupted.parent / "killed"
    chosen = ["s0_text", "s1_audio_adapter", "s3"]
    left_out = [f"stage_overrides.{name}=null" for name in STAGES if name not in chosen]
    start = f"stage_overrides.s3=[module.init_from={uninterrupted / 's2'}]"
    words = [*line(run_dir, "evaluation.after_fit=false"), *left_out, start]
    command = [sys.executable, "-m", "omnitrain", *words]
    for number, name in enumerate(chosen):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = run_dir / name / "metrics.csv"
        deadline = time.monotonic() + 240
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert name not in finished(run_dir)
        assert len(finished(run_dir)) == number
        for _ in range(100):  # the stage ends with it: nobody trains on in its folder
            if not processes_of(run_dir):
                break
            time.sleep(0.05)
        assert processes_of(run_dir) == []
        if name == "s1_audio_adapter":
            capfd.readouterr()
            assert main(["report", str(run_dir)]) == 0
            said = capfd.readouterr().err
            assert "stage s1_audio_adapter: not finished" in said
            assert "stage s3: not begun" in said
            assert "stage s0_text: held-out scores" in said
            assert "1 of 3 stages" in (run_dir / "report.html").read_text()
    assert main(words) == 0
    for name in chosen:
        whole, again = weights(uninterrupted / name), weights(run_dir / name)
        assert whole.keys() == again.keys()
        assert [key for key in whole if not torch.equal(whole[key], again[key])] == [], name
        assert (uninterrupted / name / "metrics.csv").read_bytes() == (run_dir / name / "metrics.csv").read_bytes()


def finished(run_dir: Path) -> list[str]:
    path = run_dir / "stages.json"
    return list(json.loads(path.read_text())) if path.is_file() else []


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of the processes that train below `run_dir`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"paths.run_dir={run_dir}" in "\n".join(words):
                found.append(" ".join(words))
    return found


@pytest.mark.slow
def test_a_public_text_model_instead_of_s0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """`pretrain` without its first stage: the Thinker of S1 is the text model, and stays it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    text = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=4096,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    text.save_pretrained(tmp_path / "text")
    left_out = [f"stage_overrides.{name}=null" for name in STAGES if name != "s1_audio_adapter"]
    start = f"stage_overrides.s1_audio_adapter=[module.init_from={{thinker: {tmp_path / 'text'}}}]"
    assert main([*line(tmp_path / "run", "evaluation.after_fit=false"), *left_out, start]) == 0
    assert [stage.name for stage in stages_of(tmp_path / "run") or []] == ["s1_audio_adapter"]
    after = weights(tmp_path / "run" / "s1_audio_adapter")
    assert torch.equal(after["model.thinker.lm_head.weight"], text.lm_head.weight)
    assert torch.equal(after["model.thinker.norm.weight"], text.model.norm.weight)
    shutil.rmtree(tmp_path / "run")


def recipe(*overrides: str) -> RunConfig:
    return run_config([*overrides, "paths.run_dir=run", "module.init_from=null"])


REPORT = {"text": 0.57, "audio": 0.77, "image": 0.82, "video": 0.05, "audio_video": 0.05}


@pytest.mark.parametrize("name", ["pretrain_s2", "pretrain_s3"])
def test_weights_give_the_tokens_that_the_mix_asks_for(name: str) -> None:
    """`per_sample` is what samples of the pack measure, and weight times that is the share of tokens."""
    config = recipe(f"+recipe={name}")
    data, mix = build_data(config), config.variables["mix"]
    shares = {source: entry["tokens"] for source, entry in mix.items()}
    if name == "pretrain_s2":
        assert shares == REPORT
    weighted = {}
    for source, opened in data.opened("sources").items():
        every = range(0, len(opened), max(1, len(opened) // 40))
        lengths = [len(data.encoder(opened[i], opened.media_bytes)) for i in every]
        mean = sum(lengths) / len(lengths)
        # Documents differ in length (deviation about their mean): forty of them are a rough guess.
        assert mean == pytest.approx(mix[source]["per_sample"], rel=0.25 if source == "text" else 0.04), source
        weighted[source] = config.data.config.sources[source].weight * mix[source]["per_sample"]
    scale = sum(weighted.values()) / sum(shares.values())
    assert {source: value / scale for source, value in weighted.items()} == pytest.approx(shares, rel=1e-3)


def test_the_recipes_describe_the_full_size() -> None:
    """The 30B-A3B shapes and the report's lengths, composed and checked (not built)."""
    full = ["model=qwen3_omni_30b_a3b", "trainer=ddp", f"data.tokenizer={PACK}"]
    for name, length in (("pretrain_s1_audio", 8192), ("pretrain_s1_vision", 8192), ("pretrain_s2", 8192),
                         ("pretrain_s3", 32768)):  # fmt: skip
        config = recipe(f"+recipe={name}", *full, f"data.max_tokens={length}")
        assert config.model.config.thinker == PRESETS["qwen3_omni_30b_a3b"].thinker
        assert config.data.config.max_tokens == length


def test_what_is_no_share() -> None:
    assert sample_weight(0.57, 28.5) == 20
    for tokens, per_sample in ((-0.1, 20), (0.5, 0)):
        with pytest.raises(ValueError, match="mix: tokens"):
            sample_weight(tokens, per_sample)
