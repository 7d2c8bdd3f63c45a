"""Which experts of each layer go to which group: rules that turn a profile into a partition plan.

A rule gets counts (L, M, E) and the groups, and returns an order (L, E): for each layer the original number of the expert in
each slot, the first group's slots first. A third party registers its own in ``PARTITION_RULES``. A rule may draw random numbers
from torch's global generator, which is seeded before it runs.

Letters: L MoE layers, M modalities, E experts, G groups, S experts of which a shared one is made.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value, row_from_dict
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.profile import (
    ModelIdentity,
    Profile,
    check_layer_names,
)
from symbiotic_titan.registry import Registry
from symbiotic_titan.sequence.modality import MODALITY_NAMES, TEXT, VIT, modality_ids
from symbiotic_titan.weights.reader import some_of

KIND = "partition plan"

Groups = Sequence[ExpertGroup]
PartitionRule = Callable[[Tensor, Groups], Tensor]

PARTITION_RULES: Registry[PartitionRule] = Registry("experts.partition_rule")


# ---- rules ----------------------------------------------------------------------------------------------------------------


def cumulative(counts_LME: Tensor, groups: Groups) -> Tensor:
    """The paper's rule (arXiv 2604.07753): experts ranked by how often text and ViT tokens choose them, together. Often is a share
    of the modality's choices, so that the ranking does not depend on how many tokens of each were profiled. Groups without text
    and ViT get the least used. Where text and ViT have a group each, the rest is divided so that the shares kept inside the right
    group are most."""
    shares_LME = _shares(counts_LME)
    return _order(_owners(shares_LME[:, TEXT] + shares_LME[:, VIT], shares_LME, groups), groups)


def cumulative_counts(counts_LME: Tensor, groups: Groups) -> Tensor:
    """As ``cumulative``, by counts: the modality with more tokens in the profile weighs more."""
    return _order(_owners(counts_LME[:, TEXT] + counts_LME[:, VIT], counts_LME, groups), groups)


def per_modality_max(counts_LME: Tensor, groups: Groups) -> Tensor:
    """As ``cumulative``, but an expert ranks by its share of the modality that it serves most, not by the sum: specialists come
    before those that serve both a little."""
    shares_LME = _shares(counts_LME)
    understanding_LE = torch.maximum(shares_LME[:, TEXT], shares_LME[:, VIT])
    return _order(_owners(understanding_LE, shares_LME, groups), groups)


def balanced(counts_LME: Tensor, groups: Groups) -> Tensor:
    """The groups of ``cumulative``, each ordered for expert parallelism: its ranks, which own contiguous equal ranges, get about
    equal load. Exact ranges are those of degrees 2, 4 .. and further products of the size's prime factors in ascending order."""
    order_LE = cumulative(counts_LME, groups)
    sizes = [group.num_experts for group in groups]
    for layer, row_E in enumerate(order_LE):
        parts = []
        for group, experts_E in zip(groups, row_E.split(sizes), strict=True):
            load_E = counts_LME[layer, list(group.modalities)].sum(0)
            parts += _spread_load(experts_E.tolist(), load_E.tolist())
        order_LE[layer] = torch.tensor(parts)
    return order_LE


def random(counts_LME: Tensor, groups: Groups) -> Tensor:
    """A control: groups drawn by lot, another in every layer."""
    num_layers, _, num_experts = counts_LME.shape
    lot_LE = torch.stack([torch.randperm(num_experts) for _ in range(num_layers)])
    sizes = torch.tensor([group.num_experts for group in groups])
    bounds_G = sizes.cumsum(0)
    return _order(torch.bucketize(lot_LE, bounds_G, right=True), groups)


def _shares(counts_LME: Tensor) -> Tensor:
    """Counts as shares of their modality's choices in the layer. float64: as exact as the counts, so ties stay ties."""
    return counts_LME.double() / counts_LME.sum(-1, keepdim=True).clamp(min=1)


