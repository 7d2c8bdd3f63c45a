"""Heat maps of routing for the log of a run: how often each expert of each layer was chosen by the tokens of one modality.

Shape letters: sequence/shapes.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from symbiotic_titan.moe.partition import ExpertGroup

# The scale ends here unless an expert has more, so that maps of a run in balance have the same colours.
FULL_SCALE = 2.0
OUT_OF_REACH: dict[str, Any] = {
    "facecolor": "#E4E4E4",
    "edgecolor": "#A8A8A8",
    "hatch": "////",
    "linewidth": 0,
}
INCHES_PER_EXPERT, INCHES_PER_LAYER = 0.1, 0.16
WIDTHS, HEIGHTS = (5.0, 16.0), (2.0, 12.0)  # (least, most) inches of the map
LEFT, RIGHT, BELOW, ABOVE = 0.7, 1.1, 0.9, 0.6  # inches around it
PIXELS_PER_INCH = 80


def equal_shares(counts_YE: np.ndarray, reachable_E: np.ndarray) -> np.ndarray:
    """(Y, E) float64: assignments over an equal share of the layer's among the experts within reach; NaN out of reach."""
    totals_Y1 = counts_YE.sum(1, keepdims=True)
    shares_YE = counts_YE * reachable_E.sum() / np.maximum(totals_Y1, 1)
    return np.where(reachable_E, shares_YE, np.nan)


def expert_map(
    title: str,
    counts_YE: np.ndarray,
    modality: int,
    groups: Sequence[ExpertGroup],
    layers: Sequence[int],
) -> Figure:
    """Layers (rows) by experts (columns) of the tokens of ``modality``. ``layers``: number of each row. Lines part the groups, and what the
    modality cannot reach is hatched, so that it is not taken for an expert without tokens."""
    reach = [modality in group.modalities for group in groups for _ in range(group.num_experts)]
    shares_YE = equal_shares(counts_YE, np.array(reach))
    num_layers, num_experts = shares_YE.shape
    width = float(np.clip(num_experts * INCHES_PER_EXPERT, *WIDTHS))
    height = float(np.clip(num_layers * INCHES_PER_LAYER, *HEIGHTS))
    size = width + LEFT + RIGHT, height + BELOW + ABOVE
    # Places by hand: a layout that matplotlib computes takes half as long again, and training waits for it.
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH)
    panel = figure.add_axes(placed(size, LEFT, BELOW, width, height))
    bar = figure.add_axes(placed(size, LEFT + width + 0.2, BELOW, 0.16, height))
    image = panel.imshow(
        np.ma.masked_invalid(shares_YE),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=max(FULL_SCALE, float(np.nanmax(shares_YE))),
    )
    show_groups(panel, modality, groups, num_layers)
    panel.set_xlabel("expert")
    panel.set_ylabel("layer")
    rows = range(0, num_layers, -(-num_layers // 12))
    panel.set_yticks(list(rows), [str(layers[row]) for row in rows])
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    panel.set_title(title, pad=18)
    figure.colorbar(image, cax=bar, label="assignments / equal share")
    if not all(reach):
        entry = Patch(label="out of reach of this modality", **OUT_OF_REACH)
        figure.legend(handles=[entry], loc="lower center", frameon=False)
    return figure


def placed(
    size: tuple[float, float], left: float, below: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Inches as shares of a figure of ``size``, as matplotlib wants them."""
    return left / size[0], below / size[1], width / size[0], height / size[1]


def show_groups(panel: Axes, modality: int, groups: Sequence[ExpertGroup], num_layers: int) -> None:
    """Names above the columns, lines between groups, hatching where ``modality`` has no experts."""
    start = -0.5
    for group in groups:
        if modality not in group.modalities:
            panel.add_patch(Rectangle((start, -0.5), group.num_experts, num_layers, **OUT_OF_REACH))
        if start > 0:
            panel.axvline(start, color="#D55E00", linewidth=1.6)
        middle = start + group.num_experts / 2
        panel.annotate(
            group.name,
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize="small",
        )
        start += group.num_experts
