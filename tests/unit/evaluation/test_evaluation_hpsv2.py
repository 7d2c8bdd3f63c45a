"""HPS v2 by transformers, with weights under open_clip's names, against a plain network that has them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from symbiotic_titan.evaluation.suites.hpsv2 import Hpsv2Options, load_hps, run_hpsv2
from symbiotic_titan.inference.images import Picture
from tests.helpers.pictures import picture
from tests.helpers.tiny_scorers import SIDE, TOKENS, write_clip, write_hps

STYLES = {
    "anime": ["a red cat", "a fox and two very old big dogs", "sky"],
    "photo": ["a dog", "one tree", "a house"],
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Painter:
    """Makes noise that follows from a prompt's index."""

    device = torch.device("cpu")

    def images(self, prompts, *, first_index, **settings):
        return [Picture(picture(first_index + i, SIDE, SIDE), {}) for i, _ in enumerate(prompts)]


def no_progress(what, total):
    return lambda count: None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(options, the network of the weights)"""
    folder = tmp_path_factory.mktemp("hps")
    for style, prompts in STYLES.items():
        (folder / f"{style}.json").write_text(json.dumps(prompts))
    network = write_hps(folder / "HPS.pt")
    options = {
        "prompts": tuple(str(folder / f"{style}.json") for style in STYLES),
        "weights": str(folder / "HPS.pt"),
        "model": write_clip(folder / "clip"),
        "batch_size": 4,
    }
    return options, network


def ids_of(prompt):
    """Letters, the last one of a word with a sign of its own, between the two special tokens; at most as many as the model has places."""
    letters = [
        TOKENS.index(x + "</w>" * (i == len(word) - 1))
        for word in prompt.split()
        for i, x in enumerate(word)
    ]
    return torch.tensor([len(TOKENS) - 2, *letters[:22], len(TOKENS) - 1])


def score_of(network, image, prompt):
    pixels_HW3 = torch.from_numpy(np.array(image)).float() / 255
    with torch.no_grad():
        image_3HW = ((pixels_HW3 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
        return 100 * float(network(image_3HW, ids_of(prompt)))


def test_scores_are_the_cosines_of_the_network_by_style(files, tmp_path):
    options, network = files
    scores = run_hpsv2(Painter(), Hpsv2Options(**options), tmp_path, no_progress)
    images = [picture(i, SIDE, SIDE) for i in range(6)]
    parts = {"anime": range(0, 3), "photo": range(3, 6), "all": range(0, 6)}
    prompts = [*STYLES["anime"], *STYLES["photo"]]
    following = [1, 2, 0, 4, 5, 3]
    own = [score_of(network, images[i], prompts[i]) for i in range(6)]
    others = [score_of(network, images[i], prompts[following[i]]) for i in range(6)]
    assert set(scores) == {f"hpsv2/{name}" for name in parts}
    for name, part in parts.items():
        found = scores[f"hpsv2/{name}"]
        assert found["score"] == pytest.approx(np.mean([own[i] for i in part]), abs=1e-3)
        assert found["chance"] == pytest.approx(np.mean([others[i] for i in part]), abs=1e-3)
        assert found["number"] == len(part) and found["interval"][0] < found["score"]
    assert np.std(own) > 1 and np.abs(np.subtract(own, others)).max() > 1, "they can be told apart"
    assert sorted(p.name for p in (tmp_path / "images").iterdir())[-1] == "00005.png"


def test_one_file_of_captions_and_a_limit(files, tmp_path):
    options, network = files
    (tmp_path / "coco.txt").write_text("a red cat\n\nsky\nleft out\n")
    options = Hpsv2Options(**options | {"prompts": (str(tmp_path / "coco.txt"),), "limit": 2})
    scores = run_hpsv2(Painter(), options, tmp_path, no_progress)
    wanted = [
        score_of(network, picture(i, SIDE, SIDE), p) for i, p in enumerate(["a red cat", "sky"])
    ]
    assert scores["hpsv2/coco"] == scores["hpsv2/all"]
    assert scores["hpsv2/all"]["score"] == pytest.approx(np.mean(wanted), abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "prompts: must be files of prompts, such as HPDv2's anime.json"),
        ({"prompts": ("no.json",)}, "prompts: must be a file of prompts, got 'no.json', which is"),
        ({"prompts": ("a/x.txt", "b/x.txt")}, "prompts: two files have the same name, got a/x.txt"),
        ({"prompts": ("b/x.txt",)}, "prompts: at least 2 are needed of each file, x has 1"),
        ({"prompts": ("x.json",)}, "x.json: must be a list of prompts, such as HPDv2's anime.json"),
        ({"prompts": ("broken.json",)}, "broken.json: is not JSON"),
        ({"limit": 0}, "limit: must be at least 1, got 0"),
        ({"weights": ""}, "weights: must be the weights of HPS v2, HPS_v2.1_compressed.pt, got ''"),
        ({"model": "clip-h"}, "model: must be the folder of a CLIP model, got 'clip-h'"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(files, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "a/x.txt": "a\nb",
        "b/x.txt": "a",
        "x.json": "{}",
        "broken.json": "[",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        Hpsv2Options(**files[0] | changes)


def test_weights_that_are_none_or_of_another_network_are_named_in_one_line(files, tmp_path):
    options, network = files
    path = tmp_path / "HPS.pt"
    state = network.state_dict()

    def error_of(stored):
        if stored is not None:
            torch.save(stored, path)
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as caught:
            load_hps(options["model"], str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path.write_text("no weights")
    assert "holds no weights that can be read" in error_of(None)
    assert "holds no weights that can be read (KeyError)" in error_of(state)
    assert "holds no weights" in error_of({"state_dict": {"visual.proj": "text"}})
    assert "holds no weights that can be read (Unpickl" in error_of({"state_dict": Image.new})
    wide = state | {"visual.proj": torch.zeros(16, 99)}
    assert "1 tensors are not those" in (text := error_of({"state_dict": wide}))
    assert "the first is visual_projection.weight: (99, 16) in place of (12, 16)" in text
    del state["ln_final.bias"]
    message = error_of({"state_dict": state | {"extra.weight": torch.zeros(3)}})
    assert "2 tensors are not those" in message
    assert "text_model.final_layer_norm.bias: absent in place of (16,)" in message