def _owners(understanding_LE: Tensor, usage_LME: Tensor, groups: Groups) -> Tensor:
    """(L, E) group of each expert. Groups that hold neither text nor ViT take the experts with the least understanding use; what
    is left goes to the group of text and ViT, or is cut where text's lead over ViT ends (the best cut of two groups)."""
    owner_LE = torch.full(understanding_LE.shape, -1)
    serves = [bool({TEXT, VIT} & set(group.modalities)) for group in groups]
    # Descending and stable: of equally used experts the lower number counts as more used.
    ranked_LE = understanding_LE.argsort(dim=-1, descending=True, stable=True)
    end = ranked_LE.shape[1]
    for g in range(len(groups) - 1, -1, -1):
        if not serves[g]:
            start = end - groups[g].num_experts
            owner_LE.scatter_(1, ranked_LE[:, start:end], g)
            end = start
    first, *second = [g for g in range(len(groups)) if serves[g]]
    rest_LE = ranked_LE[:, :end].sort(dim=-1).values
    if second:
        own = usage_LME[:, list(groups[first].modalities)].sum(1)
        other = usage_LME[:, list(groups[second[0]].modalities)].sum(1)
        lead = (own - other).gather(1, rest_LE)
        rest_LE = rest_LE.gather(1, lead.argsort(dim=-1, descending=True, stable=True))
        owner_LE.scatter_(1, rest_LE[:, groups[first].num_experts :], second[0])
    owner_LE.scatter_(1, rest_LE[:, : groups[first].num_experts], first)
    return owner_LE


def _order(owner_LE: Tensor, groups: Groups) -> Tensor:
    """(L, E) experts by group, inside a group in their original order."""
    return owner_LE.argsort(dim=-1, stable=True)


