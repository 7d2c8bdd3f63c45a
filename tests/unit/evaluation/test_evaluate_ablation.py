"""Probes mask whole groups of routed experts, in every layer, and nothing else; behind them the model is as before."""

from pathlib import Path

import pytest
import torch

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.evaluation.ablation import (
    ablated,
    masked_groups,
)
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE, VIT

DEBUG = Path(__file__).parents[3] / "train_configs" / "debug.toml"
MODALITY_T = torch.tensor([TEXT] * 5 + [VIT] * 4 + [VAE] * 6 + [PADDING])


def debug_model(*overrides):
    config = load_job_config(["--job.config_file", str(DEBUG), *overrides])
    with torch.device("meta"):
        model = SymbioticModel(model_args(config))
    model.to_empty(device="cpu")
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return debug_model()


def layers_of(model):
    layers = [module for module in model.modules() if isinstance(module, PartitionedMoE)]
    assert len(layers) >= 1
    return layers


def outputs(layer, x_TD):
    """(routed and shared together, shared alone)."""
    one = torch.ones(())
    with torch.no_grad():
        out_TD, record = layer(x_TD, MODALITY_T, one)
        assert record.counts.sum() > 0, "routing is counted as ever"
        return out_TD, layer.shared_experts(x_TD, MODALITY_T, one)


def inputs(layer):
    return torch.randn(len(MODALITY_T), layer.args.dim)


def test_with_shared_only_every_layer_gives_what_its_shared_expert_gives(model):
    with ablated(model, "shared_only"):
        for layer in layers_of(model):
            out_TD, shared_TD = outputs(layer, inputs(layer))
            assert torch.equal(out_TD, shared_TD)


def test_without_a_group_only_tokens_of_its_modalities_change(model):
    for layer in layers_of(model):
        x_TD = inputs(layer)
        before_TD, shared_TD = outputs(layer, x_TD)
        with ablated(model, "without:generation"):
            out_TD, _ = outputs(layer, x_TD)
        is_vae_T = MODALITY_T == VAE
        assert torch.equal(out_TD[is_vae_T], shared_TD[is_vae_T])
        assert torch.equal(out_TD[~is_vae_T], before_TD[~is_vae_T])
        assert not torch.equal(before_TD[is_vae_T], shared_TD[is_vae_T])


def test_behind_a_probe_and_with_none_the_model_is_as_before(model):
    [layer, *_] = layers_of(model)
    x_TD = inputs(layer)
    before_TD, _ = outputs(layer, x_TD)
    with pytest.raises(RuntimeError), ablated(model, "shared_only"):
        raise RuntimeError
    assert torch.equal(outputs(layer, x_TD)[0], before_TD)
    with ablated(model, "none"):
        assert torch.equal(outputs(layer, x_TD)[0], before_TD)


@pytest.mark.parametrize("probe", ["without:vae", "shared", "without:"])
def test_an_unknown_probe_is_told_with_those_that_there_are(model, probe):
    known = "none, shared_only, without:understanding, without:generation"
    with pytest.raises(
        ValueError, match=f"--probe {probe}: unknown for this model; choose from {known}"
    ):
        masked_groups(model, probe)


def test_a_model_that_would_be_left_with_nothing_is_refused():
    alone = debug_model("--experts.no-shared")
    with pytest.raises(ValueError, match="shared_only: the model has no shared expert"):
        masked_groups(alone, "shared_only")
    with pytest.raises(ValueError, match="the model has no routed experts; leave --probe out"):
        masked_groups(torch.nn.Linear(2, 2), "shared_only")
