import numpy as np
import pytest
import torch
from PIL import Image

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.latents import (
    TargetImages,
    cached_bytes,
    to_image,
)
from symbiotic_titan.sequence.geometry import (
    ImageGeometry,
    coords,
    patchify,
    unpatchify,
)

GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)
T2I = DataSource(name="t2i", task="t2i", format="webdataset", path="x")


def random_image(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_patchify_is_that_of_a_plain_loop():
    cells = torch.arange(2 * 6 * 9.0).reshape(2, 6, 9)
    expected = [
        cells[:, row : row + 3, column : column + 3].reshape(-1)
        for row in range(0, 6, 3)
        for column in range(0, 9, 3)
    ]
    tokens = patchify(cells, 3)
    assert torch.equal(tokens, torch.stack(expected))
    assert torch.equal(unpatchify(tokens, 2, 3, 3), cells)
    assert coords(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_pixel_latents_are_the_very_image():
    image = random_image(24, 40)
    tokens = TargetImages(Data(), Latents(), GEOMETRY, []).from_image(image)
    assert (tokens.rows, tokens.columns) == (6, 10)
    assert tokens.latents.shape == (60, 48) and tokens.latents.dtype == torch.float32
    cells = torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 255.0 * 2.0 - 1.0
    assert torch.equal(tokens.latents, patchify(cells, 4))
    assert np.array_equal(to_image(unpatchify(tokens.latents, 6, 10, 4)), np.asarray(image))


def test_what_no_pixel_can_show_is_clipped():
    image = to_image(torch.full((3, 8, 8), 7.0, dtype=torch.bfloat16))
    assert np.asarray(image).min() == 255


def test_an_autoencoder_gets_the_bytes_of_the_fitted_image():
    """16 channels, stride 8, patch 2: a token covers 16 x 16 pixels."""
    geometry = ImageGeometry(4, 2, 3, 16, 8, 2)
    images = TargetImages(Data(), Latents(codec="flux", patch=2), geometry, [T2I])
    image = random_image(32, 32)
    tokens = images.from_image(image)
    assert tokens.latents.shape == (4, 768) and tokens.latents.dtype == torch.uint8
    assert (images.form.num_values, images.form.dtype) == (768, torch.uint8)
    pixels = unpatchify(tokens.latents, 2, 2, 16).permute(1, 2, 0)
    assert np.array_equal(pixels, np.asarray(image))


def test_latents_from_a_cache_are_those_that_were_stored():
    cells = torch.randn(16, 8, 12)
    geometry = ImageGeometry(4, 2, 3, 16, 8, 2)
    images = TargetImages(Data(), Latents(codec="flux", patch=2, cache="x"), geometry, [T2I])
    assert images.is_cached and images.form.dtype == torch.float32
    tokens = images.from_cache(cached_bytes(cells, torch.float32))
    assert (tokens.rows, tokens.columns) == (4, 6) and torch.equal(
        tokens.latents, patchify(cells, 2)
    )
    halves = images.from_cache(cached_bytes(cells, torch.bfloat16))
    assert halves.latents.dtype == torch.float32
    assert torch.equal(halves.latents, patchify(cells.bfloat16().float(), 2))


@pytest.mark.parametrize(
    "data", [b"", b"no latents", cached_bytes(torch.ones(3, 4, 4), torch.float32)[:-8]]
)
def test_damaged_latents_are_refused(data):
    images = TargetImages(Data(), Latents(cache="x"), GEOMETRY, [T2I])
    with pytest.raises(ValueError, match="its latents cannot be read"):
        images.from_cache(data)
