"""Damage to a checkpoint is found, wherever it is, and named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from omnitrain.interop.checksums import NO_CHECKPOINT, damage, newest_whole

SAVED = {
    "state_dict": {"model.a": torch.randn(300, 100), "model.b": torch.arange(5_000, dtype=torch.bfloat16)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(300, 100)}}}],
    "global_step": 7,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(SAVED, tmp_path / "last.ckpt")
    assert damage(tmp_path / "last.ckpt") is None
    return tmp_path / "last.ckpt"


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("state_dict.model.a", SAVED["state_dict"]["model.a"]),
        ("state_dict.model.b", SAVED["state_dict"]["model.b"]),
        ("optimizer_states.0.state.0.exp_avg", SAVED["optimizer_states"][0]["state"][0]["exp_avg"]),
    ],
)
def test_the_tensor_of_a_flipped_bit_is_named(saved: Path, name: str, tensor: torch.Tensor) -> None:
    start = saved.read_bytes().index(tensor.view(torch.uint8).numpy().tobytes())
    for position in (start, start + tensor.nbytes // 2, start + tensor.nbytes - 1):
        flip(saved, position, 3)
        assert damage(saved) == f"damaged: the checksum of {name} does not fit"
        flip(saved, position, 3)
    assert damage(saved) is None


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(saved: Path) -> None:
    rng, found = random.Random(0), 0
    size = saved.stat().st_size
    for _ in range(300):
        position, bit = rng.randrange(size), rng.randrange(8)
        flip(saved, position, bit)
        if damage(saved) is None:  # between two entries, where nothing is kept
            loaded = torch.load(saved, weights_only=True)
            for name, tensor in SAVED["state_dict"].items():
                assert torch.equal(loaded["state_dict"][name], tensor)
        else:
            found += 1
        flip(saved, position, bit)
    assert found > 290


@pytest.mark.parametrize("length", [0, 1, 100, 5_000, -1, -100, -5_000])
def test_cut_off_anywhere(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    assert damage(saved) == ("empty" if length == 0 else NO_CHECKPOINT)


@pytest.mark.parametrize(
    "content", [b"\0" * 100_000, b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4garbage"]
)
def test_zeros_and_garbage(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    assert damage(saved) == NO_CHECKPOINT


def test_zeroed_from_some_place_on(saved: Path) -> None:
    """As a file system leaves a file whose pages never reached the disk."""
    content = saved.read_bytes()
    for kept in (len(content) // 3, len(content) - 3_000):
        saved.write_bytes(content[:kept].ljust(len(content), b"\0"))
        assert damage(saved) is not None


def test_a_missing_file_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        damage(tmp_path / "last.ckpt")


def test_the_newest_whole_one_beside(saved: Path) -> None:
    assert newest_whole(saved) is None
    for name in ("step=0000002.ckpt", "step=0000004.ckpt", "previous.ckpt"):
        torch.save(SAVED, saved.with_name(name))
    assert newest_whole(saved) == saved.with_name("previous.ckpt")
    saved.with_name("previous.ckpt").write_bytes(b"")
    assert newest_whole(saved) == saved.with_name("step=0000004.ckpt")
