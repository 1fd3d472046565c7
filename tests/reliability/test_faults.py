"""Disks, checkpoints and devices that fail: one line that names the file and what to do, status 1, and the last good
checkpoint as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from forked_runs import Runs
from toy_training import Toy, train

from omnitrain.__main__ import main
from omnitrain.config.errors import explained, explanation
from omnitrain.files import append_line, atomic, write_text
from omnitrain.interop.checksums import damage
from omnitrain.training.callbacks.checkpoint import RunFolderGone
from omnitrain.training.thinker import ThinkerModule
from tests.reliability.test_checksums import flip

FIT = ["ckpt_path=last", "callbacks.checkpoint.every_n_steps=1", "callbacks.progress=null"]


@pytest.fixture(scope="module")
def finished(toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["fit", *toy, *FIT, f"paths.run_dir={folder}", "trainer.max_steps=2"]) == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    said = capsys.readouterr().err.splitlines()
    [line] = [line for line in said if line.startswith("error: ")]
    assert "Traceback" not in "\n".join(said)
    return line


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_flipped_bit_in_a_checkpoint(run_dir: Path, capsys) -> None:
    """Every verb names the tensor and the checkpoint before it; from that, the run goes on to the same end."""
    last, previous = run_dir / "checkpoints" / "last.ckpt", run_dir / "checkpoints" / "previous.ckpt"
    whole = torch.load(last, weights_only=True)
    name, tensor = max(whole["state_dict"].items(), key=lambda item: item[1].numel())
    flip(last, last.read_bytes().index(tensor.numpy().tobytes()) + tensor.nbytes // 2)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    for line in (["fit"], ["validate"], ["test"], ["predict"], ["generate"]):
        words = ["a prompt"] if line == ["generate"] else ["trainer.max_steps=3"]
        assert main([*line, str(run_dir), *words]) == 1
        said = the_error(capsys)
        assert f"{last}: this file is damaged: the checksum of state_dict.{name} does not fit" in said
        assert f"the last good one is {previous}" in said
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path != run_dir} == {
        path: time for path, time in before.items() if path != run_dir
    }
    assert main(["fit", str(run_dir), f"ckpt_path={previous}"]) == 0
    again = torch.load(last, weights_only=True)
    assert again["global_step"] == 2
    assert all(torch.equal(value, whole["state_dict"][key]) for key, value in again["state_dict"].items())


@pytest.mark.parametrize("content", ["nothing", "half", "zeros", "text", "another file of torch", "another model"])
def test_a_checkpoint_that_is_none(run_dir: Path, capsys, content: str) -> None:
    last = run_dir / "checkpoints" / "last.ckpt"
    stored = last.read_bytes()
    if content == "another file of torch":
        torch.save({"weights": torch.ones(3)}, last)
    elif content == "another model":
        changed = torch.load(last, weights_only=True)
        changed["state_dict"]["model.thinker.norm.weight"] = torch.ones(3)
        torch.save(changed, last)
    else:
        half = stored[: len(stored) // 2]
        last.write_bytes({"nothing": b"", "half": half, "zeros": bytes(len(stored)), "text": b"a note\n" * 9}[content])
    damaged = last.read_bytes()
    assert main(["fit", str(run_dir), "trainer.max_steps=3"]) == 1
    said = the_error(capsys)
    if content == "another model":
        assert "of another model: model.thinker.norm.weight is (3,) in it, and (32,) here" in said
    else:
        assert f"{last}: this file is {'empty' if content == 'nothing' else 'damaged, or no checkpoint'}" in said
        assert "previous.ckpt" in said
    assert last.read_bytes() == damaged


def test_weights_that_wreck_are_not_called_good(toy: list[str], tmp_path: Path, capsys) -> None:
    """With a rate of 1e3 a step ruins the weights, and the next ones are skipped: the checkpoint after the ruin is put
    aside, and the one before it, after which training went on, is the last again."""
    line = ["fit", *toy, *FIT, f"paths.run_dir={tmp_path}", "optim.lr=1e3", "trainer.max_steps=50"]
    assert main([*line, "optim.total_steps=50"]) == 1
    said = the_error(capsys)
    skipped = [json.loads(line)["step"] for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    last, ruined = (
        torch.load(tmp_path / "checkpoints" / name, weights_only=True) for name in ("last.ckpt", "diverged.ckpt")
    )
    assert ruined["global_step"] == skipped[0] - 1
    assert last["global_step"] == skipped[0] - 2
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'last.ckpt'} (step {skipped[0] - 2})" in said
    assert "Lower optim.lr" in said


def test_nothing_is_saved_while_steps_are_skipped(tmp_path: Path) -> None:
    """What was due at a skipped step is saved after the next one that counts; the end of a run is saved in any case."""
    saved: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = ThinkerModule.on_save_checkpoint
        patch.setattr(
            ThinkerModule,
            "on_save_checkpoint",
            lambda self, state: (saved.append(self.global_step), original(self, state))[1],
        )
        train(Toy(out=str(tmp_path), steps=13, poison=(5, 9, 10, 12), checkpoint_every=2))
    assert saved == [2, 4, 7, 8, 12, 13]


# --------------------------------------------------------------------------------------------------------------- disks


def test_a_file_that_may_not_grow(runs: Runs, toy: list[str], run_dir: Path) -> None:
    """The system refuses to write the checkpoint."""
    last = run_dir / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    run = runs.start(run_dir, argv=["fit", str(run_dir), "trainer.max_steps=4"], file_limit=last.stat().st_size // 2)
    assert run.wait() == [1]
    printed = run.errors[0].read_text()
    assert f"error: {last}: the file may not become so large here" in printed
    assert "Traceback" not in printed
    assert last.read_bytes() == before
    assert damage(last) is None
    assert not list(run_dir.rglob("*.partial"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_is_full(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys, number: int) -> None:
    last = run_dir / "checkpoints" / "last.ckpt"
    before = last.read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lightning.fabric.utilities.cloud_io._atomic_save", refuse)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", refuse)
    assert main(["fit", str(run_dir), "trainer.max_steps=4"]) == 1
    assert f"{last}: the " in the_error(capsys)
    assert last.read_bytes() == before


def test_a_full_device_names_the_file(tmp_path: Path) -> None:
    """/dev/full says of every write that the disk is full."""
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as refused:
        append_line(tmp_path / "log", "a line")
    assert explanation(refused.value) == f"{tmp_path / 'log'}: the disk is full; make room and give the same line again"
    with pytest.raises(OSError, match="No space left"), atomic(tmp_path / "file"):
        Path("/dev/full").write_text("x")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("how", ["deleted", "moved", "deleted and made anew"])
def test_a_run_folder_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    out, calls = tmp_path / "run", []
    original = ThinkerModule.training_step

    def step(self: ThinkerModule, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            out.rename(tmp_path / "elsewhere") if how == "moved" else shutil.rmtree(out)
            if how == "deleted and made anew":
                tempfile.mkdtemp(dir=tmp_path)  # so that it is not where the old one lay
                out.mkdir()
        return original(self, *arguments)

    monkeypatch.setattr(ThinkerModule, "training_step", step)
    status, _ = explained(lambda: train(Toy(out=str(out), steps=10, checkpoint_every=2, log_every=100)))
    assert status == 1
    assert len(calls) == 3
    assert list(out.rglob("*")) == []
    calls.clear()
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    with pytest.raises(RunFolderGone, match="was deleted or moved"):
        train(Toy(out=str(out), steps=10, checkpoint_every=2, log_every=100))


def test_folders_that_cannot_be_written(toy: list[str], tmp_path: Path, capsys) -> None:
    write_text(tmp_path / "file", "no folder")
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        assert main(["fit", *toy, f"paths.run_dir={folder}"]) == 1
        assert str(folder) in the_error(capsys)


# ------------------------------------------------------------------------------------------------- devices and Ctrl-C


@pytest.mark.parametrize("wrong", ["trainer.accelerator=abacus", "trainer.accelerator=gpu", "trainer.precision=7"])
def test_no_such_device(toy: list[str], tmp_path: Path, capsys, wrong: str) -> None:
    if wrong.endswith("gpu") and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["fit", *toy, f"paths.run_dir={tmp_path / 'run'}", wrong]) == 1
    assert "trainer" in the_error(capsys)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_ctrl_c_says_what_it_does(runs: Runs, tmp_path: Path) -> None:
    run = runs.start(tmp_path, toy={"out": str(tmp_path), "steps": 10_000, "delay": 0.05, "checkpoint_every": 10_000})
    wait_for(tmp_path / "metrics.csv")
    run.signal(signal.SIGINT)
    assert run.wait() == [130]
    printed = run.errors[0].read_text()
    step = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert "ending after this step, which is then saved; Ctrl-C again ends at once" in printed
    assert f"SIGINT: step {step} is in {tmp_path / 'checkpoints' / 'last.ckpt'}" in printed
    assert f"continue: python -m omnitrain fit {tmp_path}" in printed
    assert "Traceback" not in printed


def test_a_second_ctrl_c_ends_at_once(runs: Runs, tmp_path: Path) -> None:
    run = runs.start(tmp_path, toy={"out": str(tmp_path), "steps": 10_000, "delay": 20.0, "accumulate": 2})
    wait_for(tmp_path / "environment.json")  # written as training starts
    time.sleep(0.5)
    run.signal(signal.SIGINT)
    time.sleep(0.5)
    start = time.monotonic()
    run.signal(signal.SIGINT)
    assert run.wait() == [-signal.SIGINT]
    assert time.monotonic() - start < 10


def wait_for(path: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_a_mistake_of_the_program_shows_where(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Errors that no user can mend keep their traceback; with HYDRA_FULL_ERROR=1 all do."""
    with pytest.raises(KeyError):
        explained(lambda: {}["key"])
    with pytest.raises(RuntimeError):
        explained(lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(ValueError, match="empty"):
        explained(lambda: torch.optim.AdamW([]))

    def mistake() -> None:
        raise ValueError("--count -1: write a number above 0")

    assert explained(mistake) == (1, None)
    assert capsys.readouterr().err == "error: --count -1: write a number above 0\n"
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="--count"):
        explained(mistake)
