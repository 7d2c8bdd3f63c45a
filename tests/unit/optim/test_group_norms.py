"""Norms and ratios of parameter groups, against sums over real differences of weights."""

import pytest
import torch
from torch import nn

from symbiotic_titan.optim.group_norms import group_grad_norms, group_update_ratios

CLASSES = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def test_gradient_norm_of_a_group_is_that_of_its_parameters_together():
    a, b, idle = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    groups = [{"name": "both", "params": [a, b]}, {"name": "idle", "params": [idle]}]
    assert group_grad_norms(groups) == {"both": pytest.approx(5.0), "idle": 0.0}


def make_groups():
    """Three groups of other sizes and settings; the last has a parameter that gets no gradient."""
    torch.manual_seed(0)
    sizes = {"fast": [(5, 4), (7,)], "slow": [(3, 3)], "rest": [(6,), (2, 2)]}
    settings = {
        "fast": {"lr": 0.1, "weight_decay": 0.3},
        "slow": {"lr": 1e-3, "betas": (0.0, 0.999), "weight_decay": 0.0},
        "rest": {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3},
    }
    return [
        {"name": name, "params": [nn.Parameter(torch.randn(s)) for s in shapes], **settings[name]}
        for name, shapes in sizes.items()
    ]


def set_gradients(groups, *, without):
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = None if parameter is without else torch.randn_like(parameter)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_update_ratio_is_that_of_the_difference_a_step_makes(name, implementation):
    groups = make_groups()
    flags = {key: key == implementation for key in ("fused", "foreach")}
    optimizer = CLASSES[name](groups, weight_decay=0.05, **flags)
    # A parameter with a gradient in the first step only: later steps pass it over although it has state.
    idle = groups[-1]["params"][-1]
    for step in range(4):
        set_gradients(groups, without=idle if step else None)
        before = {p: p.detach().clone() for group in groups for p in group["params"]}
        optimizer.step()
        found = group_update_ratios([optimizer])
        for group in groups:
            update = sum((p - before[p]).square().sum().item() for p in group["params"]) ** 0.5
            weight = sum(p.square().sum().item() for p in group["params"]) ** 0.5
            assert found[group["name"]] == pytest.approx(update / weight, rel=2e-5)


def test_ratio_needs_no_copy_of_the_weights():
    """Of 64 equal parameters, it makes at most 8 copies of one at a time."""
    size = 1000
    parameters = [nn.Parameter(torch.ones(size)) for _ in range(64)]
    optimizer = torch.optim.AdamW([{"name": "all", "params": parameters}], weight_decay=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones(size)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        group_update_ratios([optimizer])
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 4 * size <= peak <= 8 * 4 * size


def test_zero_weights_have_a_ratio_and_other_optimizers_none():
    zero = nn.Parameter(torch.zeros(3))
    adam = torch.optim.Adam([{"name": "zero", "params": [zero]}])
    sgd = torch.optim.SGD([{"name": "sgd", "params": [nn.Parameter(torch.ones(3))]}], lr=1.0)
    assert group_update_ratios([adam, sgd]) == {"zero": 0.0}
