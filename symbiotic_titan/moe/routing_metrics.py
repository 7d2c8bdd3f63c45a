"""Routing statistics of one step, computed from expert counts: scalars per layer, their means, and tensors for plots.

Pure functions without gradient. The first ones take assignments per expert, (..., E): a record's ``counts`` for one number per
modality, its ``counts.sum(0)`` for all modalities together, or the counts of one group.

Shape letters: sequence/shapes.py. E may be the experts of one group.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import MODALITY_NAMES, NUM_MODALITIES


def capacity_rate(counts_E: Tensor, capacity_factor: float = 1.0) -> Tensor:
    """(...,) float32 in [0, 1]: share of assignments within the experts' capacity.

    Capacity is ceil(assignments / E * factor) per expert. NaN without assignments.
    """
    # float64, because a step may have more than 2^24 assignments, up to which float32 is exact.
    total = counts_E.sum(-1)
    capacity = torch.ceil(total.double() / counts_E.shape[-1] * capacity_factor).unsqueeze(-1)
    return (torch.minimum(counts_E.double(), capacity).sum(-1) / total).float()


def imbalance_ratio(counts_E: Tensor) -> Tensor:
    """(...,) float32 >= 1: assignments of the busiest expert / mean over experts; 1 is uniform. NaN without assignments."""
    counts_E = counts_E.double()
    return (counts_E.amax(-1) / counts_E.mean(-1)).float()


def idle_experts(counts_E: Tensor) -> Tensor:
    """(...,) int64: number of experts without assignments."""
    return (counts_E == 0).sum(-1)


def count_std(counts_E: Tensor) -> Tensor:
    """(...,) float32: standard deviation of the counts over experts (population)."""
    return counts_E.double().std(-1, correction=0).float()


def relative_deviation(counts_E: Tensor) -> Tensor:
    """(...,) float32 >= 0: standard deviation / mean of the counts. NaN without assignments.

    Dividing by the mean makes steps and runs with different numbers of tokens comparable.
    """
    counts_E = counts_E.double()
    return (counts_E.std(-1, correction=0) / counts_E.mean(-1)).float()


def overlap_size(num_experts: int) -> int:
    """How many top experts of ``num_experts`` to compare: 8 as in arXiv 2604.07753, Figure 8, but at most a quarter of them.

    Two random sets of k share k * k / num_experts members on average, here at most a quarter of k: a larger overlap is not chance.
    """
    return min(8, num_experts // 4)


def top_overlap(counts_a_E: Tensor, counts_b_E: Tensor, k: int) -> Tensor:
    """(...,) float64: number of experts among the k most used of both ``a`` and ``b``. For the least used pass negated counts.

    Where the k-th place is tied, as among experts that nothing uses, it is the mean over ties that are broken at random.
    """
    return (_place_among_top(counts_a_E, k) * _place_among_top(counts_b_E, k)).sum(-1)


def _place_among_top(counts_E: Tensor, k: int) -> Tensor:
    """(..., E) float64: 1 for the k most used experts and 0 for the others; those tied for the last places have equal shares of them."""
    if k == 0:
        return torch.zeros_like(counts_E, dtype=torch.float64)
    last = counts_E.topk(k, dim=-1).values[..., -1:]
    above, tied = counts_E > last, counts_E == last
    places = k - above.sum(-1, keepdim=True)
    return above + tied * places.double() / tied.sum(-1, keepdim=True)


# Tensors in TensorBoard that symbiotic plot reads.
COUNTS_TAG = "routing/counts"  # (Y, M, E) assignments of the step
REACHABLE_TAG = "routing/reachable"  # (M, E) whether a modality's tokens can reach an expert
LAYERS_TAG = "routing/layers"  # (Y,) number of each MoE layer, as in parameter names


def layer_statistics(counts_YME: Tensor, groups: tuple[ExpertGroup, ...]) -> dict[str, Tensor]:
    """``statistic/modality`` -> (Y,), for modalities that have tokens, on the CPU.

    Statistics are computed within each group, because a token cannot reach the experts of others. ``all`` is the mean over groups,
    weighted by their assignments (idle experts: the sum). ``overlap/text_vit`` is the number of common experts among the k most used
    of two modalities of one group, see ``overlap_size``.
    """
    statistics: dict[str, Tensor] = {}
    for group, counts_YMe in zip(groups, _by_group(counts_YME, groups), strict=True):
        present = [m for m in sorted(group.modalities) if counts_YMe[:, m].sum() > 0]
        statistics |= _overlaps(counts_YMe, present)
    return statistics | _within_groups(counts_YME, groups, _expert_use)


def capacity_rates(
    counts_YME: Tensor, groups: tuple[ExpertGroup, ...], capacity_factor: float
) -> dict[str, Tensor]:
    """Two capacity rates as ``name/modality`` -> (Y,), for modalities that have tokens, on the CPU.

    ``capacity_rate``: an expert's capacity is an equal share of its group's assignments; ``all`` is the mean over groups, weighted by
    their assignments. It is 1 where every group is in balance.
    ``capacity_rate_global``: an equal share of all assignments, over all experts of the layer, for one modality as for ``all``: what
    arXiv 2604.07753 writes. An expert that a modality cannot reach has capacity too, so the rate is at most the share of the experts
    that it reaches; of ``all``, at most what fits where each group has its share of the tokens.
    """

    def within_group(counts_Ye: Tensor) -> dict[str, Tensor]:
        return {"capacity_rate": capacity_rate(counts_Ye, capacity_factor)}

    rates = _within_groups(counts_YME, groups, within_group)
    counts_YME = counts_YME.cpu()
    present = [m for m in range(NUM_MODALITIES) if counts_YME[:, m].sum() > 0]
    for counts_YE, name in [
        *((counts_YME[:, m], MODALITY_NAMES[m]) for m in present),
        *([(counts_YME.sum(1), "all")] if present else []),
    ]:
        rates[f"capacity_rate_global/{name}"] = capacity_rate(counts_YE, capacity_factor)
    return rates


def _by_group(counts_YME: Tensor, groups: tuple[ExpertGroup, ...]) -> tuple[Tensor, ...]:
    """The counts of each group's experts, copied to the CPU once, instead of one device sync per statistic."""
    return counts_YME.cpu().split([group.num_experts for group in groups], dim=-1)


