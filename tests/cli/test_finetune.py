"""From a public folder and recordings of one's own to a run and back to a public folder: whole, and by adapters.

Two random folders: `one` in fp32 and one file; `many` in bfloat16 and several files, with a Talker.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from omnitrain.__main__ import main
from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.files import LAST_CHECKPOINT
from omnitrain.interop.public_format import save_pretrained
from omnitrain.interop.start_from import model_weights
from omnitrain.models.presets import build, init_weights
from omnitrain.runs.load import load

SIZES = {
    "one": {
        "thinker": {"layers": 2, "d_model": 32, "heads": 2, "kv_heads": 1, "ffn": 32, "expert_width": 16},
        "aut": {"d_model": 16, "layers": 1, "heads": 2, "ffn": 16, "conv_hidden": 4},
        "vision": {"d_model": 32, "layers": 2, "heads": 2, "ffn": 32, "deepstack_layers": [0], "patch": 8},
    },
    "many": {
        "thinker": {"layers": 3, "d_model": 48, "heads": 3, "kv_heads": 1, "ffn": 40, "dense_layers": [1]},
        "aut": {"d_model": 32, "layers": 2, "heads": 2, "ffn": 48, "conv_hidden": 4},
        "vision": {"d_model": 48, "layers": 2, "heads": 3, "ffn": 32, "deepstack_layers": [0, 1]},
        "talker": {"layers": 1, "codebooks": 3},
        "code2wav": {"layers": 1, "decoder_dim": 32, "d_model": 32},
        "speech": True,
    },
}
ALL_TARGETS = "'module.lora={rank:4,alpha:8,parts:[thinker,aut,visual],targets:[attention,mlp,experts]}'".strip("'")
LINES = ["a red cat", "the blue moon", "a red mat", "the cat sits"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokenizer = train_bpe([*LINES, "system\n", "user\n", "assistant\n", "What is said?"] * 20, 400)
    ids = {**tokenizer.special_ids, **{role: tokenizer.encode(role)[0] for role in ("system", "user", "assistant")}}
    folders = {}
    for name, sizes in SIZES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=ids, **sizes)
        init_weights(model, seed=3)
        dtype, limit = (torch.float32, 10**9) if name == "one" else (torch.bfloat16, 60_000)
        save_pretrained(model.to(dtype), folders[name], max_shard_bytes=limit)
        tokenizer.save(folders[name] / "tokenizer.json")
        (folders[name] / "LICENSE").write_text("free")
        (folders[name] / "pytorch_model.bin").write_bytes(bytes(9))  # the same weights in another format stay there
    assert len(list(folders["many"].glob("*.safetensors"))) > 3
    return folders


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of half a second with a sentence each, and the adapter file that describes them."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for i, text in enumerate(LINES * 3):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 60 * i) * np.arange(8000) / 16000)
        soundfile.write(folder / f"{i}.wav", tone.astype(np.float32), 16000)
        rows.append(json.dumps({"id": str(i), "file": f"{i}.wav", "text": text}))
    (folder / "lines.jsonl").write_text("\n".join(rows))
    described = {
        "kind": "jsonl", "path": "lines.jsonl", "source": "mine", "task": "asr", "split": "train", "languages": ["en"],
        "id": "{id}", "messages": [{"user": [{"audio": "{file}"}, {"text": "What is said?"}]}, {"assistant": "{text}"}],
    }  # fmt: skip
    (folder / "mine.yaml").write_text(json.dumps(described))
    return folder / "mine.yaml"


def fit(capsys: pytest.CaptureFixture[str], folder: Path, recordings: Path, run: Path, *more: str) -> str:
    line = ["fit", "+recipe=finetune", f"model.folder={folder}", f"+data.sources.mine.path={recordings}"]
    fast = ["data.num_workers=0", "data.max_tokens=128", "optim.lr=1e-2", "optim.warmup_steps=1", "optim.total_steps=4"]
    status = main([*line, f"paths.run_dir={run}", *fast, *more])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def convert(capsys: pytest.CaptureFixture[str], *words: object) -> None:
    assert main(["convert", "to-hf", *map(str, words)]) == 0, capsys.readouterr().err
    capsys.readouterr()


@torch.no_grad()
def answers_of_transformers(folder: Path, question: str) -> tuple[list[int], torch.Tensor]:
    """Greedy ids after a question in the folder's template, and the logits of the prompt."""
    from transformers import (
        AutoTokenizer,
        Qwen3OmniMoeForConditionalGeneration,
        Qwen3OmniMoeThinkerForConditionalGeneration,
    )

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    full = architecture == "Qwen3OmniMoeForConditionalGeneration"
    cls = Qwen3OmniMoeForConditionalGeneration if full else Qwen3OmniMoeThinkerForConditionalGeneration
    reference = cls.from_pretrained(folder, dtype="auto").eval()
    thinker = reference.thinker if full else reference
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(shown, return_tensors="pt")["input_ids"]
    written = thinker.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    return written, thinker(input_ids=ids).logits[0].float()


