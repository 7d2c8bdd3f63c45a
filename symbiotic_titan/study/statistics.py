"""Means and differences over a few seeds, with intervals of 95 % by Student's t.

Seeds are paired: a seed fixes the pre-trained model, the order of the data and the noise, so two systems are compared seed by seed.
What seeds have in common drops out of the differences, and their interval is narrower than those of the two means. Every interval
is of one comparison; none is widened for the number of comparisons.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


def t_probability(t: float, degrees: int) -> float:
    """P(-t <= T <= t) of Student's T with ``degrees`` of freedom, t >= 0.

    The finite sums for whole degrees: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for n in range(2 + is_odd, degrees - 1, 2):
        term *= cosine * cosine * (n - 1) / n
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(-t <= T <= t) = ``confidence``, by bisection.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1, or there is less than one degree of freedom.
    """
    if not 0 < confidence < 1 or degrees < 1:
        raise ValueError(
            f"confidence must be between 0 and 1 and degrees at least 1, got {confidence} and {degrees}"
        )
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its interval of 95 %. values: seed -> value."""

    values: Mapping[int, float]
    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def same_sign(self) -> bool:
        """Whether all values are above 0, or all below it."""
        return all(v > 0 for v in self.values.values()) or all(v < 0 for v in self.values.values())

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        values = {str(seed): value for seed, value in self.values.items()}
        return {"mean": self.mean, "low": self.low, "high": self.high, "values": values}


def estimate(values: Mapping[int, float], what: str) -> Estimate:
    """Mean over the seeds. ``what`` is named in messages.

    Raises:
        ValueError: fewer than two seeds; a value is not finite.
    """
    if len(values) < 2:
        seeds = f"seed {next(iter(values))} alone" if values else "no seed"
        raise ValueError(
            f"{what}: an interval needs at least 2 seeds, got {seeds}; run more of them with symbiotic reproduce --seeds"
        )
    for seed, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{what}: the value of seed {seed} is {value}, so there is no mean")
    number = len(values)
    mean = math.fsum(values.values()) / number
    variance = math.fsum((value - mean) ** 2 for value in values.values()) / (number - 1)
    half_width = t_quantile(CONFIDENCE, number - 1) * math.sqrt(variance / number)
    return Estimate(dict(values), mean, half_width)


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """seed -> ours - theirs, of the seeds that both have."""
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}
