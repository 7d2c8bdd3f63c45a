"""The average of the weights is that of a plain loop, its groups are trained ones, and a measurement with it leaves the weights alone."""

import pytest
import torch
from torch import nn

from symbiotic_titan.config.optimizer import Ema
from symbiotic_titan.optim.ema import EMA, averaged_groups, averaged_parameters, decay_of_update
from symbiotic_titan.training.checks import check_ema, check_start
from tests.helpers.debug_model import config_of

ON = "--ema.enable"


class Net(nn.Module):
    """Two layers, and a third that is tied to the first."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=dtype)
        self.second = nn.Linear(4, 5, dtype=dtype)
        self.tied = nn.Linear(3, 4, bias=False, dtype=dtype)
        self.tied.weight = self.first.weight


GROUPS = {"a": ["first.weight", "first.bias"], "b": ["second.weight"]}
NAMES = {"first.weight", "first.bias", "second.weight", "tied.weight"}


def move(net, step):
    """What an optimizer would do to the weights in ``step``."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [Ema(decay=0.9, warmup=False), Ema(decay=0.4, interval=3), Ema()],
    ids=["constant", "interval", "warmup"],
)
def test_averages_are_those_of_a_plain_loop(dtype, settings):
    net = Net(dtype)
    ema = EMA(net, GROUPS, settings)
    weights = dict(net.named_parameters())
    expected = {name: weights[name].double() for name in NAMES - {"tied.weight"}}
    updates = 0
    for step in range(1, 13):
        move(net, step)
        ema.update(step)
        if step % settings.interval == 0:
            decay = settings.decay
            if settings.warmup:
                decay = min(decay, (1 + updates) / (10 + updates))
            for name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * weights[name].double()
            updates += 1
    assert ema.num_updates == updates and ema.tensors.keys() == NAMES
    for name in expected:
        assert ema.tensors[name].dtype == torch.float32
        torch.testing.assert_close(
            ema.tensors[name].double(), expected[name].detach(), rtol=1e-6, atol=1e-6
        )
    assert ema.tensors["tied.weight"] is ema.tensors["first.weight"]


def test_updates_below_the_resolution_of_bfloat16_add_up():
    net = Net(torch.bfloat16)
    with torch.no_grad():
        net.second.weight.fill_(1.0)
    ema = EMA(net, GROUPS, Ema(decay=0.9999, warmup=False))
    with torch.no_grad():
        net.second.weight.fill_(1.125)
    for step in range(1, 101):
        ema.update(step)
    expected = 1.125 - 0.125 * 0.9999**100
    assert ema.tensors["second.weight"].mean().item() == pytest.approx(expected, rel=1e-6)


