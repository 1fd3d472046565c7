"""`omnitrain convert`, from a command line to folders that transformers and the other verbs read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnitrain.__main__ import main
from omnitrain.config.saved import read_config
from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.interop.public_format import load_pretrained, save_pretrained
from omnitrain.interop.start_from import model_weights
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights
from omnitrain.runs import convert
from omnitrain.runs.load import load
from tests.conftest import save_run
from tests.interop.public_models import public_sample, save_public_model

SMALL = {
    "thinker": {"layers": 2},
    "aut": {"layers": 1},
    "vision": {"layers": 2},
    "talker": {"layers": 1, "codebooks": 3, "speakers": {"slt": 509, "rms": 510, "kal16": 511}},
    "code2wav": {"layers": 1, "decoder_dim": 32, "d_model": 32},
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_bpe(["a red fire engine", "system\n", "user\n", "assistant\n"] * 20, 400)


@pytest.fixture(scope="module")
def model(tokenizer) -> OmniModel:
    ids = {**tokenizer.special_ids, **{role: tokenizer.encode(role)[0] for role in ("system", "user", "assistant")}}
    model = build("tiny", vocab_size=tokenizer.vocab_size, special_tokens=ids, speech=True, **SMALL)
    init_weights(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def model_overrides() -> list[str]:
    given = [(part, key, value) for part, d in SMALL.items() for key, value in d.items() if key != "speakers"]
    geometry = ["data.vision.max_pixels=9216", "data.vision.fps=4.0", "data.vision.video_max_pixels=131072"]
    return ["model=tiny_speech", *(f"model.{part}.{key}={value}" for part, key, value in given), *geometry]


def run(capsys, *arguments: object) -> str:
    status = main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def fail(capsys, *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 1
    err = capsys.readouterr().err
    line = err[err.index("error: ") :]
    assert line.count("\n") == 1
    return line


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return model_weights(run_dir / "checkpoints" / "last.ckpt")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(x.dtype == other[n].dtype and x.equal(other[n]) for n, x in one.items())


def test_a_run_there_and_back(capsys, run_dir: Path, model: OmniModel, tokenizer: ChatTokenizer, tmp_path: Path):
    """Bit for bit the same weights, the same tokenizer and media, and a run that the other verbs read."""
    public, back, again = tmp_path / "public", tmp_path / "back", tmp_path / "again"
    assert run(capsys, "to-hf", run_dir, public).strip() == str(public)
    run(capsys, "from-hf", public, back)
    assert same(weights(run_dir), weights(back))
    assert json.loads((back / "tokenizer.json").read_text()) == json.loads(tokenizer.to_json())
    before, after = read_config(run_dir), read_config(back)
    assert after.model.config.thinker == before.model.config.thinker
    assert after.model.config.talker == before.model.config.talker
    assert after.model.config.code2wav == before.model.config.code2wav
    assert after.data.config.vision == before.data.config.vision
    assert str(tmp_path) not in (back / "config.yaml").read_text()

    moved = tmp_path / "moved"
    back.rename(moved)
    run(capsys, "to-hf", moved, again)
    for path in public.iterdir():
        if path.name != "conversion.json":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name

    asked = ["--device", "cpu", "--max-new-tokens", "5", "a red"]
    answers = []
    for folder in (run_dir, public, moved):
        assert main(["generate", str(folder), *asked]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    assert load(moved)[0].talker is not None


def test_transformers_loads_it(capsys, run_dir: Path, model: OmniModel, tokenizer: ChatTokenizer, tmp_path: Path):
    from transformers import AutoConfig, AutoTokenizer, Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeProcessor

    out = tmp_path / "out"
    run(capsys, "to-hf", run_dir, out)
    assert AutoConfig.from_pretrained(out).model_type == "qwen3_omni_moe"
    assert AutoTokenizer.from_pretrained(out).encode("a red fire") == tokenizer.encode("a red fire")
    processor = Qwen3OmniMoeProcessor.from_pretrained(out)
    assert processor.image_processor.size.longest_edge == 9216
    assert processor.video_processor.fps == 4.0
    reference = Qwen3OmniMoeForConditionalGeneration.from_pretrained(out).eval()
    assert reference.has_talker
    assert reference.generation_config.eos_token_id == list(tokenizer.stop_ids)
    shown = processor.apply_chat_template([{"role": "user", "content": "a red"}], add_generation_prompt=True)
    inputs = processor(text=shown, return_tensors="pt")
    ids = inputs["input_ids"][0]
    ours = model(
        input_ids=ids,
        position_ids=torch.arange(len(ids)).float().expand(3, -1),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        token_types=torch.zeros(len(ids), dtype=torch.uint8),
    ).hidden
    expected = reference.thinker(**inputs).logits[0]
    torch.testing.assert_close(model.thinker.logits(ours), expected, rtol=0, atol=1e-4)


def test_layouts_and_named_checkpoints(capsys, run_dir: Path, tmp_path: Path):
    run_dir = Path(shutil.copytree(run_dir, tmp_path / "run"))
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    state["state_dict"]["model.thinker.norm.weight"] += 1
    torch.save(state, run_dir / "checkpoints" / "best.ckpt")
    run(capsys, "to-hf", run_dir, tmp_path / "last", "--layout", "thinker")
    run(capsys, "to-hf", run_dir / "checkpoints" / "best.ckpt", tmp_path / "best", "--layout", "thinker")
    last, best = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "best"))
    assert {key for key in last if not last[key].equal(best[key])} == {"model.norm.weight"}
    assert last["model.norm.weight"].add(1).equal(best["model.norm.weight"])


@pytest.mark.parametrize("variant", [0, 1])
def test_a_public_folder_there_and_back(capsys, tokenizer: ChatTokenizer, tmp_path: Path, variant: int):
    """bfloat16 stays, and so do the files beside the weights; transformers computes the same."""
    from transformers import Qwen3OmniMoeForConditionalGeneration

    theirs, start, back = tmp_path / "theirs", tmp_path / "start", tmp_path / "back"
    save_public_model(theirs, variant, kind="full")
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    (theirs / "tokenizer.json").write_text(tokenizer.to_json())
    tensors = {key: x.bfloat16() for key, x in load_file(theirs / "model.safetensors").items()}
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    run(capsys, "from-hf", theirs, start)
    assert {x.dtype for x in weights(start).values()} == {torch.bfloat16}
    run(capsys, "to-hf", start, back)
    assert same(tensors, load_file(back / "model.safetensors"))
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    reference, ours = (
        Qwen3OmniMoeForConditionalGeneration.from_pretrained(f, dtype=torch.float32) for f in (theirs, back)
    )
    sample = public_sample(reference.config, [("text", 4), ("image", (1, 4, 6)), ("audio", 150)])
    logits = [model.thinker(**sample.reference_inputs).logits for model in (reference, ours)]
    assert torch.equal(*logits)
    mine = load(start)[0]
    hidden = mine(**PackedBatch.pack([sample.encoded]).model_inputs()).hidden
    torch.testing.assert_close(mine.thinker.logits(hidden), logits[0][0], rtol=0, atol=1e-4)


def test_a_thinker_gets_its_talker_back(capsys, tokenizer: ChatTokenizer, tmp_path: Path):
    theirs, thinker = tmp_path / "theirs", tmp_path / "run"
    save_public_model(theirs, kind="full")
    (theirs / "tokenizer.json").write_text(tokenizer.to_json())
    model = load_pretrained(theirs, speech=False)
    with torch.no_grad():
        model.thinker.norm.weight.mul_(2)
    save_run(thinker, model, tokenizer, ["model=pretrained", f"model.folder={theirs}"])
    run(capsys, "to-hf", thinker, tmp_path / "alone")
    run(capsys, "to-hf", thinker, tmp_path / "whole", "--base", theirs)
    folders = theirs, tmp_path / "alone", tmp_path / "whole"
    before, alone, whole = (load_file(folder / "model.safetensors") for folder in folders)
    assert {key for key in before if not before[key].equal(whole[key])} == {"thinker.model.norm.weight"}
    assert {f"thinker.{key}" for key in alone} == {key for key in before if key.startswith("thinker.")}


def test_fit_starts_from_it(capsys, toy: list[str], tmp_path: Path):
    """fit -> to-hf -> from-hf -> fit: at learning rate 0 the weights arrive as they left, and the third generation
    still finds the files that the first one came with."""
    first, public, start, second = (tmp_path / name for name in ("first", "public", "start", "second"))
    line = ["fit", "+recipe=quickstart", "trainer.max_steps=1", *toy]
    assert main([*line, f"paths.run_dir={first}"]) == 0
    run(capsys, "to-hf", first, public)
    (public / "LICENSE").write_text("free")
    run(capsys, "from-hf", public, start)
    assert main([*line, f"paths.run_dir={second}", f"module.init_from={start}", "optim.lr=0"]) == 0
    capsys.readouterr()
    assert same(weights(first), weights(second))
    assert convert.came_from(second) == start / "public"
    run(capsys, "to-hf", second, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"

    assert main(["validate", str(start), "data.validation_sources.pack.limit=2"]) == 0
    assert main(["fit", str(start), "trainer.max_steps=1"]) == 1
    assert "start a new run from it with module.init_from=RUN_DIR" in capsys.readouterr().err

    third = tmp_path / "third"
    own = [word for word in line if not word.startswith("+model.")]
    pretrained = ["model=pretrained", f"model.folder={public}", f"paths.run_dir={third}"]
    assert main([*own, *pretrained, "optim.lr=0"]) == 0
    capsys.readouterr()
    run(capsys, "to-hf", third, tmp_path / "out3")
    assert (tmp_path / "out3" / "LICENSE").read_text() == "free"
    assert same(load_file(public / "model.safetensors"), load_file(tmp_path / "out3" / "model.safetensors"))


def test_a_strangers_run_hands_nothing_on(capsys, run_dir: Path, tmp_path: Path):
    """Neither by a link nor by a folder that its configuration names."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key").write_text("secret")
    (secrets / "config.json").write_text("{}")
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    config = (copy / "config.yaml").read_text()
    assert "init_from: null" in config
    (copy / "config.yaml").write_text(config.replace("init_from: null", f"init_from: {secrets}"))
    run(capsys, "to-hf", copy, tmp_path / "out")
    assert not (tmp_path / "out" / "key").exists()
    (copy / "public").mkdir()
    (copy / "public" / "LICENSE").symlink_to(secrets / "key")
    assert "LICENSE is a link" in fail(capsys, "to-hf", copy, tmp_path / "other")
    shutil.rmtree(copy / "public")
    (copy / "public").symlink_to(secrets)
    assert "public is a link" in fail(capsys, "to-hf", copy, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_there_is_kept(capsys, run_dir: Path, public_dir: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    run(capsys, "to-hf", run_dir, out)  # empty
    run(capsys, "to-hf", run_dir, out)  # its own
    assert "no conversion of" in fail(capsys, "to-hf", public_dir, out)
    assert "no conversion of" in fail(capsys, "from-hf", out, out)
    monkeypatch.setattr("omnitrain.interop.public_format.save_file", lambda *a, **k: 1 / 0)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ZeroDivisionError):
        main(["convert", "to-hf", str(run_dir), str(out)])
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt" in fail(capsys, "to-hf", run_dir, out)
    assert "no conversion of" in fail(capsys, "to-hf", public_dir, run_dir)
    assert "is a file" in fail(capsys, "to-hf", run_dir, out / "notes.txt")


def test_what_cannot_be_converted(capsys, run_dir: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert "no such folder" in fail(capsys, "to-hf", tmp_path / "nothing", out)
    assert "neither a run folder" in fail(capsys, "to-hf", tmp_path, out)
    assert "no folder in the public format" in fail(capsys, "from-hf", run_dir, out)
    assert "no folder in the public format" in fail(capsys, "table", run_dir)
    stray = tmp_path / "stray.ckpt"
    shutil.copy(run_dir / "checkpoints" / "last.ckpt", stray)
    assert "stray.ckpt: no checkpoint in the folder of its run" in fail(capsys, "to-hf", stray, out)
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    assert "copy the tokenizer" in fail(capsys, "to-hf", copy, out)
    (copy / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert "copy the tokenizer" in fail(capsys, "to-hf", copy, out)
    shutil.copy(run_dir / "tokenizer.json", copy)
    assert "last.ckpt: this file is damaged" in fail(capsys, "to-hf", copy, out)
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert "module.init_from={thinker: " in fail(capsys, "from-hf", text, out)
    assert not out.exists()


def test_a_codec_has_no_place_there(capsys, tmp_path: Path):
    from omnitrain.config import compose
    from omnitrain.config.saved import write_config

    folder = tmp_path / "codec"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}}, folder / "checkpoints" / "last.ckpt")
    write_config(compose.run_config(["+recipe=codec", f"paths.run_dir={folder}"]), folder)
    error = fail(capsys, "to-hf", folder, tmp_path / "out")
    assert "run of a codec" in error
    assert f"codec={folder}" in error


