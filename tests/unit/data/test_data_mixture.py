from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from symbiotic_titan.data.mixture import Mixture, integer_weights

SETS = [[3.0, 3.0, 2.0, 2.0], [1.0], [0.7, 0.2, 0.1], [0.9, 0.05, 0.05], [1e-3, 1.0], [5, 3, 1, 1]]


def random_sets():
    random = Random(0)
    return [
        [round(random.uniform(0.01, 3), 2) for _ in range(random.randint(2, 6))] for _ in range(20)
    ]


@pytest.mark.parametrize("weights", SETS + random_sets(), ids=str)
def test_counts_are_off_by_less_than_one_after_every_sample_of_every_lane(weights):
    mixture = Mixture(weights, num_lanes=11)
    shares = [Fraction(str(w)) / sum(Fraction(str(v)) for v in weights) for w in weights]
    for lane in range(11):
        counts = [0] * len(weights)
        for n in range(1, 400):
            counts[mixture.next(lane, counts)] += 1
            assert all(abs(c - n * s) < 1 for c, s in zip(counts, shares, strict=True))


def test_first_samples_of_the_lanes_follow_the_mixture():
    mixture = Mixture([3.0, 3.0, 2.0, 2.0], num_lanes=20)
    first = Counter(mixture.next(lane, [0, 0, 0, 0]) for lane in range(20))
    assert first == {0: 6, 1: 6, 2: 4, 3: 4}


def test_weights_become_the_smallest_integers_of_the_same_proportion():
    assert integer_weights([0.3, 0.3, 0.2, 0.2]) == [3, 3, 2, 2]
    assert integer_weights([1e-3, 2.0]) == [1, 2000]
