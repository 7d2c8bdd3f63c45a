"""Every parameter is claimed by exactly one rule; rates are the config's, state follows names."""

import copy

import pytest
import torch
from torch import nn
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import LRScheduler

from symbiotic_titan.config.experts import Shielding
from symbiotic_titan.config.optimizer import Optimizer, ParamGroupRow
from symbiotic_titan.optim.build import (
    OPTIMIZER_BUILDERS,
    build_optimizers,
    claim_parameters,
    freeze_parameters,
    param_group_optimizers,
)
from symbiotic_titan.optim.lr_schedule import (
    build_schedulers,
    schedule_factor,
)
from symbiotic_titan.optim.shield_schedule import shield_scale


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
        (
            {"name": "a", "match": ["x"], "lr": 1.0, "frozen": True},
            "a frozen group has no lr; remove lr = 1.0",
        ),
        (
            {"name": "a", "match": ["x"], "weight_decay": 0.0, "frozen": True},
            "a frozen group has no weight_decay; remove weight_decay = 0.0",
        ),
        (
            {"name": "a", "match": ["x"], "betas": [0.9, 0.95], "frozen": True},
            r"a frozen group has no betas; remove betas = \[0.9, 0.95\]",
        ),
        (
            {"name": "a", "match": ["x"], "warmup_steps": 3, "frozen": True},
            "a frozen group has no warmup_steps; remove warmup_steps = 3",
        ),
        (
            {"name": "a", "match": ["x"], "decay_type": "sqrt", "frozen": True},
            "a frozen group has no decay_type; remove decay_type = sqrt",
        ),
        (
            {"name": "a", "match": ["x"], "frozen": True},
            "every group is frozen, so nothing would be trained; unfreeze one",
        ),
        ({"name": "", "match": ["x"]}, "name: must be a name of 1 to 100 characters"),
        (
            {"name": "a", "match": ["x"], "warmup_steps": -1},
            r"#1.warmup_steps: must be zero or positive, got -1",
        ),
        (
            {"name": "a", "match": ["x"], "warmup_steps": 1.5},
            "#1.warmup_steps: must be an integer, got 1.5",
        ),
        (
            {"name": "a", "match": ["x"], "decay_ratio": 1.5},
            r"#1.decay_ratio: must lie in \[0, 1\], got 1.5",
        ),
        (
            {"name": "a", "match": ["x"], "min_lr_factor": -0.1},
            r"#1.min_lr_factor: must lie in \[0, 1\], got -0.1",
        ),
        (
            {"name": "a", "match": ["x"], "decay_type": "cosin"},
            "#1.decay_type = 'cosin': nothing is registered under this name; choose from linear, sqrt, cosine",
        ),
        (
            {"name": "a", "match": ["x"], "betas": [0.9]},
            r"betas must be two numbers in \[0, 1\), got \[0.9\]",
        ),
        (
            {"name": "a", "match": ["x"], "weight_decay": -0.1},
            "weight_decay: must be zero or positive, got -0.1",
        ),
        (
            {"name": "a", "match": ["x"], "betas": [0.9, 1.5]},
            r"#1.betas\[1\]: must lie in \[0, 1\), got 1.5",
        ),
        ({"name": "a", "match": ["x"], "lr": -1.0}, "lr: must be zero or positive, got -1.0"),
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


def test_the_name_for_all_groups_is_not_a_group_among_others():
    rows = [{"name": "all", "match": ["x"]}, {"name": "rest", "match": [".*"]}]
    with pytest.raises(ValueError, match=r"#1 \(all\): 'all' names what is measured over all"):
        Optimizer(param_groups=rows)
    assert Optimizer(param_groups=[{"name": "all", "match": [".*"]}])


def test_unknown_builders_and_options_without_effect_are_refused():
    config = Optimizer(builder="param_group")
    with pytest.raises(
        ValueError, match="optimizer.builder = 'param_group': nothing is registered"
    ):
        build_optimizers([Net()], config, None)
    with pytest.raises(ValueError, match="builder 'param_groups' has no options, got {'a': 1}"):
        Optimizer(builder_options={"a": 1})


