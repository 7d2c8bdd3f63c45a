"""Figures of a study: curves over steps, right answers by kind, paired differences. Needs matplotlib.

A system has one colour in all of them. A line is the mean over seeds, the band around it reaches from the lowest to the highest seed.
Bars are intervals of 95 %.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from symbiotic_titan.evaluation.suite import Score
from symbiotic_titan.plots.style import (
    MissingData,
    label_steps,
    legend_below,
    line_style,
    panels,
)
from symbiotic_titan.sequence.modality import MODALITY_NAMES
from symbiotic_titan.study.paper import (
    ALL,
    ANSWER_CURVE,
    ANSWERS,
    FLOW,
    FLOW_CURVE,
    GLOBAL,
    LANGUAGE_CURVE,
    PAPERS,
    SPLITS,
    SYSTEMS,
    WITHIN,
    tokens,
)
from symbiotic_titan.study.results import Measure, Study

WIDTH, HEIGHT = (
    4.8,
    3.7,
)  # inches of a panel: text can be read where a phone shows it 350 pixels wide
INDEX = {name: index for index, name in enumerate(SYSTEMS)}
COMPARED = (*PAPERS, "standard_moe_two_rates")
# Flow loss of a system that never trains it says nothing, and would stretch the axis.
GENERATING = tuple(name for name in COMPARED if name != "only_lm_mmu")
SHIELDS = ("symbiotic", "wo_shield", "shield_weights")
CAPACITY_BAR = 0.95
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Curve:
    """A figure of ``tag`` over steps.  name: of its file.   paper: what the paper's figure shows.   level: drawn as a dotted line."""

    name: str
    title: str
    tag: str
    y_label: str
    paper: str
    systems: tuple[str, ...] = COMPARED
    level: float | None = None
    is_steep: bool = False  # at first: the y axis then shows the values after a tenth of the steps


CAPACITY = tuple(
    Curve(
        f"capacity_{modality}",
        f"Capacity rate, {tokens(modality)}, within groups",
        f"{WITHIN}/{modality}",
        "share of assignments",
        "Figures 5a and 9: Symbiotic near 0.95 in every modality (ViT 0.93), the standard MoE falls.",
        level=CAPACITY_BAR,
    )
    for modality in (ALL, *MODALITY_NAMES)
)
CURVES = (
    *CAPACITY,
    Curve(
        "capacity_global",
        "Capacity rate, all tokens, over all experts",
        f"{GLOBAL}/{ALL}",
        "share of assignments",
        "Figure 5a by the literal formula, which a split cannot fill where one modality has most tokens.",
        level=CAPACITY_BAR,
    ),
    Curve(
        "flow",
        "Flow loss, held out",
        FLOW_CURVE,
        "flow-matching error per token",
        "Figure 5b: Symbiotic is lowest from about 1,000 steps on, then MoT, then the standard MoE.",
        systems=GENERATING,
        is_steep=True,
    ),
    Curve(
        "language",
        "Language loss, held out",
        LANGUAGE_CURVE,
        "nats per token",
        "Figure 6b (MMLU): Symbiotic stays, understanding only falls from 0.60 to 0.52.",
    ),
    Curve(
        "answer_loss",
        "Loss of answers about images, held out",
        ANSWER_CURVE,
        "nats per token",
        "Figure 6c (OCRBench): Symbiotic peaks at 820, understanding only at 790.",
    ),
    Curve(
        "shield",
        "Shield: language loss, held out",
        LANGUAGE_CURVE,
        "nats per token",
        "Figure 6b: without the shield MMLU falls steeply in the first 500 steps.",
        systems=SHIELDS,
    ),
)
ANSWERS_PAPER = (
    "Table 1, OCRBench: Symbiotic 747, understanding only 683, MoT 611, standard MoE 593."
)


