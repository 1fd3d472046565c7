"""Runs that are killed again and again, each time amid something else, and end as if nobody had touched them: weights,
moments, logged rows and the order of the data are equal to the last bit.

Each life of a run continues what the one before left. `test_encode_shards.py` and `test_chain.py` do the same to
`data encode` and to stages; `test_cli_resume.py` kills at random moments.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import pytest
import torch
from forked_runs import Kill, Runs
from test_cli_resume import assert_identical
from test_processes import wait_for

from omnitrain.files import DATA, LAST_CHECKPOINT, LOCK, METRICS
from omnitrain.interop.checksums import damage
from omnitrain.interop.start_from import read_checkpoint
from omnitrain.runs.convert import to_ckpt
from omnitrain.runs.load import load

RANK_KILLS = int(os.environ.get("OMNITRAIN_KILLS", "2"))
STEP = "omnitrain.training.thinker:ThinkerModule.training_step"
VALIDATION = "omnitrain.training.thinker:ThinkerModule.validation_step"
UPDATE = "torch.optim.adamw:AdamW.step"
ROW = "omnitrain.training.logging:CsvTable.append"
GATHER = "lightning:Trainer.save_checkpoint"  # before the checkpoint is written
WRITE = "torch:save"  # while it is
SYNC = "omnitrain.files:_to_disk"  # after it, before it has its name
RECORD = "omnitrain.training.callbacks.run_record:write_json"  # data.json, which belongs to it
SKIPPED = "omnitrain.training.callbacks.spike_guard:append_line"


def kept(out: Path) -> dict[str, Any]:
    """All that a finished run has learnt and seen."""
    last = out / "checkpoints" / "last.ckpt"
    if last.is_dir():
        to_ckpt(last, last := out / "last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ToyData", "OmniDataModule")
    files = ("metrics.csv", "skipped_steps.jsonl", "data.json")
    return {
        **{key: checkpoint.get(key) for key in keys},
        "random": [rank["rng"]["torch"] for rank in checkpoint["omnitrain"]["ranks"]],
        **{file: (out / file).read_bytes() if (out / file).exists() else None for file in files},
    }


TOY = {
    "steps": 40, "max_steps_of_schedule": 40, "accumulate": 2, "checkpoint_every": 3, "val_every": 4, "log_every": 2,
    "poison": [5, 17, 18], "word_dropout": 0.2,
}  # fmt: skip


def killed_toy(runs: Runs, out: Path, kills: list[Kill], **toy: Any) -> None:
    """Run to the end, through a kill in each life."""
    ranks = toy.get("devices", 1)
    for number, kill in enumerate(kills):
        run = runs.start(out, ranks, kill, toy={"out": str(out), **toy})
        if kill.number == SIGKILL:
            [status] = run.wait(kill.rank)
            run.signal(SIGKILL)  # what a launcher does to the other ranks
            run.wait()
        else:
            [status, *_] = set(run.wait())
        assert status == kill.status, f"life {number}: {kill} did not come, or was not heeded"
    runs.start(out, ranks, toy={"out": str(out), **toy}).finish()


def test_kills_amid_everything(runs: Runs, tmp_path: Path) -> None:
    """12 kills of one process: between the two halves of a step, in an update, in validations, around rows and around
    each stage of the writing of a checkpoint; with steps that are skipped in between."""
    runs.start(tmp_path / "whole", toy={"out": str(tmp_path / "whole"), **TOY}).finish()
    kills = [
        Kill(STEP, 6), Kill(VALIDATION, 1), Kill(SKIPPED, 1, SIGTERM), Kill(WRITE, 2), Kill(STEP, 7, SIGTERM),
        Kill(SYNC, 5), Kill(UPDATE, 4), Kill(VALIDATION, 2, SIGINT), Kill(RECORD, 3), Kill(ROW, 3), Kill(GATHER, 2),
        Kill(ROW, 2, SIGINT),
    ]  # fmt: skip
    killed_toy(runs, tmp_path / "killed", kills, **TOY)
    assert_identical(kept(tmp_path / "whole"), kept(tmp_path / "killed"), "run")


def test_kills_of_two_processes(runs: Runs, tmp_path: Path) -> None:
    """6 kills, of the first or of the second process of a run of two."""
    toy = {**TOY, "devices": 2, "steps": 20}
    runs.start(tmp_path / "whole", 2, toy={"out": str(tmp_path / "whole"), **toy}).finish()
    kills = [
        Kill(STEP, 7, rank=1), Kill(WRITE, 2), Kill(VALIDATION, 1, rank=1), Kill(STEP, 5, SIGTERM, rank=1),
        Kill(SYNC, 5), Kill(STEP, 6, SIGINT),
    ]  # fmt: skip
    killed_toy(runs, tmp_path / "killed", kills, **toy)
    assert_identical(kept(tmp_path / "whole"), kept(tmp_path / "killed"), "run")


def test_kills_while_a_folder_is_written(runs: Runs, tmp_path: Path) -> None:
    """4 kills of one of two processes that share the model, while both write a checkpoint: the one before it is whole
    each time, and nothing half is taken for one. Then SIGTERM to one, for which both save and leave; and a disk that
    takes no more, which the error names."""
    toy = {**TOY, "devices": 2, "mesh": {"shard": 2, "expert": 2}, "steps": 12, "accumulate": 1, "val_every": 0}
    toy |= {"checkpoint_every": 2, "poison": []}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.start(whole, 2, toy={"out": str(whole), **toy}).finish()
    for kill in (
        Kill("torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", 2, rank=1),  # before its file
        Kill("omnitrain.interop.checkpoint_folder:_sums_of_mine", 2),  # behind it
        Kill("omnitrain.training.callbacks.checkpoint:linked", 1),  # before the last one gets its other name
        Kill("omnitrain.files:_exchange", 1),  # before the new one gets its name
    ):
        run = runs.start(killed, 2, kill, toy={"out": str(killed), **toy})
        assert run.wait(kill.rank) == [kill.status], f"{kill} did not come"
        run.signal(SIGKILL)
        run.wait()
        checkpoints = list((killed / "checkpoints").glob("*.ckpt"))
        assert killed / "checkpoints" / "last.ckpt" in checkpoints
        assert [damage(path) for path in checkpoints] == [None] * len(checkpoints)
    stopped = runs.start(killed, 2, Kill(STEP, 2, SIGTERM, rank=1), toy={"out": str(killed), **toy})
    assert stopped.wait() == [143, 143]
    step = read_checkpoint(killed / "checkpoints" / "last.ckpt")["global_step"]
    assert f"SIGTERM: step {step} is in " in stopped.errors[0].read_text()
    runs.start(killed, 2, toy={"out": str(killed), **toy}).finish()
    assert_identical(kept(whole), kept(killed), "run")
    assert not list(killed.rglob("*.partial"))

    last, longer = whole / "checkpoints" / "last.ckpt", {"out": str(whole), **toy, "steps": 16}
    before = read_checkpoint(last)["global_step"]
    limit = max(path.stat().st_size for path in last.glob("*.safetensors")) // 2
    full = runs.start(whole, 2, toy=longer, file_limit=limit)
    assert full.wait() == [1, 1]
    assert f"File too large: '{last}'" in full.errors[0].read_text()
    assert (damage(last), read_checkpoint(last)["global_step"]) == (None, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_kills_of_the_command_line(runs: Runs, toy: list[str], tmp_path: Path, workers: int) -> None:
    """8 kills of `fit` on shards: in training, and then while it scores and while it writes its report."""

    def line(out: Path, workers: int) -> list[str]:
        return [
            "fit", *toy, f"paths.run_dir={out}", "ckpt_path=last", f"data.num_workers={workers}",
            "trainer.max_steps=12", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4",
            "trainer.limit_val_batches=2", "callbacks.checkpoint.every_n_steps=2", "callbacks.progress=null",
            "module.word_dropout=0.2", "evaluation.after_fit=true", "evaluation.max_samples=4",
            "evaluation.max_generated=2",
        ]  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.start(whole, argv=line(whole, 1 - workers)).finish()  # the number of workers must not matter either
    kills = [
        Kill(STEP, 2), Kill(WRITE, 2), Kill(STEP, 5, SIGTERM), Kill(VALIDATION, 1), Kill(SYNC, 8),
        Kill(STEP, 6, SIGINT), Kill("omnitrain.evaluation.heldout:answer_samples"),
        Kill("omnitrain.reports.run:write_report"),
    ]  # fmt: skip
    for kill in kills:
        [status] = runs.start(killed, kill=kill, argv=line(killed, workers)).wait()
        assert status == kill.status, f"{kill} did not come, or was not heeded"
    runs.start(killed, argv=line(killed, workers)).finish()
    assert_identical(kept(whole), kept(killed), "run")
    for file in ("eval/predictions.parquet", "report.html"):
        assert (killed / file).stat().st_size == pytest.approx((whole / file).stat().st_size, rel=0.02)
    assert sorted(p.name for p in killed.rglob(".*")) == []  # no lock, and no half-written file


def line_of_two(toy: list[str], out: Path) -> list[str]:
    """Two processes that share a model (FSDP2)."""
    return [
        "fit", *toy, f"paths.run_dir={out}", "parallel=fsdp", "trainer.devices=2",
        f"trainer.max_steps={12 * (RANK_KILLS + 1)}", "trainer.accumulate_grad_batches=2",
        "trainer.val_check_interval=20", "trainer.limit_val_batches=1", "callbacks.checkpoint.every_n_steps=3",
        "callbacks.progress=null", "module.word_dropout=0.2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole_of_two(runs: Runs, toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody has touched them."""
    out = tmp_path_factory.mktemp("two")
    runs.start(out, 2, argv=line_of_two(toy, out)).finish()
    return out


