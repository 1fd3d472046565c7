"""Every command that the documents name is one that works: it composes, or its parser takes it.

One extractor reads README, docs, recipes, conf, module docstrings, the examples of the verbs' help and the notebooks. A
Hydra verb is composed and checked, and so are the stages of its recipe; other verbs and scripts parse their arguments;
targets of make exist. Nothing is run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from omnitrain.__main__ import main
from omnitrain.config import compose, targets
from omnitrain.config.locations import CONF, PACK, RECIPES
from omnitrain.config.saved import write_config
from omnitrain.config.verbs import HYDRA_VERBS, VERBS
from omnitrain.runs.chain import read_stages
from tests.interop.public_models import save_small_folder

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("omnitrain", "data_prep", "speed")
VERB = "|".join(VERBS)
COMMAND = re.compile(
    rf"(?:[A-Z_]+=\S+ )*(?:python3? -m (?:omnitrain|data_prep\.|speed\.)|omnitrain (?:{VERB})\b|make (?=[\w-]+)"
    rf"|(?:{VERB}) (?=[-+<\[]|\S+=))"
)
"""How a command begins; the last kind leaves out ``omnitrain``, as in ``fit --help``."""
MENTION = re.compile(r"python3? -m (?:omnitrain|data_prep\.\w+|speed\.\w+)")
"""Whatever begins like this must have been found."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A command, where it stands (file:line), and whether it is given to be typed or mentioned in a sentence."""

    place: str
    text: str
    in_a_sentence: bool = False


# ------------------------------------------------------------------------------------------------------- the extractor


