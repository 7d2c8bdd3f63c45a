"""ImageGeometry: how pixels become patches and patches become tokens, for input and target images; patchify and its inverse.

Data and model share one object, built from the model flavor and the latents codec, so that they cannot disagree.

Shape letters: sequence/shapes.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from symbiotic_titan.registry import Registry

# Name -> how an input image is resized, see ``data.images.ResizeRule``.
RESIZE_RULES: Registry[Callable[..., Any]] = Registry(
    "vit.image_resize",
    {
        "fit": "symbiotic_titan.data.images:resize_to_fit",
        "qwen": "symbiotic_titan.data.images:resize_as_qwen",
        "glm": "symbiotic_titan.data.images:resize_as_glm",
        "aria": "symbiotic_titan.data.images:resize_as_aria",
    },
)


@dataclass(frozen=True)
class ImageGeometry:
    """Sizes of patches and tokens.

    vit_patch:       pixels along one side of a ViT patch.
    vit_merge:       ViT patches along one side of one sequence token (2: a token covers 2 x 2 patches).
    vit_queries:     if an image's tokens are learned queries instead of squares of patches: the number of queries for each of
                     ``vit_query_sides``; else empty.
    vit_query_sides: longer side, in ViT patches, of the images that each number of queries encodes.
    vit_channels:    colour channels of an input image.
    latent_channels: channels of the latents codec (3 for the ``pixel`` codec).
    latent_stride:   pixels along one side of one latent position (1 for the ``pixel`` codec, 8 for a Flux autoencoder).
    latent_patch:    latent positions along one side of one sequence token.
    vit_mean, vit_std: mean and standard deviation per channel of the ViT's input normalization, for pixels in [0, 1].
    vit_resize:      how an input image is resized, a name in RESIZE_RULES.
    vit_own_delimiters: the tokens that begin and end an input image have its modality, not text's.
    """

    vit_patch: int
    vit_merge: int
    vit_channels: int
    latent_channels: int
    latent_stride: int
    latent_patch: int
    vit_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    vit_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    vit_resize: str = "fit"
    vit_queries: tuple[int, ...] = ()
    vit_query_sides: tuple[int, ...] = ()
    vit_own_delimiters: bool = False

    @property
    def vit_token_pixels(self) -> int:
        """Image sides are multiples of this many pixels: the side of a ViT token or, with queries, of a patch."""
        return self.vit_patch * self.vit_merge

    def vit_side(self, pixels: int) -> int:
        """For learned queries: the longer side, in patches, of an image within a budget of ``pixels``.

        Raises:
            ValueError: the model has no queries for this budget.
        """
        budgets = {(side * self.vit_patch) ** 2: side for side in self.vit_query_sides}
        if pixels not in budgets:
            known = " or ".join(f"{n} ({side * self.vit_patch}**2)" for n, side in budgets.items())
            raise ValueError(
                f"data.vit_pixels: the image encoder has queries for squares of {known} pixels, got {pixels}; set one of these, and "
                "let data.max_vit_tokens hold the queries of an image"
            )
        return budgets[pixels]

    def vit_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of ``rows`` x ``columns`` patches; queries form a single row."""
        if not self.vit_queries:
            return rows // self.vit_merge, columns // self.vit_merge
        return 1, self.vit_queries[self.vit_query_sides.index(max(rows, columns))]

    def vit_budget(self, pixels: int) -> tuple[int, int]:
        """(tokens, patches) of the largest image within a budget of ``pixels``."""
        if not self.vit_queries:
            tokens = pixels // self.vit_token_pixels**2
            return tokens, tokens * self.vit_merge**2
        side = self.vit_side(pixels)  # a square has the most patches for its longer side
        _, queries = self.vit_grid(side, side)
        return queries, side**2

    def vit_room(self, num_tokens: int, pixels: int | None) -> tuple[int, int]:
        """(tokens, patches) to reserve if input images may take ``num_tokens`` of a sequence.

        Learned queries come in whole images, so these are multiples of the largest image within ``pixels``; None: no images.
        """
        if not self.vit_queries:
            return num_tokens, num_tokens * self.vit_merge**2
        if pixels is None:
            return 0, 0
        tokens, patches = self.vit_budget(pixels)
        images = num_tokens // tokens
        return images * tokens, images * patches

    @property
    def vit_patch_values(self) -> int:
        """Numbers in one flattened ViT patch."""
        return self.vit_channels * self.vit_patch**2

    @property
    def vae_token_pixels(self) -> int:
        """Pixels along one side of one token of a target image."""
        return self.latent_stride * self.latent_patch

    @property
    def vae_token_values(self) -> int:
        """Numbers in one flattened latent patch."""
        return self.latent_channels * self.latent_patch**2


def patchify(grid_CHW: torch.Tensor, patch: int) -> torch.Tensor:
    """(L, Z) tokens in row-major order; each is flattened as (channel, row, column)."""
    channels, height, width = grid_CHW.shape
    split = grid_CHW.reshape(channels, height // patch, patch, width // patch, patch)
    return split.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch**2)


def unpatchify(tokens_LZ: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """(C, H, W) pixels or latents of an image of ``rows`` x ``columns`` tokens: the inverse of ``patchify``."""
    split = tokens_LZ.reshape(rows, columns, -1, patch, patch)
    return split.permute(2, 0, 3, 1, 4).reshape(-1, rows * patch, columns * patch)


def coords(rows: int, columns: int) -> torch.Tensor:
    """(L, 2) int64: (row, column) of each token, row-major."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