@torch.no_grad()
def answers_of_omnitrain(folder: Path, question: str) -> tuple[list[int], torch.Tensor]:
    from omnitrain.data.batch import PackedBatch
    from omnitrain.data.sample import Message, Sample, Segment
    from omnitrain.generation.sampling import Decoding
    from omnitrain.generation.text import generate

    model, encoder = load(folder)
    asked = Message(role="user", segments=(Segment(type="text", text=question),))
    prompt = encoder.encode_prompt(Sample(id="1", source="t", messages=(asked,)), lambda segment: b"")
    pack = PackedBatch.pack([prompt])
    (written,) = generate(model, pack, Decoding(max_new_tokens=12), stop_ids=encoder.tokenizer.stop_ids)
    return written, model.thinker.logits(model(**pack.model_inputs()).hidden).float()


def without_stop(ids: list[int], stops: tuple[int, ...] | set[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stops else ids


@pytest.mark.parametrize(
    ("name", "how"),
    [("many", "whole"), ("many", "lora"), ("one", "lora"), pytest.param("one", "whole", marks=pytest.mark.slow)],
)
def test_there_and_back(capsys, originals, recordings: Path, tmp_path: Path, name: str, how: str) -> None:
    """Trained, exported, read by transformers: the same greedy text as omnitrain's and, in fp32, logits within 1e-4."""
    run, out = tmp_path / "run", tmp_path / "out"
    how_trained = [ALL_TARGETS, "module.train=[aut_adapter]"] if how == "lora" else []
    fit(capsys, originals[name], recordings, run, *how_trained, "trainer.max_steps=4")
    folder = Path(shutil.copytree(originals[name], tmp_path / "folder"))
    convert(capsys, run, out)
    stored = {x.dtype for path in out.glob("*.safetensors") for x in load_file(path).values()}
    assert stored == {torch.float32 if name == "one" else torch.bfloat16}
    assert (out / "LICENSE").read_text() == "free"
    assert not (out / "pytorch_model.bin").exists()
    before, after = (answers_of_transformers(place, "What is said?") for place in (folder, out))
    assert (before[1] - after[1]).abs().max() > 0.05  # it has learnt
    stops = ChatTokenizer.from_dir(out).stop_ids
    mine = answers_of_omnitrain(out, "What is said?")
    assert without_stop(after[0], stops) == without_stop(mine[0], stops)
    if name == "one":
        torch.testing.assert_close(mine[1], after[1], rtol=0, atol=1e-4)
    convert(capsys, run, tmp_path / "fp32", "--dtype", "float32")
    exact, from_run = (
        answers_of_transformers(tmp_path / "fp32", "What is said?"),
        answers_of_omnitrain(run, "What is said?"),
    )
    assert without_stop(exact[0], stops) == without_stop(from_run[0], stops)
    torch.testing.assert_close(from_run[1], exact[1], rtol=0, atol=1e-4)


def test_adapters_resume_exactly(capsys, originals, recordings: Path, tmp_path: Path) -> None:
    """Two steps, then two more in a new process' state: weights, moments and rows as of four in one go; the frozen
    weights are the folder's, bit for bit; and the folder is not needed to read the run."""
    folder = Path(shutil.copytree(originals["one"], tmp_path / "folder"))
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    fit(capsys, folder, recordings, whole, ALL_TARGETS, "trainer.max_steps=4")
    fit(capsys, folder, recordings, parted, ALL_TARGETS, "trainer.max_steps=2")
    fit(capsys, folder, recordings, parted, ALL_TARGETS, "trainer.max_steps=4", "ckpt_path=last")
    one, other = (torch.load(run / LAST_CHECKPOINT, weights_only=True) for run in (whole, parted))
    assert all(x.equal(other["state_dict"][name]) for name, x in one["state_dict"].items())
    moments = [state["optimizer_states"][0]["state"] for state in (one, other)]
    assert all(moments[0][i][m].equal(moments[1][i][m]) for i in moments[0] for m in ("exp_avg", "exp_avg_sq"))
    assert (whole / "metrics.csv").read_text() == (parted / "metrics.csv").read_text()
    adapters = [name for name in one["state_dict"] if ".lora_" in name]
    assert len(moments[0]) == len([name for name in adapters if "visual" not in name])  # there are no pictures
    base = load(folder)[0].state_dict()
    frozen = {name.removeprefix("model.").replace(".base_layer", ""): x for name, x in one["state_dict"].items()}
    assert all(frozen[name].equal(x) for name, x in base.items())
    merged = model_weights(whole / LAST_CHECKPOINT)
    assert merged.keys() == base.keys()
    assert not merged["thinker.layers.0.mlp.experts.down"].equal(base["thinker.layers.0.mlp.experts.down"])

    shutil.rmtree(folder)
    assert all(x.equal(merged[name]) for name, x in load(whole)[0].state_dict().items())
    convert(capsys, whole, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"


@pytest.mark.slow
def test_a_run_with_adapters_is_read_by_the_verbs(capsys, originals, recordings: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(capsys, originals["one"], recordings, run, ALL_TARGETS, "trainer.max_steps=1")
    sources = [f"+data.{which}_sources={{mine:{{path:{recordings},limit:2}}}}" for which in ("validation", "predict")]
    assert main(["validate", str(run), *sources]) == 0, capsys.readouterr().err
    assert main(["predict", str(run), *sources, "module.generation.max_new_tokens=2"]) == 0, capsys.readouterr().err
    assert main(["generate", str(run), "--device", "cpu", "--max-new-tokens", "2", "What is said?"]) == 0
    second = tmp_path / "second"  # another run starts from the merged weights
    fit(capsys, originals["one"], recordings, second, f"module.init_from={run}", "trainer.max_steps=1", "optim.lr=0")
    merged, start = model_weights(run / LAST_CHECKPOINT), model_weights(second / LAST_CHECKPOINT)
    assert all(x.equal(start[name]) for name, x in merged.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model.folder must be given: add model.folder=VALUE to the line"),
        (["model.folder=/nowhere"], "error: /nowhere/config.json: "),
        (
            ["model.folder=ONE", "module.lora={rank:4,parts:[talker]}"],
            "module.lora: talker has no attention and no mlp",
        ),
        (["model.folder=ONE", "module.lora={ranks:4}"], "module.lora.ranks: there is no such key; did you mean rank"),
        (["model.folder=BAD"], "is cut off in key"),
    ],
)
def test_what_is_refused(capsys, originals, recordings: Path, tmp_path: Path, words: list[str], message: str) -> None:
    bad = Path(shutil.copytree(originals["one"], tmp_path / "bad"))
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-99])
    words = [word.replace("ONE", str(originals["one"])).replace("BAD", str(bad)) for word in words]
    line = ["fit", "+recipe=finetune", f"+data.sources.mine.path={recordings}", f"paths.run_dir={tmp_path / 'run'}"]
    assert main([*line, *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_two_processes_share_the_model(capsys, runs, originals, recordings: Path, tmp_path: Path) -> None:
    """`parallel=fsdp_ep trainer.devices=2`, exported and read by transformers: what one process has learnt."""
    line = ["fit", "+recipe=finetune", f"model.folder={originals['one']}", f"+data.sources.mine.path={recordings}"]
    line += ["data.num_workers=0", "data.max_tokens=128", "optim.lr=1e-2", "optim.warmup_steps=1", "optim.eps=1e-3"]
    line += ["optim.total_steps=4", "trainer.max_steps=4", "trainer.precision=32-true", "data.streams=2"]
    line += ["module.loss.balance_coefficient=0"]  # which depends on how many packs go together
    one, two = tmp_path / "one", tmp_path / "two"
    shared = [*line, "parallel=fsdp_ep", "trainer.devices=2", f"paths.run_dir={two}"]
    begun = runs.start(tmp_path / "begun", 2, argv=[*shared, "trainer.max_steps=2"])
    assert main([*line, "trainer.accumulate_grad_batches=2", f"paths.run_dir={one}"]) == 0, capsys.readouterr().err
    begun.finish()
    runs.start(tmp_path / "ended", 2, argv=[*shared, "ckpt_path=last"]).finish()
    weights = [model_weights(place / LAST_CHECKPOINT) for place in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (two / LAST_CHECKPOINT).is_dir()
    assert all(x.equal(weights[1][name]) for name, x in load(two)[0].state_dict().items())
    alone = ["parallel.engine=ddp", "parallel.expert=1", "trainer.devices=1"]
    alone += [f"+data.validation_sources={{mine:{{path:{recordings},limit:2}}}}"]
    assert main(["validate", str(two), *alone]) == 0, capsys.readouterr().err
    assert main(["generate", str(two), "--device", "cpu", "--max-new-tokens", "2", "What is said?"]) == 0
    again = tmp_path / "again"  # another run begins with it
    fit(capsys, originals["one"], recordings, again, f"module.init_from={two}", "trainer.max_steps=1", "optim.lr=0")
    started = model_weights(again / LAST_CHECKPOINT)
    assert all(x.to(started[name].dtype).equal(started[name]) for name, x in weights[1].items())
    convert(capsys, two, tmp_path / "out")
    stops = ChatTokenizer.from_dir(tmp_path / "out").stop_ids
    theirs, ours = (
        answers(tmp_path / "out", "What is said?") for answers in (answers_of_transformers, answers_of_omnitrain)
    )
    assert without_stop(theirs[0], stops) == without_stop(ours[0], stops)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-4)
