"""Figures of expert use: 7 (every layer) and 8 (every expert of one layer) of arXiv 2604.07753, for text and ViT tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from symbiotic_titan.moe.routing_metrics import overlap_size, top_overlap
from symbiotic_titan.plots.expert_use import ExpertUse
from symbiotic_titan.plots.style import (
    COLORS,
    Drawing,
    MissingData,
    large_numbers,
    legend_below,
    legend_line,
    line_style,
    panels,
)
from symbiotic_titan.sequence.modality import MODALITY_NAMES, TEXT, VIT

SHOWN = (TEXT, VIT)
MOST, LEAST, OTHER = COLORS[0], COLORS[4], "#BBBBBB"
NO_COUNTS = "no counts of text and vit tokens; they are logged with metrics.routing_freq > 0, or name a profile with --profile"


def layer_imbalance(uses: Sequence[ExpertUse]) -> Drawing:
    """Figure 7. Rows: imbalance ratio, standard deviation; columns: text, ViT.

    Raises:
        MissingData: there are no counts.
    """
    uses, notes = with_both(uses)
    title = "7  Expert use by layer"
    figure, axes = panels(2, len(SHOWN), 5.4, 3.2)
    figure.suptitle(title)
    for (upper, lower), modality in zip(axes.T, SHOWN, strict=True):
        for use in uses:
            style = {"linewidth": 1.5, "marker": "o", "markersize": 3.5, **line_style(use.index)}
            upper.plot(use.layers, use.imbalance(modality), **style)
            lower.plot(use.layers, use.deviation(modality), **style)
        upper.set_title(f"{MODALITY_NAMES[modality]} tokens", fontsize="medium")
        upper.axhline(1, color="black", linewidth=0.8, linestyle=":")
        lower.set_xlabel("layer")
        for panel in (upper, lower):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel("imbalance ratio (max / mean)")
    axes[1, 0].set_ylabel(
        "standard deviation (selections)" if uses[0].is_profile else "standard deviation / mean"
    )
    axes[1, 0].yaxis.set_major_formatter(large_numbers())
    axes[1, 0].set_ylim(bottom=0)  # last, because it turns off autoscaling of the upper limit
    legend_below(figure, [legend_line(use.index, f"{use.label} ({use.period})") for use in uses])
    return Drawing(title, figure, notes)


def with_both(uses: Sequence[ExpertUse]) -> tuple[list[ExpertUse], list[str]]:
    """(the uses with both text and ViT tokens, a note for each of the others).

    Raises:
        MissingData: none has.
    """
    shown = [use for use in uses if all(use.has_tokens(modality) for modality in SHOWN)]
    if not shown:
        raise MissingData(NO_COUNTS)
    return shown, [f"{use.label} has no text or no vit tokens" for use in uses if use not in shown]


def expert_counts(uses: Sequence[ExpertUse], layer: int | None) -> Drawing:
    """Figure 8. Two panels per run, text above ViT: a bar per expert; the most and the least used stand out.

    Raises:
        MissingData: there are no counts.
        ValueError: ``layer`` is no MoE layer.
    """
    uses, notes = with_both(uses)
    title = "8  Selections of every expert in one layer"
    figure, axes = panels(len(SHOWN) * len(uses), 1, 11, 2.4)
    figure.suptitle(title)
    for i, use in enumerate(uses):
        draw_pair(axes[2 * i : 2 * i + 2, 0], use, use.choose_layer(layer))
    legend_below(figure, bar_legend())
    return Drawing(title, figure, notes)


def draw_pair(pair: np.ndarray, use: ExpertUse, layer: int) -> None:
    """Text above ViT of one run's ``layer``."""
    extremes = [use.extremes(modality, layer) for modality in SHOWN]
    shared = np.intersect1d(extremes[0][0], extremes[1][0])
    for panel, modality, (most, least) in zip(pair, SHOWN, extremes, strict=True):
        numbers = np.flatnonzero(use.reachable_ME[modality])
        counts = use.reachable(modality)[use.layers.index(layer)]
        colors = [MOST if number in most else OTHER for number in numbers]
        panel.bar(numbers, counts, width=0.8, color=colors)
        for number in least:  # their bars may be too low to be seen
            panel.axvspan(number - 0.5, number + 0.5, color=LEAST, alpha=0.35, linewidth=0)
        mark_shared(panel, shared, counts[np.isin(numbers, shared)])
        panel.set_ylabel(f"{MODALITY_NAMES[modality]}: selections")
        panel.yaxis.set_major_formatter(large_numbers())
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        panel.set_xlim(numbers[0] - 0.7, numbers[-1] + 0.7)
    pair[0].set_title(
        f"{use.label}, layer {layer}, {use.period}: {overlap_words(use, layer)}",
        fontsize="medium",
        loc="left",
    )
    pair[1].set_xlabel("expert")


def overlap_words(use: ExpertUse, layer: int) -> str:
    """How many of the most and least used experts text and ViT have in common, and which; where ties leave that open, their mean number."""
    if (use.reachable_ME[TEXT] != use.reachable_ME[VIT]).any():
        return "text and vit reach different experts"
    counts = [
        torch.from_numpy(use.reachable(modality)[use.layers.index(layer)]) for modality in SHOWN
    ]
    k = overlap_size(len(counts[0]))
    words = []
    for place, (name, sign) in enumerate((("top", 1), ("bottom", -1))):
        a, b = (use.extremes(modality, layer)[place] for modality in SHOWN)
        if len(a) == len(b) == k:
            shared = ", ".join(map(str, np.intersect1d(a, b)))
            words.append(f"{name} {k} in common: {len(np.intersect1d(a, b))} ({shared or '-'})")
        else:
            mean = top_overlap(sign * counts[0], sign * counts[1], k).item()
            words.append(f"{name} {k} in common: {mean:.1f} (mean over ties)")
    return "; ".join(words)


def mark_shared(panel: Axes, numbers: np.ndarray, heights: np.ndarray) -> None:
    """A triangle above the bars of experts that both modalities use most."""
    panel.margins(y=0.18)
    panel.plot(numbers, heights, linestyle="none", marker=7, color="black", markersize=5)


def bar_legend() -> list[Patch | Line2D]:
    return [
        Patch(color=MOST, label="most used"),
        Patch(color=LEAST, alpha=0.35, label="least used (band)"),
        Patch(color=OTHER, label="others"),
        Line2D([], [], linestyle="none", marker=7, color="black", label="most used by both"),
    ]
