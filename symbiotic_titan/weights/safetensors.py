"""The safetensors format, files and folders with an index, read and written one tensor at a time.

A file is eight bytes with the length of the header, the header as JSON (name -> dtype, shape, byte range), then the bytes of all
tensors. Files are read instead of memory-mapped, because mapped pages count as our memory, up to the whole file.
"""

import io
import itertools
import json
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from symbiotic_titan.config.rows import check_value
from symbiotic_titan.weights.digests import HashedFile, sha256_of, write_sums
from symbiotic_titan.weights.reader import (
    Box,
    TensorSpec,
    box_of,
    some_of,
    total_bytes,
)
from symbiotic_titan.weights.weight_files import INDEX, files_without_index, index_in

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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
class TensorSlice:
    """The bytes of one tensor: in ``file``, from byte ``start``."""

    file: Path
    start: int
    spec: TensorSpec

    def read(self, box: Box | None = None) -> Tensor:
        """The tensor, or the part of it in ``box``, on the CPU."""
        shape = self.spec.shape if box is None else box[1]
        part = TensorSpec(shape, self.spec.dtype)
        data = torch.empty(part.num_bytes, dtype=torch.uint8)
        buffer, done = memoryview(data.numpy().data), 0
        if part.num_bytes:
            with self.file.open("rb", buffering=0) as file:
                for start, size in self._runs(box):
                    file.seek(self.start + start)
                    self._fill(file, buffer[done : done + size])
                    done += size
        return data.view(part.dtype).view(part.shape)

    def _runs(self, box: Box | None) -> Iterator[tuple[int, int]]:
        """(first byte, number of bytes) of each stretch of adjacent bytes in ``box``, which is not empty."""
        if box is None:
            yield 0, self.spec.num_bytes
            return
        shape, (first, size) = self.spec.shape, box
        # The last dim that is not whole; before it every index begins another run.
        last = max((d for d in range(len(shape)) if size[d] != shape[d]), default=-1)
        strides = [math.prod(shape[d + 1 :]) * self.spec.dtype.itemsize for d in range(len(shape))]
        if last == -1:
            yield 0, self.spec.num_bytes
            return
        for index in itertools.product(*(range(size[d]) for d in range(last))):
            at = [*(first[d] + i for d, i in enumerate(index)), first[last]]
            yield sum(map(operator.mul, at, strides)), size[last] * strides[last]

    def _fill(self, file: io.FileIO, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise OSError(f"{self.file} ended while it was read")
            done += count


def read_slices(path: Path) -> dict[str, TensorSlice]:
    """The tensors of a file by name; only its header is read.

    Raises:
        ValueError: the file is truncated or not in this format, or has a dtype that torch lacks.
    """
    header, data_start = _read_header(path)
    size = path.stat().st_size
    slices, end = {}, data_start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, first, last = _read_entry(entry)
        except ValueError as error:
            raise ValueError(
                f"{path}: its header entry for {name} is invalid ({error}); fetch it again"
            ) from None
        if code not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {code}, which is not supported; use a release in bfloat16, float16 or float32"
            )
        spec = TensorSpec(shape, DTYPES[code])
        if last - first != spec.num_bytes:
            raise ValueError(
                f"{path}: {name} has {last - first} bytes for {spec.num_bytes}; the file is damaged"
            )
        slices[name] = TensorSlice(path, data_start + first, spec)
        end = max(end, data_start + last)
    if size < end:
        raise ValueError(
            f"{path} is cut off: it has {size:,} bytes instead of {end:,}; fetch it again"
        )
    return slices