def test_the_named_builder_makes_the_optimizer():
    calls = []

    def mine(model, config, parallel_dims):
        calls.append((config.builder_options, parallel_dims))
        return param_group_optimizers(model, config, parallel_dims)

    OPTIMIZER_BUILDERS.register("test_param_groups.mine", mine)
    config = Optimizer(builder="test_param_groups.mine", builder_options={"a": 1})
    built = build_optimizers([Net()], config, "dims")
    assert calls == [({"a": 1}, "dims")] and [g["name"] for g in built.groups] == ["all"]


def train_steps(net, optimizers, schedulers, num_steps):
    torch.manual_seed(0)
    for _ in range(num_steps):
        optimizers.zero_grad()
        net(torch.randn(4, 3)).square().sum().backward()
        optimizers.step()
        schedulers.step()


def make(rules, schedule=None, num_steps=100, **config):
    torch.manual_seed(1)
    net = Net()
    optimizer_config = Optimizer(lr=0.1, param_groups=rules, implementation="foreach", **config)
    freeze_parameters(net, optimizer_config.param_groups)
    optimizers = build_optimizers([net], optimizer_config, None)
    schedule = schedule or LRScheduler(warmup_steps=4, decay_ratio=0.0)
    return net, optimizers, build_schedulers(optimizers, schedule, num_steps)


def rates_of(optimizers, schedulers, num_steps):
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizers.groups])
        optimizers.step()
        schedulers.step()
    return rates


def test_groups_have_their_own_rate_under_one_schedule():
    net, optimizers, schedulers = make(RULES)
    assert {g["name"]: g["lr"] for g in optimizers.groups} == {"fast": 0.125, "rest": 0.025}
    train_steps(net, optimizers, schedulers, 4)
    assert {g["name"]: g["lr"] for g in optimizers.groups} == {"fast": 0.5, "rest": 0.1}


