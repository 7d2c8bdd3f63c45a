"""Values and rows of the config are checked by type, Literal and key, with messages a user can act on."""

from dataclasses import dataclass
from typing import Literal

import pytest

from symbiotic_titan.config.rows import check_value, row_from_dict


@dataclass
class Row:
    name: str
    size: int = 1
    kind: Literal["a", "b"] = "a"
    rates: list[float] | None = None


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, int),
        (3, float),
        ("a", Literal["a", "b"]),
        (None, int | None),
        ([1, 2.5], list[float]),
        ({"x": [1]}, dict[str, list[int]]),
        ("a", list[str] | str),
        (["a"], list[str] | str),
    ],
)
def test_fitting_values_pass(value, annotation):
    assert check_value("key", value, annotation) is None


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("ten", int, "training.steps: must be an integer, got 'ten'"),
        (True, int, "training.steps: must be an integer, got True"),
        (1.5, int, "training.steps: must be an integer, got 1.5"),
        (1, bool, "training.steps: must be true or false, got 1"),
        ("c", Literal["a", "b"], "training.steps: must be one of 'a', 'b', got 'c'"),
        ([1, "x"], list[int], r"training.steps\[1\]: must be an integer, got 'x'"),
        ("x", float | None, "training.steps: must be a number, got 'x'"),
        ([1], dict[str, int], r"training.steps: must be a table, each value an integer, got \[1\]"),
        ([1], list[str] | str, "must be a list, each item a string or a string, got"),
    ],
)
def test_wrong_values_name_key_rule_and_value(value, annotation, message):
    with pytest.raises(ValueError, match=message):
        check_value("training.steps", value, annotation)


def test_row_is_built_from_a_table_and_left_alone_when_ready():
    row = row_from_dict(Row, {"name": "x", "size": 2}, "[[rows]] #1")
    assert row == Row("x", 2)
    assert row_from_dict(Row, row, "[[rows]] #1") is row


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"nam": "x"}, r"\[\[rows\]\] #1: unknown key 'nam'; did you mean 'name'\?"),
        ({"size": 2}, r"\[\[rows\]\] #1: missing key 'name'"),
        ({"name": 3}, r"\[\[rows\]\] #1.name: must be a string, got 3"),
        ("text", r"\[\[rows\]\] #1: must be a table, got 'text'"),
    ],
)
def test_bad_rows_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        row_from_dict(Row, table, "[[rows]] #1")
