"""Which steps are bad, how many of them are skipped, and that a resumed run decides alike."""

import math

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
        found.append(bad_steps.skips(number, loss, norm, not_finite))
    return found


def test_a_step_that_is_not_finite_or_far_above_the_median_is_skipped_also_after_a_resume():
    expected = [skipped for *_, skipped in STEPS]
    whole = BadSteps(SKIP)
    assert decisions(whole, STEPS) == expected and whole.num_skipped == 4
    for cut in range(len(STEPS)):
        first, second = BadSteps(SKIP), BadSteps(SKIP)
        decisions(first, STEPS[:cut])
        second.load_state_dict(first.state_dict())
        assert decisions(second, STEPS[cut:], cut + 1) == expected[cut:]
        assert second.state_dict() == whole.state_dict()


def test_too_many_in_a_row_and_spikes_without_skip_stop_the_run():
    bad_steps = BadSteps(SKIP)
    nan = (math.nan, 1.0, True)
    assert decisions(bad_steps, [nan, nan, nan]) == [True, True, False]  # the caller stops
    good = [(1.0, 1.0, False)] * 3
    for settings in (SKIP, Stability(loss_spike=2.0, window=3)):
        bad_steps = BadSteps(settings)
        decisions(bad_steps, good)
        allowed = 2 if settings is SKIP else 0
        assert decisions(bad_steps, [(4.0, 1.0, True)] * allowed) == [True] * allowed
        with pytest.raises(FloatingPointError, match="step 9: loss 4 is more than .* times 1, the"):
            decisions(bad_steps, [(4.0, 1.0, True)], first=9)


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
