"""Partition plans: made from a profile by a rule, saved as a file, applied to a checkpoint; and how much routing a plan retains."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.config.experts import PARTITION_RULES
from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value, row_from_dict
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.profile import (
    ModelIdentity,
    Profile,
    check_layer_names,
)
from symbiotic_titan.partition.rules import Groups, most_used
from symbiotic_titan.sequence.modality import MODALITY_NAMES, modality_ids
from symbiotic_titan.weights.reader import some_of

KIND = "partition plan"

_KEYS = ("model", "rule", "seed", "groups", "layers", "order")


@dataclass(frozen=True)
class Plan:
    """A partition of one model's experts.

    order (Y, E) int64   for each MoE layer, the original index of the expert in each slot, group after group.
    shared (Y, N) int64  the N experts that each layer's new shared expert is made from, N = 0 for none. They keep their slots too.
    """

    model: ModelIdentity
    rule: str
    seed: int
    groups: tuple[ExpertGroup, ...]
    layers: tuple[str, ...]
    order: Tensor
    shared: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def values(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "model": vars(self.model),
            "rule": self.rule,
            "seed": self.seed,
            "groups": {
                group.name: {
                    "modalities": [MODALITY_NAMES[m] for m in group.modalities],
                    "num_experts": group.num_experts,
                }
                for group in self.groups
            },
            "layers": list(self.layers),
            "order": self.order.tolist(),
            "shared": self.shared.tolist(),
        }

    @classmethod
    def of_values(cls, values: dict[str, Any], where: str) -> "Plan":
        """The inverse of ``values``; raises ValueError where they are damaged."""
        try:
            missing = [key for key in _KEYS if key not in values]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            model = ModelIdentity.of_values(values["model"])
            check_layer_names(values["layers"])
            for key, kind in (("rule", str), ("seed", int), ("groups", dict[str, Any])):
                check_value(key, values[key], kind)
            groups = tuple(_group(name, row) for name, row in values["groups"].items())
            layers = tuple(values["layers"])
            order = _table("order", values["order"])
            # Plans older than the key make no shared expert.
            shared = _table("shared", values.get("shared") or [[]] * len(layers))
            plan = cls(model, values["rule"], values["seed"], groups, layers, order, shared)
        except (RuntimeError, ValueError) as error:  # torch: a number that is too large
            raise ValueError(f"{KIND}: {where} is damaged ({error}); make the plan anew") from None
        num_experts = sum(group.num_experts for group in groups)
        check_order(order, (len(plan.layers), num_experts), f"{KIND} {where}")
        known = shared.ndim == 2 and len(shared) == len(layers)
        if not known or (shared.lt(0) | shared.ge(num_experts)).any():
            raise ValueError(
                f"{KIND} {where}: shared must list experts from 0 to {num_experts - 1} for each of {len(layers)} layers"
            )
        return plan

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        """Write the plan; ``extra`` is stored with it, for readers of the file."""
        write_json(path, KIND, {**extra, **self.values()})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Raises ValueError where the file is missing, damaged or of another kind."""
        return cls.of_values(read_json(path, KIND, _KEYS), str(path))


def _group(name: str, row: Any) -> ExpertGroup:
    check_value(f"groups.{name}", row, dict[str, Any])
    check_value(f"groups.{name}.modalities", row.get("modalities"), list[str])
    modalities = modality_ids(row["modalities"], key=name)
    group = row_from_dict(
        ExpertGroup, {**row, "name": name, "modalities": modalities}, f"groups.{name}"
    )
    if group.num_experts < 1:
        raise ValueError(f"groups.{name}.num_experts: must be at least 1, got {group.num_experts}")
    return group


def _table(key: str, rows: Any) -> Tensor:
    """(Y, N or E) int64."""
    check_value(key, rows, list[list[int]])
    return torch.tensor(rows, dtype=torch.int64)


def check_layers(plan: Plan, layers: Iterable[str]) -> None:
    """Pass if ``layers`` are those that ``plan`` partitions.

    Raises:
        ValueError: they differ.
    """
    has, needs = set(plan.layers), set(layers)
    if has != needs:
        raise ValueError(
            f"the plan is of other layers than the model: {some_of(sorted(has ^ needs))} have experts in only one of the two; make "
            "a plan with this config"
        )


def check_order(order_YE: Any, shape: tuple[int, int], where: str) -> None:
    """Pass if every row of an order contains every expert once.

    Raises:
        ValueError: it does not; the message begins with ``where``.
    """
    if not isinstance(order_YE, Tensor) or order_YE.is_floating_point():
        raise ValueError(
            f"{where}: the order must be a tensor of integers, got {type(order_YE).__name__}"
        )
    if tuple(order_YE.shape) != shape:
        raise ValueError(
            f"{where}: the order must have shape {shape} (layers, experts), got {tuple(order_YE.shape)}"
        )
    wrong_Y = (order_YE.sort(dim=-1).values != torch.arange(shape[1])).any(-1)
    if wrong_Y.any():
        row = int(wrong_Y.nonzero()[0])
        raise ValueError(
            f"{where}: row {row} of the order must hold every expert from 0 to {shape[1] - 1} once, got {order_YE[row].tolist()}"
        )


