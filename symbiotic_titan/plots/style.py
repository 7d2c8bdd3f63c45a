"""What all figures share: colours, sizes, axes. Needs matplotlib; draws without a display and changes none of its settings."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

# The palette of Okabe and Ito without its yellow, which is too pale on white: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
PIXELS_PER_INCH = 150


@dataclass(frozen=True)
class Drawing:
    """A finished figure. notes: what is missing in it, one line each."""

    title: str
    figure: Figure
    notes: list[str] = field(default_factory=list)


class MissingData(Exception):
    """A figure has nothing to show; the message says what is missing."""


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the run at ``index``, the same in every figure."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index // len(COLORS) % len(LINES)],
    }


def panels(
    rows: int, columns: int, width: float, height: float, *, share_y: bool = True
) -> tuple[Figure, np.ndarray]:
    """(figure, (rows, columns) axes of ``width`` x ``height`` inches), by default with y shared along a row."""
    size = (columns * width, rows * height)
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelleft=True)
    return figure, axes


def as_pixels(figure: Figure) -> np.ndarray:
    """(H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def as_png(figure: Figure) -> bytes:
    """A PNG of 256 colours, which lines and letters need no more than: a third of the bytes."""
    picture, file = Image.fromarray(as_pixels(figure)), io.BytesIO()
    colours = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    colours.save(file, format="PNG")
    return file.getvalue()


def as_file(figure: Figure, kind: str) -> bytes:
    """``figure`` as a file of ``kind``: png, or pdf or svg, whose lines and letters stay sharp at any size. The same bytes every time."""
    if kind == "png":
        return as_png(figure)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "symbiotic_titan"}):
        date = "CreationDate" if kind == "pdf" else "Date"
        figure.savefig(file, format=kind, metadata={date: None})
    return file.getvalue()


def label_steps(panel: Axes) -> None:
    panel.set_xlabel("training step")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def legend_line(index: int, label: str) -> Line2D:
    """Legend entry of the run at ``index``."""
    return Line2D([], [], label=label, linewidth=1.8, **line_style(index))


def legend_below(
    figure: Figure, entries: Sequence[Line2D | Patch], columns: int | None = None
) -> None:
    """One legend for all panels, with ``columns`` of small letters; by default in one row if it fits, else in as many columns as do."""
    lengths = [len(str(entry.get_label())) + 6 for entry in entries]  # of letters, with the sample
    letters = figure.get_figwidth() * 10
    fitting = len(entries) if sum(lengths) <= letters else max(1, int(letters / max(lengths)))
    figure.legend(
        handles=list(entries),
        loc="outside lower center",
        ncols=columns or fitting,
        frameon=False,
        fontsize="small" if columns else "medium",
    )


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and ``reach`` neighbours on both sides; fewer at the ends, the same number on both sides."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach_here = np.minimum(reach, np.minimum(place, len(values) - 1 - place))
    return (sums[place + reach_here + 1] - sums[place - reach_here]) / (2 * reach_here + 1)


def _with_unit(value: float, position: int | None = None) -> str:
    """1500000 -> 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def large_numbers() -> FuncFormatter:
    """Ticks in thousands (k), millions (M), billions (B), trillions (T)."""
    return FuncFormatter(_with_unit)
