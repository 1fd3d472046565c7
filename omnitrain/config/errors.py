"""From an error to the line that a user can act on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from omegaconf.errors import OmegaConfBaseException

from omnitrain.config.typed import ConfigError
from omnitrain.files import printable

T = TypeVar("T")


def explained(run: Callable[[], T]) -> tuple[int, T | None]:
    """Call `run`. What the user can mend is one message on stderr, with a traceback only where HYDRA_FULL_ERROR is set.

    Returns:
        (exit status, what `run` returned).
    """
    try:
        return 0, run()
    except (ConfigError, OmegaConfBaseException) as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        print("error: " + printable(error, keep="\n"), file=sys.stderr)
        return 1, None
