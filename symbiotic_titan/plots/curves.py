"""Figures of a scalar against training steps: 5a, 5b, 6b, 6c, 9 and 10 of arXiv 2604.07753."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from symbiotic_titan.plots.logs import Run
from symbiotic_titan.plots.style import (
    Drawing,
    MissingData,
    label_steps,
    large_numbers,
    legend_below,
    legend_line,
    line_style,
    panels,
    running_mean,
)
from symbiotic_titan.sequence.modality import MODALITY_NAMES

CAPACITY = "capacity rate (share of assignments)"
# Tag -> over which experts an equal share is the capacity, see ``moe.routing_metrics.capacity_rates``.
CAPACITY_RATES = {
    "capacity_rate": "within each group",
    "capacity_rate_global": "over all experts of the layer",
}
FEW_POINTS = 12  # below, each point gets a marker
PALE = 0.3  # opacity of the logged values beside their running mean


def draw_curve(panel: Axes, run: Run, tag: str, *, smooth: bool = False) -> bool:
    """Draw the run's values of ``tag``. With ``smooth`` and enough points, their running mean over a tenth of the points stands
    out and the values are pale. Returns whether they were smoothed.
    """
    steps, values = run.curve(tag)
    style = line_style(run.index)
    reach = len(values) // 20 if smooth else 0
    if reach:
        panel.plot(steps, values, linewidth=0.8, alpha=PALE, **style)
    marker = "o" if len(steps) < FEW_POINTS and not reach else None
    panel.plot(
        steps, running_mean(values, reach), linewidth=1.8, marker=marker, markersize=3.5, **style
    )
    return reach > 0


def curve_figure(
    runs: Sequence[Run],
    rows: Mapping[str, Mapping[str, str]],
    *,
    title: str,
    smooth: bool = False,
) -> Drawing:
    """One panel per tag, a line per run. rows: label of the y axis -> tag -> heading of its panel ("" for none). A tag that no run has
    gets no panel.

    Raises:
        MissingData: no run has any of the tags.
    """
    tags = [tag for row in rows.values() for tag in row]
    shown = {
        y_label: found
        for y_label, row in rows.items()
        if (found := {t: head for t, head in row.items() if any(t in r.scalars for r in runs)})
    }
    if not shown:
        raise MissingData(f"no run has {' or '.join(tags)}")
    columns = max(map(len, shown.values()))
    width, height = (7.2, 4.4) if columns == len(shown) == 1 else (4.2, 3.8)
    figure, axes = panels(len(shown), columns, width, height)
    missing = {run.label: [tag for tag in tags if tag not in run.scalars] for run in runs}
    notes = [
        f"{label} has no {', '.join(lacking)}" for label, lacking in missing.items() if lacking
    ]
    is_smoothed = False
    for line, (y_label, row) in zip(axes, shown.items(), strict=True):
        for panel, (tag, heading) in zip(line, row.items(), strict=False):
            for run in runs:
                if tag in run.scalars:
                    is_smoothed |= draw_curve(panel, run, tag, smooth=smooth)
            panel.set_title(heading, fontsize="medium")
            label_steps(panel)
        for panel in line[len(row) :]:
            panel.set_axis_off()
        line[0].set_ylabel(y_label)
    if axes.size == 1:
        axes[0, 0].set_title(title)
    else:
        figure.suptitle(title)
    drawn = [run for run in runs if len(missing[run.label]) < len(tags)]
    entries = [legend_line(run.index, run.label) for run in drawn]
    if is_smoothed:
        pale: dict[str, Any] = {"color": "black", "alpha": PALE, "linewidth": 0.8}
        entries.append(Line2D([], [], label="logged values", **pale))
    legend_below(figure, entries)
    return Drawing(title, figure, notes)


def capacity_rate(runs: Sequence[Run]) -> Drawing:
    tags = {f"routing/{rate}/all": scope for rate, scope in CAPACITY_RATES.items()}
    return curve_figure(
        runs, {CAPACITY: tags}, title="5a  Capacity rate over all tokens", smooth=True
    )


def flow_loss(runs: Sequence[Run]) -> Drawing:
    return curve_figure(
        runs,
        {"flow-matching error per token": {"loss/by_task/t2i_flow": ""}},
        title="5b  Text-to-image flow loss",
        smooth=True,
    )


def understanding(runs: Sequence[Run], task: str, title: str) -> Drawing:
    """Held-out text loss of ``task``. If a run lacks it, the training loss of all runs, as the two are not comparable."""
    held_out, training = f"validation/by_task/{task}_text", f"loss/by_task/{task}_text"
    with_task = [run for run in runs if held_out in run.scalars or training in run.scalars]
    if not with_task:
        raise MissingData(f"no run has {held_out} or {training}")
    without = [run.label for run in with_task if held_out not in run.scalars]
    y_label = "cross entropy (nats per labelled token)"
    if not without:
        return curve_figure(runs, {y_label: {held_out: ""}}, title=f"{title}: held-out loss")
    drawing = curve_figure(
        runs, {y_label: {training: ""}}, title=f"{title}: TRAINING loss", smooth=True
    )
    drawing.notes.append(f"training loss, because {', '.join(without)} logged no {held_out}")
    return drawing


def language(runs: Sequence[Run]) -> Drawing:
    return understanding(runs, "lm", "6b  Language (lm)")


def image_understanding(runs: Sequence[Run]) -> Drawing:
    return understanding(runs, "mmu", "6c  Image understanding (mmu)")


def capacity_by_modality(runs: Sequence[Run]) -> Drawing:
    return curve_figure(
        runs,
        {
            f"capacity rate {scope}": {
                f"routing/{rate}/{name}": f"{name} tokens" for name in MODALITY_NAMES
            }
            for rate, scope in CAPACITY_RATES.items()
        },
        title="9  Capacity rate by modality",
        smooth=True,
    )


def token_counts(runs: Sequence[Run]) -> Drawing:
    drawing = curve_figure(
        runs,
        {"tokens (cumulative)": {f"tokens/{name}": f"{name} tokens" for name in MODALITY_NAMES}},
        title="10  Tokens since the start of training",
    )
    for panel in drawing.figure.axes:
        panel.yaxis.set_major_formatter(large_numbers())
    return drawing
