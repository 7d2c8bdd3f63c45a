"""The reference of all settings: every section and key of JobConfig with its type, default, range and meaning.

Nothing is written here that the config classes say: types and ranges come from annotations, meanings from the text below each field,
choices from the registries, and what is refused from the tables of ``config.upstream``.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from docstring_markdown import as_markdown, one_line
from docstring_parser import parse_from_object

from symbiotic_titan.config.job import JobConfig, job_config_class
from symbiotic_titan.config.rows import (
    FILES,
    LINE,
    MODULE,
    NAME,
    PATH,
    PATH_OR_NONE,
    TEXT,
    Range,
    Text,
)
from symbiotic_titan.config.upstream import (
    REFUSED_CHOICES,
    UNSUPPORTED,
    UNUSED,
    Setting,
    Unsupported,
    own_settings,
    settings,
)

# Of torchtitan's keys, those without a sentence there, and those whose sentence is about another program.
MEANINGS = {
    "compile.backend": "Backend of torch.compile",
    "experimental.custom_import": "Module of yours that is imported before the rest of the config is read, so that it can register parts: "
    "[Extending](../extending.md)",
}
# What the rules that many keys share are called here; the page's introduction has their limits.
KINDS_OF_TEXT = {
    FILES: "path or pattern",
    LINE: "text on one line",
    MODULE: "name of a module",
    NAME: "name",
    PATH: "path",
    PATH_OR_NONE: "path, or empty",
    TEXT: "text",
}
_SPAN = re.compile(r"``?([^`\n]+)``?|\[\[([a-z0-9_.]+)\]\]|(?<!\[)\[([a-z0-9_.]+)\](?![\]\[(])")


@dataclass(frozen=True)
class Key:
    """A key of the config, or of the tables of one.

    name      section.key, as the command line and the configs have it.
    default   as TOML writes it; "" where the key must be given.
    in_table  whether it is a key of the tables in a list, which the command line cannot set.
    """

    name: str
    setting: Setting
    default: str
    meaning: str
    in_table: bool = False


def meanings_of(cls: type) -> dict[str, str]:
    """Field -> the text below it, in the class or in the nearest one that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if is_dataclass(base):
            params = parse_from_object(base).params
            found |= {p.arg_name: p.description for p in params if p.description}
    for f in fields(cls):
        # Weights of loss terms have theirs in the annotation.
        notes = getattr(f.type, "__metadata__", ())
        for note in notes:
            found[f.name] = getattr(note, "help", None) or found.get(f.name, "")
    return found


def default_of(cls: type, name: str) -> Any:
    (f,) = [f for f in fields(cls) if f.name == name]
    return f.default_factory() if f.default_factory is not MISSING else f.default


def toml(value: Any) -> str:
    """``value`` as a config file writes it; "" for none."""
    if value is MISSING or value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:_}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def keys_of(cls: type, section: str, in_table: bool = False) -> Iterator[Key]:
    """The keys of ``cls``, of the sections in it, and of the tables in its lists, in their order."""
    meanings = meanings_of(cls)
    for name, setting in own_settings(cls, f"{section}.").items():
        field = name.removeprefix(f"{section}.")
        if not isinstance(setting, Setting):
            yield from keys_of(setting, name, in_table)
            continue
        default = default_of(cls, field)
        shown = toml(default) if default is None or default is MISSING else toml(default) or "{}"
        meaning = MEANINGS.get(name) or as_markdown(meanings.get(field, ""))
        yield Key(name, setting, shown, meaning, in_table)
        if setting.row is not None:
            yield from keys_of(setting.row, name, in_table=True)


def all_keys() -> dict[str, list[Key]]:
    """Section -> its keys."""
    cls: type = job_config_class()
    sections = own_settings(cls)
    return {
        name: list(keys_of(sub, name)) for name, sub in sections.items() if isinstance(sub, type)
    }


# ---- words ----------------------------------------------------------------------------------------------------------------


