"""Shards whose samples are extents of bytes: the members of a tar file, the lines of a JSONL file.

An index is plain arrays: millions of samples stay small, travel to worker processes and can be kept in a file.

Letters: N samples, M members.
"""

import tarfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
import numpy as np

from symbiotic_titan.data.formats.shard import BadSample, File, FilePart, Indexed, Shard

# Bytes of a block of a tar file.
BLOCK = 512
# A damaged header may claim any size; behind one below zero tarfile would walk backwards.
MAX_MEMBER = 2**62

# What tarfile raises on headers that make no sense.
TAR_ERRORS = (tarfile.TarError, ValueError, EOFError, OverflowError, IndexError)


class _ReadByExtents(FilePart):
    """What shards of both kinds share: ``OpenExtents`` reads them."""

    max_open: ClassVar[int] = 8
    names: ClassVar[tuple[str, ...]] = ()

    def extents(self, sample: int) -> dict[str, tuple[int, int]]:
        """Name -> (offset, length) of each member of a sample."""
        raise NotImplementedError

    def open(self) -> "OpenExtents":
        return OpenExtents(self)


@dataclass(frozen=True)
class Extents(_ReadByExtents):
    """A shard whose samples have named members: 24 bytes per member and 16 per sample besides the keys.

    kinds:    names of members that occur (extensions).
    members:  (M, 3) int64: index into ``kinds``, offset, length; sample by sample.
    ends:     (N,) int64: end of each sample's rows in ``members``.
    keys:     uint8: all keys behind each other, in UTF-8.
    key_ends: (N,) int64: end of each key in ``keys``.
    """

    kinds: list[str]
    members: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.ends)

    def key(self, sample: int) -> str:
        key = self.keys[_start(self.key_ends, sample) : int(self.key_ends[sample])]
        return key.tobytes().decode("utf-8", "surrogatepass")

    def extents(self, sample: int) -> dict[str, tuple[int, int]]:
        """Name -> (offset, length) of each member of a sample."""
        rows = self.members[_start(self.ends, sample) : int(self.ends[sample])]
        return {self.kinds[kind]: (offset, length) for kind, offset, length in rows.tolist()}


@dataclass(frozen=True)
class Lines(_ReadByExtents):
    """A shard whose samples are lines: 16 bytes per sample.

    lines:  (N, 2) int64: offset, length of each line that is not blank.
    blanks: int64: for each blank line, the samples before it.
    """

    lines: np.ndarray
    blanks: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.lines)

    def key(self, sample: int) -> str:
        blanks_before = int(np.searchsorted(self.blanks, sample, side="right"))
        return f"line {sample + 1 + blanks_before}"

    def extents(self, sample: int) -> dict[str, tuple[int, int]]:
        offset, length = self.lines[sample].tolist()
        return {"json": (offset, length)}


def _start(ends: np.ndarray, number: int) -> int:
    return int(ends[number - 1]) if number else 0


class OpenExtents:
    """Reads members from one open file."""

    def __init__(self, shard: _ReadByExtents) -> None:
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
    numbers: dict[str, int] = {}
    kinds: dict[str, int] = {}
    rows = array("q")  # sample, kind, offset and length of one member after the other
    damage, end = "", 0
    with fsspec.open(file.data, "rb") as opened:
        num_bytes = opened.seek(0, 2)
        opened.seek(0)
        try:
            with tarfile.open(fileobj=opened, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte of each
                    if not 0 <= member.size <= MAX_MEMBER:
                        raise ValueError(f"size {member.size} of {member.name!r}")
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isfile():
                        key, extension = _split_name(member.name)
                        rows.append(numbers.setdefault(key, len(numbers)))
                        rows.append(kinds.setdefault(extension, len(kinds)))
                        rows.extend((member.offset_data, member.size))
        except TAR_ERRORS as error:
            damage = f"cannot be read as a tar file ({error}); write it again, uncompressed, or correct format"
        else:
            opened.seek(end)
            # tarfile takes a header that breaks off for the end; a whole archive ends with a block of zeros.
            if opened.read(BLOCK) != bytes(BLOCK):
                damage = f"breaks off after byte {end}; copy or write it again"
    members = np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)
    whole = np.ones(len(numbers), dtype=bool)
    if damage:
        whole[members[members[:, 2] + members[:, 3] > num_bytes, 0]] = False
    return Indexed(_by_sample(file, list(numbers), list(kinds), members, whole), damage)


def _split_name(path: str) -> tuple[str, str]:
    """(key, extension) of a member."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _by_sample(
    file: File, keys: list[str], kinds: list[str], members: np.ndarray, whole: np.ndarray
) -> list[Shard]:
    """The samples that are ``whole``, if any. ``members``: (M, 4) sample, kind, offset, length, as they lie in the file."""
    members = members[np.argsort(members[:, 0], kind="stable")]
    members = members[whole[members[:, 0]]]
    if not len(members):
        return []
    counts = np.bincount(members[:, 0], minlength=len(keys))[whole]
    encoded = [
        key.encode("utf-8", "surrogatepass")
        for key, is_whole in zip(keys, whole, strict=True)
        if is_whole
    ]
    text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    key_ends = np.cumsum([len(key) for key in encoded])
    return [Extents(file, kinds, members[:, 1:].copy(), np.cumsum(counts), text, key_ends)]


def index_lines(file: File, columns: Callable[[list[str]], list[str]]) -> Indexed:
    """One sample per line that is not blank; its key is the line's number, from 1."""
    lines, blanks, offset = array("q"), array("q"), 0
    with fsspec.open(file.data, "rb") as opened:
        for line in opened:
            if line.strip():
                lines.extend((offset, len(line)))
            else:
                blanks.append(len(lines) // 2)
            offset += len(line)
    if not lines:
        return Indexed([])
    extents = np.frombuffer(lines, dtype=np.int64).reshape(-1, 2)
    return Indexed([Lines(file, extents, np.frombuffer(blanks, dtype=np.int64))])
