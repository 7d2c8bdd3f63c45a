"""The safetensors format, read and written one tensor at a time.

Eight bytes with the length of the header, the header as JSON (name -> dtype, shape, place of its bytes), then the bytes of all
tensors. Files are read and not mapped into memory: the pages of a mapped one would count as ours, up to the whole file.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.checkpoint.stored_model import TensorKind
from symbiotic_titan.config.rows import check_value

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
