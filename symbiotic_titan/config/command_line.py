"""Options ``--section.key value``, checked as files are, so that a mistake is told in one line before tyro draws a box around it.

Hyphens and underscores are the same in a name. Of an option that is given twice the last holds, for every reader of the command line.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from symbiotic_titan.config.rows import COMMAND_LINE, unknown_key_message
from symbiotic_titan.config.upstream import Setting, check_setting, settings
from symbiotic_titan.process import raised_by_us


@dataclass(frozen=True)
class Given:
    """An option as given, ``--<key> <values>`` or ``--<key>=<value>``; without a key, what stands before the first option."""

    key: str
    values: tuple[str, ...]
    words: tuple[str, ...]


def split_options(args: Sequence[str]) -> list[Given]:
    """The options of a command line in their order, each with the words up to the next."""
    bounds = [*(i for i, word in enumerate(args) if word.startswith("--")), len(args)]
    given = [Given("", (), tuple(args[: bounds[0]]))]
    for start, end in pairwise(bounds):
        name, has_value, value = args[start].removeprefix("--").partition("=")
        values = (*((value,) if has_value else ()), *args[start + 1 : end])
        given.append(Given(name.replace("-", "_"), values, tuple(args[start:end])))
    return given


def last_of_each(args: Sequence[str]) -> list[str]:
    """``args`` without the options that are given again later."""
    options = split_options(args)
    last = {option.key: i for i, option in enumerate(options)}
    return [w for i, option in enumerate(options) if last[option.key] == i for w in option.words]


def option_of(args: Sequence[str], name: str) -> str | None:
    """Value of the option ``--<name>`` (``section.key``) among ``args``, the last one if there are several."""
    values = [option.values for option in split_options(args) if option.key == name]
    return values[-1][0] if values and values[-1] else None


def check_options(args: Sequence[str], cls: type) -> None:
    """Pass if every option is one of the config class ``cls`` and has a value of its type.

    Raises:
        ValueError: names the key, the value, the rule and what to do.
    """
    known = dict(settings(cls))
    for option in split_options(args):
        if option.key:
            _check_option(option, known)
        elif option.words:
            raise ValueError(
                f"{option.words[0]!r} is no option; write --section.key value, as in --training.steps 100"
            )


def _check_option(option: Given, known: dict[str, Setting]) -> None:
    switch = _switch_of(option.key, known)
    if switch is not None:
        if option.values:
            off = switch.rpartition(".")
            raise ValueError(
                f"{switch}: is switched on with --{switch} and off with --{off[0]}.no_{off[2]}, without a value, got "
                f"{option.values[0]!r}"
            )
        return
    if option.key not in known:
        raise ValueError(_unknown(option.key, known))
    found = known[option.key]
    if found.in_file_only:
        raise ValueError(f"{option.key}: a table is set in the TOML file, not on the command line")
    word = option.words[1] if len(option.words) > 1 else ""
    if not option.values or re.match(r"-[^\d.]", word):
        raise ValueError(
            f"{option.key}: needs a value; one that begins with a hyphen is given as --{option.key}=VALUE"
        )
    if len(option.values) > 1:
        raise ValueError(
            f"{option.key}: takes one value, got {' '.join(option.values)}; quote one with spaces, and write a list as a,b"
        )
    _check_text(option.key, option.values[0], found)


def _switch_of(key: str, known: dict[str, Setting]) -> str | None:
    """The key of type bool that ``--<key>`` switches on or, as ``section.no_key``, off."""
    section, _, name = key.rpartition(".")
    for candidate in (key, f"{section}.{name.removeprefix('no_')}"):
        if candidate in known and known[candidate].annotation is bool:
            return candidate
    return None


def _unknown(key: str, known: dict[str, Setting]) -> str:
    section, _, name = key.rpartition(".")
    of_section = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    if of_section:
        return unknown_key_message(section, name, of_section)
    is_near = get_close_matches(key, known, n=1)
    sections = {k.partition(".")[0] for k in known}
    return unknown_key_message(COMMAND_LINE, key, list(known if is_near else sections))


def _check_text(key: str, text: str, known: Setting) -> None:
    """Pass if ``text`` is a value of the option; whether it is a list of lists is left to tyro."""
    annotation = known.annotation
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    if text == "None" and NoneType in kinds:
        return
    if list[str] in kinds:
        check_setting(key, text.split(",") if text else [], known)
    elif not any(get_origin(kind) is list for kind in kinds):
        check_setting(key, _value(text, kinds), known)


def _value(text: str, kinds: tuple[Any, ...]) -> Any:
    """``text`` as a value of one of the types ``kinds``, or as it is."""
    for kind in kinds:
        if get_origin(kind) is Literal:
            return next((value for value in get_args(kind) if str(value) == text), text)
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turns what tyro reports on the standard error output, before it ends the process, into a ValueError.

    Raises:
        ValueError: what the config's own rule said, or else the text of tyro's box.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as end:
        if not end.code:
            raise  # after --help
        raise ValueError(_rule_behind(end) or _text_of_box(errors.getvalue())) from None


def _rule_behind(error: BaseException | None) -> str | None:
    """What a ``__post_init__`` of ours raised, if that made tyro end the process."""
    while error is not None:
        if isinstance(error, ValueError) and raised_by_us(error):
            return str(error)
        error = error.__context__
    return None


def _text_of_box(box: str) -> str:
    """The words in a box of lines."""
    return " ".join(re.sub(r"[\u2500-\u257f]|-{4,}", " ", box).split())
