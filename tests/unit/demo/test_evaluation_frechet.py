"""The Fréchet distance: the formula, and an order that one expects of a feature map."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm

from symbiotic_titan.demo.frechet import (
    frechet_distance,
    gaussian_distance,
    image_features,
)


def changed(images, function):
    return [Image.fromarray(function(np.asarray(image))) for image in images]


def noisy(levels):
    noise = np.random.default_rng(0).normal(0, 0.2 * 127.5, levels.shape)
    return (levels + noise).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("number", [200, 12])
def test_formula_agrees_with_a_matrix_root_also_for_singular_covariances(number):
    random = np.random.default_rng(0)
    first, second = (random.normal(size=(number, 20)) @ random.normal(size=(20, 20)) for _ in "ab")
    means = first.mean(0), second.mean(0) + 1.0
    one, other = np.cov(first.T), np.cov(second.T)
    # A singular product has no root that can be computed stably; a small multiple of one changes it by less than the tolerance.
    root = sqrtm((one + 1e-9 * np.eye(20)) @ (other + 1e-9 * np.eye(20))).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(one + other - 2 * root)
    assert gaussian_distance(means[0], one, means[1], other) == pytest.approx(expected, rel=1e-3)


def test_one_dimension_is_the_closed_form():
    one, other = np.array([[4.0]]), np.array([[9.0]])
    assert gaussian_distance(np.array([1.0]), one, np.array([3.0]), other) == pytest.approx(5.0)


def test_distance_orders_same_noised_recoloured_and_blank_pictures(world):
    real, same = world(200, 0), world(200, 1)
    pictures = {
        "same": same,
        "noised": changed(same, noisy),
        "colours exchanged": changed(same, lambda levels: levels[..., [1, 2, 0]]),
        "blank": [Image.new("RGB", image.size, "gray") for image in same],
    }
    distances = [frechet_distance(real, images) for images in pictures.values()]
    assert distances == sorted(distances)
    assert all(
        later > 1.3 * earlier for earlier, later in zip(distances, distances[1:], strict=False)
    )


def test_blurred_pictures_of_the_same_colours_are_farther_than_sharp_ones(world):
    real, same = world(120, 0), world(120, 1)
    blurred = [image.filter(ImageFilter.GaussianBlur(3)) for image in same]
    assert frechet_distance(real, blurred) > 1.5 * frechet_distance(real, same)


def test_distance_of_a_set_to_itself_is_zero_and_it_is_symmetric(world):
    one, other = world(40, 2), world(30, 3)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))


def test_features_do_not_depend_on_the_resolution(world):
    for image in world(10, 4):
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
        assert np.abs(image_features(image) - image_features(half)).max() < 0.02


def test_one_image_has_no_covariance(world):
    with pytest.raises(ValueError, match="needs two images on each side, got 1 and 2"):
        frechet_distance(world(1, 0), world(2, 0))
