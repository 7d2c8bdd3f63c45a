"""WebDataset: tar files. A sample is the members whose paths are equal up to the first dot of the file name."""

import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import fsspec
import numpy as np

from symbiotic_titan.data.formats.byte_ranges import ByteRangeShard
from symbiotic_titan.data.formats.shard import ChooseColumns, File, FileFormat, Indexed, Shard

# Bytes of a block of a tar file.
BLOCK = 512
# A damaged header may claim any size; a negative one would make tarfile walk backwards forever.
MAX_MEMBER = 2**62

# What tarfile raises on damaged headers.
TAR_ERRORS = (tarfile.TarError, ValueError, EOFError, OverflowError, IndexError)


@dataclass(frozen=True)
class TarSamples(ByteRangeShard):
    """The N samples of a tar file with M members: 24 bytes per member, 16 per sample, and the keys.

    kinds:    the extensions that occur.
    members:  (M, 3) int64: index into ``kinds``, offset, length; sample by sample.
    ends:     (N,) int64: end of each sample's entries in ``members``.
    keys:     uint8: all keys concatenated, in UTF-8.
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

    def byte_ranges(self, sample: int) -> dict[str, tuple[int, int]]:
        rows = self.members[_start(self.ends, sample) : int(self.ends[sample])]
        return {self.kinds[kind]: (offset, length) for kind, offset, length in rows.tolist()}


def _start(ends: np.ndarray, number: int) -> int:
    return int(ends[number - 1]) if number else 0


class WebDataset(FileFormat):
    """One shard per file, of the samples whose members are all complete."""

    cached_shard = TarSamples

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        numbers: dict[str, int] = {}
        kinds: dict[str, int] = {}
        rows = array("q")  # (sample, kind, offset, length) of each member, flattened
        with fsspec.open(file.data, "rb") as opened:
            num_bytes = opened.seek(0, 2)
            opened.seek(0)
            walk = TarWalk(opened)
            for member in walk:
                key, extension = _split_name(member.name)
                rows.append(numbers.setdefault(key, len(numbers)))
                rows.append(kinds.setdefault(extension, len(kinds)))
                rows.extend((member.offset_data, member.size))
        members = np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)
        whole = np.ones(len(numbers), dtype=bool)
        if walk.damage:
            whole[members[members[:, 2] + members[:, 3] > num_bytes, 0]] = False
        return Indexed(_by_sample(file, list(numbers), list(kinds), members, whole), walk.damage)


class TarWalk:
    """The regular files of an open tar archive, up to its end or its first damage, which ``damage`` then describes."""

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        self.damage = ""

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        end = 0
        try:
            with tarfile.open(fileobj=self._opened, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    # tarfile remembers every member at a kilobyte each: gigabytes for millions of samples.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not 0 <= member.size <= MAX_MEMBER:
                        raise ValueError(f"size {member.size} of {member.name!r}")
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isfile():
                        yield member
        except TAR_ERRORS as error:
            self.damage = f"cannot be read as a tar file ({error}); write it again, uncompressed, or correct format"
            return
        self._opened.seek(end)
        # tarfile takes a truncated header for the end of the archive, but a complete archive ends with a block of zeros.
        if self._opened.read(BLOCK) != bytes(BLOCK):
            self.damage = f"breaks off after byte {end}; copy or write it again"


def _split_name(path: str) -> tuple[str, str]:
    """(key, extension) of a member."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _by_sample(
    file: File, keys: list[str], kinds: list[str], members: np.ndarray, whole: np.ndarray
) -> list[Shard]:
    """One shard of the complete samples, or none if there are no such samples.

    members: (M, 4) int64: sample, kind, offset, length, in the order of the file.
    whole:   (N,) bool: the sample is complete.
    """
    # Members of one sample need not be adjacent in the file. A stable sort keeps their order.
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
    return [TarSamples(file, kinds, members[:, 1:].copy(), np.cumsum(counts), text, key_ends)]
