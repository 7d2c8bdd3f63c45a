"""What the parameter groups of a run are, saved with its checkpoints, and what a resumed run changed about them."""

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
    """Settings of a run's groups, for its checkpoints; loaded into a run with others, it logs what is other and changes nothing.

    A checkpoint holds it beside the optimizer's state, so that one without it loads as well, with this part left out.
    """

    def __init__(self, model: nn.Module, optimizers: HasGroups) -> None:
        self.names = {parameter: clean_name(name) for name, parameter in model.named_parameters()}
        self.optimizers = optimizers

    def settings(self) -> Settings:
        """Of the groups as they are now; ``lr`` is the rate before the schedule."""
        record = {}
        for group in self.optimizers.groups:
            own = {k: v for k, v in group.items() if k not in ("name", "params", "schedule")}
            own["lr"] = own.pop("initial_lr", own["lr"])
            names = [self.names[parameter] for parameter in group["params"]]
            record[group["name"]] = {**own, **group.get("schedule", {}), "parameters": names}
        return record

    def state_dict(self) -> dict[str, Any]:
        # Text is one entry of the checkpoint, whatever the groups are called, and read by any tool.
        return {"json": json.dumps(self.settings(), default=str)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        now = self.state_dict()  # through JSON as well: it turns pairs into lists
        for line in describe_changes(json.loads(state_dict["json"]), json.loads(now["json"])):
            logging.getLogger(__name__).info(line)


def describe_changes(saved: Settings, now: Settings) -> list[str]:
    """One line for each group that is not as it was saved, e.g. ``group new: lr 0.001 -> 0.0005``."""
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
