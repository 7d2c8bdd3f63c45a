"""The shield's scale is a pure function of config and step, and a schedule that cannot be meant is refused."""

import random

import pytest

from symbiotic_titan.config.experts import SHIELD_SCHEDULES, Shielding
from symbiotic_titan.optim.shield_schedule import check_schedule, shield_scale


@pytest.fixture(autouse=True)
def own_registry():
    with SHIELD_SCHEDULES.temporarily():
        yield


@pytest.mark.parametrize(
    ("shielding", "expected"),
    [
        (Shielding(steps=3, after_scale=0.1), [0, 0, 0, 0.1, 0.1]),
        (Shielding(steps=4, after_scale=0.2, ramp="linear"), [0, 0.05, 0.1, 0.15, 0.2, 0.2]),
        (Shielding(steps=1, after_scale=0.0, ramp="linear"), [0, 0, 0]),
        (Shielding(steps=2), [0, 0, 1, 1]),
        (Shielding(after_scale=0.1), [0.1, 0.1]),
        (Shielding(), [1, 1]),
        (Shielding(steps=3, after_scale=0.1, modalities=[]), [1, 1, 1, 1]),
    ],
    ids=["step", "linear", "linear_to_0", "to_full", "no_warm_up", "off", "nobody_shielded"],
)
def test_scales_of_the_first_steps(shielding, expected):
    scales = [shield_scale(shielding, step) for step in range(1, len(expected) + 1)]
    assert scales == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ramp", ["step", "linear"])
def test_a_resumed_run_has_the_scale_of_the_uninterrupted_one(ramp):
    """A step's scale is the same number whichever steps were asked for before, or none."""
    config = Shielding(steps=20, after_scale=0.1, ramp=ramp)
    uninterrupted = {step: shield_scale(config, step) for step in range(1, 41)}
    steps = list(uninterrupted)
    random.shuffle(steps)
    for step in steps:
        fresh = Shielding(steps=20, after_scale=0.1, ramp=ramp)
        assert shield_scale(fresh, step) == uninterrupted[step]


def test_a_schedule_is_asked_for_the_steps_of_the_warm_up_only():
    asked = []

    def half(config, step):
        asked.append(step)
        return 0.5

    SHIELD_SCHEDULES.register("half", half)
    config = Shielding(steps=2, after_scale=0.1, ramp="half")
    assert [shield_scale(config, step) for step in (1, 2, 3, 4)] == [0.5, 0.5, 0.1, 0.1]
    assert asked == [1, 2]


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan")])
def test_a_schedule_outside_0_and_1_is_named_before_the_run(scale):
    SHIELD_SCHEDULES.register("wild", lambda config, step: scale if step == 3 else 0.0)
    config = Shielding(steps=5, ramp="wild")
    message = rf"shielding.ramp = 'wild': gave the scale {scale} at step 3; it must lie in \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        check_schedule(config, training_steps=10)


def test_an_unknown_ramp_lists_the_known_ones():
    message = (
        "shielding.ramp = 'cosin': nothing is registered under this name; choose from step, linear"
    )
    with pytest.raises(ValueError, match=message):
        check_schedule(Shielding(steps=5, ramp="cosin"), training_steps=10)


def test_a_ramp_that_outlasts_the_run_is_refused_and_a_step_is_not():
    message = (
        "shielding.steps = 100: the ramp 'linear' would not reach its end within training.steps = 20; "
        "shorten the ramp, train longer, or use ramp = 'step'"
    )
    with pytest.raises(ValueError, match=message):
        check_schedule(Shielding(steps=100, ramp="linear"), training_steps=20)
    check_schedule(Shielding(steps=20, ramp="linear"), training_steps=20)
    check_schedule(Shielding(steps=100, ramp="step"), training_steps=20)


def test_a_ramp_without_steps_is_refused():
    with pytest.raises(ValueError, match="'cosine' rises over shielding.steps, which is 0"):
        Shielding(ramp="cosine")
