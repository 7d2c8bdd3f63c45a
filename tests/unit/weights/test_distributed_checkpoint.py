"""Damaged bytes of a distributed checkpoint raise an error that names the file, not a traceback of torch."""

import re

import pytest
import torch

from symbiotic_titan.weights.dcp import (
    DistributedCheckpoint,
    write_model,
)
from symbiotic_titan.weights.reader import TensorSpec
from tests.helpers.stored_models import save

TENSORS = {f"t{i}": torch.full((3, 5), float(i)) for i in range(3)}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three files, a tensor each."""
    kinds = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    write_model(tmp_path / "vlm", kinds, TENSORS.__getitem__)
    return tmp_path / "vlm"


def damage(path):
    path.write_bytes(b"?" * path.stat().st_size)


def file_of(folder, name):
    metadata = DistributedCheckpoint(folder)._reader.read_metadata()
    (place,) = (p for index, p in metadata.storage_data.items() if index.fqn == name)
    return folder / place.relative_path


def test_the_damaged_file_is_named_and_others_are_read(folder):
    damaged = file_of(folder, "t1")
    damage(damaged)
    stored = DistributedCheckpoint(folder)
    assert torch.equal(stored.read("t2"), TENSORS["t2"])
    message = f"checkpoint {folder}: {damaged.name} cannot be read, its bytes are damaged"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        stored.read("t1")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        stored.read_into({name: torch.zeros(3, 5) for name in TENSORS})


def test_a_damaged_step_is_named(tmp_path):
    folder = save({**TENSORS, "train_state": {"step": 12}}, tmp_path / "step-12")
    assert DistributedCheckpoint(folder).step == 12
    damaged = file_of(folder, "train_state.step")
    damage(damaged)
    with pytest.raises(ValueError, match=f"step-12: {damaged.name} cannot be read"):
        _ = DistributedCheckpoint(folder).step