def commands_of_text(text: str) -> Iterator[tuple[int, str, bool]]:
    """(line, command, in a sentence) of Markdown, a docstring or comments: of fenced and indented lines, and of code in
    backquotes."""
    fenced, whole, start = False, "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced, whole = not fenced, ""
            continue
        start, whole = (number, line.strip()) if not whole else (start, f"{whole} {line.strip()}")
        if whole.endswith("\\") and fenced:
            whole = whole[:-1].strip()
            continue
        if not fenced:  # "  fit -m seed=0,1   (a note)", also behind a sentence: "Jobs of a sweep:  fit -m seed=0,1"
            whole = re.sub(r"^.*:\s\s(?=\S)", "", whole)
            whole = re.sub(r"\s+\([^()]*\)$|\s{3,}[a-z].*", "", whole)
        if COMMAND.match(whole) and "`" not in whole.split(" #")[0]:
            yield start, whole, False
        whole = ""
    prose = re.sub(r"^ *```.*?^ *```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for span in re.finditer(r"(?<!`)(`{1,2})([^`]+)\1(?!`)", prose):
        inner = " ".join(span[2].split())
        if COMMAND.match(inner):
            yield prose[: span.start()].count("\n") + 1, inner, True


def documents() -> Iterator[tuple[Path, int, str]]:
    """(file, line before the text, text) of all that is read by people."""
    yield ROOT / "README.md", 0, (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "data_prep").glob("*.md"))]:
        yield path, 0, path.read_text(encoding="utf-8")
    for path in sorted([*RECIPES.rglob("*.yaml"), *CONF.rglob("*.yaml")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        yield path, 0, "\n".join(line.partition("#")[2] for line in lines)
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield path, 0, ast.get_docstring(tree) or ""
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                if any(isinstance(name, ast.Name) and name.id in ("EXAMPLES", "HELP") for name in node.targets):
                    yield path, node.lineno - 1, str(node.value.value)


def calls_in_notebook(path: Path) -> Iterator[Found]:
    """Commands of a notebook: of its text, of cells that begin with "!", and of calls of ``omnitrain_command``."""
    known: dict[str, Any] = {"os": os, "Path": Path, "PACK": PACK, "held_out": {"file": "a.png"}}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source, place = "".join(cell["source"]), f"{path.relative_to(ROOT)}:cell {number}"
        if cell["cell_type"] != "code":
            for _, text, in_a_sentence in commands_of_text(source):
                yield Found(place=place, text=text, in_a_sentence=in_a_sentence)
            continue
        yield from (
            Found(place=place, text=line[1:].strip()) for line in source.splitlines() if line.startswith(("!", "%"))
        )
        code = "\n".join(line for line in source.splitlines() if not line.startswith(("!", "%")))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Assign):
                with contextlib.suppress(Exception):  # what needs data or a model is not needed here
                    exec(ast.unparse(node), {"__builtins__": {}}, known)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "omnitrain_command":
                arguments = "[" + ", ".join(map(ast.unparse, node.args)) + "]"
                words = eval(arguments, {"path": "pictures"}, known)
                yield Found(place=place, text="omnitrain " + shlex.join(map(str, words)))


def all_commands() -> list[Found]:
    """Every command, once, with the first place where it stands."""
    found: dict[tuple[str, bool], Found] = {}
    for path, before, text in documents():
        for line, command, in_a_sentence in commands_of_text(text):
            place = f"{path.relative_to(ROOT)}:{before + line}"
            found.setdefault((command, in_a_sentence), Found(place=place, text=command, in_a_sentence=in_a_sentence))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for command in calls_in_notebook(path):
            found.setdefault((command.text, command.in_a_sentence), command)
    return list(found.values())


COMMANDS = all_commands()

NOT_TESTED = {
    "python -m omnitrain VERB [arguments]": "the form of all commands",
    "python -m omnitrain COMMAND": "the form of a stage's command",
    "python -m data_prep.NAME --out FOLDER": "the form of all scripts",
    "python -m speed.NAME": "the form of all scripts",
    "python -m data_prep.synthetic_speech --voices espeak:de,espeak:en-us --texts sentences.txt": "reads its file at once",
}
"""Commands that are none, and why."""


def test_nothing_is_left_out() -> None:
    """Each mention of a command, by a cruder search, is the beginning of one that the extractor has found."""
    found = {command.text for command in COMMANDS}
    everything = "\n".join(" ".join(text.split()) for text in found)
    for path, before, text in documents():
        for number, line in enumerate(text.splitlines(), start=1):
            for mention in MENTION.finditer(line):
                beginning = " ".join(re.split(r"[`\\#;]|\.\s| \(|\s{3,}", line[mention.start() :])[0].split())
                assert beginning.strip()[:40].strip() in everything, (
                    f"{path.relative_to(ROOT)}:{before + number}: {line}"
                )
    assert len(COMMANDS) > 120, len(COMMANDS)
    assert found >= NOT_TESTED.keys()
    print(f"{len(COMMANDS)} commands, {len(NOT_TESTED)} of them not tested")


# ----------------------------------------------------------------------------------------------------------- the check


class Parsed(Exception):
    """A parser has taken the arguments, and what follows would run."""


class Started(Exception):
    """A command line of a Hydra verb was checked, and its job would begin."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the documents' commands take for granted: a run folder, public folders, and that of own recipes."""
    home = tmp_path_factory.mktemp("documents")
    for name in ("run", "run_of_aut"):
        (home / name).mkdir()
    for name in ("DIR", "tiny_public"):
        save_small_folder(home / name)
    (home / "data").mkdir()
    (home / "data" / "tokenizer_speech").symlink_to(PACK)
    for folder in ("data/announcements", "data/dialogues", "runs/speech_quickstart", "runs/pretrain/s3"):
        (home / folder).mkdir(parents=True)
        (home / folder / "tokenizer.json").symlink_to(PACK / "tokenizer.json")
    for name, recipe in (("run", "quickstart"), ("run_of_aut", "aut_quickstart")):
        write_config(compose.run_config([f"+recipe={recipe}", f"paths.run_dir={home / name}"]), home / name)
    for document, group in (("configuration.md", "recipe"), ("benchmarks.md", "eval")):
        text = (ROOT / "docs" / document).read_text(encoding="utf-8")
        blocks = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "@package _global_" in b]
        name = {"recipe": "cats", "eval": "birds"}[group]
        (own,) = [block for block in blocks if re.search(rf"\b{name}\b", block)]
        (home / "experiments" / group).mkdir(parents=True)
        (home / "experiments" / group / f"{name}.yaml").write_text(own)
    return {name: home / name for name in ("run", "run_of_aut", "experiments")} | {"home": home}


