"""What a key may have, its type and its range, is written in its annotation and checked here, with messages a user can act on.

    lookahead: Annotated[int, Range(1, 4096)] = 32
    prompts: Annotated[list[str], TEXT] = field(default_factory=list)       # of every item
    stages: Annotated[list[Any], tyro.conf.Fixed, Rows(Stage)] = ...        # tables, each a dataclass

A bool, a ``Literal`` and what ``choice`` makes have no other range. An upper bound is more than a run could use and few enough that
what a check does as often as the number says ends at once.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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


INT64_MAX = 2**63 - 1
FLOAT32_MAX = 3.4e38  # of larger numbers torch makes infinities


def shown(value: Any) -> str:
    """``value`` as a message shows it: on one line, the middle of what is long left out."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or deeper, than Python prints
        return f"a value of type {type(value).__name__} that is too large to print"
    return text if len(text) <= 200 else f"{text[:120]}...{text[-40:]}"


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``. Where one is left out, those that a 64-bit integer or a float32 holds.

    ends    "[)" excludes ``most``, "(]" ``least``, "()" both.
    also    further values, each with what it means.
    remedy  what to do instead, a sentence for the message.
    """

    least: float | None = None
    most: float | None = None
    ends: Literal["[]", "[)", "(]", "()"] = "[]"
    also: Mapping[int, str] = field(default_factory=dict, hash=False)  # Annotated types are hashed
    remedy: str = ""

    def holds(self, value: float) -> bool:
        return value in self.also or not self._broken(value)

    def check(self, where: str, value: float) -> None:
        """Raises ValueError unless the range has ``value``, which is finite."""
        if self.holds(value):
            return
        also = "".join(f", or {number} ({meaning})" for number, meaning in self.also.items())
        raise ValueError(
            f"{where}: must {self._broken(value)}{also}, got {shown(value)}{'; ' * bool(self.remedy)}{self.remedy}"
        )

    def _broken(self, value: float) -> str:
        """The rule that ``value`` breaks, in words, or ""."""
        least, most = self.least, self.most
        low = least is not None and (value < least or (value == least and self.ends[0] == "("))
        high = most is not None and (value > most or (value == most and self.ends[1] == ")"))
        limit = INT64_MAX if isinstance(value, int) else FLOAT32_MAX
        if (low or high) and (least, most) == (0, 1):
            return f"lie in {self.ends[0]}{least:g}, {most:g}{self.ends[1]}"
        if low and least == 0:
            return "be positive" if self.ends[0] == "(" else "be zero or positive"
        if low:
            return f"be {'above' if self.ends[0] == '(' else 'at least'} {least}"
        if high:
            return f"be {'below' if self.ends[1] == ')' else 'at most'} {most}"
        return f"be at most {limit} in size" if abs(value) > limit else ""


@dataclass(frozen=True)
class Text:
    """The strings that all of the regular expression ``pattern`` matches; ``rule`` says so in words, after "must be"."""

    rule: str
    pattern: str

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def check(self, where: str, value: str) -> None:
        """Raises ValueError unless the pattern matches ``value``."""
        if not self.holds(value):
            raise ValueError(f"{where}: must be {self.rule}, got {shown(value)}")


@dataclass(frozen=True)
class Rows:
    """The items of a list, or the values of a table, are tables with the keys of the dataclass ``row``."""

    row: type


# Control characters, and surrogates, which no file in UTF-8 can hold.
_CONTROL = r"\x00-\x1f\x7f-\x9f\ud800-\udfff"
TEXT = Text("text that UTF-8 can write, without NUL", r"[^\x00\ud800-\udfff]*")
LINE = Text("1 to 1000 characters, no control character among them", rf"[^{_CONTROL}]{{1,1000}}")
NAME = Text(
    "a name of 1 to 100 characters, no space or slash at its ends, no control character",
    rf"(?![ /])[^{_CONTROL}]{{1,100}}(?<![ /])",
)
PATH = Text(
    "a path of 1 to 4096 characters, no control character among them",
    rf"[^{_CONTROL}]{{1,4096}}",
)
FILES = Text("a path or pattern without control characters, not empty", rf"[^{_CONTROL}]+")
PATH_OR_NONE = Text(
    "empty, or a path of at most 4096 characters, no control character among them",
    rf"[^{_CONTROL}]{{0,4096}}",
)
MODULE = Text(
    "the name of a module, with dots as in 'package.module', or empty",
    r"([^\W\d]\w*(\.[^\W\d]\w*)*)?",
)
SHARE = Range(0, 1)
STEPS = Range(1, 10**9)  # between two events, or of a run
NOT_NEGATIVE, POSITIVE = Range(0), Range(0, ends="(]")
SEED = Range(0)

Rule = Range | Text


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
        return is_number and (isinstance(value, int) or math.isfinite(value))
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


def check_value(where: str, value: Any, annotation: Any, rules: tuple[Rule, ...] = ()) -> None:
    """Raise ValueError unless ``value`` has the type ``annotation`` and its range; ``where`` is the key as the user wrote it.

    Understands bool, int, float, str, Literal, X | Y, X | None, list[X], tuple[X, ...], dict[str, X] and Annotated[X, ...] with a
    ``Range`` or ``Text``, which are rules for every number or string in X; ``rules`` are more of them. The message names the innermost
    key at fault, e.g. ``rates[1]``.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return check_value(where, value, args[0], (*rules, *rules_in(annotation)))
    if origin in (Union, UnionType):
        options = [option for option in args if option is not NoneType]
        if value is None and len(options) < len(args):
            return
        fitting = [option for option in options if _fits(value, option)]
        if len(options) == 1 or fitting:
            return check_value(where, value, (fitting or options)[0], rules)
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_value(f"{where}[{i}]", item, args[0], rules)
        return
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            LINE.check(f"{where}: a key in it", name)
            check_value(f"{where}.{name}", item, args[1], rules)
        return
    elif origin not in (list, tuple, dict) and _fits(value, annotation):
        return _check_rules(where, value, rules)
    finite = not isinstance(value, float) or math.isfinite(value)
    rule = _describe(annotation) if finite else "a finite number"
    raise ValueError(f"{where}: must be {rule}, got {shown(value)}")


def rules_in(annotation: Any) -> tuple[Rule, ...]:
    """The ranges that an annotation states."""
    return tuple(n for n in getattr(annotation, "__metadata__", ()) if isinstance(n, (Range, Text)))


def _check_rules(where: str, value: Any, rules: tuple[Rule, ...]) -> None:
    for rule in rules:
        kind = str if isinstance(rule, Text) else (int, float)
        if isinstance(value, kind) and not isinstance(value, bool):
            rule.check(where, value)  # type: ignore[arg-type]


def check_row(where: str, row: Any) -> None:
    """Raise ValueError unless every field of the dataclass ``row`` has its type and range. Names of registered parts are checked where
    they are read: those of another run's module may be unknown by now."""
    hints = get_type_hints(type(row), include_extras=True)
    for f in fields(row):
        if registry_of(f) is None:
            check_value(f"{where}.{f.name}", getattr(row, f.name), hints[f.name])


def row_from_dict(cls: type[T], row: Any, where: str) -> T:
    """``cls`` built from one TOML table, every key and type checked. A ready ``cls`` is returned as it is.

    Raises:
        ValueError: not a table, an unknown or missing key, or a value of the wrong type; ``where`` leads the message.
    """
    if isinstance(row, cls):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a table, got {shown(row)}")
    hints = get_type_hints(cls, include_extras=True)
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
