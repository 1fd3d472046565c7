"""Between dataclasses and plain data, both ways.

Every default of a configuration stands once: in a frozen dataclass. :func:`schema` shows a dataclass to Hydra, so that
YAML and the command line say only what differs and a value of the wrong type is refused where it is given;
:func:`typed` makes the dataclass from the resolved, plain result, and :func:`plain` writes it down again, whole.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from omegaconf import MISSING as OPEN
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, OmegaConf, StringNode

from omnitrain.files import did_you_mean

T = TypeVar("T")

TARGET = "_target_"


class ConfigError(ValueError):
    """A configuration or command line that cannot work; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """Something that a configuration builds by name.

    Attributes:
        target: the constructor, one of `targets.CONSTRUCTORS` or of a package of the user's own.
        config: its configuration; None for a constructor that takes loose keywords.
        keywords: those; or, of a class derived from ours, what it takes beyond `config`.
    """

    target: str
    config: Any = None
    keywords: dict[str, Any] = field(default_factory=dict)


@cache
def annotations(cls: Any) -> dict[str, Any]:
    """Field -> annotation of a dataclass, evaluated; what belongs to the class alone is no field."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


_NODES = {int: IntegerNode, float: FloatNode, bool: BooleanNode, str: StringNode}


def schema(cls: Any, value: Any = None, *, target: str | None = None) -> DictConfig:
    """A dataclass as Hydra composes it: a mapping of all its fields with their defaults (or the values of the instance
    `value`) and the types of their values; `target`, its constructor, stands in front. Further keys can be added to it
    (with ``+``): whether they mean anything, `typed` decides, which also knows classes that derive from ours."""
    hints: dict[str, Any] = annotations(cls)
    content: dict[str, Any] = {} if target is None else {TARGET: target}
    for f in fields(cls):
        content[f.name] = _node(hints[f.name], _default(f) if value is None else getattr(value, f.name))
    return OmegaConf.create(content)


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else OPEN


def _node(annotation: Any, value: Any) -> Any:
    options, optional = _options(annotation)
    if len(options) == 1 and options[0] in _NODES:
        return _NODES[options[0]](value, is_optional=optional)
    if is_dataclass(value) and not isinstance(value, type):
        return schema(type(value), value)
    if isinstance(value, Mapping):
        return {str(key): _node(Any, item) for key, item in value.items()}
    return [_node(Any, item) for item in value] if isinstance(value, list | tuple) else value


def _options(annotation: Any) -> tuple[list[Any], bool]:
    """The members of a union, or the annotation alone, and whether None is one of them, which is left out."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [option for option in options if option is not type(None)], type(None) in options


def typed(cls: type[T], values: Any, place: str = "") -> T:
    """The dataclass `cls` that plain `values`, which stand at the key `place`, describe; what they leave out has its
    default. Raises ConfigError, which names the place and the cure, for an unknown or missing field, or a value that is
    none of its type."""
    hints = annotations(cls)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place or 'the configuration'}: write a mapping of {', '.join(hints)}, not {values!r}")
    for name in values:
        if name not in hints:
            raise ConfigError(f"{_at(place, name)}: there is no such key; {did_you_mean(name, hints)}")
    found = {name: _value(hints[str(name)], value, _at(place, name)) for name, value in values.items()}
    for f in fields(cast(Any, cls)):
        if f.name not in found and _default(f) is OPEN:
            raise ConfigError(f"{_at(place, f.name)}: must be given")
    try:
        return cls(**found)
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(place.split(".")[0]) else f"{place}: {message}") from error


def _value(annotation: Any, value: Any, place: str) -> Any:
    if annotation is Any:
        return value
    options, optional = _options(annotation)
    if value is None and optional:
        return None
    if value is None:
        raise ConfigError(f"{place}: must not be null")
    if Named in options and isinstance(value, Mapping):
        return named(value, place)
    if isinstance(value, Mapping):
        options = [x for x in options if is_dataclass(x) or get_origin(x) is dict] or options
    exact = [option for option in options if type(value) is option]
    for option in (exact or options)[:-1]:
        try:
            return _one(option, value, place)
        except ConfigError:
            continue
    return _one((exact or options)[-1], value, place)


def _one(kind: Any, value: Any, place: str) -> Any:
    """`value` as the one type `kind`."""
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return value if isinstance(value, kind) else typed(kind, value, place)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place}: write a mapping, not {value!r}")
        return {str(key): _value(inner[1], item, _at(place, key)) for key, item in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{place}: write a list, not {value!r}")
        fixed = origin is tuple and Ellipsis not in inner
        if fixed and len(value) != len(inner):
            raise ConfigError(f"{place}: write {len(inner)} values, not {list(value)}")
        kinds = inner if fixed else [inner[0]] * len(value)
        return origin(_value(k, item, f"{place}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{place}={value}: use one of {', '.join(map(str, inner))}")
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, bool) and type(value) is kind:
        return value
    if kind is str and isinstance(value, str | int | float | PurePath):
        return str(value)
    raise ConfigError(f"{place}: {value!r} is not of type {getattr(kind, '__name__', kind)}")


def named(values: Mapping[str, Any], place: str) -> Named:
    """What a mapping with ``_target_`` describes."""
    from omnitrain.config.targets import config_class

    rest = {str(key): value for key, value in values.items() if key != TARGET}
    target = values.get(TARGET)
    if not isinstance(target, str):
        raise ConfigError(f"{place}: write a mapping with {TARGET}: NAME, the class to build")
    cls, is_ours = config_class(target, place)
    if cls is None:
        return Named(target=target, keywords={key: _nested(v, _at(place, key)) for key, v in rest.items()})
    own = {key: value for key, value in rest.items() if is_ours or key in annotations(cls)}
    more = {key: _nested(value, _at(place, key)) for key, value in rest.items() if key not in own}
    return Named(target=target, config=typed(cls, own, place), keywords=more)


def _nested(value: Any, place: str) -> Any:
    """Loose keywords, in which further objects may be named."""
    if isinstance(value, Mapping):
        if TARGET in value:
            return named(value, place)
        return {str(key): _nested(item, _at(place, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nested(item, f"{place}[{i}]") for i, item in enumerate(value)]
    return value


def _at(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def plain(value: Any) -> Any:
    """Dicts, lists and scalars that `typed` reads back to the same `value`."""
    if isinstance(value, Named):
        return {TARGET: value.target, **(plain(value.config) or {}), **plain(value.keywords)}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in plain data that is no mapping with content."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, _at(place, key))
    else:
        yield place, value


def changes(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value after) of all that differs; None where there is no such key."""
    a, b = dict(leaves(before)), dict(leaves(after))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]}


def shown_change(values: tuple[Any, Any]) -> str:
    """One of `changes` in words, such as ``0.1 -> (none)``."""
    return " -> ".join("(none)" if value is None else str(value) for value in values)