def _spread_load(experts: list[int], load: list[int]) -> list[int]:
    """``experts`` reordered so that equal contiguous parts have about equal load: the busiest first to the part that has least and
    room, then the same inside every part. Experts that nobody uses keep their order."""
    size = len(experts)
    if size <= 1:
        return experts
    num_parts = next(d for d in range(2, size + 1) if size % d == 0)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for expert in sorted(experts, key=lambda e: -load[e]):
        open_parts = [part for part in parts if len(part) < size // num_parts]
        min(open_parts, key=lambda part: sum(load[e] for e in part)).append(expert)
    return [expert for part in parts for expert in _spread_load(sorted(part), load)]


for _rule in (cumulative, cumulative_counts, per_modality_max, balanced, random):
    PARTITION_RULES.register(_rule.__name__, _rule)


# ---- plans ----------------------------------------------------------------------------------------------------------------


_KEYS = ("model", "rule", "seed", "groups", "layers", "order")


@dataclass(frozen=True)
class Plan:
    """A partition of one model's experts.

    order (L, E) int64   original number of the expert in each slot, groups one after the other.
    shared (L, S) int64  experts of which each layer's new shared expert is made, none if there is no such; they keep their slots.
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
            # Nothing, also in plans older than the key: no shared expert is made.
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
        """Write the plan, with what ``extra`` says about it."""
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
    """(L, any) integers."""
    check_value(key, rows, list[list[int]])
    return torch.tensor(rows, dtype=torch.int64)


def check_layers(plan: Plan, layers: Iterable[str]) -> None:
    """Pass if ``layers`` are those that ``plan`` divides.

    Raises:
        ValueError: it is of others.
    """
    has, needs = set(plan.layers), set(layers)
    if has != needs:
        raise ValueError(
            f"the plan is of other layers than the model: {some_of(sorted(has ^ needs))} have experts in one of the two only; make "
            "a plan with this config"
        )


def check_order(order_LE: Any, shape: tuple[int, int], where: str) -> None:
    """Pass if every row holds every expert once.

    Raises:
        ValueError: begins with ``where``.
    """
    if not isinstance(order_LE, Tensor) or order_LE.is_floating_point():
        raise ValueError(
            f"{where}: the order must be a tensor of integers, got {type(order_LE).__name__}"
        )
    if tuple(order_LE.shape) != shape:
        raise ValueError(
            f"{where}: the order must have shape {shape} (layers, experts), got {tuple(order_LE.shape)}"
        )
    wrong_L = (order_LE.sort(dim=-1).values != torch.arange(shape[1])).any(-1)
    if wrong_L.any():
        row = int(wrong_L.nonzero()[0])
        raise ValueError(
            f"{where}: row {row} of the order must hold every expert from 0 to {shape[1] - 1} once, got {order_LE[row].tolist()}"
        )


def make_plan(
    profile: Profile, groups: Groups, rule: str, seed: int = 0, num_shared: int = 0
) -> Plan:
    """The plan that ``rule`` makes of ``profile``, with the ``num_shared`` experts of each layer that text and ViT use most for a
    new shared expert.

    Raises:
        ValueError: an unknown rule, a rule whose result is no order, or a profile of other experts than ``groups`` divide.
    """
    check_profile_fits(profile, groups)
    counts_LME = profile.counts.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order_LE = PARTITION_RULES[rule](counts_LME, tuple(groups))
    num_layers, _, num_experts = profile.counts.shape
    check_order(order_LE, (num_layers, num_experts), f"experts.partition_rule = {rule!r}")
    shared_LS = most_used(profile.counts, num_shared)
    return Plan(
        profile.model, rule, seed, tuple(groups), profile.layers, order_LE.long(), shared_LS
    )


def most_used(counts_LME: Tensor, number: int) -> Tensor:
    """(L, number) experts with the largest share of text's and ViT's choices together, in ascending order.

    Raises:
        ValueError: there are not so many experts.
    """
    num_experts = counts_LME.shape[-1]
    if number > num_experts:
        raise ValueError(
            f"experts.new_shared_experts: must be at most the {num_experts} experts of a layer, got {number}"
        )
    shares_LME = _shares(counts_LME)
    use_LE = shares_LME[:, TEXT] + shares_LME[:, VIT]
    ranked_LE = use_LE.argsort(dim=-1, descending=True, stable=True)
    return ranked_LE[:, :number].sort(dim=-1).values


def check_profile_fits(profile: Profile, groups: Groups) -> None:
    """Pass if the profile is of an unpartitioned model with as many experts as the groups hold.

    Raises:
        ValueError: says what differs.
    """
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
class KeptMass:
    """Shares of a modality's choices that go to experts of its own group: mean over layers, the worst layer, and what a split by
    lot keeps on average. None for a modality that was not profiled."""

    modality: str
    mean: float | None
    worst: float | None
    worst_layer: str | None
    by_lot: float


def kept_mass(profile: Profile, plan: Plan) -> list[KeptMass]:
    """How much of each modality's routing the plan keeps inside the modality's group."""
    num_experts = profile.counts.shape[-1]
    ordered_LME = profile.counts.gather(2, plan.order.unsqueeze(1).expand_as(profile.counts))
    parts = ordered_LME.double().split([group.num_experts for group in plan.groups], dim=-1)
    rows = []
    for group, part_LME in zip(plan.groups, parts, strict=True):
        for m in group.modalities:
            total_L = profile.counts[:, m].sum(-1)
            name, by_lot = MODALITY_NAMES[m], group.num_experts / num_experts
            if not bool(total_L.all()):
                rows.append(KeptMass(name, None, None, None, by_lot))
                continue
            share_L = part_LME[:, m].sum(-1) / total_L
            worst = int(share_L.argmin())
            rows.append(
                KeptMass(
                    name,
                    float(share_L.mean()),
                    float(share_L[worst]),
                    profile.layers[worst],
                    by_lot,
                )
            )
    return sorted(rows, key=lambda row: MODALITY_NAMES.index(row.modality))
