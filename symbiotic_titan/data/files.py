"""The files of a source: which ones ``path`` names, and uncompressed copies of compressed ones.

A path is a file, a pattern of ``*`` or braces, or a folder; local or at an fsspec URL. Compressed files are unpacked into the cache
folder: samples are read in random order, and a compressed stream has no random access.
"""

import glob
import lzma
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from symbiotic_titan.config.data import FORMATS, DataSource
from symbiotic_titan.config.files import InputLimits, replacing
from symbiotic_titan.data.formats.index_cache import version_of, writing_cache
from symbiotic_titan.data.formats.shard import File, one_line
from symbiotic_titan.process import raised_by_us

# Files that Spark and Hugging Face write beside the data.
SIDE_FILES = re.compile(r"_SUCCESS|_metadata|_common_metadata|(_committed_|_started_).*")
MAGIC = re.compile(r"[*?[]")
MAX_NAMES = 1_000_000
# Questions that a remote file system is asked at a time.
REQUESTS = 32
# Protocols whose package an extra of ours installs.
EXTRAS = {"hf": "'symbiotic_titan[hub]'"}

# File suffix -> fsspec's name of the compression.
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

# How files begin that are not what their format expects -> what they are, and what to do.
SIGNATURES = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the data; load the data with: git lfs pull",
    b"<!DOCTYPE": "is an HTML page, so its download failed; load it again",
    b"<!doctype": "is an HTML page, so its download failed; load it again",
    b"<html": "is an HTML page, so its download failed; load it again",
    b"PK\x03\x04": "is a ZIP archive; unpack it",
    b"\x1f\x8b": "is compressed with gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; let its name end in .zst",
    b"PAR1": 'is a Parquet file; set format = "parquet"',
    b"ARROW1": "is an Arrow file; write it as Parquet",
    b"\xff\xff\xff\xff": "is a stream of Arrow batches; write it as Parquet, in datasets: to_parquet()",
    b"\xff\xfe": "is text in UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is text in UTF-16; convert it to UTF-8",
}

UNPACK_ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)

# Characters that are quoted of what another file system says.
LONGEST_REASON = 200

# Bytes unpacked at a time.
CHUNK = 2**20


def source_files(source: DataSource, where: str) -> list[str]:
    """Paths of the source's files, sorted, because the order of samples depends on it.

    where: the config row, for messages.

    Raises:
        ValueError: there is none, braces name some that do not exist, the protocol is unknown or its package is missing, or the file
            system says no.
    """
    try:
        return _found(source, where)
    except Exception as error:  # noqa: BLE001  other packages raise what they like
        if isinstance(error, ValueError) and raised_by_us(error):
            raise
        reason = one_line(f"{type(error).__name__}: {error}", LONGEST_REASON)
        raise ValueError(
            f"{where}: path {source.path!r} cannot be read ({reason}); correct path, or load the data down"
        ) from error


def _found(source: DataSource, where: str) -> list[str]:
    filesystem, path = _file_system(source.path, where)
    suffixes = _suffixes(FORMATS[source.format].suffixes)
    found = _match(filesystem, path, suffixes)
    # A name that holds braces, and exists, is itself.
    names = [path] if found or "{" not in path else expanded(path, where)
    if names != [path]:
        with ThreadPoolExecutor(REQUESTS if "://" in source.path else 1) as pool:
            matches = list(pool.map(lambda name: _match(filesystem, name, suffixes), names))
        missing = [name for name, files in zip(names, matches, strict=True) if not files]
        if missing:
            raise ValueError(
                f"{where}: {len(missing)} of the {len(names)} files of path {source.path!r} are missing, the first is "
                f"{missing[0]}; complete them, or correct the braces"
            )
        found = [file for files in matches for file in files]
    if not found:
        raise ValueError(f"{where}: {_nothing(source, filesystem.isdir(path), suffixes)}")
    files = sorted(set(found))
    if "://" in source.path:
        return [filesystem.unstrip_protocol(name) for name in files]
    return files


