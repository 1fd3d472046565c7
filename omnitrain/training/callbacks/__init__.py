"""What watches over a training run, one callback a file."""

from omnitrain.training.callbacks.checkpoint import AtomicCheckpoint
from omnitrain.training.callbacks.media_panels import MediaPanels
from omnitrain.training.callbacks.progress import TrainingProgress
from omnitrain.training.callbacks.run_record import RunRecord
from omnitrain.training.callbacks.spike_guard import SpikeGuard, TrainingDiverged
from omnitrain.training.callbacks.throughput import Throughput
from omnitrain.training.callbacks.watchdog import Watchdog

__all__ = [
    "AtomicCheckpoint",
    "MediaPanels",
    "RunRecord",
    "SpikeGuard",
    "Throughput",
    "TrainingDiverged",
    "TrainingProgress",
    "Watchdog",
]
