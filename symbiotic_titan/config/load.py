"""Command line and TOML file -> JobConfig, with every key and type checked.

torchtitan's ConfigManager merges defaults, TOML and command line; it rejects unknown keys but does not look at types or
Literal values that come from TOML. They are checked here, before it runs.
"""

import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torchtitan.config import ConfigManager

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.rows import check_value, unknown_key_message


def option_of(args: list[str], name: str) -> str | None:
    """Value of the option ``--job.<name>`` among ``args``, spelt with underscores or hyphens."""
    for i, arg in enumerate(args):
        key, _, value = arg.partition("=")
        if key.replace("-", "_") == f"__job.{name}":
            return value or (args[i + 1] if i + 1 < len(args) else None)
    return None


def check_table(cls: type, table: Any, where: str = "") -> None:
    """Check one TOML table against a config class: no unknown key, every value of the field's type.

    Raises:
        ValueError: names the key, the value and the rule.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where}: must be a table [{where}], got {table!r}")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for key, value in table.items():
        if key not in known:
            raise ValueError(unknown_key_message(where or "config file", key, known))
        name = f"{where}.{key}" if where else key
        if is_dataclass(hints[key]):
            check_table(hints[key], value, name)  # type: ignore[arg-type]
        else:
            check_value(name, value, hints[key])


def read_toml(path: str) -> dict[str, Any]:
    """The TOML file as a dict.

    Raises:
        ValueError: the file is missing or is not TOML.
    """
    if not Path(path).is_file():
        raise ValueError(f"job.config_file: no such file: {path}")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"job.config_file: {path} is not valid TOML: {error}") from None


def load_job_config(args: list[str]) -> JobConfig:
    """The job's config from command-line ``args`` (command line over TOML over defaults).

    A module named in ``job.custom_config_module`` may add sections of its own, as in torchtitan; its sections are not
    checked here.

    Raises:
        ValueError: a bad key, type or value; the message names it.
    """
    path = option_of(args, "config_file")
    if path is not None:
        table = read_toml(path)
        job = table.get("job", {})
        check_table(get_type_hints(JobConfig)["job"], job, "job")
        if option_of(args, "custom_config_module") or job.get("custom_config_module"):
            own = {f.name for f in fields(JobConfig)}
            table = {key: value for key, value in table.items() if key in own}
        check_table(JobConfig, table)
    return ConfigManager(JobConfig).parse_args(args)  # type: ignore[return-value]
