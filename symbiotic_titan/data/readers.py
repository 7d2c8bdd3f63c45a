"""Shards on disk or behind an fsspec URL: an index of where each sample lies, and a reader that fetches samples by number.

The index is plain data and travels to worker processes; the reader owns open files and is made in the process that reads.
"""

import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from symbiotic_titan.config.data import DataSource

# Shards a reader keeps open. Lanes walk through one shard, at an epoch's turn through two.
MAX_OPEN_SHARDS = 8

# Bytes of a block of a tar file.
BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """Bytes of one sample, by file extension (``png``, ``json`` ...), and where they came from."""

    shard: str
    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Shard:
    """Where the samples of one file lie: ``members[i]`` maps extension to (offset, length) for the sample ``keys[i]``."""

    path: str
    num_bytes: int
    keys: list[str]
    members: list[dict[str, tuple[int, int]]]


def index_source(source: DataSource, where: str) -> list[Shard]:
    """All shards of ``source``, sorted by path. Reads the tar headers, or the lines, of every file once.

    Raises:
        ValueError: no file matches, a file is empty or is not of its format; ``where`` (the config row) leads the message.
    """
    index = {"webdataset": _index_tar, "jsonl": _index_lines}[source.format]
    shards = []
    for path in _expand(source.path, where):
        with fsspec.open(path, "rb") as file:
            file.seek(0, 2)
            num_bytes = file.tell()
            file.seek(0)
            keys, members = index(file, f"{where}: {path}") if num_bytes else ([], [])
        if not keys:
            raise ValueError(f"{where}: {path} is empty; remove the file, or write samples into it")
        shards.append(Shard(path, num_bytes, keys, members))
    return shards


def _expand(path: str, where: str) -> list[str]:
    """Files that ``path`` names, sorted. A path that exists is taken as it is, whatever characters it holds."""
    try:
        filesystem, pattern = url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{where}: path {path!r} cannot be opened ({error})") from error
    found = [pattern] if filesystem.exists(pattern) else filesystem.glob(pattern)
    files = sorted(name for name in found if filesystem.isfile(name))
    if not files:
        remedy = "check path; a * in it matches several files"
        if path.startswith("demo_data"):
            remedy = "make the demo data with: python tools/make_demo_data.py --out demo_data"
        raise ValueError(f"{where}: no file matches path {path!r}; {remedy}")
    return [filesystem.unstrip_protocol(name) for name in files] if "://" in path else files


def _index_tar(file: Any, where: str) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """Members grouped by key: the path up to the first dot of the file name (WebDataset layout)."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    extent = (member.offset_data, member.size)
                    samples.setdefault(key, {})[extension.lower()] = extent
    except tarfile.TarError as error:
        raise ValueError(
            f"{where} cannot be read as a tar file ({error}); "
            "write it again, uncompressed, or correct format"
        ) from error
    file.seek(end)
    # tarfile takes a header that breaks off for the end; a whole archive ends with a block of zeros.
    if file.read(BLOCK) != bytes(BLOCK):
        raise ValueError(f"{where} breaks off after byte {end}; copy or write it again")
    return list(samples), list(samples.values())


def _index_lines(file: Any, where: str) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """One sample per line that is not blank; its key is the line's number, from 1."""
    keys, members, offset = [], [], 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            keys.append(f"line {number}")
            members.append({"json": (offset, len(line))})
        offset += len(line)
    return keys, members


class Reader:
    """Fetches samples of one source by shard and number. Not shared between processes: they would share file positions."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._files: OrderedDict[int, Any] = OrderedDict()

    def read(self, shard: int, sample: int) -> Sample:
        at = self._shards[shard]
        file = self._open(shard)
        members = {}
        for extension, (offset, length) in at.members[sample].items():
            file.seek(offset)
            members[extension] = file.read(length)
        return Sample(at.path, at.keys[sample], members)

    def _open(self, shard: int) -> Any:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MAX_OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        self._files[shard] = fsspec.open(self._shards[shard].path, "rb").open()
        return self._files[shard]
