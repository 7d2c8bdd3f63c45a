"""A config as one flat table, so that tests can say what differs between two systems of a study."""

from dataclasses import asdict
from typing import Any

from symbiotic_titan.config.job import JobConfig

OWN = ("job.config_file", "job.description", "job.dump_folder")


def flat(config: JobConfig) -> dict[str, Any]:
    """Dotted key -> value, without what every run has of its own; rows and groups in short, by their names."""
    sections = asdict(config)
    values = {f"{s}.{key}": v for s, table in sections.items() for key, v in table.items()}
    for key in OWN:
        del values[key]
    groups = values["experts.partition"]
    values["experts.partition"] = {name: group["num_experts"] for name, group in groups.items()}
    values["data.sources"] = [row["name"] for row in values["data.sources"]]
    rules = values["optimizer.param_groups"]
    values["optimizer.param_groups"] = {row["name"]: row["lr"] for row in rules}
    return values


def differences(config: JobConfig, reference: JobConfig) -> dict[str, Any]:
    """The values of ``config`` that ``reference`` has otherwise."""
    values, others = flat(config), flat(reference)
    return {key: value for key, value in values.items() if value != others[key]}


def group_sizes(config: JobConfig) -> list[int]:
    """Numbers of experts of the groups that a config divides a pool into; empty for one pool."""
    return [group.num_experts for group in config.experts.partition.values()]
