"""The verbs, and what ``fit --help`` prints: groups, recipes and common lines, read from file names alone (no Hydra,
no torch)."""

from __future__ import annotations

from omnitrain.config.locations import CONF, RECIPES
from omnitrain.files import did_you_mean

HYDRA_VERBS = {
    "fit": "train; continues the run in its folder with ckpt_path=last",
    "validate": "loss on the validation split",
    "test": "held-out scores and the media-swap test",
    "predict": "answers of a trained model to the prompts of a split, as Parquet",
}
TOOL_VERBS = {
    "generate": "answer a prompt with pictures, audio or video",
    "talk": "answer aloud, or speak a text; writes a WAV file as it goes",
    "data": "inspect, verify, summarise or import data",
    "convert": "to and from the public Qwen3-Omni format; table of its keys",
    "report": "one HTML file about a run",
    "plan": "memory, messages and time of a run on GPUs that are not here, by mesh",
    "search": "the best learning rate of each arm of a search",
}
VERBS = {**HYDRA_VERBS, **TOOL_VERBS}


def no_such_verb(verb: str) -> str:
    """What to tell one who has written `verb`, which is none."""
    hint = did_you_mean(verb, VERBS, form="'{}'", otherwise="verbs are: {}")
    return f"there is no verb '{verb}'; {hint}"


TEXT = """\
python -m omnitrain {verb}: {what}

usage: python -m omnitrain {verb} [+recipe=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]
       python -m omnitrain {verb} RUN_DIR [KEY=VALUE ...]     the configuration and last checkpoint of a run

recipes (complete experiments):
{recipes}

groups and their options:
{groups}

common keys:
  paths.run_dir=DIR        where everything is written (default: a dated folder under runs/)
  ckpt_path=last|FILE      continue the run in paths.run_dir, or start from a checkpoint
  seed=0  trainer.max_steps=1000  trainer.devices=2

Hydra's own flags:
  --cfg job                print the composed configuration and stop
  -m KEY=A,B               one run per value (a sweep), under runs/multirun/
  --config-dir DIR         your own folder; DIR/recipe/NAME.yaml becomes +recipe=NAME
  --hydra-help             all the others
"""


def verb_help(verb: str) -> str:
    """Help of the Hydra verb `verb`."""
    recipes = []
    for path in sorted(RECIPES.rglob("*.yaml")):
        comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        summary = next((line for line in comments if not line.startswith("@package")), "")
        recipes.append(f"  +recipe={path.relative_to(RECIPES).with_suffix('').as_posix():14} {summary}")
    groups = [
        f"  {folder.name:12} {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}"
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    ]
    return TEXT.format(verb=verb, what=HYDRA_VERBS[verb], recipes="\n".join(recipes), groups="\n".join(groups))
