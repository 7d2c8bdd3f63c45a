"""The reference of all subcommands of ``symbiotic``: the help of each, from its parser and docstring."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any
from unittest.mock import patch

from docstring_markdown import as_markdown, code_block, escaped, one_line

from symbiotic_titan.cli import COMMANDS, TRAIN_USAGE
from symbiotic_titan.evaluation.options import explained_options
from symbiotic_titan.evaluation.suite import SUITES

_WIDTH = "88"  # of a usage line


def parser_of(name: str, main: Callable[[list[str]], Any]) -> argparse.ArgumentParser:
    """The parser that ``main`` makes, taken when it is about to print its help."""
    made: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, file: Any = None) -> None:
        made.append(parser)

    with (
        patch.object(argparse.ArgumentParser, "print_help", keep),
        patch.object(sys, "argv", [f"symbiotic {name}"]),
        suppress(SystemExit),
    ):
        main(["--help"])
    if len(made) != 1:
        raise RuntimeError(f"symbiotic {name} --help printed no help of argparse")
    return made[0]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Name of a command of the command -> (what it does, its parser)."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {name: (helps.get(name, ""), made) for name, made in action.choices.items()}
    return {}


def invocation(action: argparse.Action) -> str:
    """``--out FOLDER``, or the name of a positional argument."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    metavar = action.metavar or action.dest.upper()
    words = [metavar] if isinstance(metavar, str) else [*metavar]
    if isinstance(action.nargs, int) and len(words) == 1:
        words *= action.nargs
    more = " ..." if action.nargs in ("+", "*") else ""
    return f"{', '.join(action.option_strings)} {' '.join(words)}{more}"


def remarks(action: argparse.Action, help_text: str) -> Iterator[str]:
    """What the help does not say: choices, default, whether it must be given."""
    if action.choices is not None:
        yield f"one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    if action.required and action.option_strings:
        yield "must be given"
    has_default = action.default not in (None, False, [], argparse.SUPPRESS)
    if has_default and action.option_strings and "default" not in help_text:
        yield f"default `{action.default}`"


def options_list(parser: argparse.ArgumentParser) -> str:
    """Arguments and options as a list of definitions."""
    formatter = parser._get_formatter()
    entries = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        if action.help == argparse.SUPPRESS:
            continue
        help_text = formatter._expand_help(action).strip() if action.help else ""
        words = [*([escaped(help_text)] if help_text else []), *remarks(action, help_text)]
        entries.append(f"`{invocation(action)}`\n:   {'; '.join(words) or 'see above'}")
    return "\n\n".join(entries)


def usage(parser: argparse.ArgumentParser) -> str:
    with patch.dict(os.environ, COLUMNS=_WIDTH):
        text = parser.format_usage()
    return code_block([line[len("usage: ") :] for line in text.splitlines()])


def body(parser: argparse.ArgumentParser, about: str) -> list[str]:
    parts = [about, "Usage:", usage(parser), options_list(parser)]
    return [part for part in parts if part]


def suites_list() -> str:
    """The suites of ``symbiotic evaluate`` with their options."""
    parts = []
    for name in SUITES:
        suite = SUITES[name]
        parts.append(f"#### `--suite {name}` {{ #suite-{name} }}\n\n{escaped(suite.description)}")
        for option in explained_options(suite):
            words = [one_line(option.sentence).rstrip(".")]
            words += [f"default `{option.default}`"] if option.default not in (None, "") else []
            parts.append(f"`--{name}.{option.name} VALUE`\n:   {'; '.join(words)}")
    return "\n\n".join(parts)


def capitalised(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def command_text(name: str) -> str:
    head = f"## `symbiotic {name}` {{ #{name} }}"
    if name == "train":
        first, rest = inspect.cleandoc(TRAIN_USAGE).split("\n\n", 1)
        what = f"{capitalised(COMMANDS[name])}. Options are the keys of the config: [Settings](settings.md)."
        line = code_block([first.removeprefix("usage: ")])
        return "\n\n".join([head, what, "Usage:", line, as_markdown(rest)])
    module = import_module(f"symbiotic_titan.commands.{name.replace('-', '_')}")
    parser = parser_of(name, module.main)
    parts = [head, *body(parser, as_markdown(module.__doc__ or COMMANDS[name]))]
    for sub, (what, found) in subparsers(parser).items():
        parts.append(f"### `symbiotic {name} {sub}` {{ #{name}-{sub} }}")
        parts += body(found, f"{capitalised(escaped(what))}." if what else "")
    if name == "evaluate":
        parts += ["### Options of suites { #suites }", suites_list()]
    return "\n\n".join(parts)


def commands_markdown() -> str:
    """The list of the page ``docs/reference/commands.md``."""
    return "\n\n".join(map(command_text, COMMANDS))
