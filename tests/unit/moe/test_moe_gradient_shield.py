"""The shield against plain autograd with explicit detach: in both modes, for every set of modalities, at every moment of a
warm-up; the forward pass keeps its bits."""

from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torchtitan.config.job_config import ActivationCheckpoint

from symbiotic_titan.config.experts import Shielding
from symbiotic_titan.moe.experts import SharedExpert
from symbiotic_titan.optim.shield_schedule import shield_scale
from symbiotic_titan.parallel.parallelize import apply_activation_checkpoint
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from tests.helpers.moe_reference import grads, make_args, make_layer, make_tokens, routed_output
from tests.helpers.shield_reference import (
    DEEP,
    MODES,
    SETS,
    assert_within_1e6,
    plain_shared_expert,
    use_plain_shield,
)
from tests.helpers.tiny_models import MIXED, OTHER, pack_row, tiny_args, tiny_model


class Moment(NamedTuple):
    """A step of a run and the scale that holds there."""

    ramp: str
    after_scale: float
    step: int
    scale: float


# A warm-up of 4 steps.
MOMENTS = (
    Moment("step", 0.1, 1, 0.0),  # before: nothing passes
    Moment("step", 0.1, 4, 0.0),
    Moment("linear", 1.0, 2, 0.25),  # during a ramp
    Moment("linear", 0.1, 3, 0.05),
    Moment("step", 0.1, 5, 0.1),  # after
    Moment("linear", 1.0, 5, 1.0),
)
AT_MOMENTS = pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m.ramp}_{m.scale}")
IN_MODES = pytest.mark.parametrize("mode", MODES)
FOR_SETS = pytest.mark.parametrize("modalities", SETS, ids=lambda ids: f"shielded{ids}")


def make_expert(mode, gate=True, modalities=(TEXT, VAE)):
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


def scale_at(moment):
    config = Shielding(steps=4, after_scale=moment.after_scale, ramp=moment.ramp)
    return shield_scale(config, moment.step)


def is_one_of(modality_T, modalities):
    return torch.isin(modality_T, torch.tensor(modalities))


@IN_MODES
@FOR_SETS
@AT_MOMENTS
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
def test_gradients_equal_explicit_detach(mode, modalities, moment, gate):
    """Of the shared weights and of the layer's input."""
    scale = scale_at(moment)
    assert scale == pytest.approx(moment.scale)
    expert = make_expert(mode, gate, modalities)
    x_TD, modality_T = make_tokens()
    out_TD = expert(x_TD, modality_T, torch.tensor(scale))
    shielded_T = is_one_of(modality_T, modalities)
    expected_TD = plain_shared_expert(expert, mode, shielded_T, x_TD, scale)
    direction_TD = torch.randn_like(out_TD) / len(out_TD)
    expected = grads((expected_TD * direction_TD).sum(), expert, x_TD)
    assert_within_1e6(grads((out_TD * direction_TD).sum(), expert, x_TD), expected)


@IN_MODES
@FOR_SETS
@AT_MOMENTS
def test_gradients_of_the_whole_layer_equal_explicit_detach(mode, modalities, moment):
    """Of routers and routed experts as well, which the shield leaves alone."""
    shield = {"shield_modalities": modalities, "shield_mode": mode}
    layer = make_layer(make_args(shared_hidden_dim=24, shared_gate=True, **shield))
    x_TD, modality_T = make_tokens(20)
    out_TD, _ = layer(x_TD, modality_T, torch.tensor(scale_at(moment)))
    shielded_T = is_one_of(modality_T, modalities)
    shared_TD = plain_shared_expert(layer.shared_experts, mode, shielded_T, x_TD, scale_at(moment))
    expected_TD = routed_output(layer, x_TD, modality_T) + shared_TD
    direction_TD = torch.randn_like(out_TD) / len(out_TD)
    expected = grads((expected_TD * direction_TD).sum(), layer, x_TD)
    found = grads((out_TD * direction_TD).sum(), layer, x_TD)
    assert_within_1e6(found, expected, relative=DEEP)  # the routers' are small differences


