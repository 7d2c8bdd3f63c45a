"""WebDataset: tar files. A sample is the members whose paths are equal up to the first dot of the file name, its key.

Members of a sample need not be adjacent, unless a key and extension come twice in the file: shards were then appended to each other,
and only consecutive members of one key form a sample. Members that are no data (hidden files, notes of macOS and of WebDataset) are
left out.
"""

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
    suffixes = (".tar",)

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        keys: dict[str, int] = {}
        kinds: dict[str, int] = {}
        rows = array("q")  # (key, kind, offset, length) of each member, flattened
        with fsspec.open(file.data, "rb") as opened:
            num_bytes = opened.seek(0, 2)
            opened.seek(0)
            walk = TarWalk(opened)
            for member in walk:
                if is_data(member.name):
                    key, extension = split_name(member.name)
                    rows.append(keys.setdefault(key, len(keys)))
                    rows.append(kinds.setdefault(extension, len(kinds)))
                    rows.extend((member.offset_data, member.size))
        members = np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)
        samples, again = group(members[:, 0], members[:, 1])
        warning = ""
        if again is not None:
            name = f"{list(keys)[members[again, 0]]}.{list(kinds)[members[again, 1]]}"
            warning = f"holds {name!r} twice, as appended shards do; only consecutive members of one key are taken as a sample"
        whole = np.ones(samples.max(initial=-1) + 1, dtype=bool)
        if walk.damage:
            whole[samples[members[:, 2] + members[:, 3] > num_bytes]] = False
        shards = _by_sample(file, list(keys), list(kinds), members, samples, whole)
        return Indexed(shards, walk.damage, warning)


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


def is_data(path: str) -> bool:
    """False for hidden files (``._0.jpg``, ``.DS_Store``), what macOS adds (``__MACOSX/``) and WebDataset's notes (``__index__``)."""
    if path.startswith("__") and path.endswith("__"):
        return False
    parts = path.split("/")
    return not any(p == "__MACOSX" or (p[:1] == "." and p not in (".", "..")) for p in parts)


def split_name(path: str) -> tuple[str, str]:
    """(key, extension) of a member."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def group(keys: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Which members form a sample.

    keys, kinds: (M,) int64: numbers of the key and of the extension of each member, in the order of the file.

    Returns:
        (M,) int64, the sample of each member; and the first member whose key and extension came before, None if there is none.
    """
    again = _repeats(keys, kinds)
    if not len(again):
        return keys, None
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = keys[1:] != keys[:-1]
    runs = np.cumsum(starts) - 1
    edges = [*np.flatnonzero(starts).tolist(), len(keys)]
    for run in np.unique(runs[_repeats(runs, kinds)]).tolist():
        first, end = edges[run], edges[run + 1]
        starts[first:end] = _starts_in_run(kinds[first:end].tolist())
    return np.cumsum(starts) - 1, int(again.min())


def _repeats(numbers: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Indices of members whose pair of numbers comes earlier as well."""
    pairs = numbers * (kinds.max(initial=0) + 1) + kinds
    order = np.argsort(pairs, kind="stable")
    return order[1:][pairs[order[1:]] == pairs[order[:-1]]]


def _starts_in_run(kinds: list[int]) -> list[bool]:
    """Which of consecutive members with one key and a repeated extension begin a sample.

    Samples of equal members one after the other are told apart. Otherwise one of them is incomplete, and it cannot be known
    which: all members stand alone, so that no image gets the text of another.
    """
    size = len(set(kinds))
    regular = kinds == kinds[:size] * (len(kinds) // size)
    return [not regular or i % size == 0 for i in range(len(kinds))]


def _by_sample(
    file: File,
    keys: list[str],
    kinds: list[str],
    members: np.ndarray,
    samples: np.ndarray,
    whole: np.ndarray,
) -> list[Shard]:
    """One shard of the complete samples, or none if there are no such samples.

    members: (M, 4) int64: key, kind, offset, length, in the order of the file.
    samples: (M,) int64: the sample of each member.
    whole:   (N,) bool: the sample is complete.
    """
    # A stable sort keeps the order of a sample's members.
    order = np.argsort(samples, kind="stable")
    order = order[whole[samples[order]]]
    if not len(order):
        return []
    members, samples = members[order], samples[order]
    counts = np.bincount(samples, minlength=len(whole))[whole]
    ends = np.cumsum(counts)
    encoded = [
        keys[key].encode("utf-8", "surrogatepass") for key in members[ends - counts, 0].tolist()
    ]
    text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    key_ends = np.cumsum([len(key) for key in encoded])
    return [TarSamples(file, kinds, members[:, 1:].copy(), ends, text, key_ends)]
