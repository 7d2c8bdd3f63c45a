"""Options of suites on the command line: ``--demo_world.pictures 20``, typed and explained by the suite's dataclass."""

import ast
import inspect
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from symbiotic_titan.config.rows import row_from_dict, unknown_key_message
from symbiotic_titan.evaluation.suite import Suite


def take_sections(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options with a dot in their names, each with its value; everything else). What follows such an option is its value, unless
    it begins with two hyphens."""
    sections: list[str] = []
    others: list[str] = []
    awaits_value = False
    for argument in arguments:
        is_option = argument.startswith("--")
        name, has_value, _ = argument.partition("=")
        if is_option and "." in name:
            sections.append(argument)
            awaits_value = not has_value
        elif awaits_value and not is_option:
            sections.append(argument)
            awaits_value = False
        else:
            others.append(argument)
            awaits_value = False
    return sections, others


def split_suites(
    sections: Sequence[str], suites: Sequence[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """({suite: {option: text}}, the others, which are the config's).

    Raises:
        ValueError: an option of a suite without a value.
    """
    given: dict[str, dict[str, str]] = {suite: {} for suite in suites}
    others: list[str] = []
    waiting = iter(sections)
    for argument in waiting:
        name, has_value, value = argument.partition("=")
        suite, _, key = name.removeprefix("--").partition(".")
        if not (argument.startswith("--") and suite in given):
            others.append(argument)
            continue
        text = value if has_value else next(waiting, "--")
        if text.startswith("--"):
            raise ValueError(
                f"{name}: needs a value; one that begins with hyphens is given as {name}=VALUE"
            )
        given[suite][key.replace("-", "_")] = text
    return given, others


def read_options(suite: Suite[Any], given: dict[str, str]) -> Any:
    """The suite's options from texts.

    Raises:
        ValueError: an unknown option, or a value that does not fit; the option is named as on the command line.
    """
    hints = get_type_hints(suite.options)
    where = f"--{suite.name}"
    for key in given:
        if key not in hints:
            raise ValueError(unknown_key_message(where, key, list(hints)))
    row = {key: _value(text, hints[key]) for key, text in given.items()}
    try:
        return row_from_dict(suite.options, row, where)
    except ValueError as error:
        # What the dataclass itself says of an option begins with the option's name.
        is_bare = str(error).partition(":")[0] in hints
        raise ValueError(f"{where}.{error}" if is_bare else str(error)) from error


def _value(text: str, annotation: Any) -> Any:
    """What ``text`` says where ``annotation`` is wanted: itself, or a TOML value; a tuple may be written as a,b."""
    is_tuple = get_origin(annotation) is tuple
    kinds = get_args(annotation) or (annotation,)
    if is_tuple and not text.startswith("["):
        return tuple(_value(item, kinds[0]) for item in text.split(","))
    if str in kinds and not is_tuple:
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return tuple(value) if is_tuple else value


@dataclass(frozen=True)
class Explained:
    """An option with its default and the sentence below it."""

    name: str
    default: Any
    sentence: str


def explained_options(suite: Suite[Any]) -> list[Explained]:
    """The suite's options, its own before inherited ones."""
    sentences: dict[str, str] = {}
    for cls in suite.options.__mro__:
        if cls is not object:
            sentences = _sentences(cls) | sentences
    defaults = {field.name: field.default for field in fields(suite.options)}
    return [Explained(name, defaults[name], sentences.get(name, "")) for name in defaults]


def _sentences(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    pairs = zip(definition.body, definition.body[1:], strict=False)
    return {
        field.target.id: below.value.value
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
