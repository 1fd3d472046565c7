import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # toy_training, forked_runs


@pytest.fixture(scope="session")
def runs() -> Iterator["Runs"]:  # noqa: F821
    """Starts training runs as processes; see `forked_runs`."""
    from forked_runs import Runs

    server = Runs()
    yield server
    server.close()
