from collections import Counter
from fractions import Fraction
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiotic_titan.data.mixture import Mixture, integer_weights

SETS = [[3.0, 3.0, 2.0, 2.0], [1.0], [0.7, 0.2, 0.1], [0.9, 0.05, 0.05], [1e-3, 1.0], [5, 3, 1, 1]]
# The same examples every time.
FIXED = settings(deadline=None, derandomize=True, database=None, max_examples=80)
WEIGHTS = st.lists(st.sampled_from([0.05, 0.1, 1 / 3, 0.7, 1.0, 2, 3, 8, 11.5]), min_size=1, max_size=7)  # fmt: skip


def random_sets():
    random = Random(0)
    return [
        [round(random.uniform(0.01, 3), 2) for _ in range(random.randint(2, 6))] for _ in range(20)
    ]


def shares_of(weights):
    total = sum(Fraction(str(v)) for v in weights)
    return [Fraction(str(w)) / total for w in weights]


def samples_of(weights, stream, length, num_streams=11):
    """Sources of the first samples of a stream."""
    mixture, counts, sources = Mixture(weights, num_streams), [0] * len(weights), []
    for _ in range(length):
        sources.append(mixture.next(stream, counts))
        counts[sources[-1]] += 1
    return sources


def spread_of_gaps(sources, shares):
    """Per source the greatest less the smallest gap to its share over all beginnings: the most that any window is off."""
    spread = []
    for source, share in enumerate(shares):
        gaps = [Fraction(0)]
        for chosen in sources:
            gaps.append(gaps[-1] + (chosen == source) - share)
        spread.append(max(gaps) - min(gaps))
    return spread


@pytest.mark.parametrize("weights", SETS + random_sets(), ids=str)
def test_counts_are_off_by_less_than_one_after_every_sample_of_every_stream(weights):
    mixture = Mixture(weights, num_streams=11)
    shares = shares_of(weights)
    for stream in range(11):
        counts = [0] * len(weights)
        for n in range(1, 400):
            counts[mixture.next(stream, counts)] += 1
            assert all(abs(c - n * s) < 1 for c, s in zip(counts, shares, strict=True))


@FIXED
@given(weights=WEIGHTS, stream=st.integers(0, 10))
def test_counts_of_every_window_are_off_by_less_than_two(weights, stream):
    """And of every window that begins with the stream by less than one: that is the test above."""
    spread = spread_of_gaps(samples_of(weights, stream, 120), shares_of(weights))
    assert max(spread) < 2


@FIXED
@given(weights=WEIGHTS, num_streams=st.integers(1, 9))
def test_all_streams_in_turn_are_off_by_less_than_one_a_stream_and_windows_by_less_than_two(
    weights, num_streams
):
    streams = [samples_of(weights, stream, 40, num_streams) for stream in range(num_streams)]
    interleaved = [source for turn in zip(*streams, strict=True) for source in turn]
    shares = shares_of(weights)
    assert max(spread_of_gaps(interleaved, shares)) < 2 * num_streams
    for source, share in enumerate(shares):
        count = Fraction(0)
        for n, chosen in enumerate(interleaved, start=1):
            count += chosen == source
            assert abs(count - n * share) < num_streams


@pytest.mark.parametrize("weights, is_there", [((3, 3, 2, 2), True), ((1, 2, 8), False)], ids=str)
def test_no_schedule_keeps_every_window_of_some_mixtures_within_one(weights, is_there):
    """All schedules whose gaps stay in an interval of length one, for every place of the interval, go through at once."""
    total = sum(weights)

    def survivors(low, length):
        reached = {(0,) * len(weights)}
        for n in range(1, length + 1):
            longer = (
                c[:s] + (c[s] + 1,) + c[s + 1 :] for c in reached for s in range(len(weights))
            )
            reached = {
                c
                for c in longer
                if all(
                    a <= x * total - n * w <= a + total
                    for a, x, w in zip(low, c, weights, strict=True)
                )
            }
        return reached

    places = product(range(-total, 1), repeat=len(weights))
    assert any(survivors(low, 2 * total) for low in places) == is_there


def test_first_samples_of_the_streams_follow_the_mixture():
    for by in ("samples", "tokens"):
        mixture = Mixture([3.0, 3.0, 2.0, 2.0], num_streams=20, by=by)
        first = Counter(mixture.next(stream, [0, 0, 0, 0]) for stream in range(20))
        assert first == {0: 6, 1: 6, 2: 4, 3: 4}


def most_behind(shares, source):
    """The factor of the longest sample in the second bound of ``mixture``."""
    others = sorted((s for i, s in enumerate(shares) if i != source), reverse=True)
    return sum((shares[source] + sum(others[: k - 1])) / k for k in range(1, len(shares)))


@FIXED
@given(
    weights=WEIGHTS,
    stream=st.integers(0, 10),
    lengths=st.lists(st.sampled_from([1, 2, 3, 10, 100, 997]), min_size=1, max_size=150),
)
def test_tokens_are_off_by_about_one_longest_sample_after_every_sample(weights, stream, lengths):
    mixture, shares = Mixture(weights, num_streams=11, by="tokens"), shares_of(weights)
    tokens, longest = [0] * len(weights), [0] * len(weights)
    for length in lengths:
        source = mixture.next(stream, tokens)
        tokens[source] += length
        longest[source] = max(longest[source], length)
        for s, share in enumerate(shares):
            ahead = tokens[s] - sum(tokens) * share
            assert ahead <= (1 - share) * longest[s]
            assert -ahead <= max(longest) * most_behind(shares, s)


def test_most_that_a_source_falls_behind_in_tokens_is_what_the_docstring_says():
    demo = shares_of([3, 3, 2, 2])
    assert float(max(most_behind(demo, s) for s in range(4))) == pytest.approx(0.8667, abs=1e-4)
    assert all(most_behind([Fraction(1, n)] * n, 0) == Fraction(n - 1, n) for n in range(2, 9))


def test_tokens_follow_the_weights_where_one_source_has_much_longer_samples():
    """By samples, the long ones get nearly all tokens."""
    lengths, shares = (300, 20, 5), {}
    for by in ("samples", "tokens"):
        mixture, tokens, counts = Mixture([2, 1, 1], 1, by), [0] * 3, [0] * 3
        for _ in range(4000):
            source = mixture.next(0, tokens if by == "tokens" else counts)
            tokens[source] += lengths[source]
            counts[source] += 1
        shares[by] = [t / sum(tokens) for t in tokens]
    assert shares["tokens"] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert shares["samples"] == pytest.approx([0.96, 0.032, 0.008], abs=0.001)


def test_weights_become_the_smallest_integers_of_the_same_proportion():
    assert integer_weights([0.3, 0.3, 0.2, 0.2]) == [3, 3, 2, 2]
    assert integer_weights([1e-3, 2.0]) == [1, 2000]
