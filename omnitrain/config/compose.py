"""How a command line becomes one checked configuration and a job.

It is composed once without side effects, to check it: a key or option that does not exist gets the nearest one that
does, and code that a configuration may not name is refused (`door.py`, `hydra_keys.py`). Then Hydra composes it again
and starts one job, or those of a sweep (`-m`), which settles its run folder and hands the verb's `run` its RunConfig.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import sys
import warnings
from argparse import Namespace
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal import utils as hydra_utils
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from omnitrain.config import launched
from omnitrain.config.door import read
from omnitrain.config.errors import explained
from omnitrain.config.hydra_keys import SHELL, check_arguments, check_hydra
from omnitrain.config.locations import CONF, RECIPES
from omnitrain.config.resolvers import register_resolvers
from omnitrain.config.run_config import RunConfig
from omnitrain.config.saved import check_folder, read_config
from omnitrain.config.schemas import register_schemas
from omnitrain.config.targets import check_targets, walk
from omnitrain.config.typed import ConfigError, plain
from omnitrain.files import CONFIG, did_you_mean

register_resolvers()
register_schemas()
# What Hydra would print of an error, such as a run folder that it cannot make, is said by `explained`.
vars(hydra_utils)["run_and_report"] = lambda function: function()
# conf/hydra/launcher/submitit_slurm.yaml has the plugin's own name on purpose: its usual spelling gets our defaults.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated against ConfigStore schema")

SAVED_RUN = "saved_run"  # the configuration of an existing run folder (`omnitrain test RUN_DIR`)
_ELSEWHERE = {
    f"model.{part}.init_from": f"module.init_from={{{{{part}: {{}}}}}}" for part in ("aut", "visual", "thinker")
}
"""Keys that one would look for beside the sizes of a part, and what they are called."""
_MOST_VALUES = 100_000  # in one YAML file of the user's


def run_config(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> RunConfig:
    """The configuration that ``python -m omnitrain fit OVERRIDES`` would run, for Python and notebooks:
    ``build_experiment(run_config(["+recipe=quickstart", "optim.lr=5e-4"]), "fit")`` is the same experiment. Raises
    ConfigError as on the command line."""
    overrides = readable(list(overrides), sweep=False)
    arguments = [*([] if config_dir is None else ["--config-dir", str(config_dir)]), *overrides]
    args = get_args_parser().parse_args(arguments)
    with _composer(args):
        return _read(_composed(args.overrides, "config"), args.overrides)


def _register_recipes(config_dir: str | None) -> None:
    """Make every YAML file below `recipes/` an option of the group `recipe`, except those that the user's folder
    `config_dir` replaces with a ``recipe/NAME.yaml`` of its own."""
    store = ConfigStore.instance()
    store.repo.pop("recipe", None)
    for path in sorted(RECIPES.rglob("*.yaml")):
        name = path.relative_to(RECIPES)
        if config_dir is None or not (Path(config_dir) / "recipe" / name).exists():
            group = "/".join(["recipe", *name.parts[:-1]])
            store.store(group=group, name=name.stem, node=_recipe(path, path.stat().st_mtime_ns), package="_global_")
    for path in sorted(Path(config_dir).rglob("*.yaml")) if config_dir is not None else ():
        text = path.read_bytes()
        if b"&" in text and (count := _count_values(text)) > _MOST_VALUES:
            raise ConfigError(f"{path}: its anchors (&NAME) stand for {count:.0e} values; at most {_MOST_VALUES:.0e}")


@functools.cache
def _recipe(path: Path, changed: int) -> Any:
    """A recipe of ours, read again only if its file has `changed` since."""
    return OmegaConf.load(path)


def _count_values(text: bytes) -> int:
    """How many values a YAML document has once what stands behind an anchor is put at each place that refers to it."""
    total, size_of, opened = 0, dict[str, int](), list[tuple[str | None, int]]()
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):  # Hydra says what is wrong, if it is used
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                total += size_of.get(event.anchor, 0)
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                size_of |= {anchor: total - before} if anchor else {}
            elif isinstance(event, yaml.NodeEvent):
                total += 1
                if isinstance(event, yaml.CollectionStartEvent):
                    opened.append((event.anchor, total - 1))
                elif event.anchor:
                    size_of[event.anchor] = 1
    return total


def run_verb(verb: str, arguments: list[str]) -> int:
    """Check the command line of a Hydra verb, then run it. Returns the exit status. `arguments` are Hydra's; a first
    argument that is a run folder stands for the configuration saved in it, with ``ckpt_path=last``."""

    def checked() -> tuple[list[str], str, Path | None]:
        run_dir, overrides = _split_run_dir(arguments)
        hydra_arguments = read_stage_overrides(overrides)
        args = get_args_parser().parse_args(hydra_arguments)
        better = dict(zip(args.overrides, readable(args.overrides, sweep=args.multirun), strict=True))
        hydra_arguments = [better.get(argument, argument) for argument in hydra_arguments]
        config_name = "config" if run_dir is None else _register_run(run_dir)
        check_command_line(hydra_arguments, config_name, run_dir)
        return hydra_arguments, config_name, run_dir

    status, found = explained(checked)
    return status if found is None else run_hydra(verb, *found)


def run_hydra(
    verb: str, arguments: list[str], config_name: str = "config", run_dir: Path | None = None, program: str = ""
) -> int:
    """Hand `arguments` to Hydra, which calls :class:`Job`. Returns the exit status."""
    _register_recipes(get_args_parser().parse_args(arguments).config_dir)
    before = sys.argv
    sys.argv = [program or before[0], *arguments]
    start = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(Job(verb, run_dir))
    try:
        return explained(start)[0]
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before


@dataclass(frozen=True)
class Job:
    """What Hydra calls with a composed configuration, here or, in a sweep, in a launcher's worker."""

    verb: str
    saved_run: Path | None = None

    def __call__(self, cfg: DictConfig) -> Any:
        job = HydraConfig.get()

        def run() -> Any:
            settled = cfg.copy()
            settled.paths.run_dir = str(_run_dir(job))
            config = read(OmegaConf.to_container(settled, resolve=True, throw_on_missing=True))  # ty: ignore
            if config.stages is not None and self.verb != "fit":
                raise ConfigError(
                    f"stages: this recipe has several, and only `fit` runs them; name the folder of one, as in "
                    f"`python -m omnitrain {self.verb} RUN_DIR/STAGE`"
                )
            check_folder(Path(config.paths.run_dir))
            sys.argv = self._child_command(job, config.paths.run_dir)
            return importlib.import_module(f"omnitrain.cli.{self.verb}").run(config)

        status, result = explained(run)
        if status:
            raise SystemExit(status)
        return result

    def _child_command(self, job: Any, run_dir: str) -> list[str]:
        """The command line of this one job. Lightning starts further processes of a distributed run with it; all of
        them must see the same folder, and none may start a sweep of its own."""
        folders = [s.path for s in job.runtime.config_sources if s.provider == "command-line"]
        return [
            sys.argv[0],
            self.verb,
            *([str(self.saved_run)] if self.saved_run else []),
            *(argument for folder in folders for argument in ("--config-dir", folder)),
            *(text for text in job.overrides.task if not text.startswith("paths.run_dir=")),
            f"paths.run_dir={quoted(run_dir)}",
        ]