def _file_system(path: str, where: str) -> tuple[Any, str]:
    """The file system of ``path``, and the path within it."""
    try:
        return url_to_fs(path)
    except ImportError as error:
        protocol = path.partition("://")[0]
        address = known_implementations.get(protocol, {"class": protocol})["class"]
        package = EXTRAS.get(protocol, address.partition(".")[0])
        raise ValueError(
            f"{where}: path {path!r} needs a package that is not installed ({error}); install it with: pip install {package}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: path {path!r} cannot be opened ({error})") from error


def _suffixes(plain: tuple[str, ...]) -> tuple[str, ...]:
    """Ends of the names of a format's files, packed ones included."""
    packed = [end + packing for end in plain for packing in COMPRESSIONS if packing != ".tgz"]
    return (*plain, *packed, *((".tgz",) if ".tar" in plain else ()))


def _match(filesystem: Any, path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files that ``path`` names, if its braces are characters like others."""
    if filesystem.isfile(path):
        return [path]
    if filesystem.isdir(path):
        depth = len(path.rstrip("/").split("/"))
        files = _below(filesystem, path) if suffixes else []
        return [f for f in files if f.lower().endswith(suffixes) and not _is_hidden(f, depth)]
    magic = MAGIC.search(path)
    if magic is None:
        return []
    depth = path.count("/", 0, magic.start())
    parts = path.split("/")
    # As in a shell: who writes the dot, or the whole name, means such a file.
    named = any(part.startswith(".") for part in parts[depth:]) or not MAGIC.search(parts[-1])
    files = [name for name in _glob(filesystem, path) if filesystem.isfile(name)]
    return [name for name in files if named or not _is_hidden(name, depth)]


def _below(filesystem: Any, folder: str) -> list[str]:
    """Files in ``folder`` and its folders. Locally those that links lead to are folders like others; none is entered twice."""
    if not isinstance(filesystem, LocalFileSystem):
        return filesystem.find(folder)
    found: list[str] = []
    entered = {os.path.realpath(folder)}
    for path, folders, files in os.walk(folder, followlinks=True):
        places = {os.path.realpath(f"{path}/{name}"): name for name in sorted(folders)}
        folders[:] = [name for place, name in places.items() if place not in entered]
        entered |= set(places)
        found += [f"{path}/{name}" for name in files if os.path.isfile(f"{path}/{name}")]
    return found


def _glob(filesystem: Any, pattern: str) -> list[str]:
    """What ``pattern`` matches. As in a shell, ``*`` also enters the folders that links lead to, and ``**`` does not."""
    if isinstance(filesystem, LocalFileSystem) and "**" not in pattern:
        return glob.glob(pattern, include_hidden=True)
    return filesystem.glob(pattern)


def _is_hidden(name: str, depth: int) -> bool:
    """Whether a part of the path after ``depth`` folders is hidden, or the file is one that lies beside data."""
    parts = name.split("/")[depth:]
    return any(part.startswith(".") for part in parts) or bool(SIDE_FILES.fullmatch(parts[-1]))


def _nothing(source: DataSource, is_folder: bool, suffixes: tuple[str, ...]) -> str:
    if is_folder and not suffixes:
        return (
            f"path {source.path!r} is a folder, and the format {source.format!r} does not say how its files end; "
            f'write path = "{source.path.rstrip("/")}/*.ENDING"'
        )
    remedy = "check path; a * in it matches several files"
    if is_folder:
        remedy = f"the folder holds no file that ends in {suffixes[0]}, packed or not"
    if source.path.startswith("demo_data"):
        remedy = "make the demo data with: symbiotic make-demo-data --out demo_data"
    return f"no file matches path {source.path!r}; {remedy}"


def expanded(path: str, where: str) -> list[str]:
    """What the braces in ``path`` stand for, as in bash: ``{a,b}``, ``{08..11}``, ``{0..9..3}``, one inside another.

    Raises:
        ValueError: more than MAX_NAMES.
    """
    import bracex  # few paths have braces

    try:
        return bracex.expand(path, keep_escapes=True, limit=MAX_NAMES)
    except bracex.ExpansionLimitException as error:
        raise ValueError(
            f"{where}: path {path!r} stands for more than {MAX_NAMES:,} files; correct its braces"
        ) from error


def open_file(path: str, cache_folder: str, where: str, limits: InputLimits) -> tuple[File, str]:
    """The file ``path``, unpacked if it is compressed; and why unpacking stopped early ("" if it did not)."""
    data, damage = path, ""
    if compression_of(path):
        data, damage = unpacked(path, cache_folder, where, limits.max_unpacked_bytes)
    try:
        with fsspec.open(path, "rb") as opened:
            return File(path, data, opened.seek(0, 2), limits), damage
    except Exception as error:  # noqa: BLE001  other packages raise what they like
        reason = one_line(f"{type(error).__name__}: {error}", LONGEST_REASON)
        raise ValueError(f"{where}: {path} cannot be read ({reason})") from error


def other_kind(path: str, own: str) -> str:
    """What the file ``path`` is if it begins like one of another kind than the format ``own``, and what to do about it; else ""."""
    with fsspec.open(path, "rb") as opened:
        begin = opened.read(max(map(len, SIGNATURES)))
    found = next((text for sign, text in SIGNATURES.items() if begin.startswith(sign)), "")
    return "" if found.endswith(f'"{own}"') else found


def compression_of(path: str) -> str | None:
    """fsspec's name of the compression that the suffix of ``path`` means, or None."""
    return next((name for end, name in COMPRESSIONS.items() if path.endswith(end)), None)


def unpacked(path: str, cache_folder: str, where: str, max_bytes: int) -> tuple[str, str]:
    """An uncompressed copy of the file ``path`` in the cache folder.

    Processes that start together may each unpack the file: the copies are equal, and the last one remains.

    Returns:
        the path of the copy, and why unpacking stopped early ("" if it did not).

    Raises:
        ValueError: there is no cache folder, or no room in it; no library for the compression; or more than ``max_bytes``.
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
        try:
            _unpack(path, compression, target, damage, max_bytes)
        except OverflowError as error:
            raise ValueError(
                f"{where}: {path} unpacks to more than data.max_unpacked_bytes = {max_bytes}; raise it if the file is right"
            ) from error
    return str(target), damage.read_text() if damage.exists() else ""


def _unpack(path: str, compression: Any, target: Path, damage: Path, max_bytes: int) -> None:
    """Write ``target``. If ``path`` is damaged, keep what precedes the damage, whose samples can be used, and say why in ``damage``.

    Raises:
        OverflowError: ``target`` would have more than ``max_bytes``.
        ValueError: it cannot be written.
    """
    with (
        fsspec.open(path, "rb", compression=compression) as file,
        writing_cache(target),
        replacing(target) as unfinished,
        unfinished.open("wb") as out,
    ):
        error = _copy(file, out, max_bytes)
        if error:
            # Before the rename of ``target``: no process can find the copy without its damage.
            damage.write_text(f"cannot be unpacked to its end ({error}); copy or write it again")


def _copy(file: Any, out: Any, max_bytes: int) -> str:
    """Decompress ``file`` to ``out``. Returns the error that stopped it, or ""; raises OverflowError after ``max_bytes``."""
    while True:
        try:
            chunk = file.read1(CHUNK)  # unlike read, returns the bytes before the damage
        except UNPACK_ERRORS as error:
            return str(error) or type(error).__name__
        if not chunk:
            return ""
        if out.tell() + len(chunk) > max_bytes:
            raise OverflowError
        out.write(chunk)
