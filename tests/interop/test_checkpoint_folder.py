"""A folder that several processes have written: what is read of it, and what is found that is not as it was written.

That they write what one process has, and that torch reads the same, is in `training/test_mesh.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omnitrain.__main__ import main
from omnitrain.interop.checkpoint_folder import STATE, SUMS, _sha256
from omnitrain.interop.checksums import damage
from omnitrain.interop.public_config import CheckpointError
from omnitrain.interop.start_from import model_weights, read_checkpoint
from omnitrain.interop.stored import region, shapes
from tests.reliability.test_checksums import flip

WEIGHTS = {"model.a": torch.randn(5, 3), "model.b.experts": torch.randn(4, 2, 3), "model.n": torch.tensor(3)}
MOMENT = torch.randn(5, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As `torch.distributed.checkpoint` writes it, of two processes: rows 0 to 2 and 3 to 4, experts 0, 1 and 2, 3."""
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    for i, (rows, experts) in enumerate(((slice(0, 3), slice(0, 2)), (slice(3, 5), slice(2, 4)))):
        tensors = {"state_dict.model.a": WEIGHTS["model.a"][rows], "optimizer_states.0.0.exp_avg": MOMENT[rows]}
        tensors |= {"state_dict.model.b.experts": WEIGHTS["model.b.experts"][experts]}
        first = {"a": [rows.start, 0], "exp_avg": [rows.start, 0], "experts": [experts.start, 0, 0]}
        places = {name: {"saved_offsets": first[name.rpartition(".")[2]]} for name in tensors}
        path = folder / f"shard-{i + 1:05d}-model-00001-of-00001.safetensors"
        save_file({n: x.contiguous() for n, x in tensors.items()}, path, {"DCP_SHARDING_INFO": json.dumps(places)})
    groups = [{"params": [0], "lr": 0.1}]
    state: dict[str, Any] = {"state_dict": {"model.n": WEIGHTS["model.n"]}, "global_step": 7}
    state["optimizer_states"] = [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": groups}]
    torch.save(state, folder / STATE)
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    sums = {path.name: _sha256(path) for path in folder.iterdir() if path.name != SUMS}
    (folder / SUMS).write_text(json.dumps(sums))


def test_what_is_read(folder: Path) -> None:
    found = read_checkpoint(folder)
    assert found["global_step"] == 7
    assert found["state_dict"].keys() == WEIGHTS.keys()
    assert all(torch.equal(found["state_dict"][name], x) for name, x in WEIGHTS.items())
    assert shapes(found["state_dict"]) == {name: tuple(x.shape) for name, x in WEIGHTS.items()}
    moments = found["optimizer_states"][0]["state"][0]
    assert dict(moments).keys() == {"step", "exp_avg"}
    assert torch.equal(moments["exp_avg"], MOMENT)
    assert model_weights(folder)["b.experts"].equal(WEIGHTS["model.b.experts"])
    for start in range(4):
        for n in range(1, 5 - start):
            part = region(found["state_dict"], "model.b.experts", (start, 0, 1), (n, 2, 2))
            assert torch.equal(part, WEIGHTS["model.b.experts"][start : start + n, :, 1:])


def test_what_is_not_as_it_was_written(folder: Path) -> None:
    """A bit of any file, one that is missing, one too many; the last good one is named."""
    good = Path(shutil.copytree(folder, folder.with_name("previous.ckpt")))
    for path in sorted(folder.iterdir()):
        for position in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            flip(path, position, 1)
            with pytest.raises(CheckpointError) as error:
                read_checkpoint(folder)
            said = "no whole checkpoint" if path.name == SUMS else f"damaged: the checksum of {path.name} does not fit"
            assert str(error.value).startswith(f"{folder}: this folder is ")
            assert said in str(error.value) or path.name == SUMS
            assert str(error.value).endswith(f"the last good one is {good} (ckpt_path={good})")
            flip(path, position, 1)
        moved = path.rename(folder.parent / path.name)
        assert damage(folder) == (
            "no whole checkpoint of omnitrain" if path.name == SUMS else f"damaged: {path.name} is missing"
        )
        moved.rename(path)
    assert damage(folder) is None
    shares = [damage(folder, (i, 2)) for i in range(2)]
    assert shares == [None, None]
    flip(folder / STATE, 99)
    assert sorted([damage(folder, (i, 2)) is None for i in range(2)]) == [False, True]  # one of them looks at it
    flip(folder / STATE, 99)
    (folder / "more").touch()
    assert damage(folder) == "damaged: more does not belong to it"


def test_what_was_never_whole(folder: Path) -> None:
    """Checksums that fit, of parts that leave something out, or of code."""
    save_file({"state_dict.model.a": torch.ones(2, 3)}, folder / "shard-00002-model-00001-of-00001.safetensors",
              {"DCP_SHARDING_INFO": json.dumps({"state_dict.model.a": {"saved_offsets": [4, 0]}})})  # fmt: skip
    seal(folder)
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint of omnitrain"):
        read_checkpoint(folder)
    touched = folder.with_name("touched")

    class Foreign:
        def __reduce__(self) -> Any:
            return Path.touch, (touched,)

    torch.save(Foreign(), folder / STATE)
    seal(folder)
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint of omnitrain"):
        read_checkpoint(folder)
    assert not touched.exists()


def test_one_file_of_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "to-ckpt", str(folder), str(tmp_path / "one.ckpt")]) == 0
    one = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert all(torch.equal(one["state_dict"][name], x) for name, x in WEIGHTS.items())
    assert torch.equal(one["optimizer_states"][0]["state"][0]["exp_avg"], MOMENT)
    assert damage(tmp_path / "one.ckpt") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "one.ckpt"]
    for source, said in ((folder, "is there already"), (tmp_path / "one.ckpt", "is one file already")):
        assert main(["convert", "to-ckpt", str(source), str(tmp_path / "one.ckpt")]) == 1
        assert said in capsys.readouterr().err
