"""A folder of safetensors files with an index, as released models come.

The safetensors format, read and written one tensor at a time.

Eight bytes with the length of the header, the header as JSON (name -> dtype, shape, place of its bytes), then the bytes of all
tensors. Files are read and not mapped into memory: the pages of a mapped one would count as ours, up to the whole file.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from symbiotic_titan.config.rows import check_value
from symbiotic_titan.weights.reader import (
    TensorKind,
    some_of,
    total_bytes,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor are: of ``file``, from byte ``start``."""

    file: Path
    start: int
    kind: TensorKind

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        data = torch.empty(self.kind.num_bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            buffer, done = memoryview(data.numpy().data), 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise OSError(f"{self.file} ended while it was read")
                done += count
        return data.view(self.kind.dtype).view(self.kind.shape)


def read_places(path: Path) -> dict[str, Place]:
    """The tensors of a file by name; nothing but its header is read.

    Raises:
        ValueError: the file is cut off, or is not in this format, or holds what torch has no dtype for.
    """
    header, data_start = _read_header(path)
    size = path.stat().st_size
    places, end = {}, data_start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, first, last = _read_entry(entry)
        except ValueError as error:
            raise ValueError(
                f"{path}: its header says nothing usable about {name} ({error}); fetch it again"
            ) from None
        if code not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {code}, which is not read; use a release in bfloat16, float16 or float32"
            )
        kind = TensorKind(shape, DTYPES[code])
        if last - first != kind.num_bytes:
            raise ValueError(
                f"{path}: {name} has {last - first} bytes for {kind.num_bytes}; the file is damaged"
            )
        places[name] = Place(path, data_start + first, kind)
        end = max(end, data_start + last)
    if size < end:
        raise ValueError(
            f"{path} is cut off: it has {size:,} bytes instead of {end:,}; fetch it again"
        )
    return places


def _read_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, the one behind the last) that a header says about a tensor.

    Raises:
        ValueError: names what is missing or of another type.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"must be a table, got {entry!r}")
    for key, kind in (("dtype", str), ("shape", list[int]), ("data_offsets", list[int])):
        check_value(key, entry.get(key), kind)
    shape, places = entry["shape"], entry["data_offsets"]
    if len(places) != 2 or min(*shape, *places, places[1] - places[0]) < 0:
        raise ValueError(f"shape {shape}, data_offsets {places}")
    return entry["dtype"], tuple(shape), places[0], places[1]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(the header, the byte at which data begin)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if start == b"version ":
            raise ValueError(
                f"{path} is a pointer of git-lfs, not the file itself; fetch it with git lfs pull"
            )
        length = int.from_bytes(start, "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ValueError(
                f"{path} is cut off or no safetensors file: its header would have {length:,} bytes, the file has {size:,}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no safetensors file: its header is not JSON: {error}"
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is no table")
    return header, _LENGTH_BYTES + length


def write_file(path: Path, kinds: Mapping[str, TensorKind], value: Callable[[str], Tensor]) -> None:
    """Write a file of ``kinds``; ``value(name)`` is called for each just before it is written: wider numbers come first, so that all
    begin at whole numbers of their own.

    Raises:
        OSError: the disk is full, or the like.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    names = sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize)
    for name in names:
        kind = kinds[name]
        end = start + kind.num_bytes
        header[name] = {
            "dtype": _CODES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # tensors then begin at whole numbers of values
    with path.open("wb", buffering=0) as file:
        _write(file.write, len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name in names:
            tensor = value(name)
            assert TensorKind.of(tensor) == kinds[name], name
            _write(file.write, tensor.contiguous().view(-1).view(torch.uint8).numpy())
        os.fsync(file.fileno())


def _write(write: Callable[[Any], int | None], data: Any) -> None:
    """All of ``data``; one call may write less, at most 2 GiB."""
    buffer, done = memoryview(data), 0
    while done < len(buffer):
        done += write(buffer[done:]) or 0


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def has_weights(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        ValueError: there is no such file, or it is not JSON, or no table.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a table, got {type(values).__name__}")
    return values


def places_in(folder: Path) -> dict[str, Place]:
    """All tensors of the folder: those that its index names, or those of its only file.

    Raises:
        ValueError: no weights in this format, a file that is missing or damaged, or a tensor that is not where the index says.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(
                f"{folder} has neither {INDEX} nor {SINGLE}; weights are read in the safetensors format only"
            )
        return read_places(folder / SINGLE)
    file_of = read_table(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map, which says where each tensor is")
    check_value(f"{folder / INDEX}: weight_map", file_of, dict[str, str])
    files = dict.fromkeys(file_of.values())
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names: {some_of(missing)}"
        )
    places = {name: read_places(folder / name) for name in files}
    absent = [name for name, file in file_of.items() if name not in places[file]]
    if absent:
        raise ValueError(
            f"{folder / INDEX} names {some_of(absent)}, but {file_of[absent[0]]} does not hold it"
        )
    return {name: places[file][name] for name, file in file_of.items()}


def fill(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Copy what ``read`` gives into ``tensors``; a sharded one takes its own part."""
    for name, target in tensors.items():
        full = read(name)
        if isinstance(target, DTensor):
            mesh, placements = target.device_mesh, target.placements
            full = full.to(device=mesh.device_type)
            full = distribute_tensor(full, mesh, placements, src_data_rank=None)
        target.detach().copy_(full)


class PlacedTensors:
    """Tensors under the names that they have in their files: ``StoredTensors``."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places
        self.tensors: Mapping[str, TensorKind] = {n: place.kind for n, place in places.items()}

    def read(self, name: str) -> Tensor:
        return self._places[name].read()


class SafetensorsModel(PlacedTensors):
    """A whole model under our names: a ``StoredModel``.

    Raises:
        ValueError: as ``places_in``.
    """

    step = None

    def __init__(self, folder: Path) -> None:
        super().__init__(places_in(folder))
        self.folder = folder

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        fill(tensors, self.read)


def write_folder(
    folder: Path,
    kinds: Mapping[str, TensorKind],
    value: Callable[[str], Tensor],
    shard_bytes: int,
) -> None:
    """Write files of at most ``shard_bytes`` (more where a single tensor has more) and, last, the index. ``value(name)`` is called
    once for each, just before it is written.

    Raises:
        OSError: the disk is full, or the like.
    """
    shards = list(_shards(kinds, shard_bytes))
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: kinds[name] for name in names}, value)
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes(kinds.values())}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(kinds: Mapping[str, TensorKind], shard_bytes: int) -> Iterator[list[str]]:
    """Names by file, in order."""
    names: list[str] = []
    size = 0
    for name, kind in kinds.items():
        if names and size + kind.num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += kind.num_bytes
    if names:
        yield names
