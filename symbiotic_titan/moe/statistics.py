"""Numbers about routing, from counts. Pure functions without gradient.

Letters: E experts. Every function takes counts (..., E), assignments per expert: a record's ``counts`` gives one number per
modality, its ``counts.sum(0)`` one for all. Pass the counts of one group to look inside it.
"""

import torch
from torch import Tensor


def capacity_rate(counts_E: Tensor, capacity_factor: float = 1.0) -> Tensor:
    """(...,) float32 in [0, 1]: share of assignments that fit when no expert takes more than its fair share.

    Capacity is ceil(assignments / E * factor) per expert. NaN where there are no assignments: nothing was measured.
    """
    total = counts_E.sum(-1)
    capacity = torch.ceil(total.double() / counts_E.shape[-1] * capacity_factor).unsqueeze(-1)
    return (torch.minimum(counts_E.double(), capacity).sum(-1) / total).float()


def imbalance_ratio(counts_E: Tensor) -> Tensor:
    """(...,) float32 >= 1: fullest expert / mean expert; 1 is uniform. NaN without assignments."""
    counts_E = counts_E.double()
    return (counts_E.amax(-1) / counts_E.mean(-1)).float()


def idle_experts(counts_E: Tensor) -> Tensor:
    """(...,) int64: experts that got nothing."""
    return (counts_E == 0).sum(-1)


def count_std(counts_E: Tensor) -> Tensor:
    """(...,) float32: standard deviation of the counts over experts (population)."""
    return counts_E.double().std(-1, correction=0).float()


def relative_deviation(counts_E: Tensor) -> Tensor:
    """(...,) float32 >= 0: standard deviation / mean of the counts. NaN without assignments.

    The standard deviation of raw counts grows with the tokens of a step; divided by the mean, steps and runs compare.
    """
    counts_E = counts_E.double()
    return (counts_E.std(-1, correction=0) / counts_E.mean(-1)).float()


def overlap_size(num_experts: int) -> int:
    """How many top experts of ``num_experts`` to compare: 8 as in arXiv 2604.07753, Figure 8, but at most a quarter of them.

    Two sets of k drawn by chance have k * k / num_experts in common: of sets up to a quarter, at most a quarter.
    """
    return min(8, num_experts // 4)


def top_overlap(counts_a_E: Tensor, counts_b_E: Tensor, k: int) -> Tensor:
    """(...,) int64: how many of the k most used experts of ``a`` are among the k most used of ``b``.

    Ties go to the lower expert number. For the least used experts pass negated counts.
    """
    top_a = torch.argsort(counts_a_E, dim=-1, descending=True, stable=True)[..., :k]
    top_b = torch.argsort(counts_b_E, dim=-1, descending=True, stable=True)[..., :k]
    return (top_a.unsqueeze(-1) == top_b.unsqueeze(-2)).sum((-2, -1))