def parses(call: Callable[[], Any]) -> None:
    """`call` gets as far as its parser, which takes the arguments; what follows does not run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, name)

            def parse(self: Any, args: Any = None, namespace: Any = None, original: Any = original) -> Any:
                original(self, args, namespace)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, name, parse)
        try:
            call()
        except Parsed:
            return
        except SystemExit as stop:  # of --help
            assert stop.code in (0, None)


def words_of(text: str) -> tuple[dict[str, str], list[str]]:
    """Environment and words of a command line, without what stands behind "#"."""
    words = shlex.split(text, comments=True)
    environment = dict(word.split("=", 1) for word in itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
    return environment, words[len(environment) :]


def filled_in(words: list[str]) -> Iterator[list[str]]:
    """The command lines that one with alternatives (``inspect|verify|stats``) or dots (``arm=...``) stands for."""
    words = [word.replace("=...", "=text").replace("data.tokenizer=QWEN3", f"data.tokenizer={PACK}") for word in words]
    words = [word for word in words if word != "..."]
    choices = [word.split("|") if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word) else [word] for word in words]
    yield from map(list, itertools.product(*choices))


def check(words: list[str], folders: dict[str, Path], in_a_sentence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose or parse one command line, without what starts Python."""
    if words[0] == "make":
        made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in made
        return
    if words[:2] in (["python", "-m"], ["python3", "-m"]):
        module, words = words[2], words[3:]
        if module != "omnitrain":
            return check_script(module, words, in_a_sentence, monkeypatch)
    elif words[0] == "omnitrain":
        words = words[1:]
    verb, rest = words[0], words[1:]
    assert verb in VERBS, f"there is no verb {verb}"
    if verb in HYDRA_VERBS and "--help" not in rest:
        check_hydra(verb, rest, folders, monkeypatch)
    elif not rest or (
        in_a_sentence and all(re.fullmatch(r"[a-z]+", word) for word in rest)
    ):  # "`omnitrain data encode`"
        parses(lambda: main([*words, "--help"]))
    elif verb == "talk" and in_a_sentence:  # "`talk --frames-per-piece 4`", "`omnitrain talk DIR ...`"
        parses(lambda: main([verb, "DIR", *(word for word in rest if word != "DIR"), "--out", "a.wav"]))
    else:
        parses(lambda: main(words))


def check_script(module: str, words: list[str], in_a_sentence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module(module)
    if in_a_sentence and not words and module.startswith("data_prep."):
        words = ["--help"]
    monkeypatch.setattr(sys, "argv", [module, *words])
    parses(script.main)


SEEN: set[tuple[str, ...]] = set()
"""Command lines that have passed: many stand in several documents."""
STAGED = {f"+recipe={path.stem}" for path in RECIPES.glob("*.yaml") if "\nstages:" in path.read_text(encoding="utf-8")}


def check_hydra(verb: str, words: list[str], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line passes the check that comes before every job, and so do the stages that its recipe has."""
    words = [str(folders["experiments"]) if word.endswith("/experiments") else word for word in words]
    if not words or (not words[0].startswith(("-", "+", "~")) and "=" not in words[0]):
        words[:1] = [str(folders["run_of_aut" if words and words[0].endswith("runs/aut") else "run"])]
    words = ["+recipe=quickstart" if word == "+recipe=NAME" else word for word in words]
    if (verb, *words) in SEEN:
        return
    monkeypatch.chdir(folders["home"])
    with monkeypatch.context() as patch, pytest.raises(Started):
        patch.setattr(compose, "run_hydra", _started)
        main([verb, *words])
    SEEN.add((verb, *words))
    if STAGED & set(words) and "--cfg" not in words:
        config = compose.run_config(compose.read_stage_overrides([word for word in words if word != "-m"]))
        for stage in read_stages(config.stages, config.stage_overrides):
            check(["omnitrain", *stage.command], folders, False, monkeypatch)


def _started(*args: object, **options: object) -> int:
    raise Started


def named(command: Found) -> str:
    return re.sub(r"\W+", "_", command.place)


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_a_command(command: Found, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if command.text in NOT_TESTED:
        pytest.skip(NOT_TESTED[command.text])
    environment, words = words_of(command.text)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if packages := environment.get(targets.EXTRA_VARIABLE):  # it is read once, when a process starts
        monkeypatch.setattr(targets, "OWN_PACKAGES", tuple(packages.split(",")))
    for line in filled_in(words):
        check(line, folders, command.in_a_sentence, monkeypatch)
