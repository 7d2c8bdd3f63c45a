"""Groups with a width and a top-k of their own: against a plain loop over tokens, and what losses and metrics count."""

from dataclasses import replace

import pytest
import torch

from symbiotic_titan.losses.balance import balance_loss
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.moe.routing_metrics import capacity_rates, layer_statistics
from symbiotic_titan.sequence.modality import MODALITY_NAMES, PADDING, TEXT, VAE, VIT
from tests.helpers.moe_reference import (
    GROUPS,
    UNEQUAL,
    grads,
    make_args,
    make_layer,
    make_tokens,
    route,
    routed_output,
)

NO_SHIELD = torch.tensor(1.0)
TOP_KS = (4, 2, 3)
# The modalities of a batch, repeated: all, without a group's, of one group only, nothing to route.
BATCHES = {
    "all": (TEXT, VIT, VAE, PADDING),
    "no vision": (TEXT, PADDING, VAE),
    "smallest only": (VIT,),
    "padding": (PADDING,),
}
ROUTERS = {
    "softmax": {},
    "not normalized": {"normalize_weights": False, "route_scale": 1.5},
    "biased sigmoid": {"score_function": "sigmoid", "selection_bias": True, "route_scale": 2.5},
}


def unequal_layer(seed, **changes) -> PartitionedMoE:
    torch.manual_seed(seed)
    layer = make_layer(make_args(UNEQUAL, **changes))
    for router in layer.router.values():
        if router.bias is not None:
            router.bias.uniform_(-0.3, 0.3)
    return layer


def tokens(batch, num_tokens=40):
    x_TD, _ = make_tokens(num_tokens)
    kinds = torch.tensor(BATCHES[batch])
    return x_TD, kinds.repeat(num_tokens)[:num_tokens]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_output_and_all_gradients_are_those_of_the_plain_loop(router, batch, seed):
    shared = {"shared_hidden_dim": 8, "shared_gate": True, "shield_modalities": (VAE,)}
    layer = unequal_layer(seed, **ROUTERS[router], **shared)
    x_TD, modality_T = tokens(batch)
    scale = torch.tensor(0.1)
    out_TD, record = layer(x_TD, modality_T, scale)
    expected_TD = routed_output(layer, x_TD, modality_T)
    expected_TD = expected_TD + layer.shared_experts(x_TD, modality_T, scale)
    torch.testing.assert_close(out_TD, expected_TD, atol=1e-5, rtol=1e-5)

    def loss(value_TD):
        # Every parameter takes part, that of a group without tokens with a gradient of zero.
        return value_TD.square().sum() / 10 + sum(0.0 * p.sum() for p in layer.parameters())

    expected = grads(loss(expected_TD), layer, x_TD)
    for name, grad in grads(loss(out_TD), layer, x_TD).items():
        size = expected[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            grad / size, expected[name] / size, atol=1e-5, rtol=1e-5, msg=name
        )
    assert record.num_tokens.tolist() == [
        int((modality_T == modality).sum()) for modality in (TEXT, VIT, VAE)
    ]


def test_widths_and_unused_places():
    layer = unequal_layer(0)
    widths = {name: experts.w1.shape[1] for name, experts in layer.experts.items()}
    assert widths == {"understanding": 24, "vision": 8, "generation": 40}
    x_TD, modality_T = tokens("all")
    routing = layer.router(x_TD, modality_T)
    for modality, top_k in zip((TEXT, VIT, VAE), TOP_KS, strict=True):
        mine = modality_T == modality
        experts_TK, weights_TK = routing.experts_TK[mine], routing.weights_TK[mine]
        assert (experts_TK[:, :top_k] < 15).all() and (experts_TK[:, top_k:] == 15).all()
        assert (weights_TK[:, top_k:] == 0).all()
        torch.testing.assert_close(weights_TK.sum(-1), torch.ones(len(weights_TK)))
        counts_E = routing.record.counts[modality]
        assert counts_E.sum() == top_k * mine.sum()
        assert routing.record.counts.is_contiguous()
        _, experts, _, _ = route(layer, x_TD[mine], modality)
        first = (0, 7, 10)[(TEXT, VIT, VAE).index(modality)]
        assert torch.equal(experts + first, experts_TK[:, :top_k])


def test_sizes_of_its_own_that_equal_the_models_change_no_bit():
    same = tuple(replace(group, hidden_dim=24, top_k=3) for group in GROUPS)
    results = []
    for groups in (GROUPS, same):
        torch.manual_seed(3)
        layer = make_layer(make_args(groups, shared_hidden_dim=8))
        x_TD, modality_T = make_tokens()
        out_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
        results.append([out_TD, *grads(out_TD.square().sum(), layer, x_TD).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bfloat16_rows_of_unequal_groups_are_near_float32():
    layer = unequal_layer(2)
    x_TD, modality_T = tokens("all", 120)
    exact_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
    with torch.autocast("cpu", torch.bfloat16):
        out_TD, _ = layer(x_TD.bfloat16(), modality_T, NO_SHIELD)
    assert not torch.equal(out_TD.float(), exact_TD)
    torch.testing.assert_close(out_TD.float(), exact_TD, atol=0.15, rtol=0.05)


def test_the_balance_loss_of_a_group_does_not_grow_with_its_top_k():
    layer = unequal_layer(4)
    x_TD, modality_T = tokens("all", 80)
    _, record = layer(x_TD, modality_T, NO_SHIELD)
    total = torch.zeros(())
    for modality in (TEXT, VIT, VAE):
        group, experts, _, probabilities = route(layer, x_TD[modality_T == modality], modality)
        chosen_E = torch.bincount(experts.flatten(), minlength=group.num_experts)
        share_E = chosen_E / (len(experts) * experts.shape[1])
        total = total + group.num_experts * (share_E * probabilities.mean(0)).sum()
    torch.testing.assert_close(balance_loss([record]), total)


def test_metrics_weigh_a_group_by_its_assignments():
    """A uniform group of 20 assignments, and one whose 10 all go to one of five experts: 2 of them are within its capacity."""
    groups = (
        ExpertGroup("und", (TEXT, VIT), 4, top_k=4),
        ExpertGroup("gen", (VAE,), 5, top_k=1),
    )
    counts = torch.zeros(1, 3, 9, dtype=torch.int64)
    counts[0, TEXT, :4] = 5
    counts[0, VAE, 6] = 10
    found = layer_statistics(counts, groups) | capacity_rates(counts, groups, 1.0)
    assert found[f"capacity_rate/{MODALITY_NAMES[VAE]}"].item() == pytest.approx(0.2)
    assert found["capacity_rate/all"].item() == pytest.approx((20 * 1.0 + 10 * 0.2) / 30)
    assert found["imbalance/all"].item() == pytest.approx((20 * 1 + 10 * 5) / 30)
    assert found["idle_experts/all"].item() == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 8}, "'understanding': top_k = 8 does not fit into num_experts = 7"),
        ({"top_k": 0}, "'understanding': top_k must be at least 1, got 0"),
        ({"hidden_dim": -8}, "'understanding': hidden_dim must be at least 1, got -8"),
    ],
)
def test_sizes_that_no_group_can_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_args((replace(UNEQUAL[0], **changes), *UNEQUAL[1:]))
