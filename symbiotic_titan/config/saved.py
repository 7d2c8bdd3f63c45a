"""The config of a run, written as TOML into the run's folder: what its checkpoints were trained with, after all files and options.

The standard library reads TOML but does not write it; the writer here knows the values that a config can have.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from symbiotic_titan.config import extends
from symbiotic_titan.config.command_line import option_of
from symbiotic_titan.config.files import replacing
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import check_table

COMMENT_COLUMN = 44


def without_none(value: Any) -> Any:
    """``value`` without keys whose value is None, which TOML has no word for."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


def key_text(key: str) -> str:
    """A key, quoted where TOML demands it."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else string_text(key)


def string_text(value: str) -> str:
    """A TOML string. It is literal where that saves escapes: regular expressions then stay readable."""
    if "\\" in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_text(value: Any) -> str:
    """A value on one line; tables in it are written inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return string_text(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_text(k)} = {value_text(v)}" for k, v in value.items()) + "}"
    assert isinstance(value, (int, float)), value
    return repr(value)


def is_rows(value: Any) -> bool:
    """Whether ``value`` is an array of tables."""
    return isinstance(value, list) and bool(value) and all(isinstance(i, dict) for i in value)


def with_comment(line: str, origin: Any) -> str:
    """``line`` with the file that its value comes from, as a comment; without one where the value is a default."""
    return f"{line:<{COMMENT_COLUMN}}  # {origin}" if isinstance(origin, str) else line


def block(header: str, table: dict[str, Any], origin: dict[str, Any]) -> str:
    """A header and its keys."""
    lines = [
        with_comment(f"{key_text(key)} = {value_text(value)}", origin.get(key))
        for key, value in table.items()
    ]
    return "\n".join([header, *lines])


def blocks(
    table: dict[str, Any], origin: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[str]:
    """The table as TOML, one text per header. ``origin``: see ``extends.origins``; empty for no comments."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict) and not is_rows(v)}
    name = ".".join(map(key_text, path))
    if plain:
        yield block(f"[{name}]", plain, origin)
    for key, value in table.items():
        below = origin.get(key)
        if isinstance(value, dict):
            yield from blocks(value, below if isinstance(below, dict) else {}, (*path, key))
        elif is_rows(value):
            header = with_comment(f"[[{'.'.join(map(key_text, (*path, key)))}]]", below)
            yield from (block(header, row, {}) for row in value)


def config_text(config: JobConfig) -> str:
    """All of ``config`` as TOML, but for the file that it was read from."""
    table = without_none(asdict(config))
    table["job"].pop("config_file", None)
    return "\n\n".join(blocks(table, {})) + "\n"


NAME = "config.toml"


class SavedConfig:
    """``config`` as it is now, to be written when the run is sure to begin: by then parts of it may have been filled in."""

    def __init__(self, config: JobConfig) -> None:
        self._text = config_text(config)
        self._path = Path(config.job.dump_folder) / NAME

    def write(self) -> None:
        """Write the file, or replace the one that an earlier start of the run wrote."""
        with replacing(self._path, ".incomplete") as unfinished:
            unfinished.write_text(self._text, encoding="utf-8")


# Keys whose values are modules, which are imported as soon as a config is read.
_MODULES = ("experimental.custom_import", "job.custom_config_module")


def saved_config(path: Path, overrides: Sequence[str] = ()) -> Path:
    """The config file of a run. ``path``: its folder, that of its checkpoints, or one of them. The file was found, not named, and may be
    a stranger's: a module that it would import must be part of this package, or named in ``overrides``, the command line's options.

    Raises:
        ValueError: there is none, or it names another module.
    """
    for folder in (path, path.parent, path.parent.parent):
        if (folder / NAME).is_file():
            _check_imports(folder / NAME, overrides)
            return folder / NAME
    raise ValueError(
        f"--config: {path} is not in the folder of a run that kept its {NAME}; name the TOML file of its config"
    )


def _check_imports(path: Path, overrides: Sequence[str]) -> None:
    table = extends.merged_table(extends.read_layers(str(path)))
    for key in _MODULES:
        section, _, name = key.partition(".")
        rows = table.get(section)
        module = rows.get(name) if isinstance(rows, dict) else None
        if not module or str(module).startswith("symbiotic_titan."):
            continue
        if option_of(overrides, key) != module:
            raise ValueError(
                f"{key} = {module!r} in {path}: the module would be imported, and the folder may be a stranger's; if you trust it, say "
                f"--{key} {module}, or name the file with --config"
            )


def check_extension(config: JobConfig) -> None:
    """Pass if a run that is resumed still knows the parts from outside that its checkpoints were trained with. A loss term that is not
    registered would be left out without a word, and a router's score or an optimizer be the built-in one.

    Raises:
        ValueError: the config that the run kept has a key or a name that only its extension registers.
    """
    kept = Path(config.job.dump_folder) / NAME
    checkpoints = Path(config.job.dump_folder) / config.checkpoint.folder
    if not config.checkpoint.enable or not kept.is_file() or not any(checkpoints.glob("step-*")):
        return
    table = tomllib.loads(kept.read_text(encoding="utf-8"))
    before, now = (
        table.get("experimental", {}).get("custom_import"),
        config.experimental.custom_import,
    )
    if not before or before == now:
        return
    try:
        check_table(type(config), table)
    except ValueError as error:
        raise ValueError(
            f"experimental.custom_import: the checkpoints in {checkpoints} were trained with {before!r}, this run has "
            f"{now or 'none'!r} ({error}); name that module again, or take what is not to go on out of {kept}"
        ) from None
    logger.warning(
        f"experimental.custom_import: the checkpoints in {checkpoints} were trained with {before!r}, this run has {now or 'none'!r}"
    )
