"""What is said about checkpoint files that cannot be used: one line that names the file and what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from omnitrain.interop.public_format import CheckpointError
from omnitrain.interop.start_from import model_weights, read_checkpoint


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"model.a": torch.arange(5000.0), "content.b": torch.ones(3)}, "step": 7}, path)
    return path


def test_a_whole_one_is_read(whole: Path) -> None:
    assert read_checkpoint(whole)["step"] == 7
    (weights,) = model_weights(whole).items()
    assert weights[0] == "a"
    assert torch.equal(weights[1], torch.arange(5000.0))


class Foreign:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/this-file-must-not-appear"),))


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "half":
            path.write_bytes(content[: len(content) // 2])
        case "no end":
            path.write_bytes(content[:-30])
        case "zeroed":
            path.write_bytes(bytes(len(content)))
        case "start zeroed":
            path.write_bytes(bytes(512) + content[512:])
        case "text":
            path.write_text("a tokenizer?\n" * 99)
        case "a zip":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("word/document.xml", "<a/>")
        case "a model":
            torch.save(nn.Linear(2, 2), path)
        case "code":
            torch.save(Foreign(), path)
        case "a tensor":
            torch.save(torch.ones(3), path)
        case "a state_dict":
            torch.save({"a": torch.ones(3)}, path)
        case "text in state_dict":
            torch.save({"state_dict": {"model.a": "b"}}, path)
        case "old format":
            torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False)


KINDS = (
    "empty", "half", "no end", "zeroed", "start zeroed", "text", "a zip", "a model", "code", "a tensor", "a state_dict",
    "text in state_dict", "old format",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_checkpoint(whole: Path, kind: str) -> None:
    damage(whole, kind)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(whole)
    said = str(error.value)
    assert said.startswith(f"{whole}: this file is {'empty' if kind == 'empty' else 'damaged, or no checkpoint'}")
    assert said.endswith("copy it again, or train again")
    assert "\n" not in said
    assert not Path("/tmp/this-file-must-not-appear").exists()
    (whole.parent / "step=300.ckpt").touch()
    torch.save({"state_dict": {}}, whole.parent / "step=200.ckpt")  # the only one that is whole
    with pytest.raises(CheckpointError, match=r"the last good one is .*/step=200\.ckpt \(ckpt_path="):
        read_checkpoint(whole)


def test_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has not written a checkpoint yet"):
        read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"this folder is no whole checkpoint of omnitrain; copy it again"):
        read_checkpoint(tmp_path)
