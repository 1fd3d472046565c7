"""From an error to the line that a user can act on, for all verbs."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from omnitrain.files import printable

T = TypeVar("T")

_CURES = {
    errno.ENOSPC: "the disk is full; make room and give the same line again",
    errno.EDQUOT: "the quota of this disk is used up; make room and give the same line again",
    errno.EFBIG: "the file may not become so large here; choose another folder or disk",
    errno.EROFS: "the disk can only be read; choose another folder",
    errno.EACCES: "permission denied; change the permissions, or choose another folder",
    errno.EPERM: "permission denied; change the permissions, or choose another folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another folder",
    errno.EIO: "the disk does not answer; look after it, and give the same line again",
    errno.ESTALE: "the network disk has lost this file; mount it anew, and give the same line again",
}


def explained(run: Callable[[], T]) -> tuple[int, T | None]:
    """Call `run` and return (exit status, what it returned): 0; 1 after an error; 130 after Ctrl-C. What the user can
    mend is one message on stderr, with a traceback only under HYDRA_FULL_ERROR=1."""
    try:
        return 0, run()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ctrl-C itself, or how Lightning ends after it
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("interrupted", file=sys.stderr)
        return 130, None
    except BrokenPipeError:  # the reader, such as head, has gone
        sys.stderr.close()
        return 0, None
    except Exception as error:
        line = explanation(error)
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print("error: " + printable(line, keep="\n\t"), file=sys.stderr)
        return 1, None


def explains_errors(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """`main` of a verb, arguments -> exit status, with its errors `explained`."""

    @functools.wraps(main)
    def run(arguments: list[str]) -> int:
        status, result = explained(lambda: main(arguments))
        return status or result or 0

    return run


def explanation(error: BaseException) -> str | None:
    """What to tell the user, or None if only a traceback helps: the error is a mistake of the program. Errors of our
    own classes were raised for the user, and so were plain ones for what is wrong with a value, a file or an
    installation; except where torch, Lightning or NumPy raise them from within."""
    home = type(error).__module__.partition(".")[0]
    ours = home in ("omnitrain", "omegaconf", "hydra") or type(error).__name__ == "MisconfigurationException"
    if ours or isinstance(error, ImportError):
        return str(error)
    if isinstance(error, OSError):
        cure = _CURES.get(error.errno or 0)
        file = error.filename2 or error.filename
        return str(error) if cure is None else cure if file is None else f"{os.fsdecode(file)}: {cure}"
    *_, (innermost, _line) = traceback.walk_tb(error.__traceback__)
    raised_in = innermost.f_globals.get("__name__", "").partition(".")[0]
    of_a_value = isinstance(error, ValueError) and raised_in not in ("torch", "lightning", "numpy")
    return str(error) if of_a_value or (isinstance(error, RuntimeError) and raised_in == "omnitrain") else None
