"""A setting of the C library that makes CPU training a few per cent faster."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones. Call it once, before training on CPU.

    By default glibc gives every large block back to the system at once, and a training step, which frees and allocates
    the same gigabyte again and again, has all of it zeroed page by page each time (6 % of a step where it was measured,
    95,000 page faults; none afterwards). Peak memory stays the same, but the process no longer shrinks between steps.

    Returns:
        Whether the C library took the setting (False outside Linux with glibc, where nothing changes).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
