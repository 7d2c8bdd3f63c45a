"""The shield against plain autograd with explicit detach."""

import pytest
import torch
import torch.nn.functional as F

from symbiotic_titan.moe.shared_expert import SharedExpert
from symbiotic_titan.sequence.modality import TEXT, VAE
from tests.unit.moe.moe_reference import grads, make_args, make_tokens

SHIELDED = (TEXT, VAE)


def make_expert(mode, gate=True, modalities=SHIELDED):
    expert = SharedExpert(
        make_args(
            shared_hidden_dim=24,
            shared_gate=gate,
            shield_modalities=modalities,
            shield_mode=mode,
        )
    )
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return expert


def partly_detached(tensor, scale, shielded):
    """``tensor``, with ``scale`` of its gradient where ``shielded``."""
    return torch.where(shielded, scale * tensor + (1 - scale) * tensor.detach(), tensor)


def reference(expert, mode, x_TD, modality_T, scale):
    """The same with explicit detach: on the output, or on every weight, token by token."""
    shielded_T1 = torch.isin(modality_T, torch.tensor(SHIELDED)).unsqueeze(-1)

    def linear(layer, y):
        if mode == "output":
            return layer(y)
        blocked = scale * layer.weight + (1 - scale) * layer.weight.detach()
        return torch.where(shielded_T1, F.linear(y, blocked), F.linear(y, layer.weight))

    out = linear(expert.w2, F.silu(linear(expert.w1, x_TD)) * linear(expert.w3, x_TD))
    if expert.gate is not None:
        out = out * linear(expert.gate, x_TD).sigmoid()
    return partly_detached(out, scale, shielded_T1) if mode == "output" else out


@pytest.mark.parametrize("mode", ["output", "weights"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_gradients_equal_explicit_detach(mode, gate, scale):
    expert = make_expert(mode, gate)
    x_TD, modality_T = make_tokens()
    out_TD = expert(x_TD, modality_T, torch.tensor(scale))
    expected_TD = reference(expert, mode, x_TD, modality_T, scale)
    direction_TD = torch.randn_like(out_TD)
    expected = grads((expected_TD * direction_TD).sum(), expert, x_TD)
    for name, grad in grads((out_TD * direction_TD).sum(), expert, x_TD).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("mode", ["output", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_forward_has_the_bits_of_no_shield(mode, dtype, scale):
    expert, plain = make_expert(mode).to(dtype), make_expert(mode, modalities=()).to(dtype)
    plain.load_state_dict(expert.state_dict())
    x_TD, modality_T = make_tokens(dtype=dtype)
    ours = expert(x_TD, modality_T, torch.tensor(scale))
    assert torch.equal(ours, plain(x_TD, modality_T, torch.tensor(1.0)))


@pytest.mark.parametrize("mode", ["output", "weights"])
def test_forward_has_the_bits_of_no_shield_under_autocast(mode):
    expert, plain = make_expert(mode), make_expert(mode, modalities=())
    plain.load_state_dict(expert.state_dict())
    x_TD, modality_T = make_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        ours = expert(x_TD, modality_T, torch.tensor(0.1))
        assert torch.equal(ours, plain(x_TD, modality_T, torch.tensor(1.0)))
    assert all(g.dtype == torch.float32 for g in grads(ours.sum(), expert, x_TD).values())


@pytest.mark.parametrize("mode", ["output", "weights"])
def test_scale_zero_leaves_zero_gradients_that_exist(mode):
    expert = make_expert(mode)
    x_TD, _ = make_tokens()
    out_TD = expert(x_TD, torch.full((50,), VAE), torch.tensor(0.0))
    found = grads(out_TD.sum(), expert, x_TD)
    passes = found.pop("input0").count_nonzero() > 0
    assert passes == (mode == "weights")
    assert all(grad.count_nonzero() == 0 for grad in found.values())


# torch 2.13 warns about itself when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_new_scale_is_the_same_program():
    expert = make_expert("output")
    x_TD, modality_T = make_tokens()
    compiled = torch.compile(expert, backend="aot_eager", fullgraph=True)
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    counted = torch.compile(expert, backend=counter, fullgraph=True)
    for scale in (0.0, 0.1, 1.0):
        value = torch.tensor(scale)
        counted(x_TD, modality_T, value)
        found = grads(compiled(x_TD, modality_T, value).sum(), expert, x_TD)
        expected = grads(expert(x_TD, modality_T, value).sum(), expert, x_TD)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)
    assert counter.frame_count == 1
