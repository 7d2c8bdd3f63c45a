"""Unmapped tensors of a released model go through every step bit for bit."""

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.hf.release_files import (
    RELEASE_FILES,
    UNMAPPED,
)
from symbiotic_titan.partition.apply import partition_checkpoint
from symbiotic_titan.weights.safetensors import TensorSlice
from tests.helpers.released_models import (
    ARIA,
    ARIA_BESIDE,
    GLM,
    GLM_BESIDE,
    random_besides,
    write_release,
)
from tests.helpers.stored_models import assert_equal_tensors, plan_for
from tests.unit.hf.test_export import GROUPS, export, tensors_in


def test_another_dtype_is_that_of_what_the_release_has_besides(tmp_path):
    more = random_besides(GLM_BESIDE, torch.float32)
    write_release(tmp_path / "glm", GLM, more=more)
    stored = HuggingFaceModel(tmp_path / "glm")
    import_model(stored, tmp_path / "imported", dtype=torch.bfloat16)
    kept = load_file(tmp_path / "imported" / RELEASE_FILES / UNMAPPED)
    assert_equal_tensors(kept, more)
    export(tmp_path / "imported", stored.args, tmp_path / "back", dtype=torch.bfloat16)
    back = tensors_in(tmp_path / "back")
    for name, tensor in more.items():
        bias = name.endswith("correction_bias")
        assert torch.equal(back[name], tensor if bias else tensor.bfloat16()), name


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "of an older import"])
def test_a_further_layer_with_more_experts_than_the_half_is_left_out(tmp_path, kept):
    """config.json then says that there is none, also where an older import did not keep the layer."""
    release = copy.deepcopy(GLM)
    release["text_config"]["num_nextn_predict_layers"] = 1
    further = random_besides(GLM_BESIDE, torch.float32)
    write_release(tmp_path / "glm", release, more=further)
    stored = HuggingFaceModel(tmp_path / "glm")
    import_model(stored, tmp_path / "imported")
    args = replace(stored.args, groups=GROUPS) if kept else stored.args
    folder = tmp_path / "imported"
    if kept:
        plan = replace(plan_for(folder), groups=GROUPS)
        partition_checkpoint(folder, args, plan, tmp_path / "split")
        folder = tmp_path / "split"
        assert_equal_tensors(load_file(folder / RELEASE_FILES / UNMAPPED), further)
    else:
        (folder / RELEASE_FILES / UNMAPPED).unlink()
    done = export(folder, args, tmp_path / "half")
    assert sorted(done.missing) == sorted(further) and further.keys().isdisjoint(done.written)
    assert tensors_in(tmp_path / "half").keys() == done.written.keys()
    text = json.loads((tmp_path / "half" / "config.json").read_text())["text_config"]
    assert text["num_nextn_predict_layers"] == 0
    assert text["n_routed_experts"] == (5 if kept else 8)


def test_what_a_release_has_besides_is_never_whole_in_memory(tmp_path, monkeypatch):
    more = random_besides(GLM_BESIDE, torch.float32)
    write_release(tmp_path / "glm", GLM, more=more)
    stored = HuggingFaceModel(tmp_path / "glm")
    import_model(stored, tmp_path / "imported")
    alive, most, read = weakref.WeakSet(), [], TensorSlice.read

    def counted(piece, *box):
        tensor = read(piece, *box)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(TensorSlice, "read", counted)
    import_model(stored, tmp_path / "shape", shape_only=True)
    assert len(most) == len(more) and max(most) <= 2  # the one before is freed as the next arrives
    most.clear()
    export(tmp_path / "imported", stored.args, tmp_path / "back")
    assert len(most) == len(more) and max(most) <= 2


def test_what_an_older_import_did_not_keep_is_told(tmp_path):
    norm = random_besides(ARIA_BESIDE, torch.float32)
    write_release(tmp_path / "aria", ARIA, more=norm)
    stored = HuggingFaceModel(tmp_path / "aria")
    import_model(stored, tmp_path / "imported")
    (tmp_path / "imported" / RELEASE_FILES / UNMAPPED).unlink()
    done = export(tmp_path / "imported", stored.args, tmp_path / "back")
    assert done.missing == list(norm) and norm.keys().isdisjoint(done.written)
