"""Sources on disk or at an fsspec URL: their shards, indexed once, and a reader that fetches samples by index.

Shards are plain data and are sent to worker processes; a reader owns open files and is made in the process that reads.
Each format indexes and reads its files in ``formats``.
"""

import functools
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import fsspec
from fsspec.core import url_to_fs

from symbiotic_titan.config.data import FORMATS, DataSource
from symbiotic_titan.data.fields import (
    Fields,
    check_fields,
    dotted,
    names_of,
)
from symbiotic_titan.data.formats.index_cache import cached_index
from symbiotic_titan.data.formats.shard import (
    BadSample,
    DamagedRest,
    File,
    FileFormat,
    Indexed,
    OpenShard,
    Sample,
    Shard,
)
from symbiotic_titan.data.formats.unpack import compression_of, unpacked
from symbiotic_titan.sequence.tasks import TASKS

# Samples of a source that are read to find out which fields they have.
NUM_INSPECTED = 16

# Seconds between two log lines about indexing.
LOG_SECONDS = 15


def index_source(
    source: DataSource, where: str, *, cache_folder: str = "", tolerant: bool = False
) -> list[Shard]:
    """All shards of ``source``, sorted by path. Reads of every file what its index needs: tar headers, lines or footers.

    where:        the config row, for messages.
    cache_folder: for indexes and unpacked files; "": keep neither.
    tolerant:     count the unreadable part of a file as one bad sample after the others, instead of raising.

    Raises:
        ValueError: no file matches, or a file is empty, damaged or not of its format.
    """
    paths = expand(source.path, where)
    # Each process indexes in its own random order, so that processes that start together share the work through the cache.
    # The shards are sorted below, so the order affects nothing else.
    order = random.Random().sample(paths, len(paths)) if cache_folder else paths
    found: dict[str, list[Shard]] = {}
    warnings: dict[str, str] = {}
    for path in _logged(order, where):
        file, indexed = _index_file(source, path, cache_folder, where)
        if indexed.damage and not tolerant:
            raise ValueError(f"{where}: {path} {indexed.damage}")
        shards = list(indexed.shards)
        if indexed.damage:
            shards.append(DamagedRest(path, file.num_bytes, f"the file {indexed.damage}"))
        if not shards:
            raise ValueError(f"{where}: {path} is empty; remove the file, or write samples into it")
        found[path] = shards
        if indexed.warning:
            warnings[path] = indexed.warning
    _warn([f"{path} {warnings[path]}" for path in paths if path in warnings], where)
    return [shard for path in paths for shard in found[path]]


def _warn(warnings: list[str], where: str) -> None:
    """One line for the source, which may have thousands of files."""
    if warnings:
        others = f"; so it is with {len(warnings) - 1} more files" if len(warnings) > 1 else ""
        logging.getLogger(__name__).warning(f"{where}: {warnings[0]}{others}")


def _logged(paths: list[str], where: str) -> Iterator[str]:
    last = time.monotonic()
    for number, path in enumerate(paths):
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            logging.getLogger(__name__).info(f"{where}: indexed {number} of {len(paths)} files")
        yield path


def _index_file(
    source: DataSource, path: str, cache_folder: str, where: str
) -> tuple[File, Indexed]:
    """The file ``path`` and its shards."""
    file, damage = _plain(path, cache_folder, where)
    file_format: FileFormat = FORMATS[source.format]()
    index = functools.partial(file_format.index, file, functools.partial(_columns, source))
    if not file.num_bytes:
        indexed = Indexed([])
    elif cache_folder and file_format.cached_shard:
        indexed = cached_index(index, file, source.format, file_format.cached_shard, cache_folder)
    else:
        indexed = index()
    return file, replace(indexed, damage=damage or indexed.damage)


def check_names(source: DataSource, shards: list[Shard], where: str) -> None:
    """Raise ValueError if no sample has the fields of the source's task, judged by a few samples or by a schema."""
    names = _names_seen(shards)
    if names:
        check_fields(TASKS[source.task], source.keys, names, where)


def _plain(path: str, cache_folder: str, where: str) -> tuple[File, str]:
    """The file ``path``, unpacked if it is compressed, and why unpacking stopped early ("" if it did not)."""
    data, damage = path, ""
    if compression_of(path):
        data, damage = unpacked(path, cache_folder, where)
    with fsspec.open(path, "rb") as opened:
        return File(path, data, opened.seek(0, 2)), damage


def _columns(source: DataSource, names: list[str]) -> list[str]:
    """The ``names`` that may hold fields of the source's task; other columns are not decoded."""
    fields = {"image", *TASKS[source.task].fields}
    wanted = [name for field in fields for name in names_of(field, source.keys)]
    heads = {name for path in wanted for name in (path, *(head for head, _ in dotted(path)))}
    return [name for name in names if name in heads]


def _names_seen(shards: list[Shard]) -> set[str]:
    """Field names of a few samples, spread over the shards; empty if all of them are bad."""
    reader = Reader(shards)
    names: set[str] = set()
    inspected = range(0, len(shards), -(-len(shards) // NUM_INSPECTED))
    for number in inspected:
        shard = shards[number]
        names.update(shard.names)
        count = 0 if shard.names else min(shard.num_samples, NUM_INSPECTED // len(inspected))
        for sample in range(count):
            try:
                names |= Fields(reader.read(number, sample), {}).names
            except BadSample:
                continue
    return names


def expand(path: str, where: str) -> list[str]:
    """Files that match ``path``, sorted, because the order of samples depends on it. An existing path with a ``*`` is no pattern."""
    try:
        filesystem, pattern = url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{where}: path {path!r} cannot be opened ({error})") from error
    found = [pattern] if filesystem.exists(pattern) else filesystem.glob(pattern)
    files = sorted(name for name in found if filesystem.isfile(name))
    if not files:
        remedy = "check path; a * in it matches several files"
        if path.startswith("demo_data"):
            remedy = "make the demo data with: symbiotic make-demo-data --out demo_data"
        raise ValueError(f"{where}: no file matches path {path!r}; {remedy}")
    return [filesystem.unstrip_protocol(name) for name in files] if "://" in path else files


class Reader:
    """Fetches samples of one source by shard and index. Do not share it between processes: they would share file positions."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._files: OrderedDict[int, OpenShard] = OrderedDict()

    def read(self, shard: int, sample: int) -> Sample:
        """Raises BadSample if it cannot be read."""
        at = self._shards[shard]
        key = at.key(sample)
        try:
            return Sample(at.path, key, self._open(shard).read(sample))
        except BadSample as error:
            raise error.at(at.path, key) from error.__cause__
        except (OSError, ValueError) as error:
            raise BadSample("unreadable", f"it cannot be read ({error})").at(
                at.path, key
            ) from error

    def _open(self, shard: int) -> OpenShard:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        # LRU eviction: the streams of a process read near each other, so a few open shards serve them all.
        if len(self._files) >= self._shards[shard].max_open:
            self._files.popitem(last=False)[1].close()
        self._files[shard] = self._shards[shard].open()
        return self._files[shard]
