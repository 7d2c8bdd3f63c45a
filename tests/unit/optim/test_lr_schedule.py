"""Our learning-rate schedule equals torchtitan's, bit for bit, and takes a decay from outside."""

import pytest
import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import LRScheduler

from symbiotic_titan.config.optimizer import LR_DECAYS
from symbiotic_titan.optim.lr_schedule import schedule_factor

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