def test_the_table(capsys, model: OmniModel, tmp_path: Path):
    save_pretrained(model, tmp_path)
    out = run(capsys, "table", tmp_path)
    names = [line.split()[0] for line in out.split("\n\n")[0].splitlines()[1:] if not line.startswith(" ")]
    assert names == [name for name, _ in model.named_parameters()]
    total = sum(p.numel() for p in model.parameters())
    keys = len(load_file(tmp_path / "model.safetensors"))
    assert f"{len(names)} tensors, {total:,} parameters, from {keys:,} public keys; 0 unknown, 0 missing" in out
    assert "thinker.model.layers.0.mlp.experts.{0..7}.gate_proj.weight" in out
    row = next(line for line in out.splitlines() if line.startswith("thinker.layers.0.attention.qkv.weight"))
    assert row.split()[-1] == "F32"
    assert "[320, 192]" in row
    assert "thinker.model.layers.0.self_attn.q_proj.weight" in row


def test_the_table_names_all_that_does_not_fit(capsys, model: OmniModel, tmp_path: Path):
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = ["thinker.lm_head.weight", "thinker.model.layers.1.mlp.experts.3.up_proj.weight"]
    for key in lost:
        del tensors[key]
    tensors |= {"thinker.extra": torch.ones(2), "other": torch.ones(2), "thinker.model.norm.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["convert", "table", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "2 unknown, 2 missing, 1 of another shape" in out
    assert [line for line in out.splitlines() if line.startswith("missing: ")] == [
        f"missing: {key}" for key in ("thinker.model.layers.1.mlp.experts.3.up_proj.weight", "thinker.lm_head.weight")
    ]
    assert {"unknown: other", "unknown: thinker.extra"} <= set(out.splitlines())
    assert "of another shape: thinker.model.norm.weight: [3], config.json asks for [192]" in out
    assert ".experts.{0,1,2,4,5,6,7}.up_proj" in out