def _run_dir(job: Any) -> Path:
    """The run folder: `paths.run_dir`, which is also Hydra's (`hydra.run.dir`), or the sweep's folder for this job."""
    explicit = any(text.lstrip("+").startswith("paths.run_dir=") for text in job.overrides.task)
    sweep = job.mode == RunMode.MULTIRUN
    if sweep and explicit:
        raise ConfigError("paths.run_dir: the jobs of a sweep have a folder each; set hydra.sweep.dir instead")
    if launched.is_one_of_several() and not explicit and not sweep:
        raise ConfigError(
            f"paths.run_dir: {launched.processes()} processes were started from outside, and each would make its own "
            "dated folder; name one folder for all of them with paths.run_dir=FOLDER"
        )
    # Hydra has made the folder that paths.run_dir names, or that a user named with hydra.run.dir.
    return Path(job.runtime.output_dir).resolve()


def _split_run_dir(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """A first argument that is a folder with a config.yaml is an existing run, whatever its name."""
    if not arguments or arguments[0].startswith("-"):
        return None, arguments
    folder = Path(arguments[0])
    if (folder / CONFIG).is_file():
        return folder.resolve(), arguments[1:]
    if arguments[0].startswith(("+", "~")) or "=" in arguments[0]:
        return None, arguments
    raise ConfigError(f"{folder}: neither an override KEY=VALUE nor a run folder (it has no {CONFIG})")


def _register_run(run_dir: Path) -> str:
    """Store the configuration of an earlier run, which is complete but for Hydra's own settings. It passes the door
    before Hydra sees it, so nothing in it can be resolved. Which benchmarks are run is the user's word alone: task
    files of lm-evaluation-harness may call Python."""
    saved = OmegaConf.create(plain(replace(read_config(run_dir), eval=None)))
    root: Any = OmegaConf.load(CONF / "config.yaml")
    chosen = [entry for entry in root.defaults if OmegaConf.is_dict(entry)]  # such as {override hydra/launcher: basic}
    saved.defaults = ["_self_", *(entry for entry in chosen if next(iter(entry)).startswith("override "))]
    saved.hydra, saved.ckpt_path = root.hydra, "last"
    ConfigStore.instance().store(name=SAVED_RUN, node=saved)
    return SAVED_RUN


def quoted(value: str) -> str:
    """`value` as Hydra's grammar takes it whatever characters it has."""
    escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'"


def readable(overrides: list[str], *, sweep: bool) -> list[str]:
    """Overrides whose values Hydra's grammar cannot read, such as ``paths.run_dir=a = b``, with these in quotes; a
    comma parts values in a sweep alone. Raises ConfigError for a key of `_ELSEWHERE`."""
    parser, found = OverridesParser.create(), []
    for text in overrides:
        key, sign, value = text.partition("=")
        if key.lstrip("+") in _ELSEWHERE:
            raise ConfigError(f"{text}: there is no such key; write {_ELSEWHERE[key.lstrip('+')].format(value)}")
        try:
            parsed = parser.parse_override(text)
            needs_quotes = parsed.is_sweep_override() and not sweep and "(" not in value
        except HydraException:
            needs_quotes = sign == "=" and not value.startswith(("'", '"', "[", "{"))
        found.append(f"{key}={quoted(value)}" if needs_quotes else text)
    return found


def check_command_line(
    arguments: list[str], config_name: str = "config", run_dir: Path | None = None, *, of_a_recipe: bool = False
) -> None:
    """Compose what `arguments` ask for and pass it through the door, without importing anything that it names. Who
    names a run folder, `run_dir`, asks for what is written there, wherever it lies. The words of a stage are those
    `of_a_recipe`, not of the user. Raises ConfigError, with the nearest valid key or option, if it does not compose;
    ForbiddenTarget if it names code that a configuration may not name."""
    args = get_args_parser().parse_args(arguments)
    if args.hydra_help or args.shell_completion or args.info:
        return
    with _composer(args):
        for overrides in _single_jobs(args.overrides):
            cfg = _composed(overrides, config_name)
            if args.cfg is None:
                asked = [] if of_a_recipe else args.overrides
                _read(cfg, asked if run_dir is None else [*asked, f"paths.run_dir={run_dir}"])
            else:  # it is only printed
                with open_dict(cfg):
                    del cfg.hydra
                check_targets(OmegaConf.to_container(cfg, resolve=False))
        known = [*cfg, *GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)]
        root_keys = set(compose("config", overrides=[]))
        for text in args.overrides:  # "+recpe=quickstart" would add a key that nobody reads
            key, _, value = text.lstrip("+").partition("=")
            near = difflib.get_close_matches(key, [str(name) for name in known if name != key], n=1, cutoff=0.75)
            if text.startswith("+") and "." not in key and key in cfg and key not in root_keys and near:
                raise ConfigError(f"{text}: nothing reads a key '{key}'; did you mean +{near[0]}={value}?")


