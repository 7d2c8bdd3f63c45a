"""Cached file indexes: making them reads the whole data set, and every process of a run needs them.

A cached index is one file: the SHA-256 of the header, that of the data, then safetensors with the arrays of the shard's dataclass
and, in the metadata, all else. Its name depends on the path, size and modification time of the data file, so a stale index is never
read. Processes may write concurrently: each writes a temporary file and renames it, and all have equal contents.

A process that starts reads the header only, so that millions of samples cost it nothing. When it first reads a sample it checks
the data, then maps them: the pages are those of the system's cache, one copy for all processes of a machine. From a large index it
reads the few numbers of a sample by their place instead: a system that maps 2 MiB at a touch would soon have all of it mapped, and
count it as memory of the process. A cache file that is damaged or gone is made again, at the start or at the first sample.
"""

import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from safetensors.numpy import save

from symbiotic_titan.config.files import replacing
from symbiotic_titan.data.formats.shard import File, FileFormat, FilePart, Indexed, OpenShard
from symbiotic_titan.process import DiskFull, is_full

# Part of the file names: increment it with every change to the contents.
VERSION = 3
DIGEST_BYTES = 32
# Longest header that is tried: a damaged one may claim any length.
MAX_HEADER = 2**26
# Fields of ``Indexed`` besides the shards.
TEXTS = ("damage", "warning", "note")
# Data types of arrays, in safetensors' words.
DTYPES = {"BOOL": "?", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
DTYPES |= {f"{k}{8 * n}": f"<{k.lower()}{n}" for k in "IU" for n in (1, 2, 4, 8)}

# Cached indexes that a process has open at a time, and the largest that is mapped: 4 MiB together.
MAX_OPEN = 8
MAX_MAPPED = 2**19

# Stamps of the cached indexes whose data this process has checked.
_checked: set[int] = set()


def version_of(path: str) -> str:
    """A hash that changes when the file at ``path``, local or at a URL, changes, as far as its file system tells."""
    filesystem, name = url_to_fs(path)
    # ukey ignores some evidence of a change, e.g. a web server's entity tag; info includes it.
    parts = (path, filesystem.ukey(name), sorted(map(str, filesystem.info(name).items())))
    return sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def cached_index(
    index: Callable[[], Indexed], file: File, format_name: str, file_format: FileFormat, folder: str
) -> Indexed:
    """The index of ``file`` in ``folder``; if it is missing or damaged there, it is made by ``index`` first.

    Raises:
        ValueError: the folder cannot be written.
    """
    name = PurePosixPath(file.path).name[-100:]
    path = Path(folder) / f"{version_of(file.data)}-{name}.{format_name}-index{VERSION}"
    header = _read_header(path)
    if header is None:
        _write(path, _packed(index()))
        header = _read_header(path)
        assert header is not None
    meta = header.meta
    shards = []
    if meta["num_samples"]:
        names = tuple(meta["names"])
        kind = type(file_format)
        shards = [MappedShard(file, str(path), header.stamp, kind, meta["num_samples"], names)]
    return Indexed(list(shards), *(meta[name] for name in TEXTS))


@dataclass(frozen=True)
class MappedShard(FilePart):
    """A shard whose arrays are in the cached index at ``index``, wherever it is read. ``stamp``: that of its header."""

    index: str
    stamp: int
    file_format: type[FileFormat]
    num_samples: int
    names: tuple[str, ...]  # type: ignore[assignment]

    def __hash__(self) -> int:
        return self.stamp

    @property
    def max_open(self) -> int:
        assert self.file_format.cached_shard is not None
        return self.file_format.cached_shard.max_open  # type: ignore[attr-defined]

    def key(self, sample: int) -> str:
        return _opened(self).key(sample)  # type: ignore[attr-defined]

    def open(self) -> OpenShard:
        return _opened(self).open()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Header:
    """The beginning of a cached index.

    meta:    what is not an array.
    tensors: where the arrays are.
    begin:   where their data begin.
    digest:  SHA-256 of the data.
    stamp:   another one for every file that is written there.
    """

    meta: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    begin: int
    digest: bytes
    stamp: int

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self.begin + max((t["data_offsets"][1] for t in self.tensors.values()), default=0)

    def places(self) -> Iterator[tuple[str, tuple[int, str, tuple[int, ...]]]]:
        """Name of each array, and its offset in the file, data type and shape."""
        for name, tensor in self.tensors.items():
            offset = self.begin + tensor["data_offsets"][0]
            yield name, (offset, DTYPES[tensor["dtype"]], tuple(tensor["shape"]))


class OpenIndex:
    """A file that is open as long as an array of it is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, place: int, size: int) -> bytes:
        """Raises OSError if the file ends before."""
        content = os.pread(self._descriptor, size, place)
        if len(content) < size:
            raise OSError(f"{self.path} was cut off while it was in use")
        return content


class StoredArray:
    """An array in a file. Numbers and slices are read when they are asked for; whatever else is done with it reads it whole."""

    def __init__(self, opened: OpenIndex, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self._opened = opened
        self._offset = offset
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._row_bytes = self._dtype.itemsize * int(np.prod(shape[1:]))

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.step is None:
            start, stop, _ = index.indices(len(self))
            return self._rows(start, max(start, stop))
        if isinstance(index, (int, np.integer)):
            place = int(index) + (len(self) if index < 0 else 0)
            if not 0 <= place < len(self):
                raise IndexError(index)
            return self._rows(place, place + 1)[0]
        return self.__array__()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._rows(0, len(self)).astype(dtype or self._dtype, copy=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__array__(), name)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        size = (stop - start) * self._row_bytes
        content = self._opened.read(self._offset + start * self._row_bytes, size)
        return np.frombuffer(content, self._dtype).reshape(stop - start, *self._shape[1:])


@lru_cache(MAX_OPEN)
def _opened(shard: MappedShard) -> FilePart:
    """The shard with its arrays.

    Raises OSError if the index must be made again and then has other samples, or cannot be written.
    """
    path = Path(shard.index)
    header = _read_header(path)
    if header is None or not _is_intact(path, header):
        logging.getLogger(__name__).warning(
            f"{path} is damaged or gone; {shard.path} is indexed again"
        )
        try:
            _write(path, _packed(shard.file_format().index(shard.file, lambda names: names)))
        except ValueError as error:
            raise OSError(str(error)) from error
        header = _read_header(path)
    if header is None or header.meta["num_samples"] != shard.num_samples:
        raise OSError(f"{shard.path} was changed after it was indexed")
    _checked.add(header.stamp)
    kind = shard.file_format.cached_shard
    assert kind is not None
    return kind(shard.file, **header.meta["fields"], **_arrays(path, header))


def _arrays(path: Path, header: Header) -> dict[str, Any]:
    if header.num_bytes > MAX_MAPPED and hasattr(os, "pread"):
        index = OpenIndex(path)
        return {name: StoredArray(index, *place) for name, place in header.places()}
    with path.open("rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)
        for name, (offset, dtype, shape) in header.places()
    }


def _read_header(path: Path) -> Header | None:
    """None if the file is missing, its header is damaged, or it has not the length that the header says."""
    try:
        with path.open("rb") as opened:
            header_digest, digest, length = (
                opened.read(n) for n in (DIGEST_BYTES, DIGEST_BYTES, 8)
            )
            size = int.from_bytes(length, "little")
            text = opened.read(size) if size <= MAX_HEADER else b""
            status = os.fstat(opened.fileno())
    except OSError:
        return None
    if sha256(length + text).digest() != header_digest:
        return None
    tensors = json.loads(text)
    meta = json.loads(tensors.pop("__metadata__")["index"])
    stamp = hash((str(path), status.st_ino, status.st_mtime_ns))
    header = Header(meta, tensors, 2 * DIGEST_BYTES + 8 + size, digest, stamp)
    return header if status.st_size == header.num_bytes else None


def _is_intact(path: Path, header: Header) -> bool:
    if header.stamp in _checked:
        return True
    with path.open("rb") as opened:  # read, not mapped: the pages would count as this process's own
        opened.seek(header.begin)
        return file_digest(opened, "sha256").digest() == header.digest


@contextmanager
def writing_cache(path: Path) -> Iterator[None]:
    """What is raised where ``path``, in the cache folder, cannot be written becomes a DiskFull or a ValueError, of one line."""
    try:
        yield
    except OSError as error:
        full = is_full(error)
        remedy = "free space there, or name another folder" if full else "name another folder"
        raise (DiskFull if full else ValueError)(
            f"data.cache_folder: {path.parent} cannot be written ({error.strerror or error}); {remedy}"
        ) from error


def _write(path: Path, content: bytes) -> None:
    length = 8 + int.from_bytes(content[:8], "little")
    view = memoryview(content)
    with writing_cache(path), replacing(path) as unfinished, unfinished.open("wb") as out:
        out.write(sha256(view[:length]).digest())
        out.write(sha256(view[length:]).digest())
        out.write(content)


def _packed(indexed: Indexed) -> bytes:
    """The index as safetensors."""
    assert len(indexed.shards) <= 1, "a format with cached_shard gives one shard per file"
    meta: dict[str, Any] = {name: getattr(indexed, name) for name in TEXTS}
    meta |= {"num_samples": 0, "names": [], "fields": {}}
    arrays = {}
    for shard in indexed.shards:
        values = {f.name: getattr(shard, f.name) for f in fields(type(shard)) if f.name != "file"}  # type: ignore[arg-type]
        arrays = {
            n: np.ascontiguousarray(v) for n, v in values.items() if isinstance(v, np.ndarray)
        }
        others = {name: value for name, value in values.items() if name not in arrays}
        meta |= {"num_samples": shard.num_samples, "names": list(shard.names), "fields": others}
    return save(arrays, metadata={"index": json.dumps(meta)})
