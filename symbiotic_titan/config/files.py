"""Files that are written whole or not at all; JSON files that name their own kind, so that a mix-up is reported; and how much of a
file of others is read.
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from symbiotic_titan.config.rows import Range
from symbiotic_titan.process import FULL, DiskFull, is_full


@contextmanager
def replacing(path: Path, suffix: str | None = None) -> Iterator[Path]:
    """A temporary file name beside ``path``: what is written there becomes ``path`` when the block ends without an error, and is
    removed otherwise. Readers see the old file or the new one, never a part of it.

    suffix: of the temporary name. By default it is unique, so several processes may write one file at a time and the last one
    wins. With a fixed suffix the next attempt overwrites what a killed process left, but there must be one writer only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + (suffix or f".incomplete-{uuid4().hex}"))
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(
                file.fileno()
            )  # else a crash of the machine can leave an empty file under the final name
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def check_file(path: Path, option: str) -> None:
    """Pass if a file can be written as ``path``, which ``option`` names; folders on the way may be missing.

    Raises:
        ValueError: it is a folder, or its folder cannot be written to.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass  # asked of the disk itself: permissions alone do not tell
    except OSError as error:
        raise ValueError(
            f"{option}: {path} cannot be written ({error.strerror}); name another file"
        ) from None


# What an account or a full disk of this machine forbids; another machine may allow it.
_OF_THIS_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, *FULL}


def check_output_folder(folder: Path, key: str, *, elsewhere: bool = False) -> None:
    """Pass if files can be written into ``folder``, the value of the config's ``key``; it need not exist. Nothing of the attempt stays.

    elsewhere: of a run on another machine, so only what no machine can have is refused.

    Raises:
        ValueError: a file is in the way, or the disk refuses it.
        DiskFull: the disk is full.
    """
    path = nearest = Path(
        os.path.abspath(folder)
    )  # without "..", which may lead through what is not there yet
    try:
        nearest = next(place for place in (path, *path.parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest) as file:
            # Asked of the disk itself: permissions alone do not tell, and an empty file fits on a full disk.
            file.write(bytes(4096))
    except OSError as error:
        if elsewhere and error.errno in _OF_THIS_MACHINE:
            return
        if is_full(error):
            raise DiskFull(
                f"{key}: the disk of {str(folder)!r} is full ({error.strerror}); free some space, or name a folder on another disk"
            ) from None
        raise ValueError(
            f"{key}: nothing can be written into {str(folder)!r} ({error.strerror or error}: {nearest}); name a folder that can be "
            "written"
        ) from None


def write_json(path: Path, kind: str, values: dict[str, Any]) -> None:
    """Write ``values`` as a file of ``kind``; a file of this name is replaced once the new one is complete.

    Raises:
        OSError: names the file; no part of it is left. DiskFull where that is the reason.
    """
    text = json.dumps({"kind": kind, **values}, indent=1) + "\n"
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        error_class = DiskFull if is_full(error) else OSError
        raise error_class(f"writing {path} failed: {error.strerror or error}") from None


def read_json(path: Path, kind: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of a file of ``kind``, with all of ``keys``.

    Raises:
        ValueError: no such file, not JSON, of another kind, or incomplete.
    """
    if not path.is_file():
        raise ValueError(f"{kind}: no such file: {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{kind}: {path} is not JSON: {error}") from None
    found = values.get("kind") if isinstance(values, dict) else None
    if found != kind:
        raise ValueError(f"{path} is no {kind}" + (f" but a {found}" if found else ""))
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{kind}: {path} lacks {', '.join(missing)}; write it anew")
    return values


@dataclass
class InputLimits:
    """What one file, record or image may cost, since who made the data is not known. All are keys of [data]; one that is exceeded is
    named by the message. They bound the memory of a worker, which holds a few such things at once."""

    max_image_pixels: Annotated[int, Range(1)] = 100_000_000
    """Images of more pixels are bad samples; they are not decoded. (A pixel takes 8 bytes while it is decoded, of WebP 16, in every
    worker at once.)"""

    max_image_bytes: Annotated[int, Range(1)] = 2**28
    """Bytes of an encoded image; a sample with a larger one is bad. No more than this is read of a file."""

    max_record_bytes: Annotated[int, Range(1)] = 2**28
    """Bytes of a sample: of its row, its line of JSON or its members in a tar file, which are not read if they are more; and as many
    again of the image files that it names. A larger sample is bad."""

    max_text_bytes: Annotated[int, Range(1)] = 2**23
    """Bytes of one text of a sample, as UTF-8; a sample with a longer one is bad. A tokenizer takes up to 250 bytes of memory for each
    of them, and some microseconds."""

    max_row_group_bytes: Annotated[int, Range(1)] = 2**31
    """Bytes of a decoded Parquet row group, of the columns that are read; a larger one is not decoded. A reader keeps two."""

    max_unpacked_bytes: Annotated[int, Range(1)] = 2**38
    """Bytes that a compressed shard may unpack to in ``cache_folder``; more is refused before the disk is full."""

    @property
    def limits(self) -> "InputLimits":
        """The limits alone."""
        return InputLimits(**{f.name: getattr(self, f.name) for f in fields(InputLimits)})
