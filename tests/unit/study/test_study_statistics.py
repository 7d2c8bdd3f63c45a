"""Student's t without scipy, means over seeds and paired differences."""

import math

import pytest

from symbiotic_titan.study.statistics import (
    differences,
    estimate,
    t_probability,
    t_quantile,
)

# Two-sided 95 % quantiles, as printed tables have them.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_the_quantiles_are_those_of_printed_tables(degrees, quantile):
    assert t_quantile(0.95, degrees) == pytest.approx(quantile, abs=6e-5)


def test_other_confidences_and_the_closed_forms_of_one_and_two_degrees():
    assert t_quantile(0.99, 4) == pytest.approx(4.6041, abs=6e-5)
    assert t_quantile(0.5, 1) == pytest.approx(1.0)  # tan(pi / 4)
    assert t_probability(1.7, 2) == pytest.approx(1.7 / math.sqrt(2 + 1.7**2))
    assert t_probability(0.0, 3) == 0.0 and t_probability(1e9, 7) == pytest.approx(1.0)


@pytest.mark.parametrize(("confidence", "degrees"), [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_there_is_no_quantile_outside_its_range(confidence, degrees):
    with pytest.raises(ValueError, match=f"got {confidence} and {degrees}"):
        t_quantile(confidence, degrees)


def test_a_mean_has_the_textbook_interval():
    found = estimate({0: 1.0, 1: 2.0, 5: 3.0}, "loss")
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert found.summary()["values"] == {"0": 1.0, "1": 2.0, "5": 3.0}
    assert (found.low, found.high) == (found.summary()["low"], found.summary()["high"])


def test_pairs_take_out_what_seeds_have_in_common():
    ours, theirs = {0: 1.0, 1: 5.0, 2: 9.0, 3: 7.0}, {0: 2.0, 1: 6.1, 2: 9.9}
    paired = estimate(differences(ours, theirs), "d")
    assert paired.values == pytest.approx({0: -1.0, 1: -1.1, 2: -0.9})
    assert paired.same_sign and paired.high < 0
    assert estimate(ours, "a").overlaps(estimate(theirs, "b"))


def test_signs_agree_only_where_no_value_is_zero():
    assert estimate({0: -1.0, 1: -2.0}, "d").same_sign
    assert not estimate({0: 0.0, 1: 2.0}, "d").same_sign
    assert not estimate({0: 0.0, 1: 0.0}, "d").same_sign


def test_intervals_that_touch_overlap():
    a, b = estimate({0: 1.0, 1: 1.0}, "a"), estimate({0: 2.0, 1: 2.0}, "b")
    assert a.half_width == 0.0 and not a.overlaps(b) and a.overlaps(a)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "loss: an interval needs at least 2 seeds, got no seed"),
        ({4: 1.0}, "loss: an interval needs at least 2 seeds, got seed 4 alone; run more"),
        ({0: 1.0, 1: math.nan}, "loss: the value of seed 1 is nan"),
    ],
)
def test_there_is_no_interval_without_numbers_of_two_seeds(values, message):
    with pytest.raises(ValueError, match=message):
        estimate(values, "loss")
