"""Our reader and writer of the safetensors format against the package of that name."""

import json
import math
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from symbiotic_titan.weights.reader import TensorSpec, cut
from symbiotic_titan.weights.safetensors import (
    DTYPES,
    INDEX,
    SafetensorsModel,
    read_slices,
    slices_in,
    write_file,
    write_folder,
)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    made = {
        code: torch.randn(3, 5, generator=generator).mul(9).to(dtype)
        for code, dtype in DTYPES.items()
    }
    return {**made, "number": torch.tensor(2.5), "nothing": torch.zeros(0, 4)}


def specs_of(tensors):
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_every_dtype_is_read_as_the_package_reads_it(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    slices = read_slices(tmp_path / "a.safetensors")
    assert {n: p.spec for n, p in slices.items()} == specs_of(tensors)
    assert_same({name: place.read() for name, place in slices.items()}, tensors)


@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (4, 3, 5), (2, 3, 2, 4)])
def test_any_part_of_a_tensor_is_that_of_the_whole(tmp_path, shape):
    whole = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    save_file({"before": torch.zeros(3), "w": whole, "z": torch.zeros(2)}, tmp_path / "a")
    stored, random = read_slices(tmp_path / "a")["w"], Random(1)
    assert stored.read(((0,) * len(shape), shape)).equal(whole)
    for _ in range(40):
        start = tuple(random.randrange(size) for size in shape)
        sizes = tuple(random.randint(0, n - at) for n, at in zip(shape, start, strict=True))
        part = stored.read((start, sizes))
        assert part.equal(cut(whole, (start, sizes))), (start, sizes)


def test_the_package_reads_what_is_written(tmp_path, tensors):
    write_file(tmp_path / "a.safetensors", specs_of(tensors), tensors.__getitem__)
    assert_same(load_file(tmp_path / "a.safetensors"), tensors)


def test_a_view_is_written_as_its_values(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    views = {"transposed": whole.t(), "part": whole[1:3, ::2]}
    write_file(tmp_path / "a.safetensors", specs_of(views), views.__getitem__)
    assert_same(load_file(tmp_path / "a.safetensors"), {n: t.clone() for n, t in views.items()})


def test_a_folder_is_cut_into_files_of_the_size_asked_for(tmp_path):
    tensors = {
        f"t{i}": torch.full((size,), i, dtype=torch.bfloat16 if i % 2 else torch.float32)
        for i, size in enumerate((10, 7, 100, 30, 3, 1))
    }
    asked = []
    value = lambda name: (asked.append(name), tensors[name])[1]  # noqa: E731
    write_folder(tmp_path, specs_of(tensors), value, shard_bytes=80)
    assert sorted(asked) == sorted(tensors)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = [load_file(tmp_path / name) for name in files]
    assert [set(one) for one in held] == [{"t0", "t1"}, {"t2"}, {"t3", "t4", "t5"}]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"]["t2"] == files[1] and index["metadata"]["total_size"] == 528
    stored = SafetensorsModel(tmp_path)
    assert_same({name: stored.read(name) for name in stored.tensors}, tensors)


def test_tensors_begin_at_whole_numbers_of_their_own(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(2),
        "c": torch.ones(1, dtype=torch.bfloat16),
    }
    write_folder(tmp_path, specs_of(tensors), tensors.__getitem__, shard_bytes=10**6)
    slices = slices_in(tmp_path)
    assert all(piece.start % piece.spec.dtype.itemsize == 0 for piece in slices.values())


def test_filling_casts_to_the_dtype_of_the_target(tmp_path):
    tensors = {"a": torch.randn(4), "b": torch.randn(2, 2)}
    write_folder(tmp_path, specs_of(tensors), tensors.__getitem__, shard_bytes=10**6)
    targets = {"b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    SafetensorsModel(tmp_path).read_into(targets)
    assert torch.equal(targets["b"], tensors["b"].bfloat16())


# ---- bad input --------------------------------------------------------------------------------------------------------------


def message_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    return str(caught.value)


def test_damaged_files_are_named(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    data = path.read_bytes()

    def message(content: bytes) -> str:
        path.write_bytes(content)
        return message_of(read_slices, path)

    assert f"is cut off: it has {len(data) - 7:,} bytes instead of {len(data):,}" in message(
        data[:-7]
    )
    assert "its header would have" in message(data[:100])
    assert "is cut off or not a safetensors file" in message(data[:3])
    assert "its header is not JSON" in message(data[:8] + b"?" + data[9:])
    assert "its header is not a table" in message((2).to_bytes(8, "little") + b"[]")
    assert "is a git-lfs pointer" in message(b"version https://git-lfs.github.com/spec/v1\n")


def test_damaged_headers_are_named(tmp_path):
    path = tmp_path / "a.safetensors"

    def message(**entry) -> str:
        text = json.dumps(
            {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}
        ).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        return message_of(read_slices, path)

    assert "w has dtype F4, which is not supported" in message(dtype="F4")
    assert "w has 8 bytes for 12; the file is damaged" in message(shape=[3])
    nothing = "its header entry for w is invalid"
    assert f"{nothing} (data_offsets: must be a list" in message(data_offsets=None)
    assert f"{nothing} (data_offsets[0]: must be an integer" in message(data_offsets=["a", "b"])
    for wrong in ([-8, 0], [8, 0], [0], [0, 4, 8]):
        assert f"{nothing} (shape [2], data_offsets {wrong})" in message(data_offsets=wrong)
    assert f"{nothing} (shape: must be a list, each item an integer" in message(shape="abc")
    assert f"{nothing} (shape [-2], data_offsets [0, 8])" in message(shape=[-2])
    assert "w has 8 bytes for " in message(shape=[2**40, 2**40])
    assert f"{nothing} (dtype: must be a string" in message(dtype=["F32"])
    text = json.dumps({"w": 3}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert f"{path}: {nothing} (must be a table, got 3)" in message_of(read_slices, path)


def test_folders_that_do_not_hold_what_their_index_says_are_named(tmp_path):
    assert "has neither model.safetensors.index.json nor" in message_of(slices_in, tmp_path)
    tensors = {f"t{i}": torch.ones(2) for i in range(3)}
    write_folder(tmp_path, specs_of(tensors), tensors.__getitem__, shard_bytes=8)
    index = json.loads((tmp_path / INDEX).read_text())

    def message(content) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / INDEX).write_text(text)
        return message_of(slices_in, tmp_path)

    assert "is not JSON" in message("{")
    assert "must hold a table, got list" in message([])
    assert "has no weight_map" in message({})
    for wrong in (1, None):
        assert f"{tmp_path / INDEX}: weight_map.t1: must be a string, got {wrong}" in message(
            {"weight_map": {"t0": "model-00001-of-00003.safetensors", "t1": wrong}}
        )
    more = {**index["weight_map"], "t9": "model-00001-of-00003.safetensors"}
    assert "names t9, but model-00001-of-00003.safetensors does not hold it" in message(
        {"weight_map": more}
    )
    for number in (2, 3):
        (tmp_path / f"model-0000{number}-of-00003.safetensors").unlink()
    assert "lacks 2 of the 3 files that model.safetensors.index.json names: model-00002" in message(
        index
    )
