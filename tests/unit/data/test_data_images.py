import io
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from symbiotic_titan.data.decoding import DECODE_ERRORS, decode_image
from symbiotic_titan.data.images import (
    aspect_buckets,
    fit_size,
    nearest_bucket,
    resize_and_crop,
    vit_patch_coords,
    vit_patches,
)
from symbiotic_titan.sequence.geometry import ImageGeometry

GEOMETRY = ImageGeometry(
    vit_patch=3, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)


def noise_image(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    buffer = io.BytesIO()
    noise_image(5, 7).convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    image = decode_image(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (7, 5))


def test_formats_that_start_programs_are_not_decoded():
    buffer = io.BytesIO()
    noise_image(5, 7).save(buffer, "EPS")
    with pytest.raises(DECODE_ERRORS, match="it is PostScript; convert it to PNG or JPEG"):
        decode_image(buffer.getvalue())


def test_fitted_size_stays_within_the_budget_and_near_the_shape():
    random = Random(0)
    for _ in range(2000):
        height, width = random.randint(1, 600), random.randint(1, 600)
        step = random.choice([4, 8, 14])
        budget = random.randint(step**2, 40 * step**2)
        rows, columns = fit_size(height, width, budget, step)
        assert rows % step == columns % step == 0 and min(rows, columns) >= step
        assert rows * columns <= budget
        # Rounding moves each side by less than one step in either direction.
        scale = min(1.0, (budget / (height * width)) ** 0.5)
        if min(height, width) * scale >= step:
            assert abs(rows - height * scale) < step and abs(columns - width * scale) < step


def test_image_within_the_budget_keeps_its_size():
    assert fit_size(48, 80, 10_000, 8) == (48, 80)
    assert fit_size(64, 64, 1024, 8) == (32, 32)
    assert fit_size(1, 500, 1024, 8) == (8, 128)


def test_vit_patches_are_those_of_a_plain_loop():
    image = noise_image(12, 18)
    cut = vit_patches(image, 10_000, GEOMETRY)
    rows, columns = cut.rows, cut.columns
    assert (rows, columns) == (2, 3) and cut.grid == (4, 6)
    pixels = np.asarray(image, dtype=np.float32) / 255.0 * 2.0 - 1.0
    expected, at = [], []
    for row in range(rows):
        for column in range(columns):
            for inner_row in range(2):
                for inner_column in range(2):
                    r, c = row * 2 + inner_row, column * 2 + inner_column
                    patch = pixels[r * 3 : r * 3 + 3, c * 3 : c * 3 + 3]
                    expected.append(patch.transpose(2, 0, 1).reshape(-1))
                    at.append((r, c))
    torch.testing.assert_close(cut.patches, torch.tensor(np.array(expected)))
    assert [tuple(c) for c in vit_patch_coords(*cut.grid, 2).tolist()] == at


def test_buckets_are_all_maximal_sizes_within_budget_and_aspect():
    buckets = aspect_buckets(1024, 4, 2.0)
    assert (32, 32) in buckets and (24, 40) in buckets and (28, 36) in buckets
    for max_aspect in (1.0, 1.5, 2.0, 4.0):
        for pixels in (16, 47, 100, 1024, 5000):
            buckets = aspect_buckets(pixels, 4, max_aspect)
            allowed = [
                (h, w)
                for h in range(4, pixels + 1, 4)
                for w in range(4, pixels // h + 1, 4)
                if max(h, w) <= max_aspect * min(h, w)
            ]
            contained = {
                (h, w)
                for h, w in allowed
                for a, b in allowed
                if h <= a and w <= b and (h, w) != (a, b)
            }
            assert set(buckets) == set(allowed) - contained and buckets


def test_no_bucket_fits_a_budget_below_one_token():
    assert aspect_buckets(15, 4, 2.0) == []


@pytest.mark.parametrize("max_aspect", [1.0, 1.1, 2.0, 7.3, 1e9])
def test_buckets_are_the_sizes_that_no_other_contains(max_aspect):
    for budget in (*range(40), 257):
        sizes = {
            (rows, columns)
            for rows in range(1, budget + 1)
            for columns in range(1, budget // rows + 1)
            if max(rows, columns) <= max_aspect * min(rows, columns)
        }
        largest = [(r, c) for r, c in sizes if not {(r + 1, c), (r, c + 1), (r + 1, c + 1)} & sizes]
        assert aspect_buckets(budget, 1, max_aspect) == sorted(largest)
    assert len(aspect_buckets(10**8, 4, 2.0)) > 1000  # at once


def test_nearest_bucket_is_chosen_by_shape_alone():
    buckets = aspect_buckets(1024, 4, 2.0)
    assert nearest_bucket(640, 640, buckets) == (32, 32)
    assert nearest_bucket(48, 80, buckets) == nearest_bucket(480, 800, buckets) == (24, 40)
    assert nearest_bucket(1, 1000, buckets)[0] < nearest_bucket(1, 1000, buckets)[1]


def test_nothing_is_cropped_where_shapes_agree():
    image = noise_image(48, 80)
    resized = resize_and_crop(image, 24, 40)
    assert np.array_equal(resized, image.resize((40, 24), Image.Resampling.BICUBIC))


def test_crop_is_centred_and_no_larger_than_needed():
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 255  # the centred square
    assert np.asarray(resize_and_crop(Image.fromarray(pixels), 20, 20)).min() == 255


def test_no_size_of_image_is_cut_outside_itself():
    """Rounding of the cut must never leave the image: such sizes are rare (1 in 400), so thousands are tried."""
    buckets = aspect_buckets(1024, 4, 2.0)
    for height in range(64, 700, 13):
        for width in range(64, 700, 7):
            size = nearest_bucket(height, width, buckets)
            image = Image.new("L", (width, height))
            assert resize_and_crop(image, *size).size == (size[1], size[0])
    assert resize_and_crop(Image.new("L", (302, 232)), *nearest_bucket(232, 302, buckets))