def type_words(annotation: Any, text: str = "text") -> str:
    """The type as a reader of TOML knows it; ``text`` is what a string in it is."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        choices = ", ".join(f"`{toml(value)}`" for value in args)
        return f"one of {choices}" if len(args) > 1 else f"only {choices}"
    if origin in (Union, UnionType):
        kinds = [kind for kind in args if kind is not NoneType]
        words = [type_words(kind, text) for kind in kinds if not (kind is int and float in kinds)]
        return " or ".join(dict.fromkeys(words))
    if origin in (list, tuple):
        return "list" if args[0] is Any else f"list, each item {type_words(args[0], text)}"
    if origin is dict:
        return "table" if args[1] is Any else f"table, each value {type_words(args[1], text)}"
    return {int: "integer", float: "number", str: text, bool: "`true` or `false`"}[annotation]


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def range_words(rule: Range) -> str:
    parts = []
    if rule.least is not None:
        parts.append(f"{'above' if rule.ends[0] == '(' else 'at least'} {number(rule.least)}")
    if rule.most is not None:
        parts.append(f"{'below' if rule.ends[1] == ')' else 'at most'} {number(rule.most)}")
    if rule.ends == "[]" and len(parts) == 2:
        parts = [f"from {number(rule.least or 0)} to {number(rule.most or 0)}"]
    also = [f"or {value} ({meaning})" for value, meaning in rule.also.items()]
    return ", ".join([" and ".join(parts), *also] if parts else also)


def allowed(key: Key) -> str:
    """Type and range."""
    setting = key.setting
    if setting.row is not None:
        return f"tables `[[{key.name}]]`" if get_origin(setting.annotation) is list else "tables"
    if setting.registry is not None:
        names = ", ".join(f"`{toml(name)}`" for name in setting.registry)
        return f"one of {names}, or a name that a [module of yours](../extending.md) registers"
    texts = [KINDS_OF_TEXT.get(r, r.rule) for r in setting.rules if isinstance(r, Text)]
    ranges = [range_words(rule) for rule in setting.rules if isinstance(rule, Range)]
    words = [type_words(setting.annotation, *texts[:1]), *ranges]
    return ", ".join(word for word in words if word)


def as_option(key: Key) -> str:
    """How the command line has it."""
    if key.in_table or key.setting.in_file_only:
        return "in TOML only"
    section, _, name = key.name.rpartition(".")
    if key.setting.annotation is bool:
        return f"`--{key.name}`, off: `--{section}.no_{name}`"
    return f"`--{key.name} VALUE`"


def default_words(key: Key) -> str:
    if key.default:
        return f"default `{key.default}`"
    takes_none = NoneType in get_args(key.setting.annotation)
    return "not set by default" if takes_none else "must be given"


# ---- page -----------------------------------------------------------------------------------------------------------------


def linked(text: str, targets: set[str], own: str) -> str:
    """``text`` with the keys and sections that it names as links to their places on this page."""

    def link(found: re.Match[str]) -> str:
        name = found[1] or found[2] or found[3]
        target = name if name in targets else f"{own.rpartition('.')[0]}.{name}"
        if target not in targets or target == own:
            return found[0] if found[1] else f"`{found[0]}`"
        return f"[`{found[0].strip('`')}`](#{target})"

    parts = re.split(r"(^```text\n.*?^```$|\[[^\]]*\]\([^)]*\))", text, flags=re.M | re.S)
    return "".join(p if n % 2 else _SPAN.sub(link, p) for n, p in enumerate(parts))


def notes_of(key: Key) -> Iterator[str]:
    """What this trainer refuses of the key, and when it has no effect."""
    for name, value, remedy in REFUSED_CHOICES:
        if name == key.name:
            yield f"**Refused:** `{toml(value)}`; {remedy}."
    for option in UNUSED:
        if option.key == key.name:
            yield f"**No effect** without `{option.without}`; the start of a run says so."


def entry(key: Key, targets: set[str]) -> str:
    level = "####" if key.in_table else "###"
    facts = " · ".join([as_option(key), allowed(key), default_words(key)])
    body = [key.meaning, *notes_of(key)]
    return "\n\n".join(
        [
            f"{level} `{key.name}` {{ #{key.name} }}",
            f"{facts}\n{{ .facts }}",
            *(linked(part, targets, key.name) for part in body if part),
        ]
    )


def refusal_of(name: str) -> Unsupported | None:
    """The rule by which this key must stay at its default."""
    return next((u for u in UNSUPPORTED if f"{name}.".startswith(f"{u.key}.")), None)


def refused_list(keys: list[Key], targets: set[str]) -> str:
    """What each key stays at, and what to do instead."""
    lines = []
    for key in keys:
        rule = refusal_of(key.name)
        stays = f"stays at `{key.default}`" if key.default else "is not set"
        remedy = f"; {linked(one_line(rule.remedy), targets, key.name)}" if rule else ""
        lines.append(f"- `{key.name}`{{ #{key.name} }} {stays}{remedy}")
    return "\n".join(lines)


def introduction(cls: type, name: str) -> str:
    """The docstring of a section's class, unless dataclasses made it."""
    section = own_settings(cls)[name]
    if not isinstance(section, type) or not section.__module__.startswith("symbiotic_titan."):
        return ""
    text = section.__doc__ or ""
    return "" if text.startswith(f"{section.__name__}(") else as_markdown(text)


def section_text(name: str, keys: list[Key], targets: set[str]) -> str:
    """A section: its supported keys one by one, then a list of those that must stay as they are."""
    refused = [key for key in keys if refusal_of(key.name)]
    kept = [key for key in keys if key not in refused]
    text = [f"## `[{name}]` {{ #{name} }}"]
    if about := introduction(job_config_class(), name):
        text.append(linked(about, targets, name))
    text += [entry(key, targets) for key in kept]
    if refused:
        what = "Other keys" if kept else "All keys"
        text.append(
            f"{what} of `[{name}]` come from torchtitan and are refused with another value:"
        )
        text.append(refused_list(refused, targets))
    return "\n\n".join(text)


def settings_markdown() -> str:
    """The list of the page ``docs/reference/settings.md``."""
    sections = all_keys()
    targets = {key.name for keys in sections.values() for key in keys} | set(sections)
    assert {name for name, _ in settings(JobConfig)} <= targets
    index = " · ".join(f"[`[{name}]`](#{name})" for name in sections)
    return "\n\n".join([index, *(section_text(n, keys, targets) for n, keys in sections.items())])
