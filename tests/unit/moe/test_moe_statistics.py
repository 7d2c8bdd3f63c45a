"""Numbers about routing, against counts made by hand."""

from itertools import combinations, product

import pytest
import torch

from symbiotic_titan.moe.routing_metrics import (
    capacity_rate,
    count_std,
    idle_experts,
    imbalance_ratio,
    overlap_size,
    relative_deviation,
    top_overlap,
)


def test_capacity_rate_counts_what_fits_below_the_fair_share():
    assert capacity_rate(torch.tensor([4, 4, 4, 4])) == 1.0
    assert capacity_rate(torch.tensor([8, 4, 4, 0])) == 12 / 16
    assert capacity_rate(torch.tensor([16, 0, 0, 0])) == 4 / 16


def test_capacity_is_rounded_up():
    # 10 assignments on 4 experts: capacity ceil(2.5) = 3.
    assert torch.isclose(capacity_rate(torch.tensor([4, 3, 2, 1])), torch.tensor(0.9))


def test_capacity_factor_makes_room():
    counts = torch.tensor([8, 4, 4, 0])
    assert capacity_rate(counts, capacity_factor=1.5) == 14 / 16
    assert capacity_rate(counts, capacity_factor=2.0) == 1.0


def test_statistics_work_per_modality():
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])
    assert capacity_rate(counts)[:2].tolist() == [1.0, 0.25]
    assert imbalance_ratio(counts)[:2].tolist() == [1.0, 4.0]
    assert idle_experts(counts).tolist() == [0, 3, 4]


def test_nothing_measured_is_not_a_number():
    empty = torch.zeros(3, 4, dtype=torch.int64)
    assert capacity_rate(empty).isnan().all()
    assert imbalance_ratio(empty).isnan().all()
    assert relative_deviation(empty).isnan().all()


def test_std_is_that_of_the_population():
    assert torch.isclose(count_std(torch.tensor([2, 4, 4, 6])), torch.tensor(2.0).sqrt())


def test_relative_deviation_does_not_grow_with_the_tokens():
    counts = torch.tensor([[2, 4, 4, 6], [200, 400, 400, 600]])
    assert torch.allclose(relative_deviation(counts), torch.tensor(2.0).sqrt() / 4)


def test_compared_top_experts_are_eight_or_a_quarter():
    assert [overlap_size(n) for n in (128, 32, 16, 12, 3)] == [8, 8, 4, 3, 0]


def test_counts_beyond_float_precision_stay_exact():
    counts = torch.tensor([2**40 + 1, 2**40])
    assert capacity_rate(counts) == 1.0
    assert imbalance_ratio(counts) >= 1.0


def test_overlap_of_the_most_and_least_used():
    text, image = torch.tensor([9, 8, 7, 1, 2, 0]), torch.tensor([9, 0, 7, 8, 1, 2])
    assert top_overlap(text, image, 3) == 2
    assert top_overlap(-text, -image, 2) == 0
    assert top_overlap(text, text, 3) == 3


def test_overlap_is_the_mean_over_ties_broken_at_random():
    """Whatever the experts' numbers: of unused ones, none is among the least used of both more than another."""
    counts = [torch.tensor(c) for c in ([5, 5, 5, 5, 5], [9, 8, 0, 0, 0], [0, 3, 3, 0, 7])]
    for a, b in product(counts, counts):
        for k, sign in product((1, 2, 3), (1, -1)):
            found = [
                len(top_a & top_b) for top_a, top_b in product(tops(sign * a, k), tops(sign * b, k))
            ]
            mean = top_overlap(sign * a, sign * b, k).item()
            assert mean == pytest.approx(sum(found) / len(found)), (a, b, k, sign)
    assert top_overlap(torch.zeros(2, 5), torch.zeros(2, 5), 0).tolist() == [0, 0]


def tops(counts_E, k):
    """Every set of k experts of which none is used less than one outside."""
    experts = set(range(len(counts_E)))
    return [
        set(top)
        for top in combinations(experts, k)
        if min(counts_E[e] for e in top) >= max(counts_E[e] for e in experts - set(top))
    ]
