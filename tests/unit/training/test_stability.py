"""Which steps are bad, how many of them are skipped or rolled back, and that a resumed run decides alike."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from symbiotic_titan.config.job import Stability
from symbiotic_titan.training.stability import BadSteps

SKIP = Stability("skip", max_in_a_row=2, loss_spike=3.0, grad_norm_spike=10.0, window=3)
# (loss, gradient norm, whether the step is skipped): the third good step fills the window.
STEPS = [
    (9.0, 1.0, False), (math.nan, 1.0, True), (2.0, 50.0, False), (2.5, 1.0, False),
    (7.6, 1.0, True), (2.0, 10.1, True), (7.5, 9.0, False), (2.4, math.inf, True),
]  # fmt: skip


def decisions(bad_steps, steps, first=1):
    found = []
    for number, (loss, norm, _) in enumerate(steps, start=first):
        values = {"text": loss, "grad_norm": norm}
        not_finite = {n: v for n, v in values.items() if not math.isfinite(v)}
        found.append(bad_steps.pass_over(number, loss, norm, not_finite))
    return found


def test_a_step_that_is_not_finite_or_far_above_the_median_is_skipped_also_after_a_resume():
    expected = [skipped for *_, skipped in STEPS]
    whole = BadSteps(SKIP, None)
    assert decisions(whole, STEPS) == expected and whole.counts["skipped_steps"] == 4
    for cut in range(len(STEPS)):
        first, second = BadSteps(SKIP, None), BadSteps(SKIP, None)
        decisions(first, STEPS[:cut])
        second.load_state_dict(first.state_dict())
        assert decisions(second, STEPS[cut:], cut + 1) == expected[cut:]
        assert second.state_dict() == whole.state_dict()


def test_too_many_in_a_row_and_spikes_without_skip_stop_the_run():
    bad_steps = BadSteps(SKIP, None)
    nan = (math.nan, 1.0, True)
    assert decisions(bad_steps, [nan, nan, nan]) == [True, True, False]  # the caller stops
    good = [(1.0, 1.0, False)] * 3
    for settings in (SKIP, Stability(loss_spike=2.0, window=3)):
        bad_steps = BadSteps(settings, None)
        decisions(bad_steps, good)
        allowed = 2 if settings is SKIP else 0
        assert decisions(bad_steps, [(4.0, 1.0, True)] * allowed) == [True] * allowed
        with pytest.raises(FloatingPointError, match="step 9: loss 4 is more than .* times 1, the"):
            decisions(bad_steps, [(4.0, 1.0, True)], first=9)


class Checkpoints:
    """Stands in for a run's checkpoints at multiples of ``interval``; ``taken`` are those that it went back to."""

    def __init__(self, interval):
        self.interval, self.newest, self.taken = interval, None, []

    def find_way_back(self):
        return self.newest

    def roll_back(self, start):
        self.taken.append(start.step)

    def save(self, step):
        if step % self.interval == 0:
            self.newest = SimpleNamespace(step=step)


def rolled_back(bad, *, interval, last, after=0, state=None):
    """(the steps that a run went back to, its state), where the steps ``bad`` of ``last`` are NaN; it is resumed ``after`` a step."""
    checkpoints = Checkpoints(interval)
    bad_steps = BadSteps(replace(SKIP, on_bad_step="roll_back"), checkpoints)
    if state is not None:
        bad_steps.load_state_dict(state)
        if after >= interval:
            checkpoints.save(after - after % interval)
    for step in range(after + 1, last + 1):
        not_finite = {"text": math.nan} if step in bad else {}
        if bad_steps.pass_over(step, 1.0, 1.0, not_finite) != bool(not_finite):
            return [*checkpoints.taken, f"stopped at {step}"], bad_steps.state_dict()
        checkpoints.save(step)
    return checkpoints.taken, bad_steps.state_dict()


@pytest.mark.parametrize(
    ("bad", "interval", "taken"),
    [
        ([5, 10], 4, [4, 8]),
        ([3], 4, ["stopped at 3"]),  # no checkpoint yet
        ([5, 6, 7], 4, [4, 4, "stopped at 7"]),  # in a row
        ([6, 9, 12], 5, [5, 5, 10]),
        ([7, 9, 11], 6, [6, 6, "stopped at 11"]),  # too often to one checkpoint
        ([6, 9, 12], 3, [3, 6, "stopped at 12"]),  # those saved at 6 and 9 have the weights of 3
        ([6, 10, 14], 3, [3, 9, 12]),
    ],
)
def test_a_run_rolls_back_so_often_from_the_same_weights_and_a_resumed_one_alike(
    bad, interval, taken
):
    found, state = rolled_back(bad, interval=interval, last=15)
    assert found == taken
    assert json.loads(state["json"])["num_rolled_back"] == sum(type(s) is int for s in taken)
    for cut in range(1, bad[-1]):
        before, middle = rolled_back(bad, interval=interval, last=cut)
        after, end = rolled_back(bad, interval=interval, last=15, after=cut, state=middle)
        assert (before + after, end) == (taken, state)


def test_a_checkpoint_saved_before_there_were_roll_backs_counts_none():
    old = {"num_skipped": 3, "in_a_row": 1, "loss": [1.0], "grad_norm": [2.0]}
    bad_steps = BadSteps(SKIP, None)
    bad_steps.load_state_dict({"json": json.dumps(old)})
    assert bad_steps.counts == {"skipped_steps": 3, "rolled_back_steps": 0}
    assert json.loads(bad_steps.state_dict()["json"]).items() >= old.items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_in_a_row": 4}, r"stability.max_in_a_row = 4 has no effect with .*'stop'; set"),
        ({"window": 4}, r"stability.window = 4 has no effect without stability.loss_spike"),
        ({"loss_spike": 0.5}, r"stability.loss_spike: must be above 1, or 0 \(no limit\), got 0.5"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Stability(**settings)
