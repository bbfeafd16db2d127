"""Settings: from flat names, as a command line or a TOML file has them, to a checked dataclass.

A setting is a field of a dataclass. The field's name is the flag and the TOML key; its docstring is the --help text.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def require(rule: bool, name: str, value: object, expected: str) -> None:
    """ValueError unless the rule holds: it names the setting, its value and what is expected."""
    if not rule:
        raise ValueError(f"{name} is {value}, expected {expected}")


def require_at_least(least: int, config: object, *names: str) -> None:
    """ValueError for the first of the named settings of a config that is below `least`."""
    for name in names:
        require(getattr(config, name) >= least, name, getattr(config, name), f"at least {least}")


def require_seed(seed: int) -> None:
    """ValueError for a seed that the random number generators can't take."""
    require(0 <= seed < 2**63, "seed", seed, "0 to 2**63 - 1")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Text that suggests the valid name nearest to a misspelt one; empty if none is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def settings(cls: Any) -> dict[str, Any]:
    """The settings of a config class, those of nested configs included: flat name -> type."""
    flat: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        flat |= settings(kind) if dataclasses.is_dataclass(kind) else {name: kind}
    return flat


def from_dict(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Builds a config from flat names.

    ValueError, which begins with `source`, for a name that is not a setting (with the nearest that is), for a value of
    the wrong type, and for one that breaks a rule.
    """
    valid = settings(cls)
    for name, value in values.items():
        if name not in valid:
            raise ValueError(f"{source}: unknown setting '{name}'{nearest(name, valid)}")
        if not _fits(value, valid[name]):
            raise ValueError(f"{source}: {name} is {value!r}, expected {_type_name(valid[name])}")
    try:
        return _build(cls, values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _build(cls: Any, values: Mapping[str, Any]) -> Any:
    arguments = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, values)
        elif name in values:
            arguments[name] = values[name]
    return cls(**arguments)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    members = get_args(kind)
    return any(_fits(value, member) for member in members) if members else isinstance(value, kind)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    members = [m for m in get_args(kind) if m is not type(None)]
    return " or ".join(_type_name(m) for m in members) if members else kind.__name__


def read_toml(path: str) -> dict[str, Any]:
    """The settings in a TOML file: its keys, with those of its tables. FileNotFoundError; ValueError names the file."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return {key.replace("-", "_"): value for key, value in flat.items()}
