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


def flip(path):
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("has_digests", "harm", "message"),
    [
        (False, damage, "NAME cannot be read, its bytes are damaged"),
        (True, damage, "the bytes of its file NAME are damaged (another SHA-256"),
        (True, flip, "the bytes of its file NAME are damaged (another SHA-256"),
    ],
)
def test_the_damaged_file_is_named_and_others_are_read(folder, has_digests, harm, message):
    damaged = file_of(folder, "t1")
    harm(damaged)
    if not has_digests:
        (folder / "SHA256SUMS").unlink()
    stored = DistributedCheckpoint(folder)
    assert torch.equal(stored.read("t2"), TENSORS["t2"])
    message = f"checkpoint {folder}: {message.replace('NAME', damaged.name)}"
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


def test_averages_are_read_in_place_of_the_weights_that_have_one(tmp_path):
    average = torch.full((3, 5), 7.5)
    state = {
        **{name: tensor.bfloat16() for name, tensor in TENSORS.items()},
        "ema": {"weights.t1": average, "num_updates": 3},
    }
    folder = save(state, tmp_path / "step-3")
    trained, averaged = DistributedCheckpoint(folder), DistributedCheckpoint(folder, "ema")
    assert trained.tensors.keys() == averaged.tensors.keys() == TENSORS.keys()
    assert trained.averaged == averaged.averaged == {"t1"} and trained.num_updates == 3
    assert trained.tensors["t1"].dtype == torch.bfloat16
    assert averaged.tensors["t1"].dtype == torch.float32
    assert torch.equal(trained.read("t1").float(), TENSORS["t1"])
    assert torch.equal(averaged.read("t1"), average)
    assert torch.equal(averaged.read("t2").float(), TENSORS["t2"])


def test_weights_without_an_average_are_refused(folder):
    with pytest.raises(ValueError, match=r"weights = 'ema': .*vlm has no averaged weights; use"):
        DistributedCheckpoint(folder, "ema")
    assert DistributedCheckpoint(folder).num_updates is None


def test_a_number_that_is_a_text_is_damage(tmp_path):
    folder = save({**TENSORS, "train_state": {"step": "12"}}, tmp_path / "step-12")
    with pytest.raises(ValueError, match=r"step-12: .* \(its entry train_state.step, ValueError\)"):
        _ = DistributedCheckpoint(folder).step
