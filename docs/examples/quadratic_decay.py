"""A learning-rate schedule: the last part of a run decays with the square of what is left."""

from symbiotic_titan.extend import register_lr_decay


@register_lr_decay("quadratic")
def quadratic(progress: float) -> float:
    return (1 - progress) ** 2
