"""A callback for the runs of these tests, named by OMNITRAIN_TARGETS=slow_steps."""

import os
import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class SlowSteps(Callback):
    """Lets a run wait after each step, SLOW_STEPS seconds, so that a test can hit it in its training."""

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(float(os.environ["SLOW_STEPS"]))
