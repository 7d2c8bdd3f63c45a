"""Schedule of the shield: step -> scale of the shielded tokens' gradient in the shared experts."""

from symbiotic_titan.config.experts import SHIELD_SCHEDULES, Shielding


def step_ramp(config: Shielding, step: int) -> float:
    """0: shielded tokens contribute no gradient."""
    return 0.0


def linear_ramp(config: Shielding, step: int) -> float:
    """Linear from 0 at step 1 to ``after_scale`` at the first step after the ramp."""
    return config.after_scale * (step - 1) / config.steps


def shield_scale(config: Shielding, step: int) -> float:
    """Scale for ``step``, counted from 1. A pure function of the step.

    Raises:
        ValueError: ``config.ramp`` is not registered, or it gave something other than a number in [0, 1].
    """
    if not config.enabled:
        return 1.0
    if step > config.steps:
        return config.after_scale
    scale = float(SHIELD_SCHEDULES[config.ramp](config, step))
    if not 0.0 <= scale <= 1.0:
        raise ValueError(
            f"shielding.ramp = {config.ramp!r}: gave the scale {scale} at step {step}; it must lie in [0, 1]"
        )
    return scale


def check_schedule(config: Shielding, training_steps: int) -> None:
    """Check that the schedule is registered, ends within the run and gives a valid scale at each of its steps.

    Raises:
        ValueError: names the key, the value and the remedy.
    """
    _ = SHIELD_SCHEDULES[config.ramp]  # raises where it is not registered
    if config.ramp != "step" and config.steps > training_steps:
        raise ValueError(
            f"shielding.steps = {config.steps}: the ramp {config.ramp!r} would not reach its end within training.steps = "
            f"{training_steps}; shorten the ramp, train longer, or use ramp = 'step'"
        )
    for number in range(1, min(config.steps, training_steps) + 1):
        shield_scale(config, number)
