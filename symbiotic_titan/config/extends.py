"""Config files that extend others, so that what several runs share is written once.

    extends = "base.toml"                            # above the first [section]; relative to the file that says it
    extends = ["symbiotic.toml", "my_data.toml"]     # each with all that it extends itself

Tables merge key by key. Every other value is replaced, arrays too: a file with ``[[data.sources]]`` replaces all of them. ``false`` in
place of a table takes back the table of the files below: ``understanding = false`` in ``[experts.partition]``. In a list later files
override earlier ones, and the file itself overrides all.

As a program it prints the merged table as one line of JSON:  python -P symbiotic_titan/config/extends.py FILE
``run_train.sh`` calls it before torch is imported, so this file uses nothing but the standard library.
"""

import functools
import json
import os.path
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "extends"
DEEPEST = 32
_TOO_DEEP = f"{{}}: tables and lists may be nested at most {DEEPEST} deep; take levels out"


@dataclass(frozen=True)
class Layer:
    """One file of a chain: its path, as messages show it, and its own table, without ``extends``."""

    path: str
    table: dict[str, Any]


def read_layers(path: str) -> list[Layer]:
    """The file and all that it extends, each after those that it overrides; the file itself is the last.

    Raises:
        ValueError: a file is missing or is not TOML, ``extends`` is not a path, or a file extends itself.
    """
    return _read(path, ())


def _read(path: str, above: tuple[str, ...]) -> list[Layer]:
    """``read_layers`` for a file that the last of the files ``above`` extends."""
    chain = " -> ".join([*above, path])
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise ValueError(
            f"{KEY}: {chain} is a circle: no file may extend itself, directly or through others; "
            f"remove one of these {KEY} lines"
        )
    if not Path(path).is_file():
        raise ValueError(
            f"{KEY}: {chain}: no such file; a path is relative to the file that names it: correct it or remove it"
            if above
            else f"job.config_file: no such file: {path}"
        )
    where = f"{KEY}: {chain}" if above else f"job.config_file: {path}"
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(_TOO_DEEP.format(where)) from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:  # no TOML, no UTF-8, or more digits than Python reads
        reason = str(error).partition(";")[0]
        raise ValueError(f"{where} is not valid TOML: {reason}") from None
    if _depth_of(table) > DEEPEST:
        raise ValueError(_TOO_DEEP.format(where))
    named = _paths_of(table.pop(KEY, []), chain)
    folder = os.path.dirname(path)
    bases = [os.path.normpath(os.path.join(folder, name)) for name in named]
    layers = [layer for base in bases for layer in _read(base, (*above, path))]
    return [*layers, Layer(path, table)]


def _depth_of(table: dict[str, Any]) -> int:
    """How deep lists and tables are nested, counted without recursion: at most one more than ``DEEPEST``."""
    depth, level = 0, [table]
    while level and depth <= DEEPEST:
        depth += 1
        below: list[Any] = []
        for value in level:
            items = value.values() if isinstance(value, dict) else value
            below += [item for item in items if isinstance(item, (dict, list))]
        level = below
    return depth


def _paths_of(value: Any, chain: str) -> list[str]:
    """The paths that the value of ``extends`` names."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(
            f"{KEY}: {chain}: must be a path or a list of paths, got {value!r}; "
            f'write {KEY} = "base.toml" or {KEY} = ["base.toml", "more.toml"]'
        )
    return paths


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` overridden by ``above``: tables merge key by key, every other value is replaced; ``false`` removes a table."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and value is False:
            del merged[key]
            continue
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value)
        merged[key] = value
    return merged


def merged_table(layers: Iterable[Layer]) -> dict[str, Any]:
    """All layers as one table."""
    return functools.reduce(merge, (layer.table for layer in layers), {})


def stamp(table: dict[str, Any], text: str) -> dict[str, Any]:
    """The table with ``text`` in place of every value."""
    return {k: stamp(v, text) if isinstance(v, dict) else text for k, v in table.items()}


def origins(layers: Iterable[Layer]) -> dict[str, Any]:
    """The merged table with, in place of every value, the path of the file that it comes from."""
    layers = list(layers)
    stamped = merged_table(Layer(layer.path, stamp(layer.table, layer.path)) for layer in layers)
    return _only(stamped, merged_table(layers))


def _only(table: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """``table`` without the keys that ``kept`` lacks."""
    return {
        key: _only(value, kept[key]) if isinstance(value, dict) else value
        for key, value in table.items()
        if key in kept
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -P symbiotic_titan/config/extends.py FILE", file=sys.stderr)
        return 2
    try:
        print(json.dumps(merged_table(read_layers(arguments[0])), default=str))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
