"""Figures of scores against training steps, in the style of 6a and 11 of arXiv 2604.07753: one panel per score, a line per run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from symbiotic_titan.plots.style import (
    Drawing,
    MissingData,
    label_steps,
    legend_below,
    legend_line,
    line_style,
    panels,
)

COLUMNS = 3
CHANCE: dict[str, Any] = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (2, 2))}


@dataclass(frozen=True)
class ScorePoint:
    """A score at a step.   interval: (low, high) of 95 %.   interval and chance are None where they are unknown."""

    step: int
    score: float
    interval: tuple[float, float] | None = None
    chance: float | None = None


@dataclass(frozen=True)
class ScoreCurve:
    """One run's values of one score, by step.   index: of the run, which decides the colour."""

    index: int
    label: str
    points: tuple[ScorePoint, ...]


def draw_scores(panel: Axes, curve: ScoreCurve) -> None:
    """The line of a run with its points and, where they are known, bars of their intervals."""
    steps, style = [point.step for point in curve.points], line_style(curve.index)
    panel.plot(
        steps, [p.score for p in curve.points], linewidth=1.8, marker="o", markersize=4, **style
    )
    known = [(p.step, p.score, *p.interval) for p in curve.points if p.interval]
    if known:
        at, scores, lows, highs = (np.array(column) for column in zip(*known, strict=True))
        bars: dict[str, Any] = {"ecolor": style["color"], "elinewidth": 1.0, "capsize": 2.5}
        panel.errorbar(at, scores, yerr=(scores - lows, highs - scores), fmt="none", **bars)


def score_figure(
    title: str, scores: Mapping[str, Sequence[ScoreCurve]], notes: Sequence[str] = ()
) -> Drawing:
    """A panel for each of ``scores`` by name. Dotted: chance, of the last step of the first run that has it.

    Raises:
        MissingData: there is no score.
    """
    if not scores:
        raise MissingData(
            "no kept result of these runs; name the folder of symbiotic evaluate with --evaluation"
        )
    columns = min(COLUMNS, len(scores))
    rows = -(-len(scores) // columns)
    width, height = (7.2, 4.4) if len(scores) == 1 else (4.2, 3.6)
    figure, axes = panels(rows, columns, width, height, share_y=False)
    shown: dict[int, str] = {}
    has_chance = False
    for panel, (name, curves) in zip(axes.flat, scores.items(), strict=False):
        for curve in curves:
            draw_scores(panel, curve)
            shown[curve.index] = curve.label
        chances = [c.points[-1].chance for c in curves if c.points[-1].chance is not None]
        if chances:
            panel.axhline(chances[0], **CHANCE)
            has_chance = True
        panel.set_title(name, fontsize="medium")
        label_steps(panel)
    for panel in axes.flat[len(scores) :]:
        panel.set_axis_off()
    for line in axes:
        line[0].set_ylabel("score (bars: 95 %)")
    figure.suptitle(title)
    entries = [legend_line(index, label) for index, label in sorted(shown.items())]
    if has_chance:
        entries.append(Line2D([], [], label="chance", **CHANCE))
    legend_below(figure, entries)
    return Drawing(title, figure, list(notes))
