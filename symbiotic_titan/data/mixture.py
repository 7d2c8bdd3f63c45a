"""Which source the next sample comes from: exact at every moment, without random numbers.

After n samples, source s with share w_s has given floor(n w_s) or ceil(n w_s) of them, so it is off by less than one sample.
Copy c (from 0) of source s may be given from sample floor(c / w_s) + 1 on and must be given by sample ceil((c + 1) / w_s);
taking the source whose copy is due first always meets all of these windows, because the shares sum to one (the windows are
those of proportionate fair scheduling: Baruah et al., Algorithmica 15, 1996).
"""

from fractions import Fraction
from math import gcd, lcm


def integer_weights(weights: list[float]) -> list[int]:
    """The smallest integers in the same proportion; 0.1 counts as one tenth, not as its binary approximation."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    return [value // gcd(*integers) for value in integers]


class Mixture:
    """The schedule of all lanes. It has no state: the caller keeps each lane's ``counts``."""

    def __init__(self, weights: list[float], num_lanes: int) -> None:
        self._weights = integer_weights(weights)
        self._total = sum(self._weights)
        self._first_of_lane = self._schedule(num_lanes)

    def next(self, lane: int, counts: list[int]) -> int:
        """Source of the next sample of ``lane``, when source s has given it ``counts[s]`` samples so far.

        The first samples of the lanes follow the mixture *over the lanes*, so that these are out of phase and a global batch
        is mixed too. Any first sample leaves all later windows within reach.
        """
        return self._due_first(counts) if any(counts) else self._first_of_lane[lane]

    def _due_first(self, counts: list[int]) -> int:
        number = sum(counts) + 1
        ready = [
            (-(-(count + 1) * self._total // weight), source)
            for source, (weight, count) in enumerate(zip(self._weights, counts, strict=True))
            if number * weight > count * self._total
        ]
        return min(ready)[1]

    def _schedule(self, length: int) -> list[int]:
        counts, schedule = [0] * len(self._weights), []
        for _ in range(length):
            source = self._due_first(counts)
            counts[source] += 1
            schedule.append(source)
        return schedule
