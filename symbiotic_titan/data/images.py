"""The sizes of images, and how an input image is cut into the patches of the ViT. Target images: see ``latents``.

An input image gets its size by a rule (``ImageGeometry.vit_resize``). ``fit`` is ours. The others give the sizes that a released
family was trained with, as the image processors of transformers do:

    qwen, glm  with their ``size`` = {shortest_edge: data.vit_min_pixels, longest_edge: data.vit_pixels}; GLM-4V's count an image as
               two frames, so its numbers are halved here.
    aria       with ``max_image_size`` squared = data.vit_pixels and ``min_image_size`` squared = data.vit_min_pixels: the longer side
               gets the first, whatever it was, and the shorter one at least the second; black pixels complete the last patches.
"""

from collections.abc import Callable
from math import ceil, floor, isqrt, log, sqrt

import numpy as np
import torch
from PIL import Image

from symbiotic_titan.data.documents import VitSegment
from symbiotic_titan.sequence.geometry import RESIZE_RULES, ImageGeometry

# Longest over shortest side of an image that ``qwen`` and ``glm`` take.
MAX_ASPECT = 200


class ImageSizeError(Exception):
    """An image has no pixels, more than may be decoded, or a shape that the backbone does not take."""


def fit_size(
    height: int, width: int, max_pixels: int, step: int, min_pixels: int = 0
) -> tuple[int, int]:
    """(height, width) in multiples of ``step``, of about the same aspect and with at most ``max_pixels`` pixels.

    Only images below ``min_pixels`` are enlarged beyond the rounding. An extreme aspect is reduced where the short side would
    vanish.
    """
    budget = max_pixels // step**2
    assert budget >= 1, "checked when the loader is built"
    area = height * width
    scale = min(max(1.0, sqrt(min_pixels / area)), sqrt(max_pixels / area))
    rows, columns = (max(1, round(side * scale / step)) for side in (height, width))
    if rows * columns > budget:
        rows, columns = (max(1, int(side * scale / step)) for side in (height, width))
    if rows > columns:
        rows = min(rows, budget // columns)
    else:
        columns = min(columns, budget // rows)
    return rows * step, columns * step


def backbone_size(
    height: int, width: int, max_pixels: int, step: int, min_pixels: int, *, widen: bool
) -> tuple[int, int]:
    """(height, width) in multiples of ``step`` as the released backbones have it: each side rounded; rounded down after
    shrinking where the result has more than ``max_pixels``, up after enlarging where it has less than ``min_pixels``.

    ``widen``: an image with a side shorter than ``step`` is enlarged first, until it is as long. A thin image may end with more
    pixels than ``max_pixels``, since every side keeps one step.

    Raises:
        ImageSizeError: the sides are too unlike.
    """
    if widen and min(height, width) < step:
        scale = max(step / height, step / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageSizeError(
            f"{width} x {height} pixels, the backbone takes sides up to 1 : {MAX_ASPECT}"
        )
    rows, columns = round(height / step), round(width / step)
    if rows * columns * step**2 > max_pixels:
        factor = sqrt(height * width / max_pixels)
        rows, columns = floor(height / factor / step), floor(width / factor / step)
    elif rows * columns * step**2 < min_pixels:
        factor = sqrt(min_pixels / (height * width))
        rows, columns = ceil(height * factor / step), ceil(width * factor / step)
    return max(1, rows) * step, max(1, columns) * step


def longest_side_size(height: int, width: int, longest: int, shortest: int) -> tuple[int, int]:
    """(height, width): the longer side is ``longest`` pixels, the other one at least ``shortest``, even if that changes the aspect."""
    scale = longest / max(height, width)
    if width >= height:
        return max(int(height * scale), shortest, 1), longest
    return longest, max(int(width * scale), shortest, 1)


ResizeRule = Callable[[int, int, ImageGeometry, int, int], tuple[int, int]]
"""(height, width, geometry, max_pixels, min_pixels) -> (height, width) to which an input image is resized. Registered by name in
``sequence.geometry.RESIZE_RULES``. Raises ImageSizeError where the backbone does not take such a shape."""


def resize_to_fit(
    height: int, width: int, geometry: ImageGeometry, max_pixels: int, min_pixels: int
) -> tuple[int, int]:
    return fit_size(height, width, max_pixels, geometry.vit_token_pixels, min_pixels)


def resize_as_qwen(
    height: int, width: int, geometry: ImageGeometry, max_pixels: int, min_pixels: int
) -> tuple[int, int]:
    step = geometry.vit_token_pixels
    return backbone_size(height, width, max_pixels, step, min_pixels, widen=False)


def resize_as_glm(
    height: int, width: int, geometry: ImageGeometry, max_pixels: int, min_pixels: int
) -> tuple[int, int]:
    step = geometry.vit_token_pixels
    return backbone_size(height, width, max_pixels, step, min_pixels, widen=True)


def resize_as_aria(
    height: int, width: int, geometry: ImageGeometry, max_pixels: int, min_pixels: int
) -> tuple[int, int]:
    longest = geometry.vit_side(max_pixels) * geometry.vit_patch
    return longest_side_size(height, width, longest, isqrt(min_pixels))


def vit_size(
    height: int, width: int, max_pixels: int, geometry: ImageGeometry, min_pixels: int
) -> tuple[int, int]:
    """(height, width) to which an input image is resized, by the rule of ``geometry``."""
    return RESIZE_RULES[geometry.vit_resize](height, width, geometry, max_pixels, min_pixels)


def vit_patches(
    image: Image.Image, max_pixels: int, geometry: ImageGeometry, min_pixels: int = 0
) -> VitSegment:
    """``image`` resized by the rule of ``geometry`` and cut up.

    Raises:
        ImageSizeError: the backbone does not take such a shape.
        ValueError: no image has such a budget, see ``ImageGeometry.vit_side``.
    """
    height, width = vit_size(image.height, image.width, max_pixels, geometry, min_pixels)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    channels, patch, merge = geometry.vit_channels, geometry.vit_patch, geometry.vit_merge
    step = geometry.vit_token_pixels
    rows, columns = ceil(height / step), ceil(width / step)
    if (height, width) != (rows * step, columns * step):
        whole = Image.new("RGB", (columns * step, rows * step))
        whole.paste(resized)
        resized = whole
    windows = np.asarray(resized).reshape(rows, merge, patch, columns, merge, patch, channels)
    # row, window row, y, column, window column, x, C -> row, column, window row, window column, C, y, x; as bytes: a quarter to move
    bytes_PCN = windows.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch**2)
    values_PCN = bytes_PCN.astype(np.float32)
    values_PCN /= 255.0
    values_PCN -= np.array(geometry.vit_mean, dtype=np.float32)[:, None]
    values_PCN /= np.array(geometry.vit_std, dtype=np.float32)[:, None]
    values_PQ = torch.from_numpy(values_PCN.reshape(-1, geometry.vit_patch_values))
    grid = rows * merge, columns * merge
    return VitSegment(values_PQ, *geometry.vit_grid(*grid), grid)


def vit_patch_coords(rows: int, columns: int, merge: int) -> torch.Tensor:
    """(P, 2) int64: (row, column) in a grid of ``rows`` x ``columns`` patches, in the order of ``vit_patches``."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    windows = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
    return windows.permute(0, 2, 1, 3, 4).reshape(-1, 2)


def aspect_buckets(max_pixels: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """All (height, width) in multiples of ``step`` within the budget and the aspect; sizes that another one contains are left out."""
    budget = max_pixels // step**2

    def allowed(rows: int, columns: int) -> bool:
        small, large = sorted((rows, columns))
        return rows * columns <= budget and large <= max_aspect * small

    buckets = []
    for rows in range(1, budget + 1):
        if rows > max_aspect * (budget // rows):
            break  # too high for any width that the budget leaves
        columns = min(budget // rows, int(max_aspect * rows))
        if allowed(rows, columns) and not (
            allowed(rows + 1, columns) or allowed(rows + 1, columns + 1)
        ):
            buckets.append((rows * step, columns * step))
    return buckets


def nearest_bucket(height: int, width: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose log aspect is nearest; of equally near ones the largest."""
    aspect = log(height / width)
    return min(buckets, key=lambda size: (abs(log(size[0] / size[1]) - aspect), -size[0] * size[1]))


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of ``image`` with the wanted aspect, resized; nothing is cut off where the aspects agree."""
    scale = min(image.height / height, image.width / width)
    left = max(0.0, (image.width - width * scale) / 2)
    top = max(0.0, (image.height - height * scale) / 2)
    # Rounding may put an edge 1e-13 pixels outside, which Pillow refuses.
    right, bottom = min(image.width, left + width * scale), min(image.height, top + height * scale)
    box = (left, top, right, bottom)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
