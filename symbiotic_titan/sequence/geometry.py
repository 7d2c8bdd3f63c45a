"""How pixels become patches and patches become tokens, for both kinds of image.

One object, made by the root from the model flavor and the latents codec, is handed to data and to the model, so that the
two cannot disagree.
"""

from dataclasses import dataclass
from typing import Literal

# How an image to be understood gets a size in whole tokens, see ``data.images``.
ResizeRule = Literal["fit", "qwen", "glm"]


@dataclass(frozen=True)
class ImageGeometry:
    """Sizes of patches and tokens.

    vit_patch:       pixels along one side of a ViT patch.
    vit_merge:       ViT patches along one side of one sequence token (2: a token covers 2 x 2 patches).
    vit_channels:    colour channels of an image to be understood.
    latent_channels: channels of the latents codec (3 for the ``pixel`` codec).
    latent_stride:   pixels along one side of one latent cell (1 for the ``pixel`` codec, 8 for a Flux autoencoder).
    latent_patch:    latent cells along one side of one sequence token.
    vit_mean, vit_std: what the ViT's input is normalised by, per channel, for pixels in [0, 1].
    vit_resize:      how an image to be understood gets its size.
    """

    vit_patch: int
    vit_merge: int
    vit_channels: int
    latent_channels: int
    latent_stride: int
    latent_patch: int
    vit_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    vit_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    vit_resize: ResizeRule = "fit"

    @property
    def vit_token_pixels(self) -> int:
        """Pixels along one side of one ViT token."""
        return self.vit_patch * self.vit_merge

    @property
    def vit_patches_per_token(self) -> int:
        return self.vit_merge**2

    @property
    def vit_patch_values(self) -> int:
        """Numbers in one flattened ViT patch."""
        return self.vit_channels * self.vit_patch**2

    @property
    def vae_token_pixels(self) -> int:
        """Pixels along one side of one token of an image to be generated."""
        return self.latent_stride * self.latent_patch

    @property
    def vae_token_values(self) -> int:
        """Numbers in one flattened latent patch."""
        return self.latent_channels * self.latent_patch**2
