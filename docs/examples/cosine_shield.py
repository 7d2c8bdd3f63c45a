"""A shield schedule: the gradient returns along half a cosine, from 0 at step 1 towards shielding.after_scale."""

import math

from symbiotic_titan.config.experts import Shielding
from symbiotic_titan.extend import register_shield_schedule


@register_shield_schedule("cosine")
def cosine(config: Shielding, step: int) -> float:
    passed = (step - 1) / config.steps
    return config.after_scale * (1 - math.cos(math.pi * passed)) / 2
