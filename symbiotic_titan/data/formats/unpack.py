"""Decompress files into the cache folder: samples are read in random order, and a compressed stream has no random access."""

import lzma
import zlib
from pathlib import Path
from typing import Any

import fsspec
from fsspec.compression import compr

from symbiotic_titan.config.files import replacing
from symbiotic_titan.data.formats.index_cache import version_of

# File suffix -> fsspec's name of the compression.
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

UNPACK_ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)

# Bytes unpacked at a time.
CHUNK = 2**20


def compression_of(path: str) -> str | None:
    """fsspec's name of the compression that the suffix of ``path`` means, or None."""
    return next((name for end, name in COMPRESSIONS.items() if path.endswith(end)), None)


def unpacked(path: str, cache_folder: str, where: str) -> tuple[str, str]:
    """An uncompressed copy of the file ``path`` in the cache folder.

    Processes that start together may each unpack the file: the copies are equal, and the last one remains.

    Returns:
        the path of the copy, and why unpacking stopped early ("" if it did not).

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
    # The version is part of the name, so a changed file is unpacked again.
    target = Path(cache_folder) / f"{version_of(path)}-{Path(path).stem}"
    damage = target.with_name(target.name + ".damage")
    if not target.exists():
        _unpack(path, compression, target, damage)
    return str(target), damage.read_text() if damage.exists() else ""


def _unpack(path: str, compression: Any, target: Path, damage: Path) -> None:
    """Write ``target``. If ``path`` is damaged, keep what precedes the damage, whose samples can be used, and say why in ``damage``."""
    with replacing(target) as unfinished, unfinished.open("wb") as out:
        error = _copy(path, compression, out)
        if error:
            # Before the rename of ``target``: no process can find the copy without its damage.
            damage.write_text(f"cannot be unpacked to its end ({error}); copy or write it again")


def _copy(path: str, compression: Any, out: Any) -> str:
    """Decompress ``path`` to ``out``. Returns the error that stopped it, or "" at the end of the file."""
    with fsspec.open(path, "rb", compression=compression) as file:
        while True:
            try:
                chunk = file.read1(CHUNK)  # unlike read, returns the bytes before the damage
            except UNPACK_ERRORS as error:
                return str(error) or type(error).__name__
            if not chunk:
                return ""
            out.write(chunk)
