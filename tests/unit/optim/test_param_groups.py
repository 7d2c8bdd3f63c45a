"""Every parameter is claimed by exactly one rule; rates are the config's, state follows names."""

import pytest
import torch
from torch import nn

from symbiotic_titan import device

device.prepare()

from torchtitan.config import LRScheduler  # noqa: E402

from symbiotic_titan.config.experts import Shielding  # noqa: E402
from symbiotic_titan.config.optimizer import Optimizer, ParamGroupRow  # noqa: E402
from symbiotic_titan.optim.build import (  # noqa: E402
    ParamGroupOptimizers,
    build_schedulers,
    freeze_parameters,
)
from symbiotic_titan.optim.param_groups import claim_parameters  # noqa: E402
from symbiotic_titan.optim.shield_schedule import shield_scale  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x):
        return self.second(self.first(x))


RULES = [{"name": "fast", "match": ["^second"], "lr": 0.5}, {"name": "rest", "match": [".*"]}]


def test_first_matching_rule_claims_a_parameter_once():
    rules = [ParamGroupRow("a", ["weight"]), ParamGroupRow("b", [".*"])]
    claimed = claim_parameters(["x.weight", "x.bias", "y.weight"], rules)
    assert claimed == {"a": ["x.weight", "y.weight"], "b": ["x.bias"]}


def test_wrapper_prefixes_do_not_hide_a_parameter_from_its_rule():
    rules = [ParamGroupRow("a", [r"^layers\.0\.w$"])]
    assert claim_parameters(["layers.0._checkpoint_wrapped_module.w"], rules)["a"]


def test_unclaimed_parameters_are_listed():
    with pytest.raises(ValueError, match=r"no rule claims 1 parameters, e.g. x.bias; add a last"):
        claim_parameters(["x.weight", "x.bias"], [ParamGroupRow("a", ["weight"])])


def test_rule_without_parameters_is_named():
    rules = [ParamGroupRow("a", [".*"]), ParamGroupRow("b", ["weight"])]
    with pytest.raises(ValueError, match=r"#2 \(b\): match \['weight'\] claims no parameter"):
        claim_parameters(["x.weight"], rules)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "a", "match": ["("]}, r"#1 \(a\): match '\(' is not a regular expression"),
        ({"name": "a", "match": []}, "match is empty"),
        ({"name": "a", "match": ["x"], "lr": 1.0, "frozen": True}, "a frozen group has no lr"),
        (
            {"name": "a", "match": ["x"], "betas": [0.9, 1.5]},
            r"betas must be two numbers in \[0, 1\)",
        ),
        ({"name": "a", "match": ["x"], "lr": -1.0}, "lr must be zero or positive, got -1.0"),
        ({"name": "a", "match": "x"}, r"match: must be a list, each item a string, got 'x'"),
        ({"name": "a", "match": ["x"], "rate": 1.0}, "unknown key 'rate'"),
    ],
)
def test_bad_rules_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(param_groups=[row])


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(ValueError, match="name is used twice"):
        Optimizer(param_groups=[{"name": "a", "match": ["x"]}, {"name": "a", "match": ["y"]}])


def train_steps(net, optimizers, schedulers, num_steps):
    torch.manual_seed(0)
    for _ in range(num_steps):
        optimizers.zero_grad()
        net(torch.randn(4, 3)).square().sum().backward()
        optimizers.step()
        schedulers.step()


def make(rules, **config):
    torch.manual_seed(1)
    net = Net()
    optimizer_config = Optimizer(lr=0.1, param_groups=rules, implementation="foreach", **config)
    freeze_parameters(net, optimizer_config.param_groups)
    optimizers = ParamGroupOptimizers(net, optimizer_config)
    schedule = LRScheduler(warmup_steps=4, decay_ratio=0.0)
    return net, optimizers, build_schedulers(optimizers, schedule, 100)


def test_groups_have_their_own_rate_under_one_schedule():
    net, optimizers, schedulers = make(RULES)
    assert {g["name"]: g["lr"] for g in optimizers.groups} == {"fast": 0.125, "rest": 0.025}
    train_steps(net, optimizers, schedulers, 4)
    assert {g["name"]: g["lr"] for g in optimizers.groups} == {"fast": 0.5, "rest": 0.1}


def test_resume_keeps_adam_state_and_takes_rates_from_the_config():
    net, optimizers, schedulers = make(RULES)
    train_steps(net, optimizers, schedulers, 6)
    saved, saved_schedule = optimizers.state_dict(), schedulers.state_dict()

    other_rules = [
        {"name": "first", "match": ["^first"], "lr": 0.3},
        {"name": "r", "match": [".*"]},
    ]
    net2, optimizers2, schedulers2 = make(other_rules)
    net2.load_state_dict(net.state_dict())
    template = optimizers2.state_dict()
    optimizers2.load_state_dict({**template, **{k: v for k, v in saved.items() if k in template}})
    schedulers2.load_state_dict(saved_schedule)
    assert {g["name"]: g["lr"] for g in optimizers2.groups} == {"first": 0.3, "r": 0.1}
    assert schedulers2.schedulers[0].last_epoch == 6
    old = optimizers.optimizers[0].state[net.first.weight]["exp_avg"]
    assert torch.equal(optimizers2.optimizers[0].state[net2.first.weight]["exp_avg"], old)


def test_frozen_group_neither_moves_nor_holds_state():
    rules = [
        {"name": "frozen", "match": ["^first"], "frozen": True},
        {"name": "r", "match": [".*"]},
    ]
    net, optimizers, schedulers = make(rules)
    before = net.first.weight.detach().clone()
    train_steps(net, optimizers, schedulers, 2)
    assert torch.equal(net.first.weight, before)
    assert net.first.weight not in optimizers.optimizers[0].state
    assert [g["name"] for g in optimizers.groups] == ["r"]


def test_shield_scale_is_a_function_of_the_step():
    step = Shielding(steps=3, after_scale=0.1)
    assert [shield_scale(step, s) for s in (1, 3, 4, 100)] == [0.0, 0.0, 0.1, 0.1]
    linear = Shielding(steps=4, after_scale=0.2, ramp="linear")
    assert [round(shield_scale(linear, s), 3) for s in (1, 3, 5)] == [0.0, 0.1, 0.2]
    assert shield_scale(Shielding(), 1) == 1.0
