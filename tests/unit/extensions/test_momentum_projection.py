"""The projection against its plain formula; on and off by config, as any user's module is."""

import pytest
import torch
from torch import nn

from symbiotic_titan.config.optimizer import Optimizer
from symbiotic_titan.extensions.momentum_projection import project
from symbiotic_titan.optim.build import build_optimizers

RULES = [{"name": "shared", "match": ["^0"]}, {"name": "own", "match": [".*"]}]


def plain(gradient, momentum):
    along = (gradient * momentum).sum()
    return gradient - along / momentum.square().sum() * momentum if along < 0 else gradient


def test_an_opposing_gradient_loses_its_part_along_the_momentum():
    gradient, momentum = torch.randn(5, 3), torch.randn(5, 3)
    gradient -= 2 * momentum
    found = gradient.clone()
    project([found], [momentum])
    torch.testing.assert_close(found, plain(gradient, momentum))
    assert abs(float((found * momentum).sum())) < 1e-5
    # Pythagoras: what was taken out is as long as the gradient's part along the momentum.
    along = (gradient * momentum).sum() / momentum.norm()
    assert float(found.norm() ** 2 + along**2) == pytest.approx(float(gradient.norm() ** 2))


def test_an_agreeing_gradient_keeps_its_bits():
    momentum = torch.randn(5, 3)
    gradients = [momentum + 0.1 * torch.randn(5, 3), torch.tensor([0.0, 1.0])]
    found = [g.clone() for g in gradients]
    project(found, [momentum, torch.tensor([1.0, 0.0])])  # the second: at a right angle
    assert all(map(torch.equal, found, gradients))


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_a_momentum_too_small_to_square_does_no_harm(size):
    found, momentum = torch.ones(3), torch.full((3,), -size)
    project([found], [momentum])
    assert torch.isfinite(found).all() and torch.allclose(found, torch.ones(3))


def test_arithmetic_is_float32_for_bfloat16():
    momentum = torch.full((4096,), 1.0).bfloat16()
    found = (-momentum).clone()
    found[0] = 8.0
    expected = plain(found.float(), momentum.float())
    project([found], [momentum])
    torch.testing.assert_close(found, expected.bfloat16())


def make(**config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    rules = {"lr": 0.1, "weight_decay": 0.0, "param_groups": RULES}
    return model, build_optimizers([model], Optimizer(**rules, **config), None)


def projected(groups=("shared",)):
    options = {"groups": list(groups)}
    return make(builder="momentum_projection", builder_options=options)


def step(model, optimizers, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    optimizers.step()


def test_only_the_named_groups_are_projected_and_never_in_the_first_step():
    ours, plainly = projected(), make()
    for scale in (1.0, -2.0):
        step(*ours, 0, scale)
        step(*plainly, 0, scale)
        same = [
            torch.equal(a, b)
            for a, b in zip(ours[0].parameters(), plainly[0].parameters(), strict=True)
        ]
        assert same == [scale == 1.0] * 2 + [True] * 2


def test_steps_are_those_of_adam_with_projected_gradients():
    (model, optimizers), (other, plainly) = projected(("shared", "own")), make()
    for seed in range(5):
        step(model, optimizers, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in other.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            state = plainly.optimizers[0].state.get(parameter)
            parameter.grad = plain(gradient, state["exp_avg"]) if state else gradient
        plainly.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


def test_resume_goes_on_to_the_bit():
    model, optimizers = projected()
    for seed in range(3):
        step(model, optimizers, seed)
    resumed_model, resumed = projected()
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(
        {k: torch.as_tensor(v).clone() for k, v in optimizers.state_dict().items()}
    )
    for seed in range(3, 6):
        step(model, optimizers, seed)
        step(resumed_model, resumed, seed)
    assert all(map(torch.equal, model.parameters(), resumed_model.parameters()))


def test_checkpoint_has_nothing_more_than_that_of_adam():
    assert projected()[1].state_dict().keys() == make()[1].state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "optimizer.builder_options: missing key 'groups'"),
        ({"groups": ["sharde"]}, "no trainable group 'sharde'; choose from shared, own"),
        ({"groups": "shared"}, "builder_options.groups: must be a list, each item a string"),
        ({"group": ["shared"]}, "unknown key 'group'; did you mean 'groups'?"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        make(builder="momentum_projection", builder_options=options)
    assert message in str(error.value)
