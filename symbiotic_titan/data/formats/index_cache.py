"""Cached file indexes: making them reads the whole data set, and every process of a run needs them.

A cached index is one file: a SHA-256 digest of the rest, then safetensors with the fields of the shard's dataclass (fields other
than arrays as JSON in a byte array). Its name depends on the path, size and modification time of the data file, so a stale index is
never read. Processes may write concurrently: each writes a temporary file and renames it, and all have equal contents. A damaged
cache file is rebuilt.
"""

import json
from collections.abc import Callable
from dataclasses import Field, fields
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

import numpy as np
from fsspec.core import url_to_fs
from safetensors.numpy import load, save

from symbiotic_titan.config.files import replacing
from symbiotic_titan.data.formats.shard import File, FilePart, Indexed

# Part of the file names: increment it with every change to the contents.
VERSION = 2
DIGEST_BYTES = 32
# Fields of ``Indexed`` besides the shards.
TEXTS = ("damage", "warning", "note")


def version_of(path: str) -> str:
    """A hash that changes when the file at ``path``, local or at a URL, changes, as far as its file system tells."""
    filesystem, name = url_to_fs(path)
    # ukey ignores some evidence of a change, e.g. a web server's entity tag; info includes it.
    parts = (path, filesystem.ukey(name), sorted(map(str, filesystem.info(name).items())))
    return sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def cached_index(
    index: Callable[[], Indexed], file: File, format_name: str, shard: type[FilePart], folder: str
) -> Indexed:
    """The index of ``file``, read from ``folder`` or, if it is missing or damaged there, made by ``index`` and written.

    shard: dataclass of the shard; a cached index has at most one.

    Raises:
        ValueError: the folder cannot be written.
    """
    name = PurePosixPath(file.path).name[-100:]
    path = Path(folder) / f"{version_of(file.data)}-{name}.{format_name}-index{VERSION}"
    content = _read(path)
    if content is None:
        indexed = index()
        _write(path, _packed(indexed))
        return indexed
    return _unpacked(content, file, shard)


def _read(path: Path) -> bytes | None:
    """The safetensors in ``path``; None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return content if sha256(content).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as out:
            out.write(sha256(content).digest())
            out.write(content)
    except OSError as error:
        raise ValueError(
            f"data.cache_folder: {path.parent} cannot be written ({error}); name another folder"
        ) from error


def _packed(indexed: Indexed) -> bytes:
    assert len(indexed.shards) <= 1
    values: dict[str, Any] = {name: getattr(indexed, name) for name in TEXTS} | {"class": ""}
    for shard in indexed.shards:
        values["class"] = type(shard).__name__
        values |= {f.name: getattr(shard, f.name) for f in _fields_of(type(shard))}
    return save({name: _as_array(value) for name, value in values.items()})


def _unpacked(content: bytes, file: File, shard: type[FilePart]) -> Indexed:
    arrays = load(content)
    rest = [_from_json(arrays[name]) for name in TEXTS]
    if not _from_json(arrays["class"]):
        return Indexed([], *rest)
    types = get_type_hints(shard)
    values = {
        f.name: arrays[f.name] if types[f.name] is np.ndarray else _from_json(arrays[f.name])
        for f in _fields_of(shard)
    }
    return Indexed([shard(file, **values)], *rest)  # type: ignore[list-item]


def _fields_of(shard: type) -> list[Field]:
    # Without the path: the data may be mounted elsewhere next time.
    return [f for f in fields(shard) if f.name != "file"]


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _from_json(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())
