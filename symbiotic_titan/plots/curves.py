"""Figures of a scalar against training steps: 5a, 5b, 6b, 6c, 9 and 10 of arXiv 2604.07753."""

from collections.abc import Sequence
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
FEW_POINTS = 12  # below, each point gets a marker
PALE = 0.3  # opacity of single steps beside their running mean


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
    tags: dict[str, str],
    *,
    title: str,
    y_label: str,
    smooth: bool = False,
) -> Drawing:
    """One panel per tag, a line per run. tags: tag -> heading of its panel ("" for none).

    Raises:
        MissingData: no run has any of the tags.
    """
    if not any(tag in run.scalars for run in runs for tag in tags):
        raise MissingData(f"no run has {' or '.join(tags)}")
    width, height = (7.2, 4.4) if len(tags) == 1 else (4.2, 3.8)
    figure, axes = panels(1, len(tags), width, height)
    missing = {run.label: [tag for tag in tags if tag not in run.scalars] for run in runs}
    notes = [
        f"{label} has no {', '.join(lacking)}" for label, lacking in missing.items() if lacking
    ]
    is_smoothed = False
    for panel, (tag, heading) in zip(axes.flat, tags.items(), strict=True):
        for run in runs:
            if tag in run.scalars:
                is_smoothed |= draw_curve(panel, run, tag, smooth=smooth)
        panel.set_title(heading, fontsize="medium")
        label_steps(panel)
    axes[0, 0].set_ylabel(y_label)
    if len(tags) == 1:
        axes[0, 0].set_title(title)
    else:
        figure.suptitle(title)
    shown = [run for run in runs if len(missing[run.label]) < len(tags)]
    entries = [legend_line(run.index, run.label) for run in shown]
    if is_smoothed:
        pale: dict[str, Any] = {"color": "black", "alpha": PALE, "linewidth": 0.8}
        entries.append(Line2D([], [], label="single steps", **pale))
    legend_below(figure, entries)
    return Drawing(title, figure, notes)


def capacity_rate(runs: Sequence[Run]) -> Drawing:
    return curve_figure(
        runs,
        {"routing/capacity_rate/all": ""},
        title="5a  Capacity rate over all tokens",
        y_label=CAPACITY,
        smooth=True,
    )


def flow_loss(runs: Sequence[Run]) -> Drawing:
    return curve_figure(
        runs,
        {"loss/by_task/t2i_flow": ""},
        title="5b  Text-to-image flow loss",
        y_label="flow-matching error per token",
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
        return curve_figure(runs, {held_out: ""}, title=f"{title}: held-out loss", y_label=y_label)
    drawing = curve_figure(
        runs, {training: ""}, title=f"{title}: TRAINING loss", y_label=y_label, smooth=True
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
        {f"routing/capacity_rate/{name}": f"{name} tokens" for name in MODALITY_NAMES},
        title="9  Capacity rate by modality",
        y_label=CAPACITY,
        smooth=True,
    )


def token_counts(runs: Sequence[Run]) -> Drawing:
    drawing = curve_figure(
        runs,
        {f"tokens/{name}": f"{name} tokens" for name in MODALITY_NAMES},
        title="10  Tokens since the start of training",
        y_label="tokens (cumulative)",
    )
    for panel in drawing.figure.axes:
        panel.yaxis.set_major_formatter(large_numbers())
    return drawing