_REFUSED = (HydraException, OmegaConfBaseException, ValueError)  # ValueError: a word as the index of a list


def _composed(overrides: list[str], config_name: str) -> DictConfig:
    try:
        return compose(config_name, overrides=overrides, return_hydra_config=True)
    except _REFUSED as error:
        raise ConfigError(_explain(error, overrides, config_name)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"a configuration file cannot be read: {' '.join(str(error).split())}") from error


def _read(cfg: DictConfig, overrides: list[str]) -> RunConfig:
    """The typed configuration of `cfg`, which is checked with Hydra's own part."""
    with open_dict(cfg):  # what Hydra fills in when a job starts
        cfg.hydra.job.num, cfg.hydra.job.id, cfg.hydra.runtime.output_dir = 0, "0", "."
    HydraConfig.instance().set_config(cfg)
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True)
        usual: Any = OmegaConf.to_container(_launcher_defaults(values["hydra"]), resolve=False)
    except InterpolationToMissingValueError as error:
        key = str(error).partition("value: ")[2].split()[0]
        raise ConfigError(f"{key} must be given: add {key}=VALUE to the line") from error
    except OmegaConfBaseException as error:
        _, by_ours, said = str(error).partition(" raised while resolving interpolation: ")
        raise ConfigError(said.splitlines()[0] if by_ours else str(error)) from error
    check_hydra(values["hydra"], usual, overrides, values["paths"]["run_dir"])
    return read(values)