def assert_same_run(whole: Path, other: Path) -> None:
    assert_identical(*(load(out)[0].state_dict() for out in (whole, other)), "weights")
    for file in (METRICS, DATA):
        assert (whole / file).read_bytes() == (other / file).read_bytes(), file


def written(out: Path) -> int:
    """When the last checkpoint was."""
    return (out / LAST_CHECKPOINT).stat().st_mtime_ns if (out / LAST_CHECKPOINT).exists() else 0


def test_random_kills_of_one_rank(runs: Runs, toy: list[str], tmp_path: Path, whole_of_two: Path) -> None:
    """A random one of them is killed at a random moment of its training, again and again: the other one ends soon and
    by itself, and the same line goes on. OMNITRAIN_KILLS=20 for more of it."""
    line, draw, hits = [*line_of_two(toy, tmp_path), "ckpt_path=last"], random.Random(0), 0
    for _ in range(RANK_KILLS):
        before, run = written(tmp_path), runs.start(tmp_path, 2, argv=line)
        wait_for(lambda before=before: written(tmp_path) > before, run)
        time.sleep(draw.uniform(0, 0.8))
        victim, begun = draw.randrange(2), time.monotonic()
        if runs.ask({"poll": run.pids[victim]}) is None:
            os.kill(run.pids[victim], SIGKILL)
        statuses = run.wait(victim, 1 - victim)
        assert time.monotonic() - begun < 10
        if statuses[0] == -SIGKILL and statuses[1]:  # else it came in the last moments of the run
            hits += 1
    runs.start(tmp_path, 2, argv=line).finish()
    assert hits > RANK_KILLS // 2
    assert_same_run(whole_of_two, tmp_path)


def test_torchrun_starts_a_killed_run_again(toy: list[str], tmp_path: Path, whole_of_two: Path) -> None:
    """The first of two processes that torchrun has started is killed: it starts both again. Equal to the bit to
    undisturbed ones that were started as Lightning does."""
    out, printed = tmp_path / "run", tmp_path / "printed.txt"
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=1",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.2", "-m", "omnitrain",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/scale.md
    with printed.open("w") as file:
        line = [*torchrun, *line_of_two(toy, out)]
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while not written(out):
            assert time.monotonic() < deadline
            assert process.poll() is None, printed.read_text()
            time.sleep(0.01)
        os.kill(json.loads((out / LOCK).read_text())["pid"], SIGKILL)
        status = process.wait(300)
    assert status == 0, printed.read_text()
    assert "continued from" in printed.read_text()
    assert_same_run(whole_of_two, out)
