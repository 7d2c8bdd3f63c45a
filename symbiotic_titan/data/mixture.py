"""The mixture: which source the next sample comes from, in samples or in tokens. Deterministic, with bounds after every sample.

**By samples.** After n samples, source s with share w_s has given floor(n w_s) or ceil(n w_s) of them: it is off by less than one.
Proof: copy c (from 0) of source s may be given from sample floor(c / w_s) + 1 on and must be given by sample ceil((c + 1) / w_s).
Taking the source whose copy is due first meets all of these windows, because the shares sum to one. (The windows are those of
proportionate fair scheduling: Baruah et al., Algorithmica 15, 1996.)

Any window of consecutive samples is the difference of two prefixes, so a source is off by less than two in it. No schedule
achieves less than one in every window: for shares 1 : 2 : 8 an exhaustive search finds none. Each stream has its own schedule, so
over L streams in turn a source is off by less than L after any sample.

**By tokens.** The next sample comes from the source that lags its share of the tokens most. A sample's length is known only once it
has been read, so the bounds are multiples of the greatest length. After any sample, source s

    leads by at most  (1 - w_s) L_s                       L_s its longest sample so far
    lags by at most   L (W_1 + W_2/2 + ... + W_m/m)       L the longest of all, m = number of sources - 1

where W_k is w_s plus the k - 1 largest other shares. With equal shares the lag is less than L, for 3 : 3 : 2 : 2 at most 0.87 L,
and never more than L (1 + 1/2 + ... + 1/m). (If the smallest tokens / weight were chosen instead, a source of share w could lag by
w m L.)

Proof. The lags sum to zero, so the chosen source did not lead; a sample of length l moves it forward by (1 - w_s) l: the first line.
For the second, any set of k sources lags in total by at most k L (W_k/k + W_{k+1}/(k+1) + ... + W_m/m), where W_j is the sum of
their shares and the j - k largest others. This holds for the set of all sources, whose total lag is 0. For a smaller set, a sample
of a source in the set does not increase its lag. A sample of a source c outside increases it by at most W_k L; before that sample c
lagged at least as much as each member, so the set had at most k/(k+1) of the lag of the set with c.

**Stages.** A run may change its weights (``StagedMixture``). Each stream counts anew from where it changes, so the bounds hold within
every stage, and the samples of each stage follow its own weights whatever was read before. Every source goes on where it was.
"""

from fractions import Fraction
from math import gcd, lcm

from symbiotic_titan.config.stages import MixtureBy


def integer_weights(weights: list[float]) -> list[int]:
    """The smallest integers in the same proportion. 0.1 counts as one tenth, not as its binary approximation."""
    # Integers compare exactly: with floats a rounding error could break a tie differently and reorder all later samples.
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    return [value // gcd(*integers) for value in integers]


class Mixture:
    """The schedule of all streams. Stateless: each stream keeps its own counts, so a resume needs nothing from here."""

    def __init__(self, weights: list[float], num_streams: int, by: MixtureBy = "samples") -> None:
        self.weights = integer_weights(weights)
        self._total = sum(self.weights)
        self._first_of_stream = self._schedule(num_streams)
        self._next = self._due_first if by == "samples" else self._lags_most

    def next(self, stream: int, given: list[int]) -> int:
        """Source of the next sample of ``stream``. ``given[s]``: samples, or tokens, of source s in this stream since this mixture
        began there.

        The first samples follow the mixture across streams: if all streams began with the same source, a global batch, one row per
        stream, would not be mixed. The bounds hold whichever source comes first.
        """
        return self._next(given) if any(given) else self._first_of_stream[stream]

    def _due_first(self, counts: list[int]) -> int:
        # (ceil((c + 1) / w_s), source) for the sources whose next copy may be given already, with w_s = weight / total in integers.
        number = sum(counts) + 1
        ready = [
            (-(-(count + 1) * self._total // weight), source)
            for source, (weight, count) in enumerate(zip(self.weights, counts, strict=True))
            if number * weight > count * self._total
        ]
        return min(ready)[1]

    def _lags_most(self, tokens: list[int]) -> int:
        # Lead over the share, times total. Ties go to the first source, the same on every rank and after a resume.
        given = sum(tokens)
        ahead = [
            (count * self._total - given * weight, source)
            for source, (weight, count) in enumerate(zip(self.weights, tokens, strict=True))
            if weight
        ]
        return min(ahead)[1]

    def _schedule(self, length: int) -> list[int]:
        counts, schedule = [0] * len(self.weights), []
        for _ in range(length):
            source = self._due_first(counts)
            counts[source] += 1
            schedule.append(source)
        return schedule


class StagedMixture:
    """The mixture at every row of the run, which depends on the row alone and on no state."""

    def __init__(
        self, stages: list[tuple[int, list[float]]], num_streams: int, by: MixtureBy = "samples"
    ) -> None:
        """``stages``: (first row, weights), in the order of their rows. The first stage holds from the beginning whatever its row."""
        self._num_streams = num_streams
        self._stages = [(row, Mixture(weights, num_streams, by)) for row, weights in stages]

    def at(self, stream: int, number: int) -> Mixture:
        """The mixture of the ``number``-th sequence of ``stream``, counted from 0, which is row ``number * num_streams + stream``."""
        row = number * self._num_streams + stream
        later = [mixture for first_row, mixture in self._stages[1:] if first_row <= row]
        return later[-1] if later else self._stages[0][1]
