"""Rows of a TOML array, or inline tables, as dataclasses: every key and type is checked, with messages a user can act on."""

import math
from dataclasses import MISSING, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from symbiotic_titan.registry import registry_of

T = TypeVar("T")


CONFIG_FILE, COMMAND_LINE = "config file", "command line"
_OWN_SECTION = "; a section of your own comes from the module in job.custom_config_module"
# Where a module of the user's may add keys, and which option names it.
_FROM_OUTSIDE = {
    "losses": "; a term of your own is known once experimental.custom_import names the module that registers it",
    CONFIG_FILE: _OWN_SECTION,
    COMMAND_LINE: _OWN_SECTION,
}


def unknown_key_message(where: str, key: str, known: list[str]) -> str:
    """Message for a key that the config class lacks, with the nearest one that it has."""
    near = get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"{where}: unknown key {key!r}; {hint}{'' if near else _FROM_OUTSIDE.get(where, '')}"


def _describe(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(v) for v in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_describe(a) for a in get_args(annotation) if a is not NoneType)
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if get_origin(annotation) in (list, tuple):
        return f"a list, each item {_describe(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return "a table" if value is Any else f"a table, each value {_describe(value)}"
    return names.get(annotation, str(annotation))


def _is_scalar(value: Any, annotation: Any) -> bool:
    """Whether ``value`` is of a scalar type. An integer passes as a float; a bool, which Python counts among the integers, does not."""
    if annotation is Any:
        return True
    if annotation is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, NoneType if annotation is None else annotation)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether ``value`` has the type ``annotation``, which is neither a union nor a dict."""
    if get_origin(annotation) is Literal:
        return any(value == v and type(value) is type(v) for v in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        item_type = get_args(annotation)[0]
        return isinstance(value, (list, tuple)) and all(_fits(item, item_type) for item in value)
    return _is_scalar(value, annotation)


def check_value(where: str, value: Any, annotation: Any) -> None:
    """Raise ValueError unless ``value`` has the type ``annotation``; ``where`` is the key as the user wrote it.

    Understands bool, int, float, str, Literal, X | Y, X | None, list[X], tuple[X, ...] and dict[str, X]. The message names the
    innermost key at fault, e.g. ``rates[1]``.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        options = [option for option in args if option is not NoneType]
        if value is None and len(options) < len(args):
            return
        if len(options) == 1:
            return check_value(where, value, options[0])
        if any(_fits(value, option) for option in options):
            return
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_value(f"{where}[{i}]", item, args[0])
        return
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            check_value(f"{where}.{name}", item, args[1])
        return
    elif origin not in (list, tuple, dict) and _fits(value, annotation):
        return
    finite = not isinstance(value, float) or math.isfinite(value)
    rule = _describe(annotation) if finite else "a finite number"
    raise ValueError(f"{where}: must be {rule}, got {value!r}")


def row_from_dict(cls: type[T], row: Any, where: str) -> T:
    """``cls`` built from one TOML table, every key and type checked. A ready ``cls`` is returned as it is.

    Raises:
        ValueError: not a table, an unknown or missing key, or a value of the wrong type; ``where`` leads the message.
    """
    if isinstance(row, cls):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a table, got {row!r}")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key, value in row.items():
        if key not in known:
            raise ValueError(unknown_key_message(where, key, known))
        check_value(f"{where}.{key}", value, hints[key])
    for f in fields(cls):  # type: ignore[arg-type]
        registry = registry_of(f)
        if registry is not None and row.get(f.name) is not None:
            registry.check(f"{where}.{f.name}", row[f.name])
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in row:
            raise ValueError(f"{where}: missing key {f.name!r}")
    return cls(**row)