def _read_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, end) of a header entry; the bytes do not include ``end``.

    Raises:
        ValueError: names what is missing or of another type.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"must be a table, got {entry!r}")
    for key, kind in (("dtype", str), ("shape", list[int]), ("data_offsets", list[int])):
        check_value(key, entry.get(key), kind)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if len(offsets) != 2 or min(*shape, *offsets, offsets[1] - offsets[0]) < 0:
        raise ValueError(f"shape {shape}, data_offsets {offsets}")
    return entry["dtype"], tuple(shape), offsets[0], offsets[1]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(the header, the byte at which the tensors' data start)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if start == b"version ":
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself; fetch it with git lfs pull"
            )
        length = int.from_bytes(start, "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ValueError(
                f"{path} is cut off or not a safetensors file: its header would have {length:,} bytes, the file has {size:,}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header is not JSON: {error}"
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a table")
    return header, _LENGTH_BYTES + length


def write_file(path: Path, specs: Mapping[str, TensorSpec], value: Callable[[str], Tensor]) -> str:
    """Write the tensors ``specs`` to a file; ``value(name)`` is called for each just before it is written. Returns its SHA-256.

    Raises:
        OSError: writing failed.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    # Wide dtypes first: every tensor is then aligned to its own dtype, without padding.
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    for name in names:
        spec = specs[name]
        end = start + spec.num_bytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the data start aligned, as the format asks
    with path.open("wb", buffering=0) as file, HashedFile(file) as hashed:
        hashed.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name in names:
            tensor = value(name)
            assert TensorSpec.of(tensor) == specs[name], name
            hashed.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        # On disk before the folder is renamed: otherwise a power cut could leave a complete-looking folder with empty files.
        os.fsync(file.fileno())
        return hashed.digest


# ---- folders --------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, Any]:
    """The object at the top level of a JSON file.

    Raises:
        ValueError: the file is missing, is not JSON, or has no object there.
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


def slices_in(folder: Path) -> dict[str, TensorSlice]:
    """All tensors of a folder: those that its index lists, or those of the files that ``files_without_index`` finds.

    Raises:
        ValueError: no weights in this format, a file is missing or damaged, or a tensor is not in the file that the index names.
    """
    index = index_in(folder)
    if index is None:
        return _slices_without_index(files_without_index(folder))
    file_of = read_table(index).get("weight_map")
    if not isinstance(file_of, dict):
        raise ValueError(f"{index} has no weight_map, which says which file has each tensor")
    check_value(f"{index}: weight_map", file_of, dict[str, str])
    files = dict.fromkeys(file_of.values())
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {index.name} names: {some_of(missing)}"
        )
    slices = {name: read_slices(folder / name) for name in files}
    absent = [name for name, file in file_of.items() if name not in slices[file]]
    if absent:
        raise ValueError(
            f"{index} names {some_of(absent)}, but {file_of[absent[0]]} does not hold it"
        )
    return {name: slices[file][name] for name, file in file_of.items()}


def _slices_without_index(files: list[Path]) -> dict[str, TensorSlice]:
    out: dict[str, TensorSlice] = {}
    for path in files:
        slices = read_slices(path)
        if twice := sorted(out.keys() & slices.keys()):
            other = out[twice[0]].file.name
            raise ValueError(
                f"{path} holds {some_of(twice)}, which {other} holds too; keep one of the files"
            )
        out |= slices
    return out


def copy_into(tensors: Mapping[str, Tensor], read: Callable[[str, Box], Tensor]) -> None:
    """Copy the part ``read(name, box)`` into each of ``tensors``; a sharded tensor (DTensor) gets its shard. Nothing is sent."""
    for name, tensor in tensors.items():
        target = tensor.detach()
        target = target.to_local() if isinstance(target, DTensor) else target
        if target.numel():
            target.copy_(read(name, box_of(tensor)))


class SliceReader:
    """Tensors under the names that they have in their files: a ``PartReader``."""

    def __init__(self, slices: Mapping[str, TensorSlice]) -> None:
        self._slices = slices
        self.tensors: Mapping[str, TensorSpec] = {n: piece.spec for n, piece in slices.items()}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self._slices[name].read(box)


class SafetensorsModel(SliceReader):
    """A whole model under our names: a ``CheckpointReader``.

    Raises:
        ValueError: as ``slices_in``.
    """

    step = None

    def __init__(self, folder: Path) -> None:
        super().__init__(slices_in(folder))
        self.folder = folder

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        copy_into(tensors, self.read)


def write_folder(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    value: Callable[[str], Tensor],
    shard_bytes: int,
) -> None:
    """Write files of at most ``shard_bytes`` (or a single larger tensor) and, last, the index and ``SHA256SUMS``. ``value(name)``
    is called once for each tensor, just before it is written.

    Raises:
        OSError: writing failed.
    """
    shards = list(_shards(specs, shard_bytes))
    file_of: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = write_file(folder / file, {name: specs[name] for name in names}, value)
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes(specs.values())}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    write_sums(folder, {**digests, INDEX: sha256_of(folder / INDEX)})


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> Iterator[list[str]]:
    """The tensor names of each file, in order."""
    names: list[str] = []
    size = 0
    for name, spec in specs.items():
        if names and size + spec.num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.num_bytes
    if names:
        yield names
