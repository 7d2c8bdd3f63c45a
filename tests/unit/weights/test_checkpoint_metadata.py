"""Metadata of checkpoints are read without running what is in them, and give what pickle gives."""

import gc
import os
import pickle
import random
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from symbiotic_titan.weights.metadata import UnsafeContent, load_metadata, metadata_of
from tests.helpers.stored_models import save

STATE = {
    **{"weight": torch.zeros(3, 1000, 70_000, device="meta"), "scale": torch.zeros(())},
    **{"train_state": {"step": 70_000}, "indices": torch.zeros(2, dtype=torch.int64)},
    **{"deep": torch.zeros(1, 2, 1, 1, 2), "half": torch.zeros(0, 4, dtype=torch.bfloat16)},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """``.metadata`` as torch writes it, of a state with several kinds of entries."""
    state = {**STATE, "weight": torch.zeros(3, 2)}
    return (save(state, tmp_path_factory.mktemp("saved") / "step-1") / ".metadata").read_bytes()


def sharded() -> Metadata:
    """Of several ranks, with numbers of all lengths."""
    metadata = pickle.loads(pickle.dumps(Metadata({}, {}, {}, StorageMeta(Path("a/b")), "1.0.0")))
    for name in ("a", "b" * 300):
        chunks = []
        for rank in range(3):
            offset = torch.Size((rank * 70_000, 2**33))
            chunks.append(ChunkStorageMetadata(offset, torch.Size((70_000, 300))))
            place = MetadataIndex(name, offset, rank)
            metadata.storage_data[place] = _place(f"__{rank}_0.distcp", 2**31 * rank, 2**40)
        properties = TensorProperties(torch.float8_e4m3fn)
        metadata.state_dict_metadata[name] = TensorStorageMetadata(
            properties, torch.Size((210_000, 300)), chunks
        )
    return metadata


def _place(*values):
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(*values)


def assert_same(data: bytes) -> Metadata:
    expected, found = pickle.loads(data), metadata_of(data)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    assert [i.index for i in found.storage_data] == [i.index for i in expected.storage_data]
    return found


def test_metadata_are_those_that_pickle_reads(written):
    assert gc.isenabled()
    found = assert_same(written)
    assert found.state_dict_metadata["half"].properties.dtype == torch.bfloat16
    assert found.version == pickle.loads(written).version
    for protocol in (4, 5):
        assert_same(pickle.dumps(sharded(), protocol))
    assert gc.isenabled()


def by_name(member) -> tuple:
    """How Python 3.11.0 to 3.11.3 pickles the member of an enumeration."""
    return getattr, (type(member), member.name)


class ByName(pickle.Pickler):
    def reducer_override(self, value):
        is_format = type(value).__name__ == "_MEM_FORMAT_ENCODING"
        return by_name(value) if is_format else NotImplemented


def test_memory_formats_may_be_pickled_by_name(tmp_path):
    with (tmp_path / ".metadata").open("wb") as file:
        ByName(file, 4).dump(sharded())
    data = (tmp_path / ".metadata").read_bytes()
    assert b"getattr" in data
    assert_same(data)


class Poison:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path, function=os.mkdir) -> None:
        self.function, self.arguments = function, (str(marker),)

    def __reduce__(self):
        return self.function, self.arguments


def metadata_with(value) -> list[bytes]:
    """Pickles of metadata that have ``value`` in several places, by several protocols."""
    places = [value, Metadata({}, value), Metadata({"a": value}), Metadata({}, None, {}, value)]
    return [pickle.dumps(place, protocol) for place in places for protocol in (0, 2, 4, 5)]


