"""Pixels that the loader carries become the latents that encoding each image alone gives."""

from dataclasses import replace

import pytest
import torch

from symbiotic_titan.codecs import batch as codec_batch
from symbiotic_titan.codecs.batch import BatchEncoder, build_batch_encoder, image_places
from symbiotic_titan.codecs.codec import build_codec
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.sequence.batch import TENSOR_FIELDS, PackedBatch
from symbiotic_titan.sequence.geometry import (
    ImageGeometry,
    coords,
    patchify,
)

# Stride 2 and patch 2: a token covers 4 x 4 pixels and holds 4 x 2 x 2 numbers.
GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=4, latent_stride=2, latent_patch=2
)
NUM_TOKENS = 24
# (span number, rows, columns) of the images of each row.
ROWS = [[(1, 2, 3), (3, 4, 2), (4, 2, 3)], [], [(0, 2, 3), (1, 1, 1)]]


def images_of(row):
    generator = torch.Generator().manual_seed(row)
    return [
        torch.randint(0, 256, (3, 4 * rows, 4 * columns), generator=generator).byte()
        for _, rows, columns in ROWS[row]
    ]


@pytest.fixture
def batch():
    empty = torch.empty(len(ROWS), 0)
    values = dict.fromkeys(TENSOR_FIELDS, empty)
    latents = torch.zeros(len(ROWS), NUM_TOKENS, 48, dtype=torch.uint8)
    at = torch.zeros(len(ROWS), NUM_TOKENS, 2, dtype=torch.int64)
    image = torch.full((len(ROWS), NUM_TOKENS), -1)
    for row, sizes in enumerate(ROWS):
        start = 0
        for (span, rows, columns), pixels in zip(sizes, images_of(row), strict=True):
            tokens = slice(start, start + rows * columns)
            latents[row, tokens] = patchify(pixels, 4)
            at[row, tokens] = coords(rows, columns)
            image[row, tokens] = span
            start = tokens.stop
    return PackedBatch(**values | {"latents": latents, "vae_coords": at, "vae_image": image})


def test_every_image_is_found(batch):
    places = image_places(batch.vae_image, batch.vae_coords)
    assert [(p.row, p.start, p.rows, p.columns) for p in places] == [
        (0, 0, 2, 3),
        (0, 6, 4, 2),
        (0, 14, 2, 3),
        (2, 0, 2, 3),
        (2, 6, 1, 1),
    ]


def test_latents_are_those_of_each_image_alone_and_padding_is_zero(batch, flux_file):
    codec = build_codec(Latents(codec="flux", path=flux_file))
    encoded = BatchEncoder(codec, GEOMETRY)(batch)
    assert encoded.latents.shape == (3, NUM_TOKENS, 16) and encoded.latents.dtype == torch.float32
    for row in range(len(ROWS)):
        alone = [codec.encode([x.float() / 127.5 - 1.0])[0] for x in images_of(row)]
        tokens = torch.cat([torch.empty(0, 16), *(patchify(z, 2) for z in alone)])
        assert torch.allclose(encoded.latents[row, : len(tokens)], tokens, atol=1e-5)
        assert (encoded.latents[row, len(tokens) :] == 0).all()
    assert encoded.vae_image is batch.vae_image and not encoded.latents.requires_grad


def test_a_batch_that_carries_latents_passes_untouched(batch):
    latents = replace(batch, latents=batch.latents.float())
    assert build_batch_encoder(Latents(), GEOMETRY, "cpu")(latents) is latents


@pytest.mark.parametrize("settings", [{}, {"cache": "x"}, {"codec": "flux", "cache": "x"}])
def test_no_codec_is_loaded_where_nothing_is_to_be_encoded(settings, monkeypatch):
    opened = []
    monkeypatch.setattr(codec_batch, "build_codec", lambda *arguments: opened.append(arguments))
    build_batch_encoder(Latents(**settings), GEOMETRY, "cpu")
    build_batch_encoder(Latents(codec="flux"), GEOMETRY, "cpu", needed=False)
    assert not opened
    build_batch_encoder(Latents(codec="flux"), GEOMETRY, "cpu")
    assert len(opened) == 1
