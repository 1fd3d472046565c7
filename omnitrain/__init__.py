"""Open training of omni-modal models of the Qwen3-Omni design."""

import logging

# Grain, which orders the data, warns at import that the JAX profiler is absent; nothing here uses JAX. Set this early:
# worker processes import Grain before anything else of omnitrain.
logging.getLogger("absl").setLevel(logging.ERROR)
