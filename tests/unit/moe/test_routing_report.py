"""Routing in numbers, against hand-made counts and against plain loops over layers, modalities and experts."""

import math
import random

import pytest
import torch

from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.moe.routing_metrics import (
    capacity_rates,
    layer_statistics,
    means_over_layers,
    reachable_experts,
    scalars_by_layer,
)
from symbiotic_titan.sequence.modality import MODALITY_NAMES, TEXT, VAE, VIT

GROUPS = (ExpertGroup("und", (TEXT, VIT), 3), ExpertGroup("gen", (VAE,), 2))


def assignments(text, vit, vae):
    """(1 layer, 3 modalities, 5 experts) counts."""
    return torch.tensor([[text, vit, vae]])


def means(counts_YME, groups=GROUPS, capacity_factor=1.0):
    return means_over_layers(statistics(counts_YME, groups, capacity_factor))


def statistics(counts_YME, groups, capacity_factor=1.0):
    rates = capacity_rates(counts_YME, groups, capacity_factor)
    return layer_statistics(counts_YME, groups) | rates


def test_experts_are_compared_with_their_own_group():
    metrics = means(assignments([4, 4, 4, 0, 0], [0] * 5, [0, 0, 0, 6, 6]))
    for name in ("all", "text", "vae"):
        assert metrics[f"routing/capacity_rate/{name}"] == pytest.approx(1.0)
        assert metrics[f"routing/imbalance/{name}"] == pytest.approx(1.0)
        assert metrics[f"routing/deviation/{name}"] == 0
        assert metrics[f"routing/idle_experts/{name}"] == 0
    assert "routing/capacity_rate/vit" not in metrics  # it has no token


def test_collapse_of_one_group_shows_in_its_modality_and_by_its_weight_in_all():
    metrics = means(assignments([2, 2, 2, 0, 0], [0] * 5, [0, 0, 0, 6, 0]))
    assert metrics["routing/capacity_rate/text"] == pytest.approx(1.0)
    assert metrics["routing/capacity_rate/vae"] == pytest.approx(0.5)
    assert metrics["routing/capacity_rate/all"] == pytest.approx(0.75)
    assert metrics["routing/imbalance/vae"] == pytest.approx(2.0)
    assert metrics["routing/deviation/vae"] == pytest.approx(1.0)
    assert metrics["routing/idle_experts/all"] == 1


def test_capacity_factor_widens_what_fits():
    counts = assignments([4, 1, 1, 0, 0], [0] * 5, [0] * 5)
    assert means(counts)["routing/capacity_rate/text"] == pytest.approx(4 / 6)
    assert means(counts, capacity_factor=2.0)["routing/capacity_rate/text"] == pytest.approx(1.0)


def test_a_step_without_tokens_has_no_statistics():
    assert statistics(assignments([0] * 5, [0] * 5, [0] * 5), GROUPS) == {}


def test_the_global_rate_is_bounded_by_the_experts_that_a_modality_reaches():
    balanced = means(assignments([4, 4, 4, 0, 0], [0] * 5, [0, 0, 0, 9, 9]))
    within = {name: balanced[f"routing/capacity_rate/{name}"] for name in ("text", "vae", "all")}
    assert within == {"text": 1.0, "vae": 1.0, "all": 1.0}
    overall = {name: balanced[f"routing/capacity_rate_global/{name}"] for name in within}
    # ceil(12 / 5) = 3 fit into each of 3 experts, ceil(18 / 5) = 4 into each of 2; together ceil(30 / 5) = 6 into each of 5.
    expected = {"text": 9 / 12, "vae": 8 / 18, "all": (4 * 3 + 6 * 2) / 30}
    assert overall == pytest.approx(expected)
    assert "routing/capacity_rate_global/vit" not in balanced  # it has no token


# ---- against plain loops --------------------------------------------------------------------------------------------------


def plain_use(counts, capacity_factor):
    """The four statistics of one list of counts."""
    mean = sum(counts) / len(counts)
    capacity = math.ceil(mean * capacity_factor)
    variance = sum((count - mean) ** 2 for count in counts) / len(counts)
    return {
        "capacity_rate": sum(min(count, capacity) for count in counts) / sum(counts),
        "imbalance": max(counts) / mean,
        "deviation": math.sqrt(variance) / mean,
        "idle_experts": sum(count == 0 for count in counts),
    }


