"""The HTML page of symbiotic plot: figures and final values of several runs."""

from collections.abc import Sequence

import numpy as np

from symbiotic_titan.plots.html import Picture, templates
from symbiotic_titan.plots.logs import Run

# Groups of tags in the table, in this order.
TABLE = ("validation/", "loss/", "routing/", "tokens/", "grad_norm/", "shield/", "perf/")


def final_values(run: Run, tag: str) -> tuple[float, float] | None:
    """(last value, mean of the last tenth of the values) of a scalar; None where the run has none."""
    _, values = run.curve(tag)
    if not len(values):
        return None
    return float(values[-1]), float(np.mean(values[-max(1, len(values) // 10) :]))


def table_tags(runs: Sequence[Run]) -> list[str]:
    """Tags that a run has, in the table's order."""
    tags = sorted({tag for run in runs for tag in run.scalars})
    return [tag for group in TABLE for tag in tags if tag.startswith(group)]


def table_row(runs: Sequence[Run], tag: str) -> list[str]:
    """Two cells per run: last value, and mean of the last tenth (not for counters, which only grow)."""
    cells = []
    for run in runs:
        last, mean = final_values(run, tag) or (None, None)
        cells += [number(last), number(None if tag.startswith("tokens/") else mean)]
    return cells


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def page(
    heading: str, runs: Sequence[Run], pictures: Sequence[Picture], skipped: Sequence[str]
) -> str:
    rows = [(tag, table_row(runs, tag)) for tag in table_tags(runs)]
    return (
        templates()
        .get_template("runs.html")
        .render(heading=heading, runs=runs, pictures=pictures, skipped=skipped, rows=rows)
    )