SCHEDULES = [
    LRScheduler(warmup_steps=4, decay_ratio=0.0),
    LRScheduler(warmup_steps=3, min_lr_factor=0.1),
    LRScheduler(warmup_steps=0, decay_ratio=0.5, decay_type="cosine"),
    LRScheduler(warmup_steps=2, decay_ratio=0.25, decay_type="sqrt", total_steps=12),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_keys_of_its_own_a_group_follows_torchtitan_to_the_bit(schedule):
    _, optimizers, schedulers = make(RULES, schedule, 10)
    _, plain, _ = make(RULES, schedule, 10)
    for group, rate in zip(plain.groups, (0.5, 0.1), strict=True):
        group["lr"] = group["initial_lr"] = rate
    expected = rates_of(plain, build_lr_schedulers(plain, schedule, 10), 10)
    assert rates_of(optimizers, schedulers, 10) == expected


def test_a_group_may_have_a_schedule_of_its_own():
    rules = [
        {
            **RULES[0],
            "warmup_steps": 2,
            "decay_ratio": 0.4,
            "decay_type": "cosine",
            "min_lr_factor": 0.2,
        },
        RULES[1],
    ]
    shape = LRScheduler(warmup_steps=5, decay_ratio=0.0)
    _, optimizers, schedulers = make(rules, shape, 10)
    own = LRScheduler(warmup_steps=2, decay_ratio=0.4, decay_type="cosine", min_lr_factor=0.2)
    found = rates_of(optimizers, schedulers, 10)
    for i, (schedule, rate) in enumerate(((own, 0.5), (shape, 0.1))):
        factor = schedule_factor(schedule, 10)
        assert [row[i] for row in found] == [rate * factor(step) for step in range(10)]
    assert found[0] == [0.25, pytest.approx(0.02)] and found[9][0] < found[5][0] == 0.5


def test_saved_schedule_is_the_step_alone_and_each_group_goes_on_where_it_was():
    rules = [{**RULES[0], "warmup_steps": 8}, RULES[1]]
    _, optimizers, schedulers = make(rules)
    rates = rates_of(optimizers, schedulers, 6)
    _, optimizers, schedulers = make(rules)
    rates_of(optimizers, schedulers, 5)
    assert schedulers.state_dict() == {"last_epoch": 5}
    _, resumed, resumed_schedulers = make(rules)
    resumed_schedulers.load_state_dict(schedulers.state_dict())
    assert [group["lr"] for group in resumed.groups] == rates[5]


def resume(saved, rules):
    """The run that another's state is loaded into, as a checkpoint loads it: what the new run has a place for."""
    net, optimizers, schedulers = saved
    made = make(rules)
    made[0].load_state_dict(net.state_dict())
    template, state = made[1].state_dict(), optimizers.state_dict()
    made[2].load_state_dict(schedulers.state_dict())
    made[1].load_state_dict({key: copy.deepcopy(state[key]) for key in template})
    return made


ONE_GROUP = [{"name": "only", "match": [".*"], "lr": 0.2, "betas": [0.5, 0.6]}]
SPLIT = [
    {"name": "weights", "match": ["second.weight"], "lr": 0.3},
    {"name": "fast", "match": ["^second", "first.bias"], "weight_decay": 0.1},
    {"name": "rest", "match": [".*"]},
]


@pytest.mark.parametrize("rules", [ONE_GROUP, SPLIT, [], RULES[::-1][:1]])
def test_resume_keeps_adam_state_and_takes_settings_from_the_config(rules):
    run = make(RULES)
    train_steps(*run, 6)
    net, optimizers, schedulers = resume(run, rules)
    for (name, old), new in zip(run[0].named_parameters(), net.parameters(), strict=True):
        before, after = (o.optimizers[0].state[p] for o, p in ((run[1], old), (optimizers, new)))
        assert all(torch.equal(before[key], after[key]) for key in before), name
        assert after["step"] == 6
    _, fresh, _ = make(rules)
    for group, wanted in zip(optimizers.groups, fresh.groups, strict=True):
        settings = {k: v for k, v in group.items() if k not in ("params", "lr")}
        assert settings == {k: wanted[k] for k in settings}
        assert group["lr"] == group["initial_lr"]  # past the warm-up
    train_steps(net, optimizers, schedulers, 1)


def test_a_run_with_other_rules_of_the_same_meaning_goes_on_to_the_bit():
    """Groups split and renamed between save and resume, with the settings that they had."""
    run = make(RULES)
    train_steps(*run, 6)
    split = [
        {"name": "fast_weight", "match": ["^second.weight"], "lr": 0.5},
        {"name": "fast_bias", "match": ["^second"], "lr": 0.5},
        {"name": "rest", "match": [".*"]},
    ]
    other = resume(run, split)
    for made in (run, other):
        train_steps(*made, 3)
    assert all(map(torch.equal, run[0].parameters(), other[0].parameters()))


def test_frozen_group_neither_moves_nor_holds_state():
    rules = [
        {"name": "frozen", "match": ["^first"], "frozen": True},
        {"name": "r", "match": [".*"]},
    ]
    net, optimizers, schedulers = make(rules)
    before = net.first.weight.detach().clone()
    train_steps(net, optimizers, schedulers, 2)
    assert torch.equal(net.first.weight, before)
    assert set(optimizers.optimizers[0].state) == set(net.second.parameters())
    assert net.first.weight.grad is None
    assert not [key for key in optimizers.state_dict() if "first" in key]
    assert [g["name"] for g in optimizers.groups] == ["r"]


def test_shield_scale_is_a_function_of_the_step():
    step = Shielding(steps=3, after_scale=0.1)
    assert [shield_scale(step, s) for s in (1, 3, 4, 100)] == [0.0, 0.0, 0.1, 0.1]
    linear = Shielding(steps=4, after_scale=0.2, ramp="linear")
    assert [round(shield_scale(linear, s), 3) for s in (1, 3, 5)] == [0.0, 0.1, 0.2]
    assert shield_scale(Shielding(), 1) == 1.0