def _launcher_defaults(hydra_values: dict[str, Any]) -> DictConfig:
    """Hydra's part with the launcher that has been chosen, as it is without any recipe."""
    if not any(hydra_values["launcher"].get(key) for key in SHELL):
        return OmegaConf.create()
    chosen = hydra_values["runtime"]["choices"].get("hydra/launcher") or "basic"
    return compose("config", overrides=[f"hydra/launcher={chosen}"], return_hydra_config=True).hydra


def check_stage(name: str, command: Sequence[str], run_dir: Path) -> None:
    """Check the command of a stage (verb first) of the run in `run_dir`, before the stages in front of it take hours.
    One that begins with a run folder is left alone: the folder may be still to be made. Raises as `check_command_line`,
    with the stage's name."""
    arguments = list(command[1:])
    if arguments and not arguments[0].startswith(("-", "+", "~")) and "=" not in arguments[0]:
        return
    running, job = GlobalHydra.instance().hydra, HydraConfig.instance().cfg  # there is one of each in a process
    GlobalHydra.instance().clear()
    try:
        check_command_line(arguments, run_dir=run_dir, of_a_recipe=True)
    except ConfigError as error:
        raise type(error)(f"stage '{name}': {error}") from error
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = running, job


def read_stage_overrides(arguments: list[str]) -> list[str]:
    """``stage_overrides.NAME=[a=1,b=2]`` as Hydra takes it: its overrides in quotes, since in a list a bare word has no
    "=", and with ++, since a recipe need not name its stages there."""
    found = []
    for text in arguments:
        key, _, value = text.partition("=")
        if key.lstrip("+").startswith("stage_") and value.startswith("[") and value.endswith("]"):
            words = (word if word[0] in "'\"" else quoted(word) for word in _split_at_commas(value[1:-1]))
            text = f"{key}=[{','.join(words)}]"
        if key.lstrip("+").startswith("stage_overrides."):
            text = "++" + text.lstrip("+")
        found.append(text)
    return found


