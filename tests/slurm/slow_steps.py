"""A callback for the runs of these tests, named by OMNITRAIN_TARGETS=slow_steps."""

import os
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class SlowSteps(Callback):
    """Lets a run wait after each step, SLOW_STEPS seconds, so that a test can hit it in its training. The first job of
    an array also waits at step HOLD_AT of its first start, since a scheduler takes as long as it likes to end it; two
    minutes, after which the test fails."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        time.sleep(float(os.environ["SLOW_STEPS"]))
        first = os.environ.get("SLURM_ARRAY_TASK_ID") == "0" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if first and str(trainer.global_step) == os.environ.get("HOLD_AT"):
            time.sleep(120)
