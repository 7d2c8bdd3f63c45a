"""Step -> scale of the gradient that shielded tokens send through the shared experts."""

from symbiotic_titan.config.experts import Shielding


def shield_scale(config: Shielding, step: int) -> float:
    """Scale for ``step``, counted from 1. A pure function of the step, so a resumed run goes on exactly.

    Within the first ``config.steps`` steps: 0 (``step``), or a line from 0 at step 1 towards ``after_scale`` (``linear``).
    """
    if not config.enabled:
        return 1.0
    if step > config.steps:
        return config.after_scale
    if config.ramp == "linear":
        return config.after_scale * (step - 1) / config.steps
    return 0.0
