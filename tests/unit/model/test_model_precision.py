"""In bfloat16 a single process (autocast, float32 weights) computes bit for bit what FSDP does (weights rounded, but the routers')."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from symbiotic_titan.moe.router import Router
from symbiotic_titan.sequence.modality import VAE
from tests.helpers.query_models import with_queries
from tests.helpers.tiny_models import MIXED, deep_args, pack_row, tiny_args

VIT = tiny_args().vit
CASES = {
    "plain": tiny_args(),
    "deepstack, table": deep_args(),
    "rms, outer norms": tiny_args(vit=replace(VIT, norm="rms", bias=False, outer_norms=True)),
    "resampler": tiny_args(vit=replace(VIT, resampled_frames=2, last_norm=True)),
    "queries": with_queries(tiny_args(), {2: 3, 4: 5}),
    "shield": tiny_args(shield_modalities=(VAE,), shield_mode="weights", shared_gate=True),
}


def rounded(model):
    """``model`` with the weights that FSDP gives it in bfloat16."""
    exact = {
        name: (router, {n: p.clone() for n, p in router.state_dict().items()})
        for name, router in model.named_modules()
        if isinstance(router, Router)
    }
    model.bfloat16()
    for router, state in exact.values():
        router.float().load_state_dict(state)
    return model


def watched(model):
    """The outputs of the model's modules, by name, filled by the next forward."""
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                seen[name] = first.detach()

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    return seen


@pytest.mark.parametrize("case", CASES)
def test_autocast_computes_what_rounded_weights_do(case, make_model, forward):
    args = CASES[case]
    one, several = make_model(args), rounded(make_model(args))
    batch = pack_row(MIXED, args)
    seen, expected = watched(one), watched(several)
    with torch.autocast("cpu", torch.bfloat16):
        output = forward(one, batch)
    reference = forward(several, batch)
    assert len(seen) > 30 and seen.keys() == expected.keys()
    for name, tensor in seen.items():
        is_table = isinstance(one.get_submodule(name), nn.Embedding)  # rounded after the look-up
        tensor = tensor.to(expected[name].dtype) if is_table else tensor
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert {seen[f"layers.{i}"].dtype for i in range(args.num_layers)} == {torch.bfloat16}
    assert torch.equal(output.logits, reference.logits)
    assert torch.equal(output.velocity, reference.velocity)
