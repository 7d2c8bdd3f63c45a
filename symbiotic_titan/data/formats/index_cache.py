"""Cached file indexes: making them reads the whole data set, and every process of a run needs them.

A cached index is one file: the SHA-256 of the header, that of the data, then safetensors with the arrays of the shard's dataclass
and, in the metadata, all else. Its name depends on the path, size and modification time of the data file, so a stale index is never
read. Processes may write concurrently: each writes a temporary file and renames it, and all have equal contents.

A process that starts reads the header only, so that millions of samples cost it nothing. When it first reads a sample it checks
the data, then maps them: the pages are those of the system's cache, one copy for all processes of a machine. A cache file that is
damaged or gone is made again, at either time.
"""

import json
import logging
import mmap
import os
from collections.abc import Callable
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

# Cached indexes that a process has mapped at a time.
MAX_MAPPED = 16
# A larger index is given back to the system after every few samples: a process alone would otherwise count all that it has seen as
# its own memory. The pages stay in the cache of the system.
MAX_RESIDENT, SAMPLES_RESIDENT = 2**18, 8

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
        mapped = _mapped(self)
        mapped.count_read()
        return mapped.shard.key(sample)  # type: ignore[attr-defined]

    def open(self) -> OpenShard:
        return _mapped(self).shard.open()  # type: ignore[attr-defined]


class Mapped:
    """``shard``, whose arrays are views of ``content``."""

    def __init__(self, shard: FilePart, content: mmap.mmap) -> None:
        self.shard = shard
        self._content = content
        self._reads = 0
        self._is_large = len(content) > MAX_RESIDENT and hasattr(mmap, "MADV_DONTNEED")

    def count_read(self) -> None:
        self._reads += 1
        if self._is_large and self._reads % SAMPLES_RESIDENT == 0:
            self._content.madvise(mmap.MADV_DONTNEED)


@lru_cache(MAX_MAPPED)
def _mapped(shard: MappedShard) -> Mapped:
    """Raises OSError if the index must be made again and then has other samples, or cannot be written."""
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
    with path.open("rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    kind = shard.file_format.cached_shard
    assert kind is not None
    arrays = {name: header.array(content, name) for name in header.tensors}
    return Mapped(kind(shard.file, **header.meta["fields"], **arrays), content)


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

    def array(self, content: mmap.mmap, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        offset = self.begin + tensor["data_offsets"][0]
        count = int(np.prod(tensor["shape"]))
        array = np.frombuffer(content, DTYPES[tensor["dtype"]], count, offset)
        return array.reshape(tensor["shape"])


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
    begin = 2 * DIGEST_BYTES + 8 + size
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if status.st_size != begin + end:
        return None
    stamp = hash((str(path), status.st_ino, status.st_mtime_ns))
    return Header(meta, tensors, begin, digest, stamp)


def _is_intact(path: Path, header: Header) -> bool:
    if header.stamp in _checked:
        return True
    with path.open("rb") as opened:  # read, not mapped: the pages would count as this process's own
        opened.seek(header.begin)
        return file_digest(opened, "sha256").digest() == header.digest


def _write(path: Path, content: bytes) -> None:
    length = 8 + int.from_bytes(content[:8], "little")
    view = memoryview(content)
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as out:
            out.write(sha256(view[:length]).digest())
            out.write(sha256(view[length:]).digest())
            out.write(content)
    except OSError as error:
        raise ValueError(
            f"data.cache_folder: {path.parent} cannot be written ({error}); name another folder"
        ) from error


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
