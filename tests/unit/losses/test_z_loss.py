"""The routers' z-loss: against a plain reference, over accumulated micro-batches, and without any cost while it has no weight."""

import re
from pathlib import Path

import pytest
import torch

from symbiotic_titan.config.losses import Losses
from symbiotic_titan.losses.balance import z_by_group, z_loss
from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.moe.partition import tokens_of_groups
from symbiotic_titan.moe.record import routing_totals
from symbiotic_titan.sequence.modality import NUM_MODALITIES, PADDING, TEXT
from symbiotic_titan.train import main
from tests.helpers.moe_reference import GROUPS, UNEQUAL, make_args, make_layer, make_tokens

NO_SHIELD = torch.tensor(1.0)
DEBUG = Path(__file__).parents[3] / "train_configs" / "debug.toml"


def measuring_layer(groups=GROUPS):
    layer = make_layer(make_args(groups))
    layer.router.measures_z = True
    return layer


def inputs_of(records, layer, modality_T):
    """What the term reads; ``modality_T`` are the tokens of the whole step."""
    tokens_M = torch.stack([(modality_T == m).sum() for m in range(NUM_MODALITIES)])
    tokens_G = tokens_of_groups(tokens_M, layer.args.groups)
    empty = torch.empty(0)
    return StepInputs(None, empty, empty, empty, records, group_tokens=tokens_G)


def plain_z_loss(layer, x_TD, modality_T):
    """Token by token: the sum over groups of the mean over a group's tokens."""
    total = 0.0
    for group in layer.args.groups:
        weight = layer.router[group.name].weight
        tokens = [
            x for x, m in zip(x_TD, modality_T.tolist(), strict=True) if m in group.modalities
        ]
        norms = [(weight @ x).exp().sum().log() for x in tokens]
        total = total + sum(norm**2 for norm in norms) / max(len(norms), 1)
    return total


@pytest.mark.parametrize("groups", [GROUPS, UNEQUAL])
def test_loss_and_gradients_are_those_of_a_plain_reference(groups):
    layers = [measuring_layer(groups), measuring_layer(groups)]
    x_TD, modality_T = make_tokens(60)
    assert (modality_T == PADDING).any()
    wanted = [x_TD, *(layer.router[g.name].weight for layer in layers for g in groups)]
    records = [layer(x_TD, modality_T, NO_SHIELD)[1] for layer in layers]
    found = z_loss(inputs_of(records, layers[0], modality_T))
    expected = sum(plain_z_loss(layer, x_TD, modality_T) for layer in layers) / 2
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)
    for grad, other in zip(*grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)
    assert (grads[0][0][modality_T == PADDING] == 0).all()


def test_accumulating_micro_batches_equals_one_batch():
    layer = measuring_layer()
    x_TD, modality_T = make_tokens(120)
    weights = list(layer.router.parameters())
    whole = layer(x_TD, modality_T, NO_SHIELD)[1]
    expected = z_loss(inputs_of([whole], layer, modality_T))
    # Unequal pieces; the first has no generated token at all.
    order = torch.argsort(modality_T == 2, stable=True)
    pieces = [order[:40], order[40:65], order[65:]]
    records = [layer(x_TD[p], modality_T[p], NO_SHIELD)[1] for p in pieces]
    shares = sum(z_loss(inputs_of([record], layer, modality_T)) for record in records)
    torch.testing.assert_close(shares, expected)
    grads = (torch.autograd.grad(loss, weights) for loss in (shares, expected))
    for grad, other in zip(*grads, strict=True):
        torch.testing.assert_close(grad, other)
    totals = sum(map(routing_totals, [[r] for r in records[1:]]), routing_totals(records[:1]))
    by_group = z_by_group(totals, [group.name for group in GROUPS])
    assert list(by_group) == ["z_loss/understanding", "z_loss/generation"]
    assert sum(by_group.values()) == pytest.approx(expected.item())


def test_a_group_without_tokens_costs_nothing_and_has_a_zero_gradient():
    layer = measuring_layer()
    x_TD, _ = make_tokens(20)
    modality_T = torch.full((20,), TEXT)
    record = layer(x_TD, modality_T, NO_SHIELD)[1]
    loss = z_loss(inputs_of([record], layer, modality_T))
    und, gen = torch.autograd.grad(loss, [layer.router[g.name].weight for g in GROUPS])
    assert loss > 0 and und.count_nonzero() > 0 and gen.count_nonzero() == 0
    assert list(z_by_group(routing_totals([record]), ["und", "gen"])) == ["z_loss/und"]


def saved_numbers(layer, x_TD, modality_T):
    """Numbers that autograd keeps for the backward, and what the layer returned."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()), lambda _: None
    ):
        returned = layer(x_TD, modality_T, NO_SHIELD)
    return sum(sizes), returned


def test_without_a_weight_nothing_is_measured_and_nothing_else_changes():
    layer = make_layer(make_args())
    x_TD, modality_T = make_tokens(64)
    few, (out_TD, record) = saved_numbers(layer, x_TD, modality_T)
    layer.router.measures_z = True
    more, (same_TD, measured) = saved_numbers(layer, x_TD, modality_T)
    assert more >= few + 64 * layer.args.num_experts  # the logits
    assert torch.equal(out_TD, same_TD)
    assert all(map(torch.equal, record.prob_sum, measured.prob_sum))
    assert record.z_sum is None and routing_totals([record]).z_sum is None
    assert z_by_group(routing_totals([record]), ["und", "gen"]) == {}
    assert "z_loss" not in LossFunction(Losses()).weights
    weighted = LossFunction(Losses(z_loss=1e-3))
    assert list(weighted.weights) == [*LossFunction(Losses()).weights, "z_loss"]
    assert weighted.weights["z_loss"] == 1e-3


def test_training_with_it_lowers_the_normaliser():
    layer = measuring_layer()
    x_TD, modality_T = make_tokens(200)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        record = layer(x_TD.detach(), modality_T, NO_SHIELD)[1]
        loss = z_loss(inputs_of([record], layer, modality_T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--experts.score_function=sigmoid"],
            r"losses\.z_loss = 0\.001: is the squared logsumexp .* scores are 'sigmoid'; set it to 0, or experts\.score_",
        ),
        (["--losses.z_loss=-1"], r"losses\.z_loss: must be zero or positive, got -1"),
    ],
)
def test_a_weight_that_means_nothing_is_refused_before_anything_is_built(
    options, message, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("torchtitan.tools.logging.init_logger", lambda: None)
    folder = f"--job.dump_folder={tmp_path / 'run'}"
    words = ["--job.config_file", str(DEBUG), "--losses.z_loss=0.001", *options, folder]
    with caplog.at_level("ERROR"):
        assert main(words) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(message, line) and "\n" not in line
    assert not (tmp_path / "run").exists()
