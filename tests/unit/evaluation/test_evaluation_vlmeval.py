"""The model class of VLMEvalKit, on a stand-in with the contract of the kit's base class: the kit itself is on no package index."""

import importlib
import sys
from types import ModuleType

import pytest
from PIL import Image

from symbiotic_titan.inference.generator import (
    Completion,
    Generator,
)


class BaseModel:
    """As vlmeval.vlm.base.BaseModel: checks a message and hands it on as a list of {type, value}."""

    INTERLEAVE = True
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        for item in message:
            assert item["type"] in self.allowed_types, f"Invalid input type: {item['type']}"
        return self.generate_inner(message, dataset)


class FakeGenerator:
    def text(self, prompts, images, *, max_tokens):
        [prompt], [shown] = prompts, images
        sizes = [image.size for image in shown]
        return [Completion(f"{prompt} {sizes} {max_tokens}", [1], "end")]


@pytest.fixture
def model(monkeypatch):
    modules = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base")}
    modules["vlmeval.vlm.base"].BaseModel = BaseModel
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    name = "symbiotic_titan.evaluation.suites.vlmeval"
    monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = []
    monkeypatch.setattr(Generator, "load", lambda *a: loaded.append(a) or FakeGenerator())
    model = importlib.import_module(name).SymbioticVLM("debug.toml", "outputs/debug", max_tokens=9)
    monkeypatch.delitem(sys.modules, name)
    assert loaded == [("debug.toml", "outputs/debug")]
    return model


@pytest.fixture
def files(tmp_path):
    paths = []
    for width in (8, 16):
        paths.append(str(tmp_path / f"{width}.jpg"))
        Image.new("RGB", (width, 8)).save(paths[-1])
    return paths


def test_images_are_shown_before_the_texts(model, files):
    message = [
        {"type": "image", "value": files[0]},
        {"type": "text", "value": "What is this?"},
        {"type": "image", "value": files[1]},
        {"type": "text", "value": "One word."},
    ]
    answer = model.generate(message, dataset="OCRBench")
    assert answer == "What is this?\nOne word. [(8, 8), (16, 8)] 9"


def test_a_text_alone_is_a_message(model):
    assert model.generate([{"type": "text", "value": "Hello"}]) == "Hello [] 9"


def test_videos_are_refused_and_damaged_images_named(model, tmp_path):
    with pytest.raises(AssertionError, match="Invalid input type: video"):
        model.generate([{"type": "video", "value": "a.mp4"}])
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.jpg: is no image that can be read"):
        model.generate([{"type": "image", "value": str(tmp_path / "bad.jpg")}])
