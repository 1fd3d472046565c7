"""Speed and memory, ours against the reference: one script for each claim of README, ``python -m speed.NAME``."""
