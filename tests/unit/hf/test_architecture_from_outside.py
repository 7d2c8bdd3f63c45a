"""A third party's architecture: one module, written here as a user would, and no change to the package."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from symbiotic_titan.commands import convert
from symbiotic_titan.extend import register_architecture
from symbiotic_titan.hf.architectures.base import ARCHITECTURES
from symbiotic_titan.hf.model import open_model
from tests.helpers.released_models import QWEN, write_release

MODULE = '''
"""Qwen3-VL under another name, whose release calls the last norm differently."""

from dataclasses import replace

from symbiotic_titan.extend import register_architecture
from symbiotic_titan.hf.architectures.base import Architecture, WeightMapping
from symbiotic_titan.hf.architectures.qwen3_vl_moe import QWEN3_VL_MOE


def weight_map(args, shapes):
    return [
        WeightMapping(("closing_norm.weight",), mapping.ours) if mapping.ours == ("norm.weight",) else mapping
        for mapping in QWEN3_VL_MOE.weight_map(args, shapes)
    ]


register_architecture("quen", replace(QWEN3_VL_MOE, weight_map=weight_map))
'''
QUEN = QWEN | {"model_type": "quen"}
IMPORT = ["--experimental.custom_import", "quen_architecture"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "quen_architecture.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with ARCHITECTURES.temporarily():
        yield tmp_path
    sys.modules.pop("quen_architecture", None)


def write_quen(folder):
    """A release of Qwen's tensors under the names of the other."""
    write_release(folder, num_files=1)
    (folder / "config.json").write_text(json.dumps(QUEN))
    (folder / "model.safetensors.index.json").unlink()
    tensors = load_file(folder / "model-00001-of-00001.safetensors")
    tensors["closing_norm.weight"] = tensors.pop("model.language_model.norm.weight")
    (folder / "model-00001-of-00001.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_an_architecture_registered_by_a_users_module_goes_through_from_hf_and_to_hf(folder):
    tensors = write_quen(folder / "release")
    words = ["from-hf", "--hf", str(folder / "release"), "--out", str(folder / "imported")]
    assert convert.main([*words, *IMPORT]) == 0
    norm = open_model(folder / "imported").read("norm.weight")
    assert torch.equal(norm, tensors["closing_norm.weight"])
    words = ["to-hf", "--checkpoint", str(folder / "imported"), "--part", "understanding"]
    assert convert.main([*words, "--out", str(folder / "back"), *IMPORT]) == 0
    index = json.loads((folder / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()


def test_an_architecture_whose_module_is_not_imported_is_named_with_the_remedy(folder, capsys):
    write_quen(folder / "release")
    words = ["from-hf", "--hf", str(folder / "release"), "--out", str(folder / "imported")]
    assert convert.main(words) == 2
    error = capsys.readouterr().err
    assert "model_type = 'quen': nothing is registered" in error
    assert "experimental.custom_import" in error


def test_a_registered_model_type_cannot_be_taken_by_another_architecture(folder):
    qwen = ARCHITECTURES["qwen3_vl_moe"]
    assert register_architecture("qwen3_vl_moe", qwen) is qwen
    with pytest.raises(ValueError, match="'aria' is already registered"):
        register_architecture("aria", qwen)
