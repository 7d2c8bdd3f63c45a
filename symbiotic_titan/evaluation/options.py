"""Options of suites on the command line, ``--demo_world.pictures 20``: parsed by tyro, checked as values of a config are."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from docstring_parser import parse_from_object
from tyro.constructors import PrimitiveConstructorSpec

from symbiotic_titan.config.rows import check_value, unknown_key_message
from symbiotic_titan.evaluation.suite import Suite


def take_sections(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options with a dot in their names, each with its value; everything else). The argument after such an option is its value,
    unless it begins with two hyphens: argparse would take it for a checkpoint."""
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


def split_sections(sections: Sequence[str], suites: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options of ``suites``, the others, which are the config's)."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    of_suite = False
    for argument in sections:
        if argument.startswith("--"):  # otherwise it is the value of the option before
            of_suite = argument.removeprefix("--").partition(".")[0] in suites
        parts[of_suite].append(argument)
    return parts[True], parts[False]


class _Mistake(Exception):
    """A user's mistake. Not a ValueError, because tyro would catch it and print a box of several lines."""


def read_options(suites: Sequence[Suite[Any]], arguments: Sequence[str]) -> dict[str, Any]:
    """{suite: its options} from ``arguments``, which hold nothing else.

    Raises:
        ValueError: an unknown option, or a missing or wrong value; the option is named as on the command line.
    """
    parsers = [
        (suite.name, parser := _parser_of(suite), field(default_factory=parser)) for suite in suites
    ]
    Parsers: Any = make_dataclass("Parsers", parsers)
    try:
        values, unknown = tyro.cli(
            Parsers,
            args=arguments,
            return_unknown_args=True,
            add_help=False,
            config=(tyro.conf.FlagConversionOff,),
        )
    except _Mistake as mistake:
        raise ValueError(str(mistake)) from None
    known = {suite.name: [f.name for f in fields(suite.options)] for suite in suites}
    for argument in unknown:
        name, _, key = argument.removeprefix("--").partition("=")[0].partition(".")
        raise ValueError(unknown_key_message(f"--{name}", key, known.get(name, [])))
    return {suite.name: _checked(suite, getattr(values, suite.name)) for suite in suites}


def _parser_of(suite: Suite[Any]) -> type:
    """A dataclass of the suite's fields whose values are read by ``_spec``. It has no ``__post_init__``: see ``_Mistake``."""
    hints = get_type_hints(suite.options)
    return make_dataclass(
        suite.name,
        [
            (f.name, Annotated[Any, _spec(f"--{suite.name}.{f.name}", hints[f.name])], f.default)
            for f in fields(suite.options)
        ],
    )


def _spec(option: str, annotation: Any) -> PrimitiveConstructorSpec:
    def read(texts: list[str]) -> Any:
        if not texts:
            raise _Mistake(
                f"{option}: needs a value; one that begins with hyphens is given as {option}=VALUE"
            )
        value = _value(texts[0], annotation)
        try:
            check_value(option, value, annotation)
        except ValueError as error:
            raise _Mistake(str(error)) from None
        return value

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="VALUE",
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _value(text: str, annotation: Any) -> Any:
    """``text`` as a value of type ``annotation``: a string as it is, anything else in TOML's notation; a tuple also as a,b."""
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


def _checked(suite: Suite[Any], values: Any) -> Any:
    """The suite's own dataclass, whose ``__post_init__`` checks ranges and files."""
    where = f"--{suite.name}"
    try:
        return suite.options(**vars(values))
    except ValueError as error:
        # What the dataclass says of one of its options begins with the option's name.
        is_bare = str(error).partition(":")[0] in vars(values)
        raise ValueError(f"{where}.{error}" if is_bare else str(error)) from error


@dataclass(frozen=True)
class ExplainedOption:
    """An option with its default and the sentence below it."""

    name: str
    default: Any
    sentence: str


def explained_options(suite: Suite[Any]) -> list[ExplainedOption]:
    """The suite's options in the order of their fields, inherited ones first."""
    sentences: dict[str, str] = {}
    for cls in reversed(suite.options.__mro__[:-1]):
        found = parse_from_object(cls).params
        sentences |= {p.arg_name: p.description for p in found if p.description}
    return [
        ExplainedOption(f.name, f.default, sentences.get(f.name, "")) for f in fields(suite.options)
    ]
