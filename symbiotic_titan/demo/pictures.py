"""Images as scorers take them: Pillow images, or what a codec decodes."""

import numpy as np
import torch
from PIL import Image

from symbiotic_titan.data.images import fit_size

Picture = Image.Image | torch.Tensor


def to_image(picture: Picture) -> Image.Image:
    """RGB image of a Pillow image, or of a (3, H, W) tensor in [-1, 1]; values outside are clipped.

    Raises:
        ValueError: the tensor has another shape, or holds numbers that are not finite.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(
            f"an image to be scored must be (3, height, width), got {tuple(picture.shape)}"
        )
    values_HW3 = picture.detach().float().cpu().permute(1, 2, 0)  # device sync
    if not values_HW3.isfinite().all():
        raise ValueError("an image to be scored holds numbers that are not finite")
    levels_HW3 = ((values_HW3.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels_HW3.numpy())


def with_pixels(image: Image.Image, num_pixels: int) -> Image.Image:
    """``image``, reduced to about ``num_pixels`` if it has more: what a model of that resolution could draw at best."""
    height, width = fit_size(image.height, image.width, max(1, num_pixels), 1)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def levels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) float32, 0 to 255."""
    return np.asarray(image.convert("RGB"), dtype=np.float32)