def make_plan(
    profile: Profile, groups: Groups, rule: str, seed: int = 0, num_shared: int = 0
) -> Plan:
    """The plan that ``rule`` makes from ``profile``. The ``num_shared`` experts of each layer that text and ViT use most make its new
    shared expert.

    Raises:
        ValueError: an unknown rule, a rule that returns no valid order, or a profile with another number of experts than ``groups``.
    """
    _check_profile(profile, groups)
    counts_YME = profile.counts.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order_YE = PARTITION_RULES[rule](counts_YME, tuple(groups))
    num_layers, _, num_experts = profile.counts.shape
    check_order(order_YE, (num_layers, num_experts), f"experts.partition_rule = {rule!r}")
    shared_YN = most_used(profile.counts, num_shared)
    return Plan(
        profile.model, rule, seed, tuple(groups), profile.layers, order_YE.long(), shared_YN
    )


def _check_profile(profile: Profile, groups: Groups) -> None:
    """Pass if the profile is of an unpartitioned model with as many experts as the groups."""
    if set(profile.model.groups) != {"all"}:
        raise ValueError(
            f"the profile is of a model that is partitioned into {', '.join(profile.model.groups)}; "
            "profile the model before it was partitioned"
        )
    held, profiled = sum(group.num_experts for group in groups), profile.counts.shape[-1]
    if held != profiled:
        raise ValueError(
            f"experts.partition: the groups hold {held} experts, but the profile is of a model with {profiled}; "
            "use the config and the profile of one model"
        )


@dataclass(frozen=True)
class RetainedRoutingMass:
    """Share of a modality's choices that go to experts of its own group: mean over layers, the worst layer, and the expectation for
    random groups of the same sizes. None for a modality that was not profiled."""

    modality: str
    mean: float | None
    worst: float | None
    worst_layer: str | None
    random_baseline: float

    def values(self) -> dict[str, Any]:
        """JSON-able, with the keys of a plan file."""
        values = dict(vars(self))
        by_lot = values.pop("random_baseline")  # the key in plan files since their first version
        return {**values, "by_lot": by_lot}


def retained_routing_mass(profile: Profile, plan: Plan) -> list[RetainedRoutingMass]:
    """How much of each modality's routing stays inside the modality's group, in the order of the modalities."""
    num_experts = profile.counts.shape[-1]
    ordered_YME = profile.counts.gather(2, plan.order.unsqueeze(1).expand_as(profile.counts))
    parts = ordered_YME.double().split([group.num_experts for group in plan.groups], dim=-1)
    rows = []
    for group, part_YME in zip(plan.groups, parts, strict=True):
        baseline = group.num_experts / num_experts
        for m in group.modalities:
            total_Y = profile.counts[:, m].sum(-1)
            if not bool(total_Y.all()):
                rows.append(RetainedRoutingMass(MODALITY_NAMES[m], None, None, None, baseline))
                continue
            share_Y = part_YME[:, m].sum(-1) / total_Y
            worst = int(share_Y.argmin())
            mean, least = float(share_Y.mean()), float(share_Y[worst])
            layer = profile.layers[worst]
            rows.append(RetainedRoutingMass(MODALITY_NAMES[m], mean, least, layer, baseline))
    return sorted(rows, key=lambda row: MODALITY_NAMES.index(row.modality))


def retained_mass_table(plan: Plan, retained: list[RetainedRoutingMass]) -> str:
    """How much of each modality's routing a plan retains, as text."""
    groups = " + ".join(f"{group.name} {group.num_experts}" for group in plan.groups)
    lines = [
        f"{groups} experts in {len(plan.layers)} layers by the rule {plan.rule!r}\n",
        "routed mass that stays inside the modality's group",
    ]
    for row in retained:
        where = f" ({row.worst_layer})" if row.worst_layer else ""
        lines.append(
            f"  {row.modality:5s} mean over layers {percent(row.mean):>8s}   worst {percent(row.worst):>8s}{where}"
            f"   at random {percent(row.random_baseline):>8s}"
        )
    return "\n".join(lines)


def worse_than_random(retained: list[RetainedRoutingMass]) -> str | None:
    """A warning where a plan retains less than random groups would, else None."""
    worse = [
        row.modality for row in retained if row.mean is not None and row.mean < row.random_baseline
    ]
    if not worse:
        return None
    return (
        f"random groups would retain more of {', '.join(worse)}; try another --rule: "
        f"{', '.join(PARTITION_RULES)}"
    )


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
