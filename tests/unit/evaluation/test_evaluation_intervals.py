"""Intervals of scores, against published values and formulas written out."""

import random
import statistics

import pytest

from symbiotic_titan.evaluation.intervals import of_error, of_mean, of_share
from symbiotic_titan.evaluation.suite import measure_mean


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_the_interval_of_a_share_is_wilsons(right, number, low, high):
    assert of_share(right, number) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_mean_is_normal_and_of_rights_and_wrongs_wilsons():
    values = [0.5, 1.0, 0.25, 0.75, 0.0]
    half = 1.959964 * statistics.stdev(values) / len(values) ** 0.5
    assert of_mean(values) == pytest.approx((0.5 - half, 0.5 + half))
    assert of_mean([True, False, 1.0, 0]) == of_share(2, 4)
    assert of_mean([0.5]) is None and of_mean([1.0]) == of_share(1, 1)


def test_an_error_that_is_not_known_gives_no_interval():
    assert of_error(0.5, 0.1) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert of_error(0.5, float("nan")) is None


@pytest.mark.parametrize("is_share", [True, False])
def test_it_holds_the_true_mean_in_about_19_of_20_samples(is_share):
    held = 0
    for _ in range(600):
        values = [random.random() for _ in range(50)]
        low, high = of_mean([v < 0.3 for v in values] if is_share else values)
        held += low <= (0.3 if is_share else 0.5) <= high
    assert 0.92 < held / 600 < 0.98


def test_a_score_of_items_has_its_mean_number_and_interval():
    score = measure_mean([True, False, False, True], chance=0.25)
    assert score["score"] == 0.5 and score["number"] == 4 and score["chance"] == 0.25
    assert score["interval"] == list(of_share(2, 4)) and score["upper_bound"] is None
