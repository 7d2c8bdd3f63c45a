"""Command line and TOML file -> JobConfig, with every key and type checked.

torchtitan's ConfigManager merges defaults, TOML and command line; it rejects unknown keys but checks neither types nor
choices that come from TOML. They are checked here first, in every file that the config extends.
"""

from dataclasses import fields
from typing import Any

from torchtitan.config import ConfigManager

from symbiotic_titan.config import extends
from symbiotic_titan.config.command_line import (
    check_options,
    last_of_each,
    option_of,
    told_in_one_line,
)
from symbiotic_titan.config.extension import import_extension
from symbiotic_titan.config.job import JobConfig, job_config_class
from symbiotic_titan.config.rows import CONFIG_FILE, shown, unknown_key_message
from symbiotic_titan.config.upstream import Setting, check_setting, own_settings
from symbiotic_titan.registry import offer_choices


def check_table(cls: type, table: Any, where: str = "") -> None:
    """Check one TOML table against a config class: no unknown key, every value of the field's type.

    Raises:
        ValueError: names the key, the value and the rule.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where}: must be a table [{where}], got {shown(table)}")
    keys = own_settings(cls, f"{where}." if where else "")
    known = [f.name for f in fields(cls)]
    for key, value in table.items():
        if key == extends.KEY and key not in known:
            raise ValueError(
                f"{where}.{key}: a whole file extends others, not a section; put it above the first [section]"
            )
        if key not in known:
            raise ValueError(unknown_key_message(where or CONFIG_FILE, key, known))
        name = f"{where}.{key}" if where else key
        setting = keys[name]
        if isinstance(setting, Setting):
            check_setting(name, value, setting)
        else:
            check_table(setting, value, name)


def check_layers(layers: list[extends.Layer], cls: type[JobConfig], *, only_ours: bool) -> None:
    """Check every file by itself, so that a message can name it; with ``only_ours`` other sections are not checked.

    Raises:
        ValueError: names the file where there are several, the key, the value and the rule.
    """
    ours = {f.name for f in fields(cls)}
    for layer in layers:
        table = {key: v for key, v in layer.table.items() if key in ours or not only_ours}
        try:
            check_table(cls, table)
        except ValueError as error:
            raise ValueError(f"{layer.path}: {error}" if len(layers) > 1 else str(error)) from None


class MergedConfigManager(ConfigManager):
    """torchtitan's manager over a table that has been merged already: upstream does not know ``extends``."""

    def __init__(self, config_cls: type[JobConfig], table: dict[str, Any]) -> None:
        super().__init__(config_cls)
        self._table = table

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any]:
        return self._table

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> type:
        try:
            cls = super()._maybe_add_custom_config(args, toml_values)
        except (ImportError, AttributeError) as error:
            if isinstance(error, AttributeError) and error.name != "JobConfig":
                raise  # in the module's own code, for its author
            raise ValueError(
                f"job.custom_config_module: must name a module that can be imported and has a dataclass JobConfig ({error}); correct "
                "the name, or remove it"
            ) from None
        if not {"-h", "--help"} & set(args):
            check_options(args, cls)
        return cls


def load_job_config(args: list[str]) -> JobConfig:
    """The job's config from command-line ``args`` (which override TOML files, which override what they extend, which override defaults).

    A module named in ``job.custom_config_module`` may add sections of its own, as in torchtitan; its sections are not
    checked here.

    Raises:
        ValueError: a bad file, key, type or value; the message names it.
    """
    args = last_of_each(args)
    path = option_of(args, "job.config_file")
    layers = extends.read_layers(path) if path is not None else []
    table = extends.merged_table(layers)
    extension = _chosen(args, table, "experimental.custom_import")
    if extension:
        import_extension(extension)  # first: the config may choose what it registers
    cls = job_config_class()
    offer_choices(cls)
    check_layers(layers, cls, only_ours=bool(_chosen(args, table, "job.custom_config_module")))
    manager = MergedConfigManager(cls, table)
    with told_in_one_line():
        return manager.parse_args(args)  # type: ignore[return-value]


def import_parts_of(path: str) -> None:
    """Import the module that the config file ``path`` names, for a command that may be given another one besides.

    Raises:
        ValueError: the file is missing or no TOML, or the module cannot be imported.
    """
    own = _chosen([], extends.merged_table(extends.read_layers(path)), "experimental.custom_import")
    if own:
        import_extension(own)


def _chosen(args: list[str], table: dict[str, Any], name: str) -> str | None:
    """The value of ``section.key`` on the command line, or else in the files, if it is a string."""
    section, _, key = name.partition(".")
    rows = table.get(section)
    value = option_of(args, name) or (rows.get(key) if isinstance(rows, dict) else None)
    return value if isinstance(value, str) else None
