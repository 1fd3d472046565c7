"""Where configuration, recipes and embedded data lie: beside the package in a clone, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    inside, beside = PACKAGE / f"_{name}", PACKAGE.parent / name
    return inside if inside.is_dir() else beside


CONF = _folder("conf")
RECIPES = _folder("recipes")
PACK = PACKAGE / "pack"
PACK_SPEECH = PACKAGE / "pack_speech"
PACK_ANNOUNCEMENTS = PACKAGE / "pack_announcements"
