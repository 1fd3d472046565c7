"""Weights of public folders: how much memory reading them takes, and what is said of files that cannot be read.

Two random folders, one of them in several files.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnitrain.interop.public_config import CheckpointError
from omnitrain.interop.public_format import load_part, load_pretrained, save_pretrained
from omnitrain.models.presets import build, init_weights
from tests.interop.public_models import public_model, save_public_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one`: a Thinker in one file.  `many`: a whole model in several."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "many")}
    save_public_model(folders["one"], variant=1)
    public_model(0, "full").save_pretrained(folders["many"], max_shard_size="200KB")
    assert len(list(folders["many"].glob("*.safetensors"))) > 4
    return folders


@pytest.fixture(params=["one", "many"])
def folder(request, originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[request.param], tmp_path / request.param))


def file_of(folder: Path, key: str) -> Path:
    index = folder / "model.safetensors.index.json"
    return folder / (json.loads(index.read_text())["weight_map"][key] if index.exists() else "model.safetensors")


def change(folder: Path, key: str, action) -> Path:
    """Apply `action` to the tensors of the file that holds `key`."""
    path = file_of(folder, key)
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def said(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def key_in(folder: Path) -> str:
    prefix = "thinker." if (folder / "model.safetensors.index.json").exists() else ""
    return f"{prefix}model.layers.2.mlp.experts.1.up_proj.weight" if prefix else "model.layers.3.mlp.up_proj.weight"


def test_a_file_that_is_cut_off(folder: Path) -> None:
    path = file_of(folder, key_in(folder))
    path.write_bytes(path.read_bytes()[:-1000])
    message = said(folder)
    assert re.fullmatch(rf"{re.escape(str(path))}: the file is cut off in key '(.+)'; copy it again", message)
    path.write_bytes(path.read_bytes()[:30])
    assert said(folder).startswith(f"{path}: not a readable safetensors file")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(folder: Path, dtype: torch.dtype) -> None:
    key = key_in(folder)
    path = change(folder, key, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    name = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    assert said(folder) == (
        f"{path}: key {key!r} is stored as {name}; expected one of F32, BF16, F16, F64: quantised weights are not "
        "trained here, use the folder that they were made from"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert said(folder).startswith(f"{folder / 'config.json'}: field quantization_config is set; quantised weights")


def test_a_tensor_that_is_missing(folder: Path) -> None:
    key = key_in(folder)
    index = folder / "model.safetensors.index.json"
    path = change(folder, key, lambda tensors: tensors.pop(key))
    if not index.exists():
        assert said(folder).startswith(f"{path}: key {key!r} is missing, though config.json describes it; copy the")
        return
    assert said(folder).startswith(f"{path}: key {key!r} cannot be read (File does not contain tensor")
    values = json.loads(index.read_text())
    del values["weight_map"][key]
    index.write_text(json.dumps(values))
    assert said(folder).startswith(f"{index}: key {key!r} is missing, though config.json describes it")


def test_a_tensor_that_nobody_knows(folder: Path) -> None:
    extra = key_in(folder).replace("up_proj", "up_proj_2")
    path = change(folder, key_in(folder), lambda tensors: tensors.update({extra: torch.ones(2)}))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"][extra] = path.name
        index.write_text(json.dumps(values))
    assert said(folder) == (
        f"{path}: unknown key {extra!r}; config.json describes no tensor of that name: remove it from the file, or use "
        "the config.json that belongs to these weights"
    )


def test_a_file_that_the_index_names_is_missing(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals["many"], tmp_path / "many"))
    path = file_of(folder, key_in(folder))
    path.unlink()
    assert re.fullmatch(
        rf"{folder}/model\.safetensors\.index\.json: key '.+' is in {path.name}, which is not there; copy that file "
        "too",
        said(folder),
    )


def test_a_part_alone(originals: dict[str, Path]) -> None:
    whole = load_pretrained(originals["many"]).state_dict()
    for part in ("aut", "visual", "thinker", "talker", "code2wav"):
        alone = load_part(originals["many"], part)
        assert {f"{part}.{name}" for name in alone} == {name for name in whole if name.startswith(f"{part}.")}
        assert all(x.equal(whole[f"{part}.{name}"]) for name, x in alone.items())
    with pytest.raises(CheckpointError, match="describes no talker"):
        load_part(originals["one"], "talker")


def test_captioner_and_thinking_load_as_thinkers(originals: dict[str, Path], tmp_path: Path) -> None:
    """Their config.json describes a Talker, says `enable_audio_output: false`, and no file holds one."""
    folder = Path(shutil.copytree(originals["many"], tmp_path / "many"))
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    weight_map = {key: name for key, name in values["weight_map"].items() if key.startswith("thinker.")}
    index.write_text(json.dumps({**values, "weight_map": weight_map}))
    assert "key 'talker." in said(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "enable_audio_output": False}))
    model, whole = load_pretrained(folder), load_pretrained(originals["many"])
    assert model.talker is None
    assert model.code2wav is None
    assert all(x.equal(whole.state_dict()[name]) for name, x in model.state_dict().items())


MEASURE = """
import sys, threading, torch, omnitrain.interop.public_format as f
def kib(name): return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith(name))
start, peak, done = kib('VmRSS:'), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005): peak = max(peak, kib('VmRSS:'))
thread = threading.Thread(target=watch); thread.start()
model = f.load_pretrained(sys.argv[1])
done.set(); thread.join()
print((max(peak, kib('VmRSS:')) - start) * 1024, sum(p.nbytes for p in model.parameters()))
"""


def test_memory_is_the_model_and_one_file(tmp_path: Path) -> None:
    """99 MB in files of at most 15 MB: the peak is the model, one file and at most 12 MB."""
    model = build("tiny", vocab_size=20_000, special_tokens={}, speech=True, thinker={"expert_width": 384})
    init_weights(model, seed=0)
    save_pretrained(model, tmp_path, max_shard_bytes=8_000_000)
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 8
    out = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, size = map(int, out.stdout.split())
    assert size > 80_000_000
    print(f"peak {peak / 1e6:.1f} MB, model {size / 1e6:.1f} MB, largest file {largest / 1e6:.1f} MB")
    assert peak < size + largest + 12_000_000