def test_decay_grows_to_its_value():
    decays = [decay_of_update(Ema(decay=0.5), number) for number in range(20)]
    assert decays[:3] == [0.1, 2 / 11, 3 / 12] and decays == sorted(decays)
    assert set(decays[8:]) == {0.5}
    assert {decay_of_update(Ema(decay=0.5, warmup=False), n) for n in range(20)} == {0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_has_the_averages_for_a_measurement_and_its_weights_afterwards(dtype, fails):
    net = Net(dtype)
    ema = EMA(net, GROUPS, Ema())
    for step in (1, 2):
        move(net, step)
        ema.update(step)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    averages = {name: a.clone() for name, a in ema.tensors.items()}
    places = {name: p.data_ptr() for name, p in net.named_parameters()}
    seen = {}
    with pytest.raises(ArithmeticError) if fails else torch.enable_grad(), ema.applied():
        seen = {name: p.detach().clone() for name, p in net.named_parameters()}
        assert torch.is_grad_enabled()
        if fails:
            raise ArithmeticError
    for name, parameter in net.named_parameters():
        expected = averages[name].to(dtype) if name in NAMES else weights[name]
        assert torch.equal(seen[name], expected)
        assert torch.equal(parameter, weights[name]) and parameter.data_ptr() == places[name]
        assert name not in NAMES or not torch.equal(seen[name], weights[name])
    assert all(torch.equal(ema.tensors[name], averages[name]) for name in NAMES)


def test_metrics_are_the_distances_of_the_groups():
    net = Net()
    ema = EMA(net, GROUPS, Ema(decay=0.75, warmup=False))
    move(net, 1)
    ema.update(1)
    weight = net.second.weight.detach()
    distance = (weight - ema.tensors["second.weight"]).norm()
    found = ema.metrics()
    assert found.keys() == {"decay", "distance/a", "distance/b"} and found["decay"] == 0.75
    assert found["distance/b"] == pytest.approx(float(distance / weight.norm()))


def test_all_trained_groups_are_averaged_or_those_that_are_named():
    config = config_of(ON)
    names = ["layers.1.moe.experts.generation.w1", "layers.1.moe.experts.understanding.w1"]
    assert averaged_groups(config) == ["generation", "understanding"]
    assert averaged_parameters(names, config) == {
        "generation": names[:1],
        "understanding": names[1:],
    }
    config = config_of(f"{ON} --ema.groups understanding")
    assert averaged_parameters(names, config) == {"understanding": names[1:]}
    assert averaged_parameters(names, config_of("")) == {}
    config.ema.groups, config.optimizer.param_groups = [], []
    assert averaged_parameters(names, config) == {"all": names}


def test_a_group_that_is_trained_from_a_later_stage_on_is_averaged():
    config = config_of(ON)
    row = config.optimizer.param_groups[0]
    row.lr = 0.0
    assert averaged_groups(config) == ["understanding"]
    stage = type("Stage", (), {"lr": {"generation": 1e-3}})
    config.data.stages = [stage]
    assert averaged_groups(config) == ["generation", "understanding"]


def refused(overrides, change=lambda config: None):
    config = config_of(overrides)
    change(config)
    with pytest.raises(ValueError) as caught:
        check_start(config)
        check_ema(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def freeze(config):
    row = config.optimizer.param_groups[0]
    row.frozen, row.lr = True, None


def stop_all(config):
    for row in config.optimizer.param_groups:
        row.lr = 0.0


def test_mistakes_name_key_rule_and_remedy():
    named = f"{ON} --ema.groups generation"
    assert "ema.groups: the group 'generation' is frozen, so" in refused(named, freeze)
    assert "'generation' has the learning rate 0, so an average" in refused(named, stop_all)
    assert "no parameter group is trained, so there is nothing" in refused(ON, stop_all)
    unknown = refused(f"{ON} --ema.groups generations")
    assert "has no group 'generations'; choose from generation, understanding" in unknown
    for name in ("validation", "sampling"):
        message = refused(f"--{name}.weights ema")
        assert (
            message.startswith(f"{name}.weights = 'ema': no average is kept") and "true" in message
        )
    message = refused(f"{ON} --checkpoint.last_save_model_only")
    assert message.startswith("checkpoint.last_save_model_only = true: the last checkpoint would")
    start = "--checkpoint.enable --checkpoint.initial_load_weights ema"
    assert "needs checkpoint.initial_load_path" in refused(start)
    full = f"{start} --checkpoint.initial_load_path x --checkpoint.no_initial_load_model_only"
    assert "the optimizer state of x belongs to the trained weights" in refused(full)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_decay_lies_between_0_and_1(decay):
    with pytest.raises(
        ValueError, match=r"ema\.decay: must (lie in \(0, 1\)|be a finite number), got"
    ):
        Ema(decay=decay)
    with pytest.raises(ValueError, match=r"ema\.interval: must be at least 1, got 0"):
        Ema(interval=0)


def test_groups_of_an_average_that_is_not_kept_are_refused():
    message = (
        r"ema.groups = \['a'\]: no average is kept with ema.enable = false; set it to true, or"
    )
    with pytest.raises(ValueError, match=message):
        Ema(groups=["a"])
    assert Ema(enable=True, groups=["a"]).groups == ["a"]
