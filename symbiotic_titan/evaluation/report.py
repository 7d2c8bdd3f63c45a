"""Tables of scores with their intervals: of one evaluation target, or of several side by side."""

from collections.abc import Mapping, Sequence

from symbiotic_titan.evaluation.suite import Score, Scores

_MISSING = "-"


def comparison_table(columns: Mapping[str, Scores]) -> str:
    """A row per score, a column per label of ``columns`` with ``score [low, high]``, then chance, upper bound and number.

    The last three come from the first column that has the score. A row gets a * if they differ by more than 1 % in another
    column, as with a Fréchet distance or other settings.
    """
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    header = ["", *columns, "chance", "upper bound", "number"]
    rows = [_row(name, [scores.get(name) for scores in columns.values()]) for name in names]
    return _aligned([header, *rows], 1 + len(columns))


def _row(name: str, found: Sequence[Score | None]) -> list[str]:
    known = [score for score in found if score is not None]
    first = known[0]
    marked = any(_differ(first, other) for other in known[1:])
    return [
        name + " *" * marked,
        *(_score_cell(score) for score in found),
        _cell(first["chance"]),
        _cell(first["upper_bound"]),
        str(first["number"]),
    ]


def _differ(first: Score, other: Score) -> bool:
    bounds = (
        (first["chance"], other["chance"]),
        (first["upper_bound"], other["upper_bound"]),
    )
    near = all(
        a == b or (a is not None and b is not None and abs(a - b) <= 0.01 * max(abs(a), abs(b)))
        for a, b in bounds
    )
    return not near or first["number"] != other["number"]


def _cell(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _score_cell(score: Score | None) -> str:
    if score is None or score["interval"] is None:
        return _cell(score and score["score"])
    low, high = score["interval"]
    return f"{score['score']:.3f} [{low:.3f}, {high:.3f}]"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """The first ``left`` columns are aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)