def model_gradients(model, args, scale):
    batch = stack_rows([pack_row(MIXED, args), pack_row(OTHER, args, seed=10)])
    timesteps_BL = torch.linspace(0.1, 0.9, batch.vae_image.shape[1]).expand(batch.vae_image.shape)
    output = model(batch, batch.latents, timesteps_BL, torch.tensor(scale))
    return grads(output.logits.square().mean() + output.velocity.square().mean(), model)


def checkpointed(model, mode):
    config = ActivationCheckpoint(
        mode=mode, selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=[]
    )
    apply_activation_checkpoint(model, config, "")
    return model


@IN_MODES
@pytest.mark.parametrize("modalities", [(VAE,), (TEXT, VIT, VAE)], ids=str)
def test_gradients_of_a_model_equal_explicit_detach(mode, modalities):
    """Through attention and several layers, with every result kept, recomputed, or recomputed but for the products."""
    args = tiny_args(num_layers=3, shield_modalities=modalities, shield_mode=mode)
    plain = tiny_model(args)
    use_plain_shield(plain, mode, modalities)
    models = [checkpointed(tiny_model(args), ac) for ac in ("none", "full", "selective")]
    weight, seen = "layers.2.moe.shared_experts.w1.weight", []
    for scale in (0.0, 0.05, 0.1, 1.0):
        expected = model_gradients(plain, args, scale)
        seen.append(expected[weight])
        for model in models:
            found = model_gradients(model, args, scale).values()
            named = dict(zip(expected, found, strict=True))
            assert_within_1e6(named, expected, relative=DEEP)
    assert (seen[0] - seen[-1]).abs().max() > 1e-4  # the shield does something here


@IN_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.05, 0.1])
@FOR_SETS
def test_forward_has_the_bits_of_no_shield(mode, dtype, scale, modalities):
    expert = make_expert(mode, modalities=modalities).to(dtype)
    plain = make_expert(mode, modalities=()).to(dtype)
    plain.load_state_dict(expert.state_dict())
    x_TD, modality_T = make_tokens(dtype=dtype)
    ours = expert(x_TD, modality_T, torch.tensor(scale))
    assert torch.equal(ours, plain(x_TD, modality_T, torch.tensor(1.0)))


@IN_MODES
def test_forward_has_the_bits_of_no_shield_under_autocast(mode):
    expert, plain = make_expert(mode), make_expert(mode, modalities=())
    plain.load_state_dict(expert.state_dict())
    x_TD, modality_T = make_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        ours = expert(x_TD.bfloat16(), modality_T, torch.tensor(0.1))
        assert torch.equal(ours, plain(x_TD.bfloat16(), modality_T, torch.tensor(1.0)))
    assert all(g.dtype == torch.float32 for g in grads(ours.sum(), expert, x_TD).values())


@IN_MODES
def test_scale_zero_leaves_zero_gradients_that_exist(mode):
    expert = make_expert(mode)
    x_TD, _ = make_tokens()
    out_TD = expert(x_TD, torch.full((50,), VAE), torch.tensor(0.0))
    found = grads(out_TD.sum(), expert, x_TD)
    passes = found.pop("input0").count_nonzero() > 0
    assert passes == (mode == "weights")
    assert all(grad.count_nonzero() == 0 for grad in found.values())


@IN_MODES
# torch 2.13 warns about itself when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_every_scale_of_a_ramp_is_the_same_program(mode):
    expert = make_expert(mode)
    x_TD, modality_T = make_tokens()
    compiled = torch.compile(expert, backend="aot_eager", fullgraph=True)
    counter = CompileCounter()
    counted = torch.compile(expert, backend=counter, fullgraph=True)
    config, scale = Shielding(steps=3, after_scale=0.1, ramp="linear"), torch.ones(())
    for step in range(1, 6):
        scale.fill_(shield_scale(config, step))  # as the trainer does
        counted(x_TD, modality_T, scale)
        found = grads(compiled(x_TD, modality_T, scale).sum() / 50, expert, x_TD)
        expected = grads(expert(x_TD, modality_T, scale).sum() / 50, expert, x_TD)
        assert_within_1e6(found, expected)
    assert counter.frame_count == 1
