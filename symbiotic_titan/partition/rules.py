"""Partition rules: which experts of each layer go to which group, decided from how often text and ViT tokens choose them.

A rule gets counts (Y, M, E), of layers, modalities and experts, and the groups. It returns an order (Y, E): for each layer the original
index of the expert in each slot, the first group's slots first. It may use torch's global random generator, which is seeded before
the rule runs. ``symbiotic_titan.extend.register_partition_rule`` adds one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import TEXT, VIT

Groups = Sequence[ExpertGroup]
PartitionRule = Callable[[Tensor, Groups], Tensor]


def cumulative(counts_YME: Tensor, groups: Groups) -> Tensor:
    """The paper's rule (arXiv 2604.07753): experts ranked by their share of text's choices plus their share of ViT's. With shares
    instead of counts the ranking does not depend on how many tokens of each were profiled. Groups without text and ViT get the
    least used experts. Where text and ViT have a group each, the other experts are divided so that as much routing as possible
    stays inside the right group."""
    shares_YME = _shares(counts_YME)
    return _order(_owners(shares_YME[:, TEXT] + shares_YME[:, VIT], shares_YME, groups), groups)


def cumulative_counts(counts_YME: Tensor, groups: Groups) -> Tensor:
    """As ``cumulative``, but by counts: the modality with more tokens in the profile weighs more."""
    return _order(_owners(counts_YME[:, TEXT] + counts_YME[:, VIT], counts_YME, groups), groups)


def per_modality_max(counts_YME: Tensor, groups: Groups) -> Tensor:
    """As ``cumulative``, but experts are ranked by the larger of their two shares, not by the sum: specialists come before experts
    that both modalities use a little."""
    shares_YME = _shares(counts_YME)
    understanding_YE = torch.maximum(shares_YME[:, TEXT], shares_YME[:, VIT])
    return _order(_owners(understanding_YE, shares_YME, groups), groups)


def balanced(counts_YME: Tensor, groups: Groups) -> Tensor:
    """The groups of ``cumulative``, each ordered for expert parallelism: ranks own contiguous ranges of equal size, which get about
    equal load. It is balanced for degrees that are products of the smallest prime factors of the group's size, e.g. 2, 4, 8."""
    order_YE = cumulative(counts_YME, groups)
    sizes = [group.num_experts for group in groups]
    for layer, row_E in enumerate(order_YE):
        parts = []
        for group, experts_E in zip(groups, row_E.split(sizes), strict=True):
            load_E = counts_YME[layer, list(group.modalities)].sum(0)
            parts += _spread_load(experts_E.tolist(), load_E.tolist())
        order_YE[layer] = torch.tensor(parts)
    return order_YE


def random(counts_YME: Tensor, groups: Groups) -> Tensor:
    """A random baseline: random groups, different in every layer."""
    num_layers, _, num_experts = counts_YME.shape
    permutation_YE = torch.stack([torch.randperm(num_experts) for _ in range(num_layers)])
    sizes = torch.tensor([group.num_experts for group in groups])
    bounds = sizes.cumsum(0)
    return _order(torch.bucketize(permutation_YE, bounds, right=True), groups)


def _shares(counts_YME: Tensor) -> Tensor:
    """Counts as shares of their modality's choices in the layer; 0 where there are none."""
    # float64 is as exact as the counts: experts with equal counts stay tied, and ties are broken by the expert's index.
    return counts_YME.double() / counts_YME.sum(-1, keepdim=True).clamp(min=1)


def _owners(understanding_YE: Tensor, usage_YME: Tensor, groups: Groups) -> Tensor:
    """(Y, E) index of each expert's group. Groups with neither text nor ViT take the experts that understanding uses least. The
    others go to the group of text and ViT; where these have a group each, experts are sorted by text's lead over ViT and cut at the
    groups' sizes, which keeps the most routing inside the right group."""
    owner_YE = torch.full(understanding_YE.shape, -1)
    serves = [bool({TEXT, VIT} & set(group.modalities)) for group in groups]
    # Descending and stable: of equally used experts, the one with the lower index counts as more used.
    ranked_YE = understanding_YE.argsort(dim=-1, descending=True, stable=True)
    end = ranked_YE.shape[1]
    for g in range(len(groups) - 1, -1, -1):
        if not serves[g]:
            start = end - groups[g].num_experts
            owner_YE.scatter_(1, ranked_YE[:, start:end], g)
            end = start
    if not any(serves):
        return owner_YE
    first, *second = [g for g in range(len(groups)) if serves[g]]
    rest_YE = ranked_YE[:, :end].sort(dim=-1).values
    if second:
        own = usage_YME[:, list(groups[first].modalities)].sum(1)
        other = usage_YME[:, list(groups[second[0]].modalities)].sum(1)
        lead = (own - other).gather(1, rest_YE)
        rest_YE = rest_YE.gather(1, lead.argsort(dim=-1, descending=True, stable=True))
        owner_YE.scatter_(1, rest_YE[:, groups[first].num_experts :], second[0])
    owner_YE.scatter_(1, rest_YE[:, : groups[first].num_experts], first)
    return owner_YE


def _order(owner_YE: Tensor, groups: Groups) -> Tensor:
    """(Y, E) expert indices sorted by group, inside a group in their original order."""
    return owner_YE.argsort(dim=-1, stable=True)


def _spread_load(experts: list[int], load: list[int]) -> list[int]:
    """``experts`` reordered so that contiguous parts of equal size have about equal load. Greedy: the busiest expert goes to the
    least loaded part with room, and so on; then the same inside each part. Unused experts keep their order."""
    size = len(experts)
    if size <= 1:
        return experts
    num_parts = next(d for d in range(2, size + 1) if size % d == 0)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for expert in sorted(experts, key=lambda e: -load[e]):
        open_parts = [part for part in parts if len(part) < size // num_parts]
        min(open_parts, key=lambda part: sum(load[e] for e in part)).append(expert)
    return [expert for part in parts for expert in _spread_load(sorted(part), load)]


def most_used(counts_YME: Tensor, number: int) -> Tensor:
    """(Y, N) indices, ascending, of the experts with the largest sum of shares of text's and ViT's choices.

    Raises:
        ValueError: a layer has fewer experts.
    """
    num_experts = counts_YME.shape[-1]
    if number > num_experts:
        raise ValueError(
            f"experts.new_shared_experts: must be at most the {num_experts} experts of a layer, got {number}"
        )
    shares_YME = _shares(counts_YME)
    use_YE = shares_YME[:, TEXT] + shares_YME[:, VIT]
    ranked_YE = use_YE.argsort(dim=-1, descending=True, stable=True)
    return ranked_YE[:, :number].sort(dim=-1).values
