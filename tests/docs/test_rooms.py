"""Every room of the repository says in a sentence what lives there, and docs/architecture.md shows all of them."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACKED = [
    Path(name) for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines() if name
]
PACKAGES = sorted({path.parent for path in TRACKED if path.parts[0] == "omnitrain" and path.suffix == ".py"})
TOP = sorted({Path(path.parts[0]) for path in TRACKED if len(path.parts) > 1 and not path.parts[0].startswith(".")})
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def said(room: Path) -> str:
    """The first sentence of a room's docstring or README, without the heading."""
    package, readme = ROOT / room / "__init__.py", ROOT / room / "README.md"
    if package.is_file() and (text := ast.get_docstring(ast.parse(package.read_text(encoding="utf-8")))):
        return text.split("\n\n")[0]
    if readme.is_file():
        paragraphs = readme.read_text(encoding="utf-8").split("\n\n")
        return next((text for text in paragraphs if not text.startswith("#")), "").strip()
    return ""


@pytest.mark.parametrize("room", sorted({*PACKAGES, *TOP}), ids=str)
def test_a_room_says_what_lives_there(room: Path) -> None:
    sentence = said(room)
    assert len(sentence.split()) >= 6, f"{room}: write what lives there as the docstring of {room}/__init__.py"
    assert sentence[0].isupper() or not sentence[0].isalpha()
    assert re.search(r"[.:]\W*$", sentence), sentence


def tree() -> dict[str, str]:
    """The first block of docs/architecture.md: room -> what is said of it."""
    block = re.search(r"```\n(omnitrain/\n.*?)```", ARCHITECTURE, re.DOTALL)
    assert block is not None
    rooms: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and (match := re.match(r"\s*(\S+)(?:\s{2,}(.*))?$", line)) and "/" in match[1] + "/":
            name, what = match[1], match[2] or ""
            if indent > 12 or not re.fullmatch(r"[\w./]+", name):
                continue  # a second line about the same room
            parents = [(i, n) for i, n in parents if i < indent]
            full = "".join(n for _, n in parents) + name
            if name.endswith("/"):
                parents.append((indent, name))
            rooms[full] = what
    return rooms


def test_the_tree_is_complete() -> None:
    shown = tree()
    for room in {*PACKAGES, *TOP}:
        assert f"{room.as_posix()}/" in shown, f"docs/architecture.md: the tree has no {room}/"
    for name, what in shown.items():
        assert (ROOT / name).exists(), f"docs/architecture.md: there is no {name}"
        assert what or name == "omnitrain/", f"docs/architecture.md: {name} has no line"


def test_the_layers_are_those_that_are_checked() -> None:
    """The order of the layers in the page is that of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r'type = "layers"\nlayers = \[(.*?)\]', text, re.DOTALL)
    assert layers is not None
    order = [re.sub(r"omnitrain\.", "", layer) for layer in re.findall(r'"([^"]+)"', layers[1])]
    assert f"`{' -> '.join(order)}`" in " ".join(ARCHITECTURE.split())
