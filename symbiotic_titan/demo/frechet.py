"""Fréchet distance (arXiv 1706.08500, eq. 6) in hand-written instead of learned features.

No weights are needed, and every feature has a meaning. The distances compare models of the demo world with each other; they are not
comparable to published FIDs.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# Every image is resized to a square of this side, whatever its shape: 32 pixels show the edges of the smallest shapes.
SIDE = 32
# Cells per side in which mean colours and edges are taken: a cell is a place of the demo world.
CELLS = 2
DIRECTIONS = 4
# Edges cover little of a picture; with this weight they vary as much over training pictures as colours do.
EDGE_WEIGHT = 4.0
# Corners of the colour cube; every pixel is split among them with trilinear weights.
LEVELS = (0.0, 1.0)


def image_features(image: Image.Image) -> np.ndarray:
    """(D,) float64 in about [0, 1]: mean colour and edges per direction in each cell, and how colours are distributed."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values_HWC = np.asarray(small, dtype=np.float64) / 255.0
    corners = _corner_shares(values_HWC)
    chroma = _cell_means(_chroma(values_HWC))
    edges = _cell_means(_edges(values_HWC))
    return np.concatenate([corners, chroma, EDGE_WEIGHT * edges])


def _cell_means(values_HWC: np.ndarray) -> np.ndarray:
    """Mean of each channel in each of CELLS x CELLS cells."""
    rows = np.array_split(values_HWC, CELLS, axis=0)
    cells = [cell for row in rows for cell in np.array_split(row, CELLS, axis=1)]
    return np.concatenate([cell.mean((0, 1)) for cell in cells])


def _corner_shares(values_HWC: np.ndarray) -> np.ndarray:
    """Share of the image at each corner of the colour cube; every pixel is split among all eight."""
    red, green, blue = np.moveaxis(values_HWC, -1, 0)
    return np.array(
        [
            np.mean(abs(1 - r - red) * abs(1 - g - green) * abs(1 - b - blue))
            for r in LEVELS
            for g in LEVELS
            for b in LEVELS
        ]
    )


def _chroma(values_HWC: np.ndarray) -> np.ndarray:
    """(H, W, 2): red against green, and both against blue; 0 where the pixel is grey."""
    red, green, blue = np.moveaxis(values_HWC, -1, 0)
    return np.stack([red - green, (red + green) / 2 - blue], axis=-1)


def _edges(values_HWC: np.ndarray) -> np.ndarray:
    """(H, W, DIRECTIONS): strength of the edge at each pixel, split among directions by squared cosines."""
    grey_HW = values_HWC.mean(-1)
    down_HW, right_HW = np.gradient(grey_HW)
    angles = np.arange(DIRECTIONS) * np.pi / DIRECTIONS
    along = right_HW[..., None] * np.cos(angles) + down_HW[..., None] * np.sin(angles)
    return abs(along)


def frechet_distance(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    """Distance between the distributions of two sets of images; 0 for equal ones. Sets may differ in size.

    It falls with the number of images: compare only distances between sets of the same size.

    Raises:
        ValueError: a set has fewer than two images, too few for a covariance.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(
            f"a Fréchet distance needs two images on each side, got {len(first)} and {len(second)}"
        )
    one_ND, other_ND = (np.stack([image_features(i) for i in images]) for images in (first, second))
    return gaussian_distance(one_ND.mean(0), np.cov(one_ND.T), other_ND.mean(0), np.cov(other_ND.T))


def gaussian_distance(
    mean_D: np.ndarray, covariance_DD: np.ndarray, other_D: np.ndarray, other_DD: np.ndarray
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two normal distributions.

    The trace of the root is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2), whose eigenvalues are real and, but for rounding,
    not negative: singular covariances, of few images, need no correction.
    """
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    product_D = np.linalg.eigvalsh(root_DD @ other_DD @ root_DD)
    traces = np.trace(covariance_DD) + np.trace(other_DD)
    distance = ((mean_D - other_D) ** 2).sum() + traces - 2 * np.sqrt(product_D.clip(0)).sum()
    return float(max(distance, 0.0))
