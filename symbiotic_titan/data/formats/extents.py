"""Shards whose samples are extents of bytes: the members of a tar file, the lines of a JSONL file.

Letters: N samples, M members.
"""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
import numpy as np

from symbiotic_titan.data.fields import BadSample
from symbiotic_titan.data.formats.shard import File, Indexed

# Bytes of a block of a tar file.
BLOCK = 512
# A damaged header may claim any size; behind one below zero tarfile would walk backwards.
MAX_MEMBER = 2**62

# What tarfile raises on headers that make no sense.
TAR_ERRORS = (tarfile.TarError, ValueError, EOFError, OverflowError, IndexError)


@dataclass(frozen=True)
class Extents:
    """An index in arrays: 24 bytes per member and 16 per sample besides the keys.

    kinds:   names of members that occur (extensions).
    members: (M, 3) int64: index into ``kinds``, offset, length; sample by sample.
    ends:    (N,) int64: end of each sample's rows in ``members``.
    key_text: all keys behind each other; key_ends: (N,) int64.
    """

    file: File
    kinds: list[str]
    members: np.ndarray
    ends: np.ndarray
    key_text: str
    key_ends: np.ndarray
    max_open: ClassVar[int] = 8
    names: ClassVar[tuple[str, ...]] = ()

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    @property
    def num_samples(self) -> int:
        return len(self.ends)

    def key(self, sample: int) -> str:
        return self.key_text[_start(self.key_ends, sample) : int(self.key_ends[sample])]

    def extents(self, sample: int) -> dict[str, tuple[int, int]]:
        """Name -> (offset, length) of each member of a sample."""
        rows = self.members[_start(self.ends, sample) : int(self.ends[sample])]
        return {self.kinds[kind]: (offset, length) for kind, offset, length in rows.tolist()}

    def open(self) -> "OpenExtents":
        return OpenExtents(self)


def _start(ends: np.ndarray, number: int) -> int:
    return int(ends[number - 1]) if number else 0


class OpenExtents:
    """Reads members from one open file."""

    def __init__(self, shard: Extents) -> None:
        self._shard = shard
        self._file = fsspec.open(shard.file.data, "rb").open()
        self._num_bytes = self._file.seek(0, 2)

    def read(self, sample: int) -> dict[str, Any]:
        return {
            name: self._read(name, *extent) for name, extent in self._shard.extents(sample).items()
        }

    def _read(self, name: str, offset: int, length: int) -> bytes:
        if offset + length > self._num_bytes:
            raise BadSample("unreadable", f"the file ends inside its .{name}")
        self._file.seek(offset)
        return self._file.read(length)

    def close(self) -> None:
        self._file.close()


def index_tar(file: File, columns: Callable[[list[str]], list[str]]) -> Indexed:
    """Members grouped by key: the path up to the first dot of the file name (WebDataset layout)."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    damage, end = "", 0
    with fsspec.open(file.data, "rb") as opened:
        num_bytes = opened.seek(0, 2)
        opened.seek(0)
        try:
            with tarfile.open(fileobj=opened, mode="r:") as archive:
                for member in archive:
                    if not 0 <= member.size <= MAX_MEMBER:
                        raise ValueError(f"size {member.size} of {member.name!r}")
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isfile():
                        key, extension = _split_name(member.name)
                        extent = (member.offset_data, member.size)
                        samples.setdefault(key, {})[extension] = extent
        except TAR_ERRORS as error:
            damage = f"cannot be read as a tar file ({error}); write it again, uncompressed, or correct format"
        else:
            opened.seek(end)
            # tarfile takes a header that breaks off for the end; a whole archive ends with a block of zeros.
            if opened.read(BLOCK) != bytes(BLOCK):
                damage = f"breaks off after byte {end}; copy or write it again"
    if damage:
        samples = {key: sample for key, sample in samples.items() if _is_whole(sample, num_bytes)}
    return Indexed([_in_arrays(file, samples)] if samples else [], damage)


def _is_whole(sample: dict[str, tuple[int, int]], num_bytes: int) -> bool:
    return all(offset + length <= num_bytes for offset, length in sample.values())


def _split_name(path: str) -> tuple[str, str]:
    """(key, extension) of a member."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _in_arrays(file: File, samples: dict[str, dict[str, tuple[int, int]]]) -> Extents:
    kinds: dict[str, int] = {}
    members = [
        (kinds.setdefault(extension, len(kinds)), *extent)
        for sample in samples.values()
        for extension, extent in sample.items()
    ]
    return Extents(
        file,
        list(kinds),
        np.array(members, dtype=np.int64),
        np.cumsum([len(sample) for sample in samples.values()]),
        "".join(samples),
        np.cumsum([len(key) for key in samples]),
    )


def index_lines(file: File, columns: Callable[[list[str]], list[str]]) -> Indexed:
    """One sample per line that is not blank; its key is the line's number, from 1."""
    keys, members, offset = [], [], 0
    with fsspec.open(file.data, "rb") as opened:
        for number, line in enumerate(opened, start=1):
            if line.strip():
                keys.append(f"line {number}")
                members.append((0, offset, len(line)))
            offset += len(line)
    if not keys:
        return Indexed([])
    ends = np.arange(1, len(keys) + 1)
    key_ends = np.cumsum([len(key) for key in keys])
    shard = Extents(file, ["json"], np.array(members), ends, "".join(keys), key_ends)
    return Indexed([shard])
