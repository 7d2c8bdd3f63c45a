"""Pictures side by side with their captions."""

from collections.abc import Sequence
from math import ceil, sqrt
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

# Pillow's own font: a letter is about this wide, a line this high.
LETTER, LINE = 6, 13
MOST_LINES = 6
# Narrower pictures are enlarged, so that a caption has room below; wider ones reduced, for a log keeps every grid.
NARROWEST, WIDEST = 192, 512
MARGIN = 8


def shown_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of a picture in a grid. Enlarged by a whole factor."""
    if width > WIDEST:
        return WIDEST, max(1, round(height * WIDEST / width))
    factor = ceil(NARROWEST / width)
    return width * factor, height * factor


def picture_grid(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """All ``pictures``, of one size, row by row in about a square, each above its caption, of which long ones are cut.

    What is enlarged is not smoothed: what is seen is what the model drew.
    """
    size = width, height = shown_size(*pictures[0].size)
    enlarged = width >= pictures[0].width
    filter_ = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    texts = [wrap(c, width // LETTER, max_lines=MOST_LINES, placeholder=" ...") for c in captions]
    step_x = width + MARGIN
    step_y = height + LINE * max(len(lines) for lines in texts) + 2 * MARGIN
    columns = ceil(sqrt(len(pictures)))
    rows = ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default()
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        grid.paste(picture.resize(size, filter_), (x, y))
        for number, line in enumerate(lines):
            place = (x, y + height + MARGIN // 2 + number * LINE)
            pen.text(place, line, fill="black", font=font)
    return grid
