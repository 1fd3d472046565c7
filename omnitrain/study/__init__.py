"""The non-degradation study: one run of it, its statistics and verdicts, its report."""
