"""A record of the parameter groups in every checkpoint, and a log of what a resumed run changed in them."""

import json
import logging
from typing import Any, Protocol

from torch import nn

from symbiotic_titan.config.optimizer import clean_name

Settings = dict[str, dict[str, Any]]
"""Group name -> settings, and the names of its ``parameters``."""


class HasGroups(Protocol):
    @property
    def groups(self) -> list[dict[str, Any]]: ...


class GroupRecord:
    """The settings of a run's groups, saved in its checkpoints. Loading a record only logs the differences.

    It is a separate checkpoint entry from the optimizer's state, so that checkpoints without it also load.
    """

    def __init__(self, model: nn.Module, optimizers: HasGroups) -> None:
        self.names = {parameter: clean_name(name) for name, parameter in model.named_parameters()}
        self.optimizers = optimizers

    def settings(self) -> Settings:
        """The current groups; ``lr`` is the rate before the schedule."""
        record = {}
        for group in self.optimizers.groups:
            own = {k: v for k, v in group.items() if k not in ("name", "params", "schedule")}
            own["lr"] = own.pop("initial_lr", own["lr"])
            names = [self.names[parameter] for parameter in group["params"]]
            record[group["name"]] = {**own, **group.get("schedule", {}), "parameters": names}
        return record

    def state_dict(self) -> dict[str, Any]:
        # As text it is a single checkpoint entry, whatever the groups' names, and any tool can read it.
        return {"json": json.dumps(self.settings(), default=str)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        now = self.state_dict()  # through JSON too, which turns tuples into lists
        for line in describe_changes(json.loads(state_dict["json"]), json.loads(now["json"])):
            logging.getLogger(__name__).info(line)


def describe_changes(saved: Settings, now: Settings) -> list[str]:
    """One line for each group that differs from the saved one, e.g. ``group new: lr 0.001 -> 0.0005``."""
    home = {parameter: name for name, group in saved.items() for parameter in group["parameters"]}
    lines = []
    for name, group in now.items():
        before = saved.get(name, {"parameters": []})
        changes = [
            f"{key} {before[key]} -> {value}"
            for key, value in group.items()
            if key != "parameters" and before.get(key, value) != value
        ]
        joined = [p for p in group["parameters"] if home.get(p) != name]
        if joined:
            homes = sorted({home.get(p, "none") for p in joined})
            changes.append(f"parameters joined: {len(joined)} (from {', '.join(homes)})")
        left = set(before["parameters"]) - set(group["parameters"])
        if left:
            changes.append(f"parameters left: {len(left)}")
        if changes:
            lines.append(f"group {name}: {', '.join(changes)}")
    return lines + [f"group {name}: gone" for name in saved if name not in now]
