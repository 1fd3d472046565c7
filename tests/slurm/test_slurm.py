"""Sweeps, and a run of two nodes, through a real Slurm on this machine: jobs that are killed, preempted or out of time
end as if undisturbed."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

import pyarrow.parquet as pq
import pytest
import torch

from omnitrain.__main__ import main
from omnitrain.interop.start_from import model_weights

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",  # the sequential run's sums in the order of a job with one core
    "OMNITRAIN_TARGETS": "slow_steps",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
}
MICRO = [
    "+model.thinker={layers:2,accept_hidden_layer:1,d_model:32,heads:2,kv_heads:1,ffn:32,expert_width:16}",
    "+model.aut={d_model:16,layers:1,heads:2,ffn:16,conv_hidden:4}",
    "+model.vision={d_model:32,layers:2,heads:2,ffn:32,deepstack_layers:[0]}",
    "+callbacks.slow._target_=slow_steps.SlowSteps",
    "callbacks.checkpoint.every_n_steps=2",
    "evaluation.max_samples=8",
    "evaluation.max_generated=2",
    "evaluation.report=false",
]
SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"]
LIMITS = {"texts": 24, "translations": 10, "pictures": 12, "speech": 8, "sounds": 4}
ARMS = ["text", "vision", "audio", "omni_early", "omni_late"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running Slurm; the environment in which its commands find it."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([HERE / "start_slurm.sh", folder], capture_output=True, text=True)
    try:
        if started.returncode == 77:
            pytest.skip(started.stderr.strip().splitlines()[-1])
        assert started.returncode == 0, started.stderr
        yield {**ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([HERE / "stop_slurm.sh", folder], check=True)


class Sweep:
    """``fit -m`` with Slurm's jobs, in the background. Ends with the `with` block."""

    def __init__(self, arguments: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, {**environment, "SLOW_STEPS": "0.8"}
        folder.mkdir()
        self.log = (folder / "sweep.log").open("w+")
        command = [sys.executable, "-m", "omnitrain", "fit", "-m", *arguments]
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text()
            assert self.process.poll() in (None, 0), self.text()
            time.sleep(0.05)

    def text(self) -> str:
        logs = [self.folder / "sweep.log", *sorted(self.folder.rglob("*_log.*"))]
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in logs)

    def job(self, number: int) -> str:
        """Slurm's id of the sweep's job `number`."""
        (first,) = {path.name.split("_")[0] for path in self.folder.glob(".submitit/[0-9]*_[0-9]")}
        return f"{first}_{number}"

    def output(self, number: int) -> str:
        """What job `number` has printed, in all its starts."""
        job = self.job(number)
        return (self.folder / ".submitit" / job / f"{job}_0_log.out").read_text()

    def call(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def state(self, job: str) -> str:
        return self.call("scontrol", "--oneliner", "show", "job", job).partition("JobState=")[2].split()[0]


def in_sequence(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "omnitrain", "fit", "-m", *arguments]
    done = subprocess.run(command, env={**ENVIRONMENT, "SLOW_STEPS": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_same_weights(a: Path, b: Path) -> None:
    weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_interrupted_study_equals_the_sequential_one(slurm: dict[str, str], tmp_path: Path) -> None:
    """All five arms; one job is requeued, one killed outright and requeued, one told that its time runs out."""
    arguments = [
        "+recipe=nondegradation", f"arm={','.join(ARMS)}", "seed=0", *MICRO, "data.max_tokens=128",
        "study.validations=2", "study.epochs={texts:1,translations:1,pictures:2,speech:2,sounds:1}",
        *(f"+data.sources.{name}.limit={n}" for name, n in LIMITS.items()),
        *(f"+data.test_sources.{name}.limit=4" for name in LIMITS),
        "data.validation_sources.texts.limit=2", "data.validation_sources.others.limit=8",
    ]  # fmt: skip
    alone, swept = tmp_path / "alone", tmp_path / "swept"
    in_sequence([*arguments, f"paths.study_dir={alone}"])

    with Sweep([*arguments, *SLURM, f"paths.study_dir={swept}"], swept, slurm) as sweep:

        def kill_and_requeue(job: str) -> None:
            sweep.call("scancel", "--signal=KILL", job)
            sweep.wait_for(lambda: sweep.state(job) in ("FAILED", "CANCELLED"))
            sweep.call("scontrol", "requeue", job)

        interruptions: dict[str, Callable[[str], object]] = {
            "text": lambda job: sweep.call("scontrol", "requeue", job),
            "vision": kill_and_requeue,
            "audio": lambda job: sweep.call("scancel", "--signal=USR2", job),
        }
        for arm, interrupt in interruptions.items():
            sweep.wait_for((swept / "data" / arm / "seed=0" / "checkpoints" / "last.ckpt").exists)
            assert not (swept / "data" / arm / "seed=0" / "items.parquet").exists()
            interrupt(sweep.job(ARMS.index(arm)))
        sweep.wait_for(lambda: sweep.process.poll() is not None)
        for number, arm in enumerate(ARMS):
            starts = sweep.output(number).count("Starting with JobEnvironment")
            assert starts == (2 if arm in interruptions else 1), sweep.text()
            assert ("continued from" in sweep.output(number)) == (arm in interruptions), sweep.text()

    for arm in ARMS:
        one, other = (study / "data" / arm / "seed=0" for study in (alone, swept))
        for name in ("items.parquet", "curve.parquet"):
            tables = [pq.read_table(run / name) for run in (one, other)]
            assert tables[0].num_rows > 0
            assert tables[0].equals(tables[1]), (arm, name)
        assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
        assert_same_weights(one, other)
        records = [json.loads((run / "study_run.json").read_text()) for run in (one, other)]
        assert all(record.pop("finished") and record.pop("seconds") > 0 for record in records)
        assert records[0] == records[1]

    for study in (alone, swept):
        assert main(["report", "--study", str(study)]) == 0
    assert (alone / "table.md").read_text() == (swept / "table.md").read_text()

    # The whole sweep again, in sequence, in the same folder: every run is finished, and none is touched.
    finished = {path: path.stat().st_mtime_ns for path in swept.glob("data/*/seed=0/**/*") if path.is_file()}
    assert in_sequence([*arguments, f"paths.study_dir={swept}"]).count("finished before") == len(ARMS)
    for path, time_written in finished.items():
        assert path.name == ".lock" or path.stat().st_mtime_ns == time_written, path


def test_preempted_run_goes_on_by_itself(slurm: dict[str, str], tmp_path: Path) -> None:
    """Ordinary runs without ckpt_path=last. A job of a partition that goes first takes the machine: Slurm asks with
    SIGTERM, gives a time of grace, kills, and queues again."""
    arguments = [
        "+recipe=quickstart", "seed=0,1", *MICRO, "trainer.max_steps=24", "trainer.val_check_interval=8",
        "trainer.limit_val_batches=1", "data.max_tokens=256",
    ]  # fmt: skip
    alone, swept = tmp_path / "alone", tmp_path / "swept"
    in_sequence([*arguments, f"hydra.sweep.dir={alone}"])
    partition = ["+launcher=slurm", "hydra.launcher.gpus_per_node=null", *SLURM[1:], "hydra.launcher.partition=main"]
    held = {**slurm, "HOLD_AT": "20"}
    with Sweep([*arguments, *partition, f"hydra.sweep.dir={swept}"], swept, held) as sweep:
        sweep.wait_for((swept / "0/checkpoints/last.ckpt").exists)
        assert sweep.state(sweep.job(0)) == "RUNNING"
        sweep.call("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        sweep.wait_for(lambda: sweep.process.poll() is not None)
        assert sweep.output(0).count("Starting with JobEnvironment") == 2, sweep.text()
        assert "continued from" in sweep.output(0), sweep.text()
    for number in (0, 1):
        one, other = alone / str(number), swept / str(number)
        assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
        assert_same_weights(one, other)


def sbatch_script(folder: Path) -> Path:
    """That of docs/scale.md."""
    page = (HERE.parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    [text] = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if block.startswith("#!/bin/bash")]
    script = folder / "train.sh"
    script.write_text(text)
    return script


def process_of(job: str, rank: int) -> int:
    """The id of the process that is this rank of Slurm's `job`."""
    told, found = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}, []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            if told <= {*environment} and b"omnitrain" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return min(found)  # what it has started itself came later


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_of_two_nodes(slurm: dict[str, str], toy: list[str], tmp_path: Path) -> None:
    """One process each, started by the script of docs/scale.md. The second is killed, and Slurm queues the job again:
    equal to the bit to two nodes that submitit has started and nobody touched. Killed again, it is given one node: one
    process goes on with twice the accumulation."""
    line = [
        *toy, "parallel=fsdp", "trainer.max_steps=14", "module.loss.balance_coefficient=0",
        "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_every_n_steps=8",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole" / "0", tmp_path / "killed"
    environment = {
        **slurm,
        "SLOW_STEPS": "0.3",
        "PACKS": "2",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    nodes = [*SLURM, "hydra.launcher.partition=two", "trainer.num_nodes=2", "trainer.devices=1"]
    lines = [*line, "+callbacks.slow._target_=slow_steps.SlowSteps"]

    def call(*command: str) -> str:
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, log.read_text() + call("scontrol", "show", "job", job)
            time.sleep(0.1)

    def state() -> str:
        return call("scontrol", "--oneliner", "show", "job", job).partition("JobState=")[2].split()[0]

    log = tmp_path / "job.log"
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--partition=two"]
    script = [str(sbatch_script(tmp_path)), *lines, f"paths.run_dir={killed}"]
    with Sweep([*line, *nodes, "seed=0", f"hydra.sweep.dir={whole.parent}"], whole.parent, slurm) as untouched:
        job = call("sbatch", "--parsable", f"--output={log}", *options, *script).strip()
        until((killed / "checkpoints/last.ckpt").exists)
        os.kill(process_of(job, rank=1), SIGKILL)
        until(lambda: "continued from" in log.read_text())
        until(lambda: len(list(killed.glob("checkpoints/step=*8.ckpt"))) == 1)
        os.kill(process_of(job, rank=0), SIGKILL)
        until(lambda: state() == "PENDING")
        call("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
        until(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED"))
        assert state() == "COMPLETED", log.read_text()
        untouched.wait_for(lambda: untouched.process.poll() is not None)
    printed = log.read_text()
    assert printed.count("run folder:") == 3, printed
    assert printed.count("continued from") == 2, printed
    assert sorted(path.name for path in killed.glob(".*")) == []  # no lock
    one, other = (model_weights(*run.glob("checkpoints/step=*8.ckpt")) for run in (whole, killed))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert rows(killed)[:8] == rows(whole)[:8]
    one, other = (model_weights(run / "checkpoints/last.ckpt") for run in (whole, killed))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(rows(killed), rows(whole), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert float(ours[name] or 0) == pytest.approx(float(value or 0), rel=1e-4, abs=1e-5), name
