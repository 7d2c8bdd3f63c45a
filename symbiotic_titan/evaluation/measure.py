"""A score beside what it has to be compared with."""

from typing import TypedDict


class Measure(TypedDict):
    """``score`` of the model, between ``chance`` and ``upper_bound``, from ``number`` samples. Plain data, for JSON.

    chance:      what is reached without looking at the prompt or at the image.
    upper_bound: what the real pictures or answers themselves reach under the same rules.

    Both are None where nobody knows them.
    """

    score: float
    chance: float | None
    upper_bound: float | None
    number: int


# Measures by name, as tables and TensorBoard show them.
Scores = dict[str, Measure]
