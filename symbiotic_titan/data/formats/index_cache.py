"""Indexes of shards, kept in the cache folder: finding the samples of a large data set takes long, and every process needs them.

file = digest of the rest, then safetensors: the index's arrays, what is no array as JSON in bytes

Files that are derived from a user's files and kept in the cache folder (data.cache_folder).

Their names depend on the path, size and time of what they come from, so that a changed file is never taken for the old one.
Several processes may write at once: each writes a file of its own, which gets its name when it is whole.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from safetensors.numpy import load, save

from symbiotic_titan.config.files import replacing
from symbiotic_titan.data.formats.byte_ranges import (
    Extents,
    Lines,
)
from symbiotic_titan.data.formats.shard import File, Indexed


def version_of(path: str) -> str:
    """Changes when the file at ``path``, local or behind a URL, does, as far as its file system tells."""
    filesystem, name = url_to_fs(path)
    # Some file systems' own keys leave out what they know of the version, a web server's entity tag for one.
    parts = (path, filesystem.ukey(name), sorted(map(str, filesystem.info(name).items())))
    return sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


# Part of the files' names: raise it with every change to what is in them.
VERSION = 1
DIGEST = 32
CLASSES = {"Extents": Extents, "Lines": Lines}


def cached_index(index: Callable[[], Indexed], file: File, form: str, cache_folder: str) -> Indexed:
    """What ``index`` returns for ``file`` of the format ``form``: from the cache where it is whole there, else made and kept.

    Raises:
        ValueError: the cache folder cannot be written.
    """
    name = PurePosixPath(file.path).name[-100:]
    path = Path(cache_folder) / f"{version_of(file.data)}-{name}.{form}-index{VERSION}"
    content = _read(path)
    if content is None:
        indexed = index()
        _write(path, _packed(indexed))
        return indexed
    return _unpacked(content, file)


def _read(path: Path) -> bytes | None:
    """What was written to ``path``; None where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, content = content[:DIGEST], content[DIGEST:]
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
    values: dict[str, Any] = {"damage": indexed.damage, "class": ""}
    for shard in indexed.shards:  # at most one
        assert isinstance(shard, (Extents, Lines))
        values["class"] = type(shard).__name__
        values |= {f.name: getattr(shard, f.name) for f in fields(shard) if f.name != "file"}
    return save({name: _as_array(value) for name, value in values.items()})


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _unpacked(content: bytes, file: File) -> Indexed:
    arrays = load(content)
    damage, kind = (json.loads(arrays.pop(name).tobytes()) for name in ("damage", "class"))
    if not kind:
        return Indexed([], damage)
    if "kinds" in arrays:
        arrays["kinds"] = json.loads(arrays["kinds"].tobytes())
    return Indexed([CLASSES[kind](file, **arrays)], damage)
