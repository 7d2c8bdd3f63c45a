"""Partition plans: made from a profile by a rule, saved as a file, applied to a checkpoint; and how much routing a plan retains."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.config.experts import PARTITION_RULES, ExpertGroupRow
from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value, row_from_dict
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.pools import (
    ONE_POOL,
    GroupSource,
    group_sources,
    pool_columns,
    shares_of_pools,
)
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

    groups               of the new model. A plan does not depend on their width and top-k, and leaves them out.
    order (Y, E) int64   for each MoE layer, the original index of the expert in each slot, group after group: an index within the pool
                         that the group is taken from.
    sources              where the experts of each group come from; empty: all of one pool.
    shared (Y, N) int64  the N experts that each layer's new shared expert is made from, N = 0 for none. They keep their slots too.
    """

    model: ModelIdentity
    rule: str
    seed: int
    groups: tuple[ExpertGroup, ...]
    layers: tuple[str, ...]
    order: Tensor
    shared: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    sources: tuple[GroupSource, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", without_sizes(self.groups))
        if not self.sources:
            object.__setattr__(self, "sources", (GroupSource(),) * len(self.groups))

    def by_group(self) -> Iterator[tuple[ExpertGroup, GroupSource, Tensor]]:
        """(group, source, (Y, E) its part of the order)."""
        sizes = [group.num_experts for group in self.groups]
        yield from zip(self.groups, self.sources, self.order.split(sizes, dim=1), strict=True)

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
                    **vars(source),
                }
                for group, source in zip(self.groups, self.sources, strict=True)
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
            pairs = [_group(name, row) for name, row in values["groups"].items()]
            groups, sources = tuple(g for g, _ in pairs), tuple(s for _, s in pairs)
            layers = tuple(values["layers"])
            order = _table("order", values["order"])
            # Plans older than the key make no shared expert.
            shared = _table("shared", values.get("shared") or [[]] * len(layers))
            plan = cls(
                model, values["rule"], values["seed"], groups, layers, order, shared, sources
            )
        except (RuntimeError, ValueError) as error:  # torch: a number that is too large
            raise ValueError(f"{KIND}: {where} is damaged ({error}); make the plan anew") from None
        _check_shares(plan, f"{KIND} {where}")
        num_experts = sum(model.groups.values())
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


def without_sizes(groups: Iterable[ExpertGroup]) -> tuple[ExpertGroup, ...]:
    """``groups`` without a width and a top_k of their own."""
    return tuple(replace(group, hidden_dim=None, top_k=None) for group in groups)


def _group(name: str, row: Any) -> tuple[ExpertGroup, GroupSource]:
    check_value(f"groups.{name}", row, dict[str, Any])
    check_value(f"groups.{name}.modalities", row.get("modalities"), list[str])
    modalities = modality_ids(row["modalities"], key=name)
    # Plans older than these keys are of one pool.
    keys = {key: row[key] for key in ("pool", "copy") if key in row}
    source = row_from_dict(GroupSource, keys, f"groups.{name}")
    own = {key: value for key, value in row.items() if key not in keys}
    group = row_from_dict(
        ExpertGroup, {**own, "name": name, "modalities": modalities}, f"groups.{name}"
    )
    if group.num_experts < 1:
        raise ValueError(f"groups.{name}.num_experts: must be at least 1, got {group.num_experts}")
    return group, source


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


def _check_shares(plan: Plan, where: str) -> None:
    """Pass if the groups that divide a pool hold every one of its experts once, and so does every copy.

    Raises:
        ValueError: they do not; the message begins with ``where``.
    """
    shape = (len(plan.layers), sum(group.num_experts for group in plan.groups))
    if tuple(plan.order.shape) != shape:
        return check_order(plan.order, shape, where)
    parts = [order_YE for _, _, order_YE in plan.by_group()]
    for pool, share in shares_of_pools(plan.sources):
        if pool not in plan.model.groups:
            raise ValueError(f"{where}: its model has no group {pool!r}; make the plan anew")
        shape = (len(plan.layers), plan.model.groups[pool])
        check_order(torch.cat([parts[i] for i in share], dim=1), shape, where)


