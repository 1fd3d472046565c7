"""``python -m omnitrain VERB [arguments]``, also installed as ``omnitrain``.

This file knows only the names of the verbs; torch and Hydra are imported by the verb that needs them, so that
``--help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys

from omnitrain.config.verbs import HYDRA_VERBS, TOOL_VERBS, VERBS, no_such_verb, verb_help

HELP = """\
omnitrain: open training of omni-modal models.

usage: python -m omnitrain VERB [arguments]

{verbs}

first steps:
  python -m omnitrain fit +recipe=quickstart        train a small model on the embedded data, a few minutes
  python -m omnitrain fit --help                    what can be configured
  python -m omnitrain generate RUN_DIR "prompt"     ask what was trained
  eval "$(omnitrain -sc install=bash)"              tab completion in bash
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, or 1 with an explanation on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:9} {what}" for name, what in VERBS.items())))
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(version("omnitrain"))
        return 0
    if verb in ("-sc", "--shell-completion"):
        return _complete(arguments)
    if verb in HYDRA_VERBS and {"-h", "--help"} & set(rest):
        print(verb_help(verb))
        return 0
    if verb in HYDRA_VERBS:
        from omnitrain.config.compose import run_verb

        return run_verb(verb, rest)
    if verb in TOOL_VERBS:
        return importlib.import_module(f"omnitrain.cli.{verb}").main(rest) or 0
    print(f"error: {no_such_verb(verb)}", file=sys.stderr)
    return 1


def _complete(arguments: list[str]) -> int:
    """Hydra's shell completion, which knows nothing of verbs: complete the verb here, leave the rest to Hydra."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(arguments) > 1 and arguments[1].startswith("query="):
        verb_is_open = len(words) < 2 or (len(words) == 2 and not line.endswith(" "))
        if verb_is_open:
            print(" ".join(VERBS))
            return 0
        if words[1] not in HYDRA_VERBS:
            return 0
        os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    from omnitrain.config.compose import run_hydra

    return run_hydra("fit", arguments, program="omnitrain")


if __name__ == "__main__":
    sys.exit(main())
