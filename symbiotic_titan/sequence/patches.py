"""Cells of an image <-> the flat tokens of a row.

Letters: C channels, H and W cells (pixels or latents), L tokens of the image, Z numbers in one token.
"""

import torch


def patchify(cells_CHW: torch.Tensor, patch: int) -> torch.Tensor:
    """(L, Z) tokens in row-major order; each is flattened as (channel, row, column)."""
    channels, height, width = cells_CHW.shape
    split = cells_CHW.reshape(channels, height // patch, patch, width // patch, patch)
    return split.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch**2)


def unpatchify(tokens_LZ: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """(C, H, W) cells of an image of ``rows`` x ``columns`` tokens: the inverse of ``patchify``."""
    split = tokens_LZ.reshape(rows, columns, -1, patch, patch)
    return split.permute(2, 0, 3, 1, 4).reshape(-1, rows * patch, columns * patch)


def coords(rows: int, columns: int) -> torch.Tensor:
    """(L, 2) int64: (row, column) of each token, row-major."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
