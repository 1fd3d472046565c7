"""Open training of omni-modal models of the Qwen3-Omni design."""

import logging

# Grain, which orders the data, warns at import that JAX's profiler is absent; nothing here uses JAX. A filter, because
# Grain's worker processes set the logger's level anew; here, because they import this file before Grain.
logging.getLogger("absl").addFilter(lambda record: "jax profiler" not in record.getMessage())
