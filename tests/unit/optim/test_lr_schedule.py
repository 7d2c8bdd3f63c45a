"""Our learning-rate schedule equals torchtitan's, bit for bit, and takes a decay from outside."""

import itertools

import pytest
import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import LRScheduler

from symbiotic_titan.config.optimizer import LR_DECAYS
from symbiotic_titan.optim.lr_schedule import build_schedulers, schedule_factor

SHAPES = [
    {"warmup_steps": 0, "decay_ratio": 0.0},
    {"warmup_steps": 5},
    {"warmup_steps": 5, "decay_ratio": 0.3, "min_lr_factor": 0.1},
    {"warmup_steps": 7, "decay_ratio": 0.9},  # together longer than the run
    {"warmup_steps": 40},
    {"warmup_steps": 3, "decay_ratio": 0.5, "total_steps": 31},
]


def upstream_factor(config, steps):
    """torchtitan's function, which it makes only together with a scheduler of an optimizer."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
    return build_lr_schedulers([optimizer], config, steps).schedulers[0].lr_lambdas[0]


@pytest.mark.parametrize("decay", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_equal_torchtitans_at_every_step(shape, decay):
    config = LRScheduler(decay_type=decay, **shape)
    ours, theirs = schedule_factor(config, 20), upstream_factor(config, 20)
    assert [ours(step) for step in range(20)] == [theirs(step) for step in range(20)]


def test_a_registered_decay_is_taken():
    config = LRScheduler(warmup_steps=0, decay_ratio=0.5, decay_type="square")
    with LR_DECAYS.temporarily(square=lambda progress: (1 - progress) ** 2):
        factor = schedule_factor(config, 4)
        assert [factor(step) for step in range(4)] == [1.0, 1.0, 1.0, 0.25]
    with pytest.raises(ValueError, match="lr_scheduler.decay_type = 'square': nothing is"):
        schedule_factor(config, 4)


@pytest.mark.parametrize("share", [-50.0, 10.0, float("nan"), None])
def test_a_decay_outside_0_and_1_is_refused_before_training(share):
    config = LRScheduler(warmup_steps=0, decay_ratio=0.5, decay_type="odd")
    with LR_DECAYS.temporarily(odd=lambda progress: share):
        with pytest.raises(ValueError, match=f"decay_type = 'odd': gave {share} at progress 0.001"):
            schedule_factor(config, 4)


@pytest.mark.parametrize("ratio, last", [(0.0, 1.0), (0.5, 0.1)])
def test_a_run_longer_than_its_schedule_stays_at_the_last_rate(ratio, last):
    config = LRScheduler(warmup_steps=0, decay_ratio=ratio, total_steps=6, min_lr_factor=0.1)
    factor = schedule_factor(config, 20)
    assert [factor(step) for step in range(7, 20)] == pytest.approx([last] * 13)


def test_every_combination_of_small_numbers_gives_rates_between_0_and_1():
    numbers = itertools.product([1, 2, 5], [0, 1, 2, 7], [None, 0.0, 0.3, 0.5, 1.0], [None, 1, 3])
    for steps, warmup, ratio, total in numbers:
        config = LRScheduler(warmup_steps=warmup, decay_ratio=ratio, total_steps=total)
        factor = schedule_factor(config, steps)
        factors = [factor(step) for step in range(10)]  # a resumed run may be beyond its end
        assert all(0.0 <= value <= 1.0 for value in factors), (config, steps)
        assert factors[steps - 1] > 0 or (total or steps) < steps, (config, steps)


GROUPS = {"new": 1e-3, "old": 1e-4}
STAGES = {"new": [(4, 5e-4), (12, 2e-4)], "old": [(8, 0.0)]}
SHAPE = {"warmup_steps": 6, "decay_ratio": 0.4, "min_lr_factor": 0.1}


def scheduled(stages=STAGES, groups=GROUPS):
    """(optimizer, schedulers) of a run of 20 steps; the group ``old`` has a warm-up of its own."""
    rows = [
        {"params": [torch.zeros((), requires_grad=True)], "lr": rate, "name": name}
        for name, rate in groups.items()
    ]
    rows[1]["schedule"] = {"warmup_steps": 2}
    optimizer = torch.optim.AdamW(rows)
    schedulers = build_schedulers([optimizer], LRScheduler(**SHAPE), 20)
    schedulers.set_stages(stages)
    return optimizer, schedulers


def rates_of(optimizer, schedulers, num_steps):
    """Rates of the next steps, by group."""
    rates = []
    for _ in range(num_steps):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedulers.step()
    return rates


def written_out():
    """Warm-up, constant, decay over the last 8 of 20 steps to a tenth; the rate of the stage times that."""
    new = [1e-3] * 3 + [5e-4] * 8 + [2e-4] * 9
    old = [1e-4] * 7 + [0.0] * 13
    decay = [0.1 + 0.9 * (1 - n / 8) for n in range(1, 9)]
    down = [1.0, *decay[:-1]]  # the last step of the run is one short of the end of the decay
    warm = {"new": [n / 6 for n in range(1, 7)], "old": [n / 2 for n in range(1, 3)]}
    factors = {name: own + [1.0] * (12 - len(own)) + down for name, own in warm.items()}
    return [
        {"new": new[i] * factors["new"][i], "old": old[i] * factors["old"][i]} for i in range(20)
    ]


def test_rates_by_stage_are_those_written_out_at_every_step():
    for found, expected in zip(rates_of(*scheduled(), 20), written_out(), strict=True):
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stopped_after", [1, 3, 4, 7, 11, 13, 19])
def test_rates_after_a_resume_are_those_of_the_undisturbed_run_exactly(stopped_after):
    undisturbed = rates_of(*scheduled(), 20)
    optimizer, schedulers = scheduled()
    rates_of(optimizer, schedulers, stopped_after)
    resumed, resumed_schedulers = scheduled()
    resumed_schedulers.load_state_dict(schedulers.state_dict())
    rest = rates_of(resumed, resumed_schedulers, 20 - stopped_after)
    assert rest == undisturbed[stopped_after:]


def test_without_stages_and_before_them_rates_do_not_change_by_a_bit():
    plain = rates_of(*scheduled({}), 20)
    staged = rates_of(*scheduled({"old": [(15, 1.0)]}), 20)
    assert staged[:14] == plain[:14] and staged[14]["old"] > 1e3 * plain[14]["old"]
    assert [s["new"] for s in staged] == [p["new"] for p in plain]


def test_a_stage_of_a_group_that_is_not_trained_is_refused():
    with pytest.raises(
        ValueError,
        match=r"lr.mine: the optimizer trains no group of that name; choose from new, old",
    ):
        scheduled({"mine": [(3, 1.0)]})  # fmt: skip
