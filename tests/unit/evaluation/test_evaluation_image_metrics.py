"""FID and CLIPScore of torchmetrics with networks from local files, against plain formulas."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchmetrics", reason="the extra torchmetrics is not installed")

import scipy.linalg
from transformers import CLIPModel, CLIPProcessor

from symbiotic_titan.evaluation.suites.clip_score import (
    ClipScoreOptions,
    load_clip,
    run_clip_score,
)
from symbiotic_titan.evaluation.suites.fid import (
    FeatureNetwork,
    FidOptions,
    run_fid,
)
from symbiotic_titan.inference.images import Picture
from tests.helpers.tiny_scorers import SIDE, write_clip

CAPTIONS = ["a red circle", "two blue squares", "the digit four", "a cross", "a cat"]


class Features(torch.nn.Module):
    """Five fixed projections of an image."""

    def __init__(self, shape=5):
        super().__init__()
        weight = torch.randn(shape, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(3))
        self.register_buffer("weight", weight)

    def forward(self, images):
        return (images.flatten(1) / 255.0) @ self.weight.T


def saved(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        example = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
        torch.jit.trace(module, example).save(path)
    return str(path)


def noise(seed, height=SIDE, width=SIDE):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


class Painter:
    """Draws noise that follows from a caption's index."""

    device = torch.device("cpu")

    def images(self, prompts, *, first_index, **settings):
        return [Picture(noise(100 + first_index + i), {}) for i, _ in enumerate(prompts)]


def no_progress(what, total):
    return lambda count: None


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return str(path)


@pytest.fixture
def references(tmp_path):
    """Images of which the middle square is noise, the rest black."""
    folder = tmp_path / "real" / "inner"
    folder.mkdir(parents=True)
    for seed in range(7):
        image = Image.new("RGB", (SIDE + 8, SIDE))
        image.paste(noise(seed), (4, 0))
        image.save(folder / f"{seed}.png")
    return str(folder.parent)


@pytest.fixture
def fid_options(prompts, references, tmp_path):
    def make(**changes):
        given = {"prompts": prompts, "references": references, "side": SIDE, "batch_size": 3}
        return FidOptions(**given | {"model": saved(Features(), tmp_path / "net.pt")} | changes)

    return make


def features_of(images):
    pixels = torch.from_numpy(np.stack([np.asarray(i).transpose(2, 0, 1) for i in images]))
    return Features()(pixels).double().numpy()


def test_the_distance_is_that_of_the_formula(fid_options, tmp_path, caplog):
    scores = run_fid(Painter(), fid_options(), tmp_path, no_progress)
    real, drawn = (
        features_of([noise(seed) for seed in seeds])
        for seeds in (range(7), range(100, 100 + len(CAPTIONS)))
    )
    one, other = np.cov(real.T), np.cov(drawn.T)
    root = scipy.linalg.sqrtm(one @ other).real
    wanted = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root)
    assert scores["fid/distance"]["score"] == pytest.approx(wanted, rel=1e-3)
    assert scores["fid/distance"]["number"] == len(CAPTIONS)
    assert "7 real and 5 generated images for 5 features" in caplog.text


def test_images_are_not_drawn_for_a_network_that_does_not_fit(fid_options, tmp_path):
    larger = f"takes uint8 .N, 3, {SIDE + 1}, {SIDE + 1}."
    with pytest.raises(
        ValueError, match=f"net.pt: is no TorchScript file of a network that {larger}"
    ):
        run_fid(None, fid_options(side=SIDE + 1), tmp_path, no_progress)
    flat = torch.nn.Sequential(Features(1), torch.nn.Flatten(0))
    with pytest.raises(ValueError, match="flat.pt: must give a row of features for each image"):
        FeatureNetwork(Path(saved(flat, tmp_path / "flat.pt")), SIDE)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="text.pt: is no TorchScript file"):
        FeatureNetwork(tmp_path / "text.pt", SIDE)


def test_wrong_options_are_named(fid_options, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("a\n")
    for changes, message in [
        ({"prompts": ""}, "prompts: must be a text file with a caption per line, got ''"),
        ({"prompts": str(tmp_path / "one.txt")}, "prompts: at least 2 are needed"),
        ({"limit": 1}, "prompts: at least 2 are needed"),
        ({"references": ""}, "references: must be a folder of real images, got ''"),
        ({"references": str(tmp_path / "empty")}, "holds 0 images .*; at least 2 are needed"),
        ({"model": "inception.pt"}, "model: must be a TorchScript file of .* got 'inception.pt'"),
        ({"side": 0}, "side: must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fid_options(**changes)


def test_a_damaged_reference_is_named(fid_options, references, tmp_path):
    (Path(references) / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.png: is no image that can be read"):
        run_fid(Painter(), fid_options(), tmp_path, no_progress)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def cosines(folder, images, captions):
    """100 x cosine of each pair, by transformers alone."""
    model, processor = (
        CLIPModel.from_pretrained(folder).eval(),
        CLIPProcessor.from_pretrained(folder),
    )
    values = []
    for image, caption in zip(images, captions, strict=True):
        inputs = processor(text=[caption], images=[image], return_tensors="pt", truncation=True)
        with torch.no_grad():
            out = model(**inputs)
        values.append(100 * float((out.image_embeds * out.text_embeds).sum()))
    return values


def test_the_clip_score_is_the_mean_cosine_and_chance_that_with_the_next_caption(
    clip_folder, prompts, tmp_path
):
    options = ClipScoreOptions(prompts=prompts, model=clip_folder, batch_size=2)
    scores = run_clip_score(Painter(), options, tmp_path, no_progress)
    images = [noise(100 + i) for i in range(len(CAPTIONS))]
    wanted = max(0.0, math.fsum(cosines(clip_folder, images, CAPTIONS)) / len(CAPTIONS))
    others = CAPTIONS[1:] + CAPTIONS[:1]
    chance = max(0.0, math.fsum(cosines(clip_folder, images, others)) / len(CAPTIONS))
    found = scores["clip_score/score"]
    assert found["score"] == pytest.approx(wanted, abs=1e-3)
    assert found["chance"] == pytest.approx(chance, abs=1e-3)
    assert wanted > 0 and abs(wanted - chance) > 1e-2, "the two can be told apart"


def test_a_caption_that_is_too_long_keeps_its_end_mark(clip_folder):
    _, processor = load_clip(clip_folder)
    ids = processor(text=["a red circle and many more words"], return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 24) and ids[0, -1] == 53


def test_a_folder_without_a_clip_is_named(clip_folder, prompts, tmp_path):
    with pytest.raises(ValueError, match="model: must be the folder of a CLIP model, got 'clip'"):
        ClipScoreOptions(prompts=prompts, model="clip")
    with pytest.raises(ValueError, match="has no config.json, so it holds no CLIP model"):
        ClipScoreOptions(prompts=prompts, model=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="holds no CLIP model that can be read"):
        load_clip(str(tmp_path))