def _within_groups(
    counts_YME: Tensor,
    groups: tuple[ExpertGroup, ...],
    measure: Callable[[Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """``statistic/modality`` -> (Y,) of each modality within its group, and of ``all``, by ``measure`` of (Y, e) counts."""
    statistics: dict[str, Tensor] = {}
    together = []
    for group, counts_YMe in zip(groups, _by_group(counts_YME, groups), strict=True):
        present = [m for m in sorted(group.modalities) if counts_YMe[:, m].sum() > 0]
        for modality in present:
            name = MODALITY_NAMES[modality]
            measured = measure(counts_YMe[:, modality])
            statistics |= {f"{key}/{name}": values for key, values in measured.items()}
        if present:
            counts_Ye = counts_YMe.sum(1)
            together.append((measure(counts_Ye), counts_Ye.sum(-1)))
    return statistics | _over_groups(together)


def _expert_use(counts_YE: Tensor) -> dict[str, Tensor]:
    return {
        "imbalance": imbalance_ratio(counts_YE),
        "deviation": relative_deviation(counts_YE),
        "idle_experts": idle_experts(counts_YE).float(),
    }


def _overlaps(counts_YME: Tensor, modalities: list[int]) -> dict[str, Tensor]:
    """Overlaps of all pairs of ``modalities``, which share the group's experts."""
    k = overlap_size(counts_YME.shape[-1])
    return {
        f"overlap/{MODALITY_NAMES[a]}_{MODALITY_NAMES[b]}": top_overlap(
            counts_YME[:, a], counts_YME[:, b], k
        ).float()
        for a, b in combinations(modalities, 2)
        if k > 0
    }


def _over_groups(uses: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    """``statistic/all`` from (statistics, (Y,) assignments) of every group that has tokens."""
    if not uses:
        return {}
    totals = sum((total_Y for _, total_Y in uses), torch.zeros(()))
    return {
        f"{key}/all": sum(
            (
                use[key] * (1.0 if key == "idle_experts" else total_Y / totals)
                for use, total_Y in uses
            ),
            torch.zeros(()),
        )
        for key in uses[0][0]
    }


def means_over_layers(statistics: Mapping[str, Tensor]) -> dict[str, float]:
    """``routing/<statistic>/<modality>``."""
    return {f"routing/{key}": float(values_Y.mean()) for key, values_Y in statistics.items()}


def scalars_by_layer(statistics: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, float]:
    """``routing_by_layer/<statistic>/<modality>/layer_NN``, NN as in the names of the layer's parameters."""
    return {
        f"routing_by_layer/{key}/layer_{layer:02}": value
        for key, values_Y in statistics.items()
        for layer, value in zip(layers, values_Y.tolist(), strict=True)
    }


def reachable_experts(groups: tuple[ExpertGroup, ...]) -> Tensor:
    """(M, E) bool: whether a modality's tokens can be routed to an expert."""
    columns = [
        torch.tensor([modality in group.modalities for modality in range(NUM_MODALITIES)])
        .unsqueeze(1)
        .expand(-1, group.num_experts)
        for group in groups
    ]
    return torch.cat(columns, dim=1)


def write_routing(
    writer: SummaryWriter,
    step: int,
    counts_YME: Tensor,
    groups: tuple[ExpertGroup, ...],
    layers: Sequence[int],
) -> None:
    """Log the step's counts and the tensors needed to interpret them. TensorBoard has no tab for them.

    Measured with 47 layers of 128 experts: 38 kB of counts; the scalars of every layer are 63 kB.
    """
    writer.add_tensor(COUNTS_TAG, counts_YME.cpu().to(torch.int32), step)
    writer.add_tensor(REACHABLE_TAG, reachable_experts(groups), step)
    writer.add_tensor(LAYERS_TAG, torch.tensor(list(layers), dtype=torch.int32), step)