def test_a_function_in_metadata_is_refused_by_name_and_not_called(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(metadata_with(Poison(marker))[-1])
    assert marker.is_dir(), "the payload works"
    marker.rmdir()
    for data in metadata_with(Poison(marker)):
        (tmp_path / ".metadata").write_bytes(data)
        with pytest.raises(ValueError) as caught:
            load_metadata(tmp_path)
        # Protocol 0 writes text, which nothing here reads as far as the name.
        if data[:1] == pickle.PROTO and data[1] >= 4:
            assert isinstance(caught.value, UnsafeContent)
            assert f"checkpoint {tmp_path}: its .metadata names 'posix.mkdir'" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"cposix\nsystem\n.",
        b"(\x8c\x01aiposix\nsystem\n.",
        # A dotted name would be looked up attribute by attribute.
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x0bos.PathLike\x93.",
        # getattr of a module's member, and of a class that metadata may name.
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x05torch\x8c\x04Size\x93\x8c\x07__doc__\x86R.",
        b"\x80\x04\x8c\x06\x1b[2Jos\x8c\x06system\x93.",
    ],
)  # fmt: skip
def test_names_outside_the_list_are_refused(data):
    with pytest.raises(UnsafeContent, match="names '") as caught:
        metadata_of(data)
    assert str(caught.value).isprintable()


TUPLES = b")" + b"\x94h%c\x86" * 40 % tuple(range(40))  # each of two of the one before


def test_no_file_takes_more_than_its_length():
    size = b"\x8c\x05torch\x8c\x04Size\x93"
    bombs = {
        "a key whose hash takes 2**40 steps": b"\x80\x04}" + TUPLES + b"Ns.",
        "a key as deep as the stack": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
        "a memo number": b"\x80\x04Nr\xff\xff\xff\xff.",
        "a long text": b"\x80\x04X\xff\xff\xff\xffa.",
        "a long frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "a product of large numbers": size + b"(" + b"J\xff\xff\xff\x7f" * 65 + b"t\x85R.",
        "a number of many bytes": b"\x80\x04\x8b\xff\xff\xff\x7f1.",
    }
    for bomb, data in bombs.items():
        begin = time.process_time()
        with pytest.raises(ValueError):
            metadata_of(data)
        assert time.process_time() - begin < 2, bomb


def changed(**fields) -> bytes:
    """Pickled metadata of one tensor, some of whose parts are ``fields``."""
    chunk = ChunkStorageMetadata(torch.Size((0,)), fields.pop("sizes", torch.Size((4,))))
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size((4,)), [chunk])
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": 4} | fields
    storage = {MetadataIndex("a", (0,)): _place(*place.values())}
    return pickle.dumps(Metadata({"a": tensor}, None, storage))


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"relative_path": path}
            for path in ("../a", "/etc/passwd", "a/b", "..", "", "a\0b", "\x1b[2J", 3)
        ),
        *({"offset": -1}, {"length": 2**70}, {"length": 1.0}, {"transform_descriptors": ["zstd"]}),
        *({"sizes": torch.Size((2**40,))}, {"sizes": torch.Size((4, 1))}, {"sizes": (4,)}),
    ],
)
def test_fields_are_checked(fields):
    assert metadata_of(changed()).storage_data
    with pytest.raises(ValueError):
        metadata_of(changed(**fields))


def test_objects_without_their_fields_and_shared_chunks_are_refused():
    metadata = sharded()
    first, second = metadata.state_dict_metadata.values()
    second.chunks = first.chunks
    with pytest.raises(ValueError, match="two tensors have the same chunks"):
        metadata_of(pickle.dumps(metadata))
    empty = pickle.dumps(MetadataIndex("a"))
    unfilled = empty[: empty.index(b"\x81") + 1]
    for data in (unfilled + b".", b"}" + unfilled + b"Ns.", unfilled + b"}b.", unfilled):
        with pytest.raises(ValueError):
            metadata_of(data)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """``data`` with a few bytes changed, removed, repeated or inserted."""
    new = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start = draw.randrange(len(new))
        end = start + draw.choice((0, 1, 1, 4, 40))
        kind = draw.randrange(4)
        taken = bytes(new[draw.randrange(len(new)) :][: end - start])
        new[start:end] = (b"", draw.randbytes(end - start), new[start:end] * 2, taken)[kind]
    return bytes(new)


def test_changed_bytes_raise_nothing_but_value_errors_and_run_nothing(written, tmp_path):
    draw, marker = random.Random(7), tmp_path / "marker"
    poisoned = pickle.dumps(Metadata({"a": Poison(marker)}))
    refused = 0
    for number in range(1500):
        data = mutated(poisoned if number % 2 else written, draw)
        try:
            assert type(metadata_of(data)) is Metadata
        except ValueError as error:
            refused += "\n" not in str(error)
    assert refused > 1250 and not marker.exists() and gc.isenabled()
