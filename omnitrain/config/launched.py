"""What launchers (srun, torchrun, Lightning) tell the processes of a job, which is in their environment."""

from __future__ import annotations

import os


def processes() -> int:
    """How many of them were started from outside with one command line."""
    return max(_number("WORLD_SIZE", 1), _number("SLURM_NTASKS", 1))


def is_one_of_several() -> bool:
    """Whether this process was started from outside as one of several."""
    return processes() > 1 and ("LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ)


def is_first() -> bool:
    """Whether this is rank 0 of its job, or no part of a job."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name):
            return _number(name) == 0
    return not any(_number(name) for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def job() -> str:
    """The job's name, of Slurm or torchrun; empty if it has none. torchrun calls a job without ``--rdzv-id`` none."""
    slurm, torchrun = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"slurm {slurm}" if slurm else f"torchrun {torchrun}" if torchrun != "none" else ""


def restarts() -> int:
    """How often the job was started again, by Slurm or within this start of it by torchrun."""
    return _number("SLURM_RESTART_COUNT") + _number("TORCHELASTIC_RESTART_COUNT")


def _number(name: str, otherwise: int = 0) -> int:
    return int(os.environ.get(name) or otherwise)
