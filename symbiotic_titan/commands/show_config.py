"""A config as the trainer sees it: its file, the files that it extends, the command line and the defaults as one TOML file.

Examples: symbiotic show-config train_configs/study/symbiotic.toml --changed --training.steps 50
          symbiotic show-config train_configs/study/symbiotic.toml --diff train_configs/study/mot.toml

Keys, types and ranges are checked; rules that span sections or depend on the machine are checked when training starts. What is
printed can itself be used as a config file. A comment says which file set a value, a value without one is a default. Options
--section.key value are applied as in training, with --diff to both configs.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from symbiotic_titan.config import extends
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.saved import (
    blocks,
    is_rows,
    value_text,
    without_none,
)
from symbiotic_titan.process import exit_status

COMMAND_LINE = "command line"
MISSING = object()


# ---- what is shown ----------------------------------------------------------------------------------------------------


def changed_from(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``table`` that ``other`` lacks or sets differently. Arrays count as one value."""
    changed = {}
    for key, value in table.items():
        old = other.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            value = changed_from(value, old)
            if value:
                changed[key] = value
        elif value != old:
            changed[key] = value
    return changed


def table_of(config: str, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the config as a table, the defaults as one)."""
    job = load_job_config(["--job.config_file", config, *overrides])
    table, defaults = without_none(asdict(job)), without_none(asdict(type(job)()))
    table["job"].pop("config_file", None)
    return table, defaults


def config_text(config: str, overrides: list[str], only_changed: bool) -> str:
    """The merged config as TOML with comments."""
    table, defaults = table_of(config, overrides)
    origin = extends.origins(extends.read_layers(config))
    if overrides:
        overridden = changed_from(table, table_of(config, [])[0])
        origin = extends.merge(origin, extends.stamp(overridden, COMMAND_LINE))
    return "\n\n".join(blocks(changed_from(table, defaults) if only_changed else table, origin))


# ---- differences ------------------------------------------------------------------------------------------------------


def by_name(rows: Any) -> dict[str, Any] | None:
    """Rows of an array of tables by their ``name``; None if they have no names of their own."""
    if rows != [] and not (is_rows(rows) and all("name" in row for row in rows)):
        return None
    named = {f"[{row['name']}]": row for row in rows}
    return named if len(named) == len(rows) else None


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value in ``old``, value in ``new``) wherever the two differ; MISSING where a side has none."""
    old_rows, new_rows = by_name(old), by_name(new)
    if old_rows is not None and new_rows is not None:
        common = [name for name in old_rows if name in new_rows]
        if common != [name for name in new_rows if name in old_rows]:
            yield f"{path} (order)", [r["name"] for r in old], [r["name"] for r in new]
        old, new = old_rows, new_rows
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            name = f"{path}{key}" if key.startswith("[") or not path else f"{path}.{key}"
            yield from differences(old.get(key, MISSING), new.get(key, MISSING), name)
    elif old != new:
        yield path, old, new


def difference_text(old: str, new: str, overrides: list[str]) -> str:
    """One line per key that differs."""
    lines = [f"# {old} -> {new}"]
    for key, *sides in differences(table_of(old, overrides)[0], table_of(new, overrides)[0]):
        texts = ["(not set)" if side is MISSING else value_text(side) for side in sides]
        lines.append(f"{key}: {' -> '.join(texts)}")
    return "\n".join(lines) if len(lines) > 1 else f"{lines[0]}: no difference"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="TOML file of a training config")
    parser.add_argument(
        "--changed", action="store_true", help="only what differs from the defaults"
    )
    parser.add_argument("--diff", metavar="CONFIG", help="what differs in this one, key by key")
    options, overrides = parser.parse_known_args(arguments)

    def run() -> None:
        if options.diff:
            print(difference_text(options.config, options.diff, overrides))
        else:
            print(config_text(options.config, overrides, options.changed))

    return exit_status(run)