def make_plan(
    profile: Profile,
    groups: Groups,
    rule: str,
    seed: int = 0,
    num_shared: int = 0,
    rows: Mapping[str, ExpertGroupRow] | None = None,
) -> Plan:
    """The plan that ``rule`` makes from ``profile``. The ``num_shared`` experts of each layer that text and ViT use most make its new
    shared expert. ``rows``: the config's [experts.partition], which say what the groups take where the profiled model has several.

    Raises:
        ValueError: an unknown rule, a rule that returns no valid order, or a profile with another number of experts than ``groups``.
    """
    rows, pools = rows or {}, profile.model.groups
    _check_profile(profile, groups, rows, num_shared)
    sources = group_sources(groups, pools, rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order_YE = _order_of_pools(profile, groups, sources, rule)
    shared_YN = most_used(profile.counts, num_shared)
    return Plan(
        profile.model, rule, seed, tuple(groups), profile.layers, order_YE, shared_YN, sources
    )


def _order_of_pools(
    profile: Profile, groups: Groups, sources: Sequence[GroupSource], rule: str
) -> Tensor:
    """(Y, E): the rule's order of every pool that groups divide; a copy keeps the order of its pool."""
    parts: dict[int, Tensor] = {}
    for pool, share in shares_of_pools(sources):
        counts_YME = profile.counts[..., pool_columns(profile.model.groups)[pool]].clone()
        order_YE = torch.arange(counts_YME.shape[-1]).expand(len(profile.layers), -1)
        sharing = tuple(groups[i] for i in share)
        if not sources[share[0]].copy:
            shape = (len(profile.layers), profile.model.groups[pool])
            order_YE = PARTITION_RULES[rule](counts_YME, sharing)
            check_order(order_YE, shape, f"experts.partition_rule = {rule!r}")
        sizes = [group.num_experts for group in sharing]
        parts |= dict(zip(share, order_YE.long().split(sizes, dim=1), strict=True))
    return torch.cat([parts[i] for i in range(len(groups))], dim=1)


def whole_pools_plan(
    model: ModelIdentity,
    groups: Groups,
    layers: Sequence[str],
    sources: Sequence[GroupSource],
) -> Plan | None:
    """The plan of groups that each take a whole pool, which needs no profile; None if groups divide one."""
    if any(len(share) > 1 for _, share in shares_of_pools(sources)):
        return None
    order_E = torch.cat([torch.arange(group.num_experts) for group in groups])
    order_YE, shared_YN = order_E.repeat(len(layers), 1), torch.empty(len(layers), 0).long()
    return Plan(model, "", 0, tuple(groups), tuple(layers), order_YE, shared_YN, tuple(sources))


def check_sources_named(
    of: str, pools: Iterable[str], rows: Mapping[str, ExpertGroupRow], remedy: str
) -> None:
    """Pass if there is one pool, or the config says what its groups take.

    Raises:
        ValueError: it does not, so that it partitions a model which is partitioned already. ``of``: the subject of the sentence.
    """
    if set(pools) - {ONE_POOL} and not any(row.source for row in rows.values()):
        raise ValueError(
            f"{of} partitioned into {', '.join(sorted(pools))}; {remedy}, or name with experts.partition.<name>.source the one that each "
            "group takes its experts from"
        )


def _check_profile(
    profile: Profile, groups: Groups, rows: Mapping[str, ExpertGroupRow], num_shared: int
) -> None:
    """Pass if the profile is of a model that can be partitioned into ``groups``."""
    pools = profile.model.groups
    check_sources_named(
        "the profile is of a model that is",
        pools,
        rows,
        "profile the model before it was partitioned",
    )
    if num_shared and len(pools) > 1:
        raise ValueError(
            f"experts.new_shared_experts = {num_shared}: is made of experts that all tokens choose from, but the profile is of a "
            f"model whose tokens are divided among {', '.join(pools)}; remove the key"
        )
    if len(pools) > 1 or any(row.copy for row in rows.values()):
        return  # ``group_sources`` checks every pool
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
    columns = pool_columns(profile.model.groups)
    rows = []
    for group, source, order_YE in plan.by_group():
        counts_YME = profile.counts[..., columns[source.pool]]
        index_YME = order_YE.unsqueeze(1).expand(-1, counts_YME.shape[1], -1)
        part_YME = counts_YME.gather(2, index_YME).double()
        baseline = group.num_experts / counts_YME.shape[-1]
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
