"""Open training of omni-modal models of the Qwen3-Omni design."""

import logging

# Grain, which orders the data, warns at import that JAX's profiler is absent; nothing here uses JAX. (Its worker
# processes may import it before this file, and then say so once.)
logging.getLogger("absl").addFilter(lambda record: "jax profiler" not in record.getMessage())
