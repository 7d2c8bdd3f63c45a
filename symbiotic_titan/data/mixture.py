"""Which source the next sample comes from, in samples or in tokens: exact at every moment, without random numbers.

**By samples.** After n samples, source s with share w_s has given floor(n w_s) or ceil(n w_s) of them: it is off by less than
one. Copy c (from 0) of source s may be given from sample floor(c / w_s) + 1 on and must be given by sample
ceil((c + 1) / w_s); taking the source whose copy is due first always meets all of these windows, because the shares sum to one
(the windows are those of proportionate fair scheduling: Baruah et al., Algorithmica 15, 1996).

Any W samples in a row are the difference of two beginnings, so there a source is off by less than two. No schedule gives at
most one everywhere: for shares 1 : 2 : 8 a search through all of them finds none. A stream keeps to this by itself; over L streams
in turn a source is off by less than L after any sample.

**By tokens.** The next sample comes from the source that is furthest behind its share of the tokens. How long the sample is
shows only when it has been read, so the bound is in samples of the greatest length. After any sample, source s is

    ahead by at most    (1 - w_s) L_s                       L_s its longest sample so far
    behind by at most   L (W_1 + W_2/2 + ... + W_m/m)       L the longest of all, m = number of sources - 1

W_k is w_s plus the k - 1 largest shares of others. With equal shares that is less than L, for 3 : 3 : 2 : 2 at most 0.87 L, and
never more than L (1 + 1/2 + ... + 1/m). (Taking the smallest tokens / weight instead, a source of share w falls behind by up to
w m L.) Proof: a source that is given a sample of length l was not ahead, since the gaps sum to zero, and gains (1 - w_s) l.
For the second line, claim of every set of k sources that they are together behind by at most
k L (W_k/k + W_{k+1}/(k+1) + ... + W_m/m), W_j the sum of their shares and the j - k largest others: all sources are behind by 0
together. A sample of a source inside the set does not raise their sum. One of a source c outside raises it by at most W_k L, and
before it c was at least as far behind as each of them, so that they had at most k/(k+1) of what the set with c had.
"""

from fractions import Fraction
from math import gcd, lcm

from symbiotic_titan.config.data import MixtureBy


def integer_weights(weights: list[float]) -> list[int]:
    """The smallest integers in the same proportion; 0.1 counts as one tenth, not as its binary approximation."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    return [value // gcd(*integers) for value in integers]


class Mixture:
    """The schedule of all streams. It has no state: the caller keeps what each source has ``given`` to each stream."""

    def __init__(self, weights: list[float], num_streams: int, by: MixtureBy = "samples") -> None:
        self._weights = integer_weights(weights)
        self._total = sum(self._weights)
        self._first_of_stream = self._schedule(num_streams)
        self._next = self._due_first if by == "samples" else self._furthest_behind

    def next(self, stream: int, given: list[int]) -> int:
        """Source of the next sample of ``stream``, when source s has given it ``given[s]`` samples, or tokens, so far.

        The first samples of the streams follow the mixture *over the streams*, so that these are out of phase and a global batch
        is mixed too. Any first sample leaves all later windows within reach.
        """
        return self._next(given) if any(given) else self._first_of_stream[stream]

    def _due_first(self, counts: list[int]) -> int:
        number = sum(counts) + 1
        ready = [
            (-(-(count + 1) * self._total // weight), source)
            for source, (weight, count) in enumerate(zip(self._weights, counts, strict=True))
            if number * weight > count * self._total
        ]
        return min(ready)[1]

    def _furthest_behind(self, tokens: list[int]) -> int:
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
