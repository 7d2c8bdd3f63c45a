"""Intervals of 95 % of a score, from the items that it was measured on: what another set of as many such items would show.

They say nothing of another seed of the training or of the sampler, and take the items as independent.
"""

import math
from collections.abc import Collection

# (low, high)
Interval = tuple[float, float]

Z = 1.959964  # of the normal distribution, two-sided 95 %


def of_share(right: int, number: int) -> Interval:
    """Wilson's score interval of ``right`` among ``number`` > 0 items: within [0, 1], and not empty where none or all are right.

    E. B. Wilson, Journal of the American Statistical Association 22 (1927), p. 209.
    """
    share, z2 = right / number, Z * Z
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    spread = share * (1 - share) / number + z2 / (4 * number * number)
    half = Z * math.sqrt(spread) / (1 + z2 / number)
    # The formula itself gives 0 and 1 there, but for rounding.
    return 0.0 if right == 0 else middle - half, 1.0 if right == number else middle + half


def of_error(mean: float, standard_error: float) -> Interval | None:
    """The normal interval around ``mean``; None where the error is not a finite number."""
    if not math.isfinite(standard_error):
        return None
    return mean - Z * standard_error, mean + Z * standard_error


def of_mean(values: Collection[float]) -> Interval | None:
    """Of the mean of ``values``: Wilson's where each is 0 or 1, else the normal one, which needs at least two."""
    number = len(values)
    if number and all(value in (0, 1) for value in values):
        return of_share(round(sum(values)), number)
    if number < 2:
        return None
    mean = math.fsum(values) / number
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
    return of_error(mean, math.sqrt(variance / number))
