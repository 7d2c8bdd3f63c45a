"""The table of scores: a column per checkpoint, and what they have to be compared with."""

from symbiotic_titan.evaluation.report import comparison_table
from symbiotic_titan.evaluation.suite import measure


def test_scores_stand_side_by_side_with_chance_and_upper_bound():
    one = {
        "digit": measure(0.5, number=8, interval=(0.2, 0.8), chance=0.1, upper_bound=1.0),
        "loss": measure(2, number=3),
    }
    other = {"digit": measure(0.625, number=8, chance=0.1, upper_bound=1.0)}
    assert comparison_table({"run/step-1": one, "b": other}).splitlines() == [
        "       run/step-1            b      chance  upper bound  number",
        "digit  0.500 [0.200, 0.800]  0.625   0.100        1.000       8",
        "loss   2.000                 -           -            -       3",
    ]


def test_a_row_whose_columns_were_measured_against_other_bounds_is_marked():
    def row(**of_second):
        first = {"chance": 0.1, "upper_bound": 1.0, "number": 8}
        columns = {"a": {"x": measure(0.5, **first)}, "b": {"x": measure(0.5, **first | of_second)}}
        return comparison_table(columns).splitlines()[1]

    assert row().startswith("x  ") and row(chance=0.1005).startswith("x  ")
    for change in ({"number": 9}, {"chance": 0.2}, {"upper_bound": None}):
        assert row(**change).startswith("x *  ")
