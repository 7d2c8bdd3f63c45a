"""A grid: every picture whole, in order, with room for its caption."""

import numpy as np
import pytest

from symbiotic_titan.inference.images import (
    MARGIN,
    picture_grid,
    shown_size,
)
from tests.helpers.pictures import picture

LONG = "a wide picture with a gray background: a red circle at the top left, a blue cross, " * 4


def grid_of(num, captions=None, height=32, width=48):
    pictures = [picture(seed, height, width) for seed in range(num)]
    return pictures, picture_grid(pictures, captions or [f"number {i}" for i in range(num)])


@pytest.mark.parametrize(("num", "columns"), [(1, 1), (2, 2), (5, 3), (9, 3)])
def test_pictures_stand_in_order_row_by_row_and_are_not_smoothed(num, columns):
    pictures, grid = grid_of(num)
    width, height = shown_size(48, 32)
    assert (width, height) == (192, 128)
    step_x, rows = width + MARGIN, -(-num // columns)
    step_y = (grid.height - MARGIN) // rows
    for i, single in enumerate(pictures):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        cell = np.asarray(grid.crop((x, y, x + width, y + height)))
        assert np.array_equal(cell[::4, ::4], np.asarray(single)), i
        assert np.array_equal(cell[3::4, 3::4], np.asarray(single)), i


def test_captions_are_below_their_pictures():
    width, height = shown_size(48, 32)
    below = (MARGIN + height + 1, MARGIN + width)
    _, named = grid_of(2, ["", "a red circle"])
    ink = np.asarray(named.convert("L"))[below[0] :] < 128
    assert ink[:, below[1] :].any() and not ink[:, : below[1]].any()
    _, unnamed = grid_of(2, ["", ""])
    assert unnamed.height < named.height


def test_a_long_caption_is_wrapped_and_cut_and_any_script_is_taken():
    _, one_line = grid_of(1, ["short"])
    _, cut = grid_of(1, [LONG])
    assert one_line.width == cut.width
    assert cut.height == one_line.height + 5 * 13
    grid_of(2, ["一只红色的圆", "W" * 100])


def test_large_pictures_are_reduced():
    assert shown_size(1024, 768) == (512, 384) and shown_size(512, 512) == (512, 512)
    _, grid = grid_of(1, height=768, width=1024)
    assert grid.width == 512 + 2 * MARGIN
