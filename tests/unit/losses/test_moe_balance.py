"""The balancing loss, per group, per layer, and over accumulated micro-batches."""

import functools
import operator

import pytest
import torch

from symbiotic_titan.losses.balance import balance, balance_loss
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.moe.record import RoutingRecord, routing_totals
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE
from tests.helpers.moe_reference import make_args, make_layer, make_tokens

NO_SHIELD = torch.tensor(1.0)


def record_of(counts, prob_sum, num_tokens):
    return RoutingRecord(
        counts=torch.tensor(counts),
        prob_sum=tuple(torch.tensor(p, requires_grad=True) for p in prob_sum),
        num_tokens=torch.tensor(num_tokens),
    )


def test_uniform_routing_costs_one_per_group():
    record = record_of([[4, 4, 6, 6, 6], [0] * 5, [0] * 5], [[2.0, 2.0], [3.0, 3.0, 3.0]], [4, 9])
    torch.testing.assert_close(balance_loss([record]), torch.tensor(2.0))


def test_all_tokens_on_one_expert_cost_the_size_of_the_group():
    record = record_of([[8, 0, 0, 0]] + [[0] * 4] * 2, [[8.0, 0.0, 0.0, 0.0]], [8])
    torch.testing.assert_close(balance_loss([record]), torch.tensor(4.0))


def test_loss_follows_the_formula_by_hand_and_groups_are_independent():
    record = record_of([[3, 1, 0, 0], [1, 3, 0, 0], [0, 0, 9, 1]], [[1.0, 3.0], [4.0, 1.0]], [4, 5])
    expected = 2 * (0.5 * 1 / 4 + 0.5 * 3 / 4) + 2 * (0.9 * 4 / 5 + 0.1 * 1 / 5)
    loss = balance_loss([record])
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.backward()
    torch.testing.assert_close(record.prob_sum[0].grad, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(record.prob_sum[1].grad, torch.tensor([0.36, 0.04]))


def test_layers_are_averaged():
    one = record_of([[4, 4]] + [[0, 0]] * 2, [[2.0, 2.0]], [4])
    two = record_of([[8, 0]] + [[0, 0]] * 2, [[4.0, 0.0]], [4])
    torch.testing.assert_close(balance_loss([one, two]), torch.tensor(1.5))


def test_group_without_tokens_costs_nothing_and_has_a_zero_gradient():
    layer = make_layer(make_args())
    x_TD, _ = make_tokens(20)
    for modality, groups in ((TEXT, 1), (PADDING, 0)):
        _, record = layer(x_TD, torch.full((20,), modality), NO_SHIELD)
        loss = balance_loss([record])
        assert (loss > 0) == (groups > 0)
        router = layer.router
        found = torch.autograd.grad(loss, [router[g].weight for g in router])
        assert (found[0].count_nonzero() > 0) == (groups > 0)
        assert found[1].count_nonzero() == 0


def test_accumulating_micro_batches_equals_one_batch():
    layer = make_layer(make_args())
    x_TD, modality_T = make_tokens(120)
    _, whole = layer(x_TD, modality_T, NO_SHIELD)
    expected = balance_loss([whole, whole])
    weights = list(layer.router.parameters())
    expected_grads = torch.autograd.grad(expected, weights)

    # Unequal pieces; the first has no generated token at all.
    order = torch.argsort(modality_T == 2, stable=True)
    pieces = [order[:40], order[40:65], order[65:]]
    records = [layer(x_TD[p], modality_T[p], NO_SHIELD)[1] for p in pieces]
    assert records[0].num_tokens[1] == 0
    totals = sum(
        (routing_totals([r, r]) for r in records[1:]), start=routing_totals([records[0]] * 2)
    )
    parts = [balance_loss([r, r], totals) for r in records]
    torch.testing.assert_close(sum(parts), expected)
    found = torch.autograd.grad(sum(parts), weights)
    for grad, wanted in zip(found, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


# (text and ViT tokens, generated tokens) of each micro-batch.
MIXTURES = {"an_absent_group": [(9, 0), (7, 5), (8, 3), (6, 0)], "all_groups": [(9, 1), (2, 5)]}


def micro_batches(layer, mixture):
    """One record for each micro-batch."""
    for und, gen in mixture:
        x_TD, _ = make_tokens(und + gen)
        modality_T = torch.tensor([TEXT] * und + [VAE] * gen)
        yield layer(x_TD, modality_T, NO_SHIELD)[1]


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_a_group_s_loss_is_that_of_the_micro_batches_in_which_it_has_tokens(mixture):
    """Micro-batch by micro-batch with a plain formula: one without the group's tokens does not pull its mean down."""
    layer = make_layer(make_args())
    records = list(micro_batches(layer, mixture))
    tokens_G = sum(record.num_tokens for record in records)
    batches_G = sum((record.num_tokens > 0).int() for record in records)
    step = functools.reduce(operator.add, [routing_totals([record]) for record in records])
    expected = {"local": 0.0, "global": 0.0}
    for group, (size, end) in enumerate(((7, 7), (5, 12))):
        experts = slice(end - size, end)
        of_step_E = step.counts[0].sum(0)[experts]
        for record in records:
            counts_E, sum_E = record.counts.sum(0)[experts], record.prob_sum[group]
            if counts_E.sum():
                own = size * (counts_E / counts_E.sum() * sum_E / record.num_tokens[group]).sum()
                expected["local"] += own / batches_G[group]
                expected["global"] += (
                    size * (of_step_E / of_step_E.sum() * sum_E / tokens_G[group]).sum()
                )
    empty, weights = torch.empty(0), list(layer.router.parameters())
    for scope, routing in (("local", None), ("global", step)):
        shares = [
            balance(
                StepInputs(
                    None, empty, empty, empty, [record], num_micro_batches=len(records),
                    step_routing=routing, group_batches=batches_G,
                )
            )
            for record in records
        ]  # fmt: skip
        torch.testing.assert_close(sum(shares), expected[scope])
        found = torch.autograd.grad(sum(shares), weights, retain_graph=True)
        wanted = torch.autograd.grad(expected[scope], weights, retain_graph=True)
        torch.testing.assert_close(found, wanted)


def test_descent_on_the_loss_balances_the_experts():
    layer = make_layer(make_args())
    x_TD, modality_T = make_tokens(400)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        _, record = layer(x_TD.detach(), modality_T, NO_SHIELD)
        loss = balance_loss([record])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