def plain_overlap(a, b):
    """Expert by expert: its chance to be among the top k of both, where those tied with the last one draw lots."""
    k, mean = min(8, len(a) // 4), 0.0
    for e in range(len(a)):
        chances = []
        for x in (a, b):
            above, tied = sum(y > x[e] for y in x), x.count(x[e])
            chances.append(min(max(k - above, 0) / tied, 1.0))
        mean += chances[0] * chances[1]
    return mean


def plain_layer(counts, groups, capacity_factor):
    """Statistics of one layer's [modality][expert] counts."""
    expected, together, start = {}, [], 0
    for group in groups:
        own = [row[start : start + group.num_experts] for row in counts]
        start += group.num_experts
        for m in group.modalities:
            for key, value in plain_use(own[m], capacity_factor).items():
                expected[f"{key}/{MODALITY_NAMES[m]}"] = value
            for other in group.modalities:
                if m < other:
                    pair = f"{MODALITY_NAMES[m]}_{MODALITY_NAMES[other]}"
                    expected[f"overlap/{pair}"] = plain_overlap(own[m], own[other])
        summed = [sum(row[e] for row in own) for e in range(group.num_experts)]
        together.append((plain_use(summed, capacity_factor), sum(summed)))
    of_layer = {name: row for name, row in zip(MODALITY_NAMES, counts, strict=True) if sum(row)}
    for name, row in {
        **of_layer,
        "all": [sum(column) for column in zip(*counts, strict=True)],
    }.items():
        rate = plain_use(row, capacity_factor)["capacity_rate"]
        expected[f"capacity_rate_global/{name}"] = rate
    total = sum(weight for _, weight in together)
    for key in together[0][0]:
        if key == "idle_experts":
            expected[f"{key}/all"] = sum(use[key] for use, _ in together)
        else:
            expected[f"{key}/all"] = sum(use[key] * weight / total for use, weight in together)
    return expected


@pytest.mark.parametrize(
    "groups",
    [
        (ExpertGroup("all", (TEXT, VIT, VAE), 24),),
        (ExpertGroup("und", (VIT, TEXT), 16), ExpertGroup("gen", (VAE,), 8)),
        (ExpertGroup("a", (TEXT,), 8), ExpertGroup("b", (VIT,), 4), ExpertGroup("c", (VAE,), 12)),
    ],
    ids=["standard", "bipartite", "tripartite"],
)
def test_every_layer_is_as_a_plain_loop_says(groups):
    layers = []
    for _ in range(5):
        layer, start = [[0] * 24 for _ in range(3)], 0
        for group in groups:
            for m in group.modalities:
                for e in range(start, start + group.num_experts):
                    layer[m][e] = random.randrange(6)  # few values: many ties
                layer[m][start] += 1
            start += group.num_experts
        layers.append(layer)
    found = statistics(torch.tensor(layers), groups, 1.25)
    expected = [plain_layer(layer, groups, 1.25) for layer in layers]
    assert found.keys() == expected[0].keys()
    for key, values_Y in found.items():
        assert values_Y.tolist() == pytest.approx([layer[key] for layer in expected]), key


def test_overlap_is_measured_only_where_both_reach_the_same_experts():
    counts = torch.ones(2, 3, 8, dtype=torch.int64)
    one = layer_statistics(counts, (ExpertGroup("all", (TEXT, VIT, VAE), 8),))
    assert {key for key in one if "overlap" in key} == {
        "overlap/text_vit",
        "overlap/text_vae",
        "overlap/vit_vae",
    }
    assert one["overlap/text_vit"].tolist() == [0.5, 0.5]  # all tied: 2 of 8, twice
    apart = (ExpertGroup("a", (TEXT,), 4), ExpertGroup("b", (VIT, VAE), 4))
    assert {key for key in layer_statistics(counts, apart) if "overlap" in key} == {
        "overlap/vit_vae"
    }


def test_names_carry_the_number_of_the_layer():
    scalars = scalars_by_layer({"imbalance/vae": torch.tensor([1.0, 2.0])}, range(9, 11))
    assert scalars == {
        "routing_by_layer/imbalance/vae/layer_09": 1.0,
        "routing_by_layer/imbalance/vae/layer_10": 2.0,
    }


def test_reachable_experts_are_those_of_the_modality_s_group():
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert reachable_experts(GROUPS).int().tolist() == expected
