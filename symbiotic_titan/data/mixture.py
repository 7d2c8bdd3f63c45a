"""The mixture: which source the next sample comes from. Exact after every sample, in samples or in tokens, without random numbers.

**By samples.** After n samples, source s with share w_s has given floor(n w_s) or ceil(n w_s) of them: it is off by less than one.
Proof: copy c (from 0) of source s may be given from sample floor(c / w_s) + 1 on and must be given by sample ceil((c + 1) / w_s).
Taking the source whose copy is due first meets all of these windows, because the shares sum to one. (The windows are those of
proportionate fair scheduling: Baruah et al., Algorithmica 15, 1996.)

Any W consecutive samples are the difference of two such beginnings, so in them a source is off by less than two. No schedule
achieves one everywhere: for shares 1 : 2 : 8 a search through all schedules finds none. Every stream keeps to this by itself, so
over L streams in turn a source is off by less than L after any sample.

**By tokens.** The next sample comes from the source that lags its share of the tokens most. How long the sample is shows only when
it has been read, so the bounds are multiples of the greatest length. After any sample, source s

    leads by at most  (1 - w_s) L_s                       L_s its longest sample so far
    lags by at most   L (W_1 + W_2/2 + ... + W_m/m)       L the longest of all, m = number of sources - 1

where W_k is w_s plus the k - 1 largest shares of others. With equal shares that is less than L, for 3 : 3 : 2 : 2 at most 0.87 L,
and never more than L (1 + 1/2 + ... + 1/m). (Taking the smallest tokens / weight instead, a source of share w lags by up to
w m L.)

Proof. A source that is given a sample of length l did not lead, since the gaps sum to zero, and gains (1 - w_s) l: the first line.
For the second, show of every set of k sources that together they lag by at most k L (W_k/k + W_{k+1}/(k+1) + ... + W_m/m), W_j
being the sum of their shares and the j - k largest others. It holds for the set of all sources, which lag by 0 together. A sample
of a source inside a set does not make the set lag more. A sample of a source c outside makes it lag at most W_k L more, and before
that sample c lagged at least as much as each of them, so that they had at most k/(k+1) of what the set with c had.
"""

from fractions import Fraction
from math import gcd, lcm

from symbiotic_titan.config.data import MixtureBy


def integer_weights(weights: list[float]) -> list[int]:
    """The smallest integers in the same proportion: comparisons of shares are then exact. 0.1 counts as one tenth, not as its
    binary approximation."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    return [value // gcd(*integers) for value in integers]


class Mixture:
    """The schedule of all streams. It has no state: the caller counts what each source has ``given`` to each stream."""

    def __init__(self, weights: list[float], num_streams: int, by: MixtureBy = "samples") -> None:
        self._weights = integer_weights(weights)
        self._total = sum(self._weights)
        self._first_of_stream = self._schedule(num_streams)
        self._next = self._due_first if by == "samples" else self._lags_most

    def next(self, stream: int, given: list[int]) -> int:
        """Source of the next sample of ``stream``, when source s has given it ``given[s]`` samples, or tokens, so far.

        The first samples of the streams follow the mixture over the streams: if all began with the same source, a global batch, one
        row of each stream, would not be mixed. Whatever comes first, all later windows can still be met.
        """
        return self._next(given) if any(given) else self._first_of_stream[stream]

    def _due_first(self, counts: list[int]) -> int:
        # In integers, w_s = weight / total: when the next copy is due, of the sources whose next copy may be given already.
        number = sum(counts) + 1
        ready = [
            (-(-(count + 1) * self._total // weight), source)
            for source, (weight, count) in enumerate(zip(self._weights, counts, strict=True))
            if number * weight > count * self._total
        ]
        return min(ready)[1]

    def _lags_most(self, tokens: list[int]) -> int:
        # Lead over the share, times total. Of equals the first source: a tie must be broken the same way on every rank.
        given = sum(tokens)
        ahead = [
            (count * self._total - given * weight, source)
            for source, (weight, count) in enumerate(zip(self._weights, tokens, strict=True))
        ]
        return min(ahead)[1]

    def _schedule(self, length: int) -> list[int]:
        counts, schedule = [0] * len(self._weights), []
        for _ in range(length):
            source = self._due_first(counts)
            counts[source] += 1
            schedule.append(source)
        return schedule