def _split_at_commas(text: str) -> list[str]:
    """The parts between the commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


@contextlib.contextmanager
def _composer(args: Namespace) -> Generator[None]:
    """Hydra's compose API with the search path that the same arguments give `hydra.main`."""
    check_arguments(args)
    _register_recipes(args.config_dir)
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="check"):
        if args.config_dir is not None:
            loader: Any = GlobalHydra.instance().config_loader()
            path = loader.get_search_path()
            own = f"file://{Path(args.config_dir).resolve()}"
            path.prepend(provider="command-line", path=own, anchor=SearchPathQuery(provider="schema"))
            loader.repository.initialize_sources(path)
        yield


def _single_jobs(overrides: list[str]) -> list[list[str]]:
    """The override lists to compose for a sweep: the first value of everything, then each option of each swept group
    once (only groups bring targets)."""
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text}: not KEY=VALUE as Hydra writes it ({error})") from error
        key = text.split("=", 1)[0]
        if override.is_interval_sweep():  # a search draws from it; its beginning stands for all
            interval: Any = override.value()
            choices.append([f"{key}={interval.start}"])
        elif override.is_sweep_override():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    loader = GlobalHydra.instance().config_loader()
    first = [values[0] for values in choices if values]
    jobs = [first]
    for i, values in enumerate(choices):
        group = values[0].split("=", 1)[0].lstrip("+~").split("@")[0]
        if len(values) > 1 and loader.get_group_options(group):
            jobs += [[*first[:i], value, *first[i + 1 :]] for value in values[1:]]
    return jobs


def _explain(error: Exception, overrides: list[str], config_name: str) -> str:
    """Hydra's message without its advice, and the nearest valid spelling of the override that is at fault."""
    good: list[str] = []
    for text in overrides:
        try:
            compose(config_name, overrides=[*good, text])
        except _REFUSED:
            if hint := _nearest(text, good, config_name):
                return f"{text}: {hint}"
        else:
            good.append(text)
    message = str(error).strip()
    cause = str(error.__cause__).strip() if error.__cause__ is not None else ""
    return message if cause in message else f"{message}\n{cause}"


def _nearest(text: str, good: list[str], config_name: str) -> str | None:
    """What `text` should probably have been, given the overrides that do compose."""
    loader = GlobalHydra.instance().config_loader()
    start, _, value = text.partition("=")
    key = start.lstrip("+~")
    sign, key = start[: len(start) - len(key)], key.split("@")[0]
    options = loader.get_group_options(key, ObjectType.CONFIG)
    if value in options:
        return None if sign else f"did you mean +{text}? '{key}' has no default option that could be replaced"
    if options:
        hint = did_you_mean(value, options, form=f"{sign}{key}={{}}", otherwise="there are: {}")
        return f"there is no {key} '{value}'; {hint}"
    try:
        cfg = compose(config_name, overrides=good)
    except _REFUSED:
        return None
    tree = OmegaConf.to_container(cfg, resolve=False)
    keys = {f"{where}.{name}".lstrip("."): node for where, name, node in walk(tree)}
    if key in keys:
        return None
    parent = key.rpartition(".")[0]
    if not sign and keys.get(parent) == {}:
        return f"did you mean +{text}? '{parent}' has no such key yet, and + adds it"
    extra_groups = [group for group in loader.get_group_options("", ObjectType.GROUP) if group not in keys]
    near = difflib.get_close_matches(key, [*keys, *extra_groups], n=3, cutoff=0.5)
    if not near:
        return f"there is no key '{key}'; `python -m omnitrain fit --cfg job` prints all of them"
    near.sort(key=lambda name: value not in loader.get_group_options(name, ObjectType.CONFIG))  # an option says more
    return f"there is no key '{key}'; did you mean {'+' if near[0] in extra_groups else ''}{near[0]}={value}?"
