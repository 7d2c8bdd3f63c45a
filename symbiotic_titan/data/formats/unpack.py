"""Compressed files -> plain ones in the cache folder. Samples are read in any order; a compressed stream has no random access."""

import lzma
import zlib
from pathlib import Path
from typing import Any

import fsspec
from fsspec.compression import compr

from symbiotic_titan.config.files import replacing
from symbiotic_titan.data.formats.index_cache import version_of

# Suffix of a file -> fsspec's name of its compression.
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

UNPACK_ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)

# Bytes unpacked at a time.
CHUNK = 2**20


def compression_of(path: str) -> str | None:
    """fsspec's name of the compression that the suffix of ``path`` stands for, or None."""
    return next((name for end, name in COMPRESSIONS.items() if path.endswith(end)), None)


def unpacked(path: str, cache_folder: str, where: str) -> tuple[str, str]:
    """A plain copy of the compressed file ``path`` in the cache folder.

    Processes that start together may each unpack the file: the copies are equal and the last one stays.

    Returns:
        the path of the copy, and why the file could not be unpacked to its end ("" where it could).

    Raises:
        ValueError: there is no cache folder, or no library for the compression.
    """
    compression = compression_of(path)
    if compression not in compr:
        raise ValueError(
            f"{where}: {path} is compressed as {compression}, for which a library is missing; "
            f"install the package zstandard, or write the file with gzip"
        )
    if not cache_folder:
        raise ValueError(
            f"{where}: {path} is compressed, so that samples cannot be read from anywhere in it; set data.cache_folder "
            "to a local folder with room for the unpacked shards, or unpack them yourself"
        )
    target = Path(cache_folder) / f"{version_of(path)}-{Path(path).stem}"
    damage = target.with_name(target.name + ".damage")
    if not target.exists():
        _unpack(path, compression, target, damage)
    return str(target), damage.read_text() if damage.exists() else ""


def _unpack(path: str, compression: Any, target: Path, damage: Path) -> None:
    """Write ``target``. Where ``path`` is damaged, it ends there and ``damage`` says why, so that the samples before it can be used."""
    with replacing(target) as unfinished, unfinished.open("wb") as out:
        error = _copy(path, compression, out)
        if error:
            damage.write_text(f"cannot be unpacked to its end ({error}); copy or write it again")


def _copy(path: str, compression: Any, out: Any) -> str:
    """Copy the plain bytes of ``path`` to ``out``. Returns the error that stopped it, or "" at the end of the file."""
    with fsspec.open(path, "rb", compression=compression) as file:
        while True:
            try:
                chunk = file.read1(CHUNK)  # unlike read, it returns what comes before the damage
            except UNPACK_ERRORS as error:
                return str(error) or type(error).__name__
            if not chunk:
                return ""
            out.write(chunk)
