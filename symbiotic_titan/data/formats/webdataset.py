"""WebDataset: tar files. A sample is the members whose paths are equal up to the first dot of the file name, its key.

Members of a sample need not be adjacent, unless a key and extension come twice in the file: shards were then appended to each other,
and only consecutive members of one key form a sample. Members that are no data (hidden files, notes of macOS and of WebDataset) are
left out.
"""

from array import array
from dataclasses import dataclass
from itertools import chain

import fsspec
import numpy as np

from symbiotic_titan.data.formats.byte_ranges import ByteRangeShard, compact
from symbiotic_titan.data.formats.shard import ChooseColumns, File, FileFormat, Indexed, Shard
from symbiotic_titan.data.formats.tar_walk import BLOCK, TarWalk


@dataclass(frozen=True)
class TarSamples(ByteRangeShard):
    """The N samples of a tar file with M members: 9 bytes per member and the keys, where all samples have as many members and keys
    of one length; 8 more per sample otherwise. Twice as much for files of 2 TiB or members of 4 GiB.

    kinds:      the extensions that occur.
    extensions: (M,) uint8, or more: index into ``kinds``; sample by sample.
    blocks:     (M,) uint32 or int64: where the member's bytes begin, in blocks of 512 bytes.
    lengths:    (M,) uint32 or int64: the number of bytes.
    ends:       (N,): end of each sample's members; or (1,): how many each has.
    keys:       uint8: all keys concatenated, in UTF-8.
    key_ends:   (N,): end of each key in ``keys``; or (1,): the length of each.
    """

    num_samples: int
    kinds: list[str]
    extensions: np.ndarray
    blocks: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray

    def key(self, sample: int) -> str:
        key = self.keys[_part(self.key_ends, sample)]
        return key.tobytes().decode("utf-8", "surrogatepass")

    def byte_ranges(self, sample: int) -> dict[str, tuple[int, int]]:
        part = _part(self.ends, sample)
        rows = zip(
            self.extensions[part].tolist(),
            self.blocks[part].tolist(),
            self.lengths[part].tolist(),
            strict=True,
        )
        return {self.kinds[kind]: (block * BLOCK, length) for kind, block, length in rows}


def _part(ends: np.ndarray, number: int) -> slice:
    if len(ends) == 1:
        return slice(number * int(ends[0]), (number + 1) * int(ends[0]))
    return slice(int(ends[number - 1]) if number else 0, int(ends[number]))


def _ends(counts: np.ndarray) -> np.ndarray:
    """What ``_part`` needs of parts with so many items."""
    return compact(counts[:1] if (counts == counts[0]).all() else np.cumsum(counts))


class WebDataset(FileFormat):
    """One shard per file, of the samples whose members are all complete."""

    cached_shard = TarSamples
    suffixes = (".tar",)

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        with fsspec.open(file.data, "rb") as opened:
            num_bytes = opened.seek(0, 2)
            walk = TarWalk(opened)
            keys, kinds, members = _numbered(walk)
        samples, again = group(members[:, 0], members[:, 1])
        warning = ""
        if walk.goes_on:
            warning = "goes on after the end of its archive, as tar files do that were joined with cat; the rest is not read"
        if again is not None:
            name = f"{keys[members[again, 0]]}.{kinds[members[again, 1]]}"
            warning = f"holds {name!r} twice, as appended shards do; only consecutive members of one key are taken as a sample"
        whole = np.ones(samples.max(initial=-1) + 1, dtype=bool)
        if walk.damage:
            whole[samples[members[:, 2] + members[:, 3] > num_bytes]] = False
        shards = _by_sample(file, keys, kinds, members, samples, whole)
        return Indexed(shards, walk.damage, warning)


def _numbered(walk: TarWalk) -> tuple[list[str], list[str], np.ndarray]:
    """The keys; the extensions; and (M, 4) int64: key, extension, offset and length of each member that is data."""
    keys: dict[str, int] = {}
    kinds: dict[str, int] = {}
    rows = array("q")
    number, start = 0, "/."  # the key of the last member, and how the names of its sample begin
    for name, offset, length in chain.from_iterable(walk):
        extension = name[len(start) :]
        # Mostly a member of the same sample: no need to look at its key.
        if not name.startswith(start) or "/" in extension:
            if not is_data(name):
                continue
            key, extension = split_name(name)
            number = keys.setdefault(key, len(keys))
            start = f"{key}." if key[:1] not in "._" else "/."
        kind = kinds.get(extension)
        if kind is None:
            kind = kinds.setdefault(extension.lower(), len(kinds))
        rows.extend((number, kind, offset, length))
    return list(keys), list(kinds), np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)


def is_data(path: str) -> bool:
    """False for hidden files (``._0.jpg``, ``.DS_Store``), what macOS adds (``__MACOSX/``) and WebDataset's notes (``__index__``)."""
    if path[:1] not in "._" and "/." not in path and "__MACOSX" not in path:
        return True
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
    firsts = np.cumsum(counts) - counts
    encoded = [keys[key].encode("utf-8", "surrogatepass") for key in members[firsts, 0].tolist()]
    _, extensions, offsets, lengths = members.T
    return [
        TarSamples(
            file,
            len(counts),
            kinds,
            extensions.astype(np.uint8 if len(kinds) <= 256 else np.int64),
            compact(offsets // BLOCK),
            compact(lengths),
            _ends(counts),
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            _ends(np.array([len(key) for key in encoded])),
        )
    ]
