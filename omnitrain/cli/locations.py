"""Where the configuration, the recipes and the embedded data lie: in a clone beside the package, in a wheel inside it."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    inside, beside = PACKAGE / f"_{name}", PACKAGE.parent / name
    return inside if inside.is_dir() else beside


CONF = _folder("conf")
RECIPES = _folder("recipes")
PACK = PACKAGE / "pack"
