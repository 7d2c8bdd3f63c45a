"""Rotary positions of a document, in three conventions.

``shared``: 1-D. Text counts up by one; all tokens of an image share one position, and the text after it takes the next
(arXiv 2505.14683, section 3). All three axes carry the same number.

``sequence``: 1-D. Every token counts up by one, image tokens too, in the order of the sequence.

``grid``: 3 axes (temporal, height, width), as multimodal rotary backbones expect (arXiv 2409.12191, section 2.1). Text has
three equal values. In an image that starts at p, a token has (p, p + row, p + column); the text after it starts above the image's
largest position.
"""

from typing import Literal

import torch

RotaryLayout = Literal["shared", "sequence", "grid"]


def text_positions(start: int, length: int) -> tuple[torch.Tensor, int]:
    """((length, 3) positions of a run of text, the next free position)."""
    # Three equal axes: 1-D rotary reads only the first, multimodal rotary reduces to 1-D on text.
    positions = torch.arange(start, start + length).unsqueeze(-1).expand(-1, 3)
    return positions, start + length


def image_positions(
    start: int, height: int, width: int, layout: RotaryLayout
) -> tuple[torch.Tensor, int]:
    """((height * width, 3) positions of an image's tokens in row-major order, the next free position).

    ``height`` and ``width`` are counted in sequence tokens, not pixels.
    """
    if layout == "shared":
        return torch.full((height * width, 3), start), start + 1
    if layout == "sequence":
        return text_positions(start, height * width)
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    offsets = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
    # The text must not share a position with the image on any axis, so it continues after the longer side.
    return start + offsets, start + max(height, width)
