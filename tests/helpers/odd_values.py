"""Values that a key of the config may be given: at the ends of its range, beyond them, and of every wrong kind.

What a key may have is read from its ``Setting``, so a new key is drawn like all others.
"""

import math
from dataclasses import fields
from random import Random
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from symbiotic_titan.config.rows import FLOAT32_MAX, INT64_MAX, Range, Text, rules_in
from symbiotic_titan.config.upstream import Setting
from symbiotic_titan.registry import registry_of

HUGE = 10**400
# Of no type that a key has, except where the type is Any.
NO_VALUES = (
    math.nan,
    math.inf,
    -math.inf,
    {"": {}},
    [{}],
    [[["x"]]],
    HUGE,
    -HUGE,
    "\x00",
    object(),
)
STRINGS = (
    "",
    "x",
    "x/y",
    " ",
    "\n",
    "x" * 5000,
    "\x01",
    "\udcff",
    "/",
    "..",
    "None",
    "(",
    "é",
    "1:1",
)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The types in a union, or the type itself, without None."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    return tuple(kind for kind in kinds if kind is not NoneType)


def numbers(rule: Range, kind: type, rng: Random) -> tuple[list[Any], list[Any]]:
    """(numbers in the range, among them its ends; numbers beyond it)"""
    limit = INT64_MAX if kind is int else FLOAT32_MAX
    low = -limit if rule.least is None else rule.least
    high = limit if rule.most is None else rule.most
    step = 1 if kind is int else max(abs(low), abs(high), 1.0) * 1e-3
    inside = [kind(low), kind(high), *rule.also, kind(low + (high - low) * rng.random() ** 9)]
    if kind is float:
        inside.append((low + min(high, low + 1.0)) / 2)
    beyond = [low - step, high + step, low - 10**12, HUGE, -HUGE]
    return (
        [value for value in inside if rule.holds(value)],
        [value for value in (*beyond, low, high) if not rule.holds(value)],
    )


def draws(setting: Setting, rng: Random) -> tuple[list[Any], list[Any]]:
    """(values that the key can have, values that it cannot have) by its type and range alone."""
    good: list[Any] = []
    bad: list[Any] = [value for value in NO_VALUES if setting.annotation is not Any]
    if setting.registry is not None:
        return list(setting.registry), [*bad[:-1], "", "nope", 3, True, ["x"]]
    for kind in kinds_of(setting.annotation):
        more, worse = _draws_of(kind, setting.rules, rng)
        good += more
        bad += worse
    fitting = [kind for kind in kinds_of(setting.annotation) if get_origin(kind) is not Literal]
    if NoneType in get_args(setting.annotation):
        good.append(None)
    if str not in fitting and not any(get_origin(kind) is Literal for kind in fitting):
        bad += ["", "x"]
    if float in fitting:  # an integer is a number
        bad = [value for value in bad if value not in (0, 1) or isinstance(value, bool)]
    return good, bad


def _draws_of(kind: Any, rules: tuple[Any, ...], rng: Random) -> tuple[list[Any], list[Any]]:
    if kind is bool:
        return [True, False], [0, 1, "true", [], {}]
    if get_origin(kind) is Literal:
        return list(get_args(kind)), ["nope", "", 3, True, [], 1.5]
    if kind in (int, float):
        inside, beyond = [], []
        for rule in rules:
            inside, beyond = numbers(rule, kind, rng)
        return inside, [*beyond, True, [], {}, "1"]
    if kind is str:
        return (
            [text for text in STRINGS if all(rule.holds(text) for rule in rules)],
            [*(t for t in STRINGS if not all(rule.holds(t) for rule in rules)), 3, True, {}],
        )
    if get_origin(kind) is list:
        good, bad = _draws_of(get_args(kind)[0], rules, rng)
        return [[], *([value] for value in good)], [*([value] for value in bad), 3, True, {"a": 1}]
    return [], [3, True, 1.5]


def fields_of_row(cls: type) -> dict[str, Setting]:
    """The keys of the tables that a list or table holds, like those of a section."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        f.name: Setting(
            getattr(hints[f.name], "__origin__", hints[f.name])
            if rules_in(hints[f.name])
            else hints[f.name],
            rules_in(hints[f.name]),
            True,
            registry_of(f),
            None,
        )
        for f in fields(cls)
    }


def has_range(setting: Setting) -> bool:
    """Whether it is stated what values a key may have."""
    if setting.registry is not None or setting.row is not None:
        return True
    scalars = _scalars(setting.annotation)
    wanted = {Range: {int, float} & scalars, Text: {str} & scalars}
    return all(
        any(isinstance(rule, kind) for rule in setting.rules) for kind, has in wanted.items() if has
    )


def _scalars(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Literal:
        return set()
    if get_origin(annotation) is dict:
        return _scalars(get_args(annotation)[1])
    inner = get_args(annotation)
    return set().union(*map(_scalars, inner)) if inner else {annotation}
