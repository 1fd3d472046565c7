"""Every test that docs/reliability.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_named_test_exists() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", page)
    named = [(file, name) for file, name in named if not file.startswith("omnitrain/")]
    assert len(named) > 40
    missing = [(f, n) for f, n in named if n and f"def {n}(" not in (TESTS / f).read_text(encoding="utf-8")]
    assert missing == []
    assert [f for f, _ in named if not (TESTS / f).is_file()] == []
