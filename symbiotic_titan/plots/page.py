"""Figures and final values of several runs as one self-contained HTML page."""

import base64
import html
from collections.abc import Sequence

import numpy as np

from symbiotic_titan.plots.logs import Run

# Groups of tags in the table, in this order.
TABLE = ("validation/", "loss/", "routing/", "tokens/", "grad_norm/", "shield/", "perf/")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; height: auto; }
figure { margin: 2em 0; }
figcaption { color: #555; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 12px; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""


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


def table(runs: Sequence[Run]) -> str:
    """Two columns per run: last value, and mean of the last tenth (not for counters, which only grow)."""
    heads = "".join(f'<th colspan="2">{html.escape(run.label)}</th>' for run in runs)
    steps = "".join(f"<th>step {run.last_step}</th><th>last tenth</th>" for run in runs)
    rows = [f"<tr><th></th>{heads}</tr>", f"<tr><th></th>{steps}</tr>"]
    for tag in table_tags(runs):
        cells = [f"<td>{html.escape(tag)}</td>"]
        for run in runs:
            last, mean = final_values(run, tag) or (None, None)
            mean = None if tag.startswith("tokens/") else mean
            cells += [f"<td>{number(last)}</td>", f"<td>{number(mean)}</td>"]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def page(
    heading: str,
    runs: Sequence[Run],
    pictures: Sequence[tuple[str, bytes, list[str]]],
    skipped: Sequence[str],
) -> str:
    """The page. pictures: (title, PNG, notes)."""
    heading = html.escape(heading)
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{heading}</title><style>{STYLE}</style></head><body>',
        f"<h1>{heading}</h1>",
    ]
    for title, png, notes in pictures:
        image = base64.b64encode(png).decode("ascii")
        caption = html.escape("; ".join(notes))
        parts.append(
            f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    if skipped:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in skipped)
        parts.append(f"<h2>Not drawn</h2><ul>{items}</ul>")
    if runs:
        folders = "".join(
            f"<li>{html.escape(run.label)}: {html.escape(str(run.folder))}</li>" for run in runs
        )
        parts += ["<h2>Final values</h2>", table(runs), f"<h2>Runs</h2><ul>{folders}</ul>"]
    return "\n".join([*parts, "</body></html>\n"])
