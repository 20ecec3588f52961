"""Frozen dataclasses as configuration: to and from plain dicts, and `--set key=value`, with unknown keys refused.

Each default stands once, on its field. Knows errors only.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dualvla.errors import UsageError, did_you_mean

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """JSON-ready (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Strict inverse of `to_dict`. Raises: UsageError on an unknown key or a value of the wrong type."""
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # any dataclass
    for name in values:
        if name not in fields:
            raise UsageError(f"Unknown key '{where}.{name}'.", did_you_mean(name, fields))
    return cls(**{name: _coerce(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def override(config: T, assignments: Iterable[str]) -> T:
    """Applies `a.b=value` strings, as in `--set train.steps=10`. Returns a new config."""
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign:
            raise UsageError(f"'--set {assignment}' has no '='.", "write it as --set key=value")
        config = _override_one(config, path.strip().split("."), text.strip(), path.strip())
    return config


def _override_one(config: Any, parts: list[str], text: str, path: str) -> Any:
    names = {f.name for f in dataclasses.fields(config)}
    head, *rest = parts
    if head not in names:
        raise UsageError(f"Unknown key '{path}'.", did_you_mean(head, names))
    current = getattr(config, head)
    if rest:
        if not dataclasses.is_dataclass(current):
            raise UsageError(f"'{path}': '{head}' has no keys of its own.", f"set {head} itself")
        return dataclasses.replace(config, **{head: _override_one(current, rest, text, path)})
    if dataclasses.is_dataclass(current):
        keys = ", ".join(f"{path}.{f.name}" for f in dataclasses.fields(current))
        raise UsageError(f"'{path}' is a group, not a value.", f"set one of: {keys}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string
    return dataclasses.replace(config, **{head: _coerce(typing.get_type_hints(type(config))[head], value, path)})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _coerce(hint, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise UsageError(f"{where} = {value!r} is not allowed.", did_you_mean(str(value), [str(a) for a in args]))
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]  # a dataclass type
            return value
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) == len(value):
            return tuple(_coerce(h, v, where) for h, v in zip(inner, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {k: _coerce(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is str and not isinstance(value, (dict, list)):
        return value if isinstance(value, str) else json.dumps(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UsageError(f"{where} = {value!r} is not a {getattr(hint, '__name__', hint)}.", "check its type and unit")