def label(system: str | float) -> str:
    """What readers call a system; a number as it is compared with."""
    if not isinstance(system, str):
        return f"{system:.2f}".rstrip("0").rstrip(".")
    known = SYSTEMS.get(system) or SPLITS.get(system)
    return known.label if known else system


def style_of(system: str) -> dict[str, Any]:
    """Colour, and dashes for all but the paper's four systems. Those that the study does not know share the last colour."""
    place = INDEX.get(system, len(INDEX))
    return line_style(place) | {"linestyle": "-" if system in PAPERS else "--"}


def line_of(system: str) -> Line2D:
    """Legend entry of a line."""
    return Line2D([], [], label=label(system), linewidth=1.9, **style_of(system))


def mean_curve(points: dict[int, dict[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps that all seeds have, (seeds, steps) values) of seed -> step -> value."""
    steps = sorted(set.intersection(*[set(of_seed) for of_seed in points.values()]))
    values = [[of_seed[step] for step in steps] for of_seed in points.values()]
    return np.array(steps, dtype=np.int64), np.array(values)


def draw_curve(panel: Axes, study: Study, curve: Curve) -> list[str]:
    """Draw the systems that have it, and return them.

    Raises:
        MissingData: none has.
    """
    logged = {name: study.curves(name, curve.tag) for name in curve.systems}
    means = {name: mean_curve(points) for name, points in logged.items() if points}
    shown = [name for name, (steps, _) in means.items() if len(steps)]
    if not shown:
        raise MissingData(f"no system has logged {curve.tag}")
    means = {name: means[name] for name in shown}
    for system, (steps, values) in means.items():
        style = style_of(system)
        band = {"color": style["color"], "alpha": 0.16, "linewidth": 0}
        panel.fill_between(steps, values.min(0), values.max(0), **band)
        panel.plot(steps, values.mean(0), linewidth=1.9, **style)
    if curve.is_steep:
        set_range(panel, [values[:, steps >= steps[-1] / 10] for steps, values in means.values()])
    if curve.level is not None:
        panel.axhline(curve.level, color="#777777", linewidth=0.9, linestyle=(0, (2, 2)))
    panel.set_title(curve.title, fontsize="medium", loc="left")
    panel.set_ylabel(curve.y_label)
    label_steps(panel)
    return shown


def set_range(panel: Axes, values: list[np.ndarray]) -> None:
    """Limit the y axis to ``values`` and a twentieth more."""
    every = np.concatenate([found.ravel() for found in values])
    margin = (every.max() - every.min() or 1.0) / 20
    panel.set_ylim(every.min() - margin, every.max() + margin)


def curve_figure(study: Study, curve: Curve) -> Figure:
    """Raises:
    MissingData: no system has the curve.
    """
    figure, axes = panels(1, 1, WIDTH, HEIGHT)
    shown = draw_curve(axes[0, 0], study, curve)
    entries = [line_of(system) for system in shown]
    legend_below(figure, entries, columns=2)
    return figure


def draw_answers(panel: Axes, study: Study) -> list[str]:
    """Share of right answers by kind: a point and its interval for each system, and chance. Returns the systems that have any.

    Raises:
        MissingData: none has scores of two seeds.
    """
    shown = [s for s in COMPARED if any(study.values(s, m) for m in ANSWERS.values())]
    if not shown:
        raise MissingData("no system has scores of answers")
    for row, system in enumerate(shown):
        offset = (row - (len(shown) - 1) / 2) * 0.14
        for place, measure in enumerate(ANSWERS.values()):
            found = study.estimate(system, measure)
            if found is not None:
                draw_interval(panel, system, place + offset, found.mean, y_error=found.half_width)
    for place, measure in enumerate(ANSWERS.values()):
        if (chance := chance_of(study, measure)) is not None:
            panel.hlines(chance, place - 0.42, place + 0.42, color="#777777", linestyle=(0, (2, 2)))
    panel.set_xticks(range(len(ANSWERS)), list(ANSWERS))
    panel.set_ylim(0, 1)
    panel.set_title("Right answers to questions about images", fontsize="medium", loc="left")
    panel.set_ylabel("share right (dashed: chance)")
    return shown


def answers_figure(study: Study) -> Figure:
    """Raises:
    MissingData: no system has scores.
    """
    figure, axes = panels(1, 1, WIDTH, HEIGHT)
    entries = [point(system) for system in draw_answers(axes[0, 0], study)]
    legend_below(figure, entries, columns=2)
    return figure


def draw_interval(
    panel: Axes,
    system: str,
    x: float,
    y: float,
    *,
    x_error: float | None = None,
    y_error: float | None = None,
) -> None:
    errors: dict[str, Any] = {"xerr": x_error, "yerr": y_error, "capsize": 2.5, "linewidth": 1.4}
    panel.errorbar([x], [y], markersize=5, **errors, **point_style(system))


def point_style(system: str) -> dict[str, Any]:
    marker = MARKERS[INDEX.get(system, len(INDEX)) % len(MARKERS)]
    return {"color": style_of(system)["color"], "marker": marker}


def point(system: str) -> Line2D:
    """Legend entry of points."""
    return Line2D([], [], label=label(system), linewidth=1.4, markersize=5, **point_style(system))


def chance_of(study: Study, measure: Measure) -> float | None:
    """Mean over the seeds of any system that has the score: their questions are the same."""
    known = [score["chance"] for score in scores_of(study, measure) if score["chance"] is not None]
    return float(np.mean(known)) if known else None


def scores_of(study: Study, measure: Measure) -> list[Score]:
    """Of every seed of the first system that has it, with chance and number."""
    for by_seed in study.runs.values():
        found = [run.scores[measure.key] for run in by_seed.values() if measure.key in run.scores]
        if found:
            return found
    return []


def difference_figure(study: Study, measure: Measure) -> Figure:
    """Symbiotic less each other system, with the interval paired over seeds.

    Raises:
        MissingData: no pair has two seeds.
    """
    compared = GENERATING if measure == FLOW else COMPARED
    rivals = (*compared[1:], *SHIELDS[1:])
    pairs = {n: pair for n in rivals if (pair := study.difference("symbiotic", n, measure))}
    if not pairs:
        raise MissingData(f"{measure.name}: no pair of systems has two seeds in common")
    figure, axes = panels(1, 1, WIDTH, 0.9 + 0.3 * len(pairs))
    panel = axes[0, 0]
    for row, (name, pair) in enumerate(pairs.items()):
        draw_interval(panel, name, pair.mean, row, x_error=pair.half_width)
    panel.axvline(0, color="black", linewidth=0.9)
    panel.grid(axis="y", visible=False)
    panel.set_yticks(range(len(pairs)), [label(name) for name in pairs])
    panel.set_ylim(len(pairs) - 0.5, -0.5)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5))
    side = "left" if measure.better == "lower" else "right"
    panel.set_xlabel(f"Symbiotic less the other; better on the {side} of 0", fontsize="small")
    panel.set_title(f"Difference: {measure.name}", fontsize="medium", loc="left")
    return figure


def summary_figure(study: Study) -> Figure:
    """Four panels for a README: capacity, flow, language, answers. A panel without data stays empty and says so."""
    figure, axes = panels(2, 2, WIDTH, 3.2, share_y=False)
    chosen = {curve.name: curve for curve in CURVES}
    for panel, name in zip(axes.flat, ("capacity_vae", "flow", "language"), strict=False):
        try:
            draw_curve(panel, study, chosen[name])
        except MissingData as reason:
            panel.set_title(f"{chosen[name].title}: {reason}", fontsize="small", loc="left")
    try:
        draw_answers(axes[1, 1], study)
    except MissingData as reason:
        axes[1, 1].set_title(str(reason), fontsize="small", loc="left")
    shown = [system for system in COMPARED if study.runs.get(system)]
    legend_below(figure, [line_of(system) for system in shown])
    return figure
