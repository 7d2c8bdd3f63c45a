"""Suites' images are drawn once: what lies there with the same note is read, everything else is drawn as it would have been."""

from dataclasses import replace

import pytest
from PIL import Image

from symbiotic_titan.evaluation.suites.generation import (
    ImageRequest,
    ImageSettings,
    generate_images,
)
from symbiotic_titan.inference.images import Picture

SETTINGS = ImageSettings(steps=3, batch_size=2)
SIZES = [None, None, (8, 16), None, (8, 16)]


class FakeGenerator:
    """Its images tell prompt, size, seed and index by their colour."""

    def __init__(self, fail_after=100):
        self.drawn, self.fail_after = [], fail_after

    def images(self, prompts, *, steps, seed, size, first_index, advance, batch_size, **settings):
        assert len(prompts) <= batch_size
        if len(self.drawn) >= self.fail_after:
            raise KeyboardInterrupt
        self.drawn += prompts
        advance(len(prompts) * steps)
        height, width = size or (8, 8)
        return [
            Picture(Image.new("RGB", (width, height), (ord(prompt), seed, first_index + i)), {})
            for i, prompt in enumerate(prompts)
        ]


class Counted:
    """Progress that is looked at."""

    def __call__(self, what, total):
        self.total, self.done = total, 0
        return self.advance

    def advance(self, count):
        self.done += count


def requests_in(folder, sizes=SIZES):
    return [
        ImageRequest("abcde"[i], folder / f"{i}" / "image.png", size)
        for i, size in enumerate(sizes)
    ]


def pixels(images):
    return [(image.size, image.getpixel((0, 0))) for image in images]


@pytest.fixture
def expected(tmp_path):
    images = generate_images(
        FakeGenerator(), requests_in(tmp_path / "expected"), SETTINGS, Counted()
    )
    return pixels(images)


def test_images_come_in_the_order_wanted_numbered_among_their_size(tmp_path, expected):
    assert [size for size, _ in expected] == [(8, 8), (8, 8), (16, 8), (8, 8), (16, 8)]
    assert [colour[2] for _, colour in expected] == [0, 1, 0, 2, 1]
    with Image.open(tmp_path / "expected" / "2" / "image.png") as image:
        assert image.getpixel((0, 0)) == (ord("c"), 0, 0)


def test_a_second_run_draws_nothing_and_gives_the_same(tmp_path, expected):
    generator, progress = FakeGenerator(), Counted()
    images = generate_images(generator, requests_in(tmp_path / "expected"), SETTINGS, progress)
    assert generator.drawn == [] and pixels(images) == expected
    assert progress.done == progress.total == 15


def test_a_run_that_was_broken_off_goes_on_behind_its_last_batch(tmp_path, expected):
    requests = requests_in(tmp_path / "images")
    with pytest.raises(KeyboardInterrupt):
        generate_images(FakeGenerator(fail_after=2), requests, SETTINGS, Counted())
    generator, progress = FakeGenerator(), Counted()
    assert pixels(generate_images(generator, requests, SETTINGS, progress)) == expected
    assert sorted(generator.drawn) == ["c", "d", "e"]
    assert progress.done == progress.total


def test_a_lost_or_damaged_image_is_drawn_again_as_it_was(tmp_path, expected):
    requests = requests_in(tmp_path / "images")
    generate_images(FakeGenerator(), requests, SETTINGS, Counted())
    requests[1].path.unlink()
    requests[4].path.write_text("no picture")
    generator = FakeGenerator()
    assert pixels(generate_images(generator, requests, SETTINGS, Counted())) == expected
    assert generator.drawn == ["b", "e"]


@pytest.mark.parametrize("change", [{"steps": 4}, {"seed": 1}, {"guidance": 1.0}])
def test_other_settings_draw_anew(tmp_path, change):
    requests = requests_in(tmp_path)
    generate_images(FakeGenerator(), requests, SETTINGS, Counted())
    generator = FakeGenerator()
    generate_images(generator, requests, replace(SETTINGS, **change), Counted())
    assert sorted(generator.drawn) == list("abcde")


def test_another_batch_size_or_more_images_keep_those_that_are_there(tmp_path):
    generate_images(FakeGenerator(), requests_in(tmp_path, SIZES[:3]), SETTINGS, Counted())
    generator = FakeGenerator()
    generate_images(generator, requests_in(tmp_path), replace(SETTINGS, batch_size=5), Counted())
    assert generator.drawn == ["d", "e"]


def test_images_of_other_options_and_suites_are_taken_over_where_they_would_be_the_same(
    tmp_path, expected
):
    first, second = tmp_path / "suite-01234567", tmp_path / "suite-89abcdef"
    generate_images(FakeGenerator(), requests_in(first, SIZES[:3]), SETTINGS, Counted(), first)
    generator = FakeGenerator()
    images = generate_images(generator, requests_in(second), SETTINGS, Counted(), second)
    assert generator.drawn == ["d", "e"] and pixels(images) == expected
    assert all(request.path.is_file() for request in requests_in(second))
    other = tmp_path / "suites-01234567"
    generate_images(generator, requests_in(other, SIZES[:1]), SETTINGS, Counted(), other)
    assert generator.drawn == ["d", "e"], "another suite has it"
    elsewhere = tmp_path / "checkpoint" / "suite-01234567"
    generate_images(generator, requests_in(elsewhere, SIZES[:1]), SETTINGS, Counted(), elsewhere)
    assert generator.drawn == ["d", "e", "a"], "another checkpoint's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"sampler": "rk4"}, "sampler = 'rk4': nothing is registered"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_loaded(change, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings(**change)
