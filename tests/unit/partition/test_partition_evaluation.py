"""Evaluation of a partition, on layers small enough to count by hand."""

import copy

import pytest
import torch
from torch import nn

from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.partition.evaluate import (
    EqualShares,
    InsideShares,
    StepZeroReport,
    moe_layers,
)
from symbiotic_titan.partition.plan import Plan
from symbiotic_titan.partition.profile import ModelIdentity
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE, VIT
from tests.helpers.moe_reference import POOL, make_args, make_layer, make_tokens

ALONE = DataRanks(torch.device("cpu"), 0, 1, None)
GROUPS = (ExpertGroup("und", (TEXT, VIT), 7), ExpertGroup("gen", (VAE,), 5))


def model_of(*layers) -> nn.Module:
    """A dense block, then one block per MoE layer."""
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": nn.Identity()})
    for i, layer in enumerate(layers, start=1):
        model.layers[str(i)] = nn.Module()
        model.layers[str(i)].moe = layer
    return model


def test_moe_layers_are_named_as_in_parameter_names():
    layer = make_layer(make_args())
    assert moe_layers(model_of(layer)) == {"layers.1": layer}


def test_inside_shares_count_tokens_whose_top_k_is_in_their_group():
    layers = [make_layer(make_args(POOL)) for _ in range(2)]
    order = torch.stack([torch.randperm(12) for _ in layers])
    identity = ModelIdentity("tiny", None, "", {"all": 12}, 3)
    plan = Plan(identity, "lot", 0, GROUPS, ("layers.1", "layers.2"), order)
    x_TD, modality_T = make_tokens(200)
    inside = InsideShares(plan, torch.device("cpu"))
    with inside.counting(model_of(*layers)):
        for half in (slice(0, 100), slice(100, 200)):
            for layer in layers:
                layer(x_TD[half], modality_T[half], torch.ones(()))
    layers[0](x_TD, modality_T, torch.ones(()))  # outside the block nothing is counted
    shares = inside.shares(ALONE)
    for i, layer in enumerate(layers):
        own = {TEXT: set(order[i, :7].tolist()), VAE: set(order[i, 7:].tolist())}
        chosen_TK = layer.router(x_TD, modality_T).experts_TK.tolist()
        for name, modality in (("text", TEXT), ("vit", VIT), ("vae", VAE)):
            mine = [set(c) for c, m in zip(chosen_TK, modality_T, strict=True) if m == modality]
            group = own[VAE if modality == VAE else TEXT]
            assert shares[name][i] == sum(chosen <= group for chosen in mine) / len(mine)
    assert 0 < shares["text"][0] < 1


def test_shares_of_a_modality_without_tokens_are_left_out():
    layer = make_layer(make_args(POOL))
    identity = ModelIdentity("tiny", None, "", {"all": 12}, 3)
    plan = Plan(identity, "lot", 0, GROUPS, ("layers.1",), torch.arange(12).unsqueeze(0))
    inside = InsideShares(plan, torch.device("cpu"))
    with inside.counting(model_of(layer)):
        layer(torch.randn(8, 16), torch.tensor([TEXT] * 6 + [PADDING] * 2), torch.ones(()))
    assert inside.shares(ALONE).keys() == {"text"}


def test_equal_shares_count_tokens_whose_output_is_the_same_bits_for_the_same_input():
    """Another expert in the first layer does not tell on the second, which gets the original's input."""
    before = [make_layer(make_args(POOL)) for _ in range(2)]
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].experts["all"].w2[5] += 1
    x_TD, modality_T = make_tokens(200)
    names = ("layers.1", "layers.2")
    equal = EqualShares(names, torch.device("cpu"))

    def forward(layers):
        x, one = x_TD, torch.ones(())
        for layer in layers:
            x = x + layer(x, modality_T, one)[0]

    with torch.no_grad():
        with equal.recording(model_of(*before)):
            forward(before)
        with equal.comparing(model_of(*after)):
            forward(after)
        forward(after)  # outside the block nothing is counted
    shares = equal.shares(ALONE)
    uses_T = (before[0].router(x_TD, modality_T).experts_TK == 5).any(-1)
    for name, modality in (("text", TEXT), ("vit", VIT), ("vae", VAE)):
        mine_T = modality_T == modality
        expected = float((~uses_T & mine_T).sum() / mine_T.sum())
        assert shares[name] == [pytest.approx(expected), 1.0]
    assert 0 < shares["text"][0] < 1


def test_differences_are_relative_to_the_original():
    columns = {"original": {"text": 2.0, "accuracy/mmu": 0.0}, "partitioned": {"text": 2.1}}
    report = StepZeroReport({}, columns | {"shared_only": {"text": 9.0}}, (), {})
    assert report.differences.keys() == {"text"}
    assert abs(report.differences["text"] - 0.05) < 1e-12
    without = StepZeroReport({}, {"partitioned": {"text": 2.1}}, (), {})
    assert without.differences == {} and without.values()["layers"] == []
