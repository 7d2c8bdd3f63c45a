"""The demo world's own score, from its files to the table."""

import json
import sys

import pytest
import torch
from PIL import Image

from symbiotic_titan.demo.digit_classifier import demo_extra
from symbiotic_titan.demo.held_out import (
    demo_source,
    read_pictures,
    read_questions,
    read_texts,
)
from symbiotic_titan.demo.pictures import (
    to_image,
    with_pixels,
)
from symbiotic_titan.demo.scores import (
    PICTURE_SCORES,
    demo_world_score,
)
from symbiotic_titan.demo.write import (
    WorldSize,
    write_world,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    write_world(out, seed=0, size=WorldSize(1, 40, 2, 2, train_shards=1))
    return out


@pytest.fixture(scope="module")
def samples(folder):
    return read_pictures(demo_source(folder, "heldout", "t2i_long"))


def test_samples_are_read_from_the_worlds_files(folder, samples):
    assert len(samples) == 40 and samples[0].image.mode == "RGB" and samples[0].caption
    assert len(read_pictures(demo_source(folder, "heldout", "t2i"), limit=3)) == 3
    assert all(
        q.question.endswith("?") and q.answer
        for q in read_questions(demo_source(folder, "heldout", "mmu"))
    )
    assert len(read_texts(demo_source(folder, "train", "lm"))) == 2
    with pytest.raises(ValueError, match="source 'heldout/mmu': no file matches path"):
        read_questions(demo_source(folder / "nowhere", "heldout", "mmu"))


def test_real_pictures_reach_the_upper_bound_and_every_score_is_plain_data(samples):
    scores = demo_world_score([sample.image for sample in samples], samples)
    assert tuple(scores) == PICTURE_SCORES
    assert json.loads(json.dumps(scores)) == scores
    assert scores.pop("frechet")["score"] == pytest.approx(0.0, abs=1e-6)
    for name, measure in scores.items():
        assert measure["score"] == measure["upper_bound"] > 0.98, name
        assert measure["chance"] < 0.7, name
    kinds = ("digit", "words", "numbers", "scene/count")
    assert sum(scores[name]["number"] for name in kinds) == 40
    assert scores["scene/count"]["number"] == scores["scene/all_correct"]["number"] > 10


def test_pictures_of_other_captions_score_about_chance(samples):
    others = [sample.image for sample in samples[1:] + samples[:1]]
    scores = demo_world_score(others, samples)
    for name in ("digit", "scene/all_correct", "scene/colour", "scene/shape", "scene/count"):
        assert scores[name]["score"] < scores[name]["chance"] + 0.25, name
    assert scores["frechet"]["score"] == pytest.approx(0.0, abs=1e-5)


def test_blank_pictures_score_nothing_and_are_chance_for_the_distance(samples):
    blank = [torch.full((3, s.image.height, s.image.width), 128 / 127.5 - 1) for s in samples]
    scores = demo_world_score(blank, samples)
    distance = scores.pop("frechet")
    assert distance["score"] == pytest.approx(distance["chance"])
    assert distance["upper_bound"] < 0.2 * distance["chance"]
    for name in ("scene/background", "writing/background"):
        assert scores.pop(name)["score"] < 0.8
    assert {measure["score"] for measure in scores.values()} == {0.0}


def test_bound_is_measured_at_the_resolution_of_the_pictures(samples):
    tiny = [with_pixels(sample.image, 64) for sample in samples]
    scores = demo_world_score(tiny, samples)
    assert scores["scene/shape"]["score"] == scores["scene/shape"]["upper_bound"] < 0.9


def test_tensors_and_images_are_the_same_pictures(samples):
    for sample in samples[:5]:
        levels = torch.frombuffer(bytearray(sample.image.tobytes()), dtype=torch.uint8)
        tensor = levels.view(sample.image.height, sample.image.width, 3).permute(2, 0, 1)
        assert to_image(tensor / 127.5 - 1).tobytes() == sample.image.tobytes()
    outside = to_image(torch.full((3, 2, 4), 7.0))
    assert outside.size == (4, 2) and outside.getpixel((0, 0)) == (255, 255, 255)


def test_single_picture_has_no_distance_but_its_facts(samples):
    scene = next(s for s in samples if "digit" not in s.caption)
    scores = demo_world_score([scene.image], [scene])
    assert "frechet" not in scores and "digit" not in scores
    assert scores["scene/all_correct"]["score"] == 1.0


def test_bad_input_is_named(samples, monkeypatch):
    with pytest.raises(ValueError, match="got 1 images for 40 captions"):
        demo_world_score([samples[0].image], samples)
    with pytest.raises(ValueError, match="got 0 images for 0 captions"):
        demo_world_score([], [])
    with pytest.raises(ValueError, match=r"must be \(3, height, width\), got \(1, 8, 8\)"):
        to_image(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="numbers that are not finite"):
        to_image(torch.full((3, 8, 8), float("nan")))
    assert to_image(Image.new("L", (4, 4))).mode == "RGB"
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ValueError, match="install it: pip install scikit-learn"):
        demo_extra("sklearn.svm")
