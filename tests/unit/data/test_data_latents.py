import numpy as np
import torch
from PIL import Image

from symbiotic_titan.config.data import Latents
from symbiotic_titan.data.latents import build_codec, coords, patchify, unpatchify
from symbiotic_titan.sequence.geometry import ImageGeometry

GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)


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


def test_pixel_codec_returns_the_very_image():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    codec = build_codec(Latents(codec="pixel", patch=4), GEOMETRY)
    tokens = codec.encode(Image.fromarray(pixels))
    assert tokens.shape == (60, 48) and tokens.dtype == torch.float32
    assert tokens.min() >= -1 and tokens.max() <= 1
    assert np.array_equal(np.asarray(codec.decode(tokens, 6, 10)), pixels)


def test_decoding_clips_what_no_pixel_can_show():
    codec = build_codec(Latents(), GEOMETRY)
    image = codec.decode(torch.full((4, 48), 7.0, dtype=torch.bfloat16), 2, 2)
    assert np.asarray(image).min() == 255
