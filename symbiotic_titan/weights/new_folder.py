"""A folder that is written whole or not at all, and replaced only if it was written here."""

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from symbiotic_titan.config.files import read_json, write_json

# Below every folder that was written here: what lies in it. A release has all that ours have but this, and it may be the only copy.
MARK = ".symbiotic_titan"
_KIND = "list of what was written"


def check_target(folder: Path, *, overwrite: bool, num_bytes: int = 0) -> None:
    """Pass if a checkpoint of ``num_bytes`` may be written to ``folder``.

    Raises:
        ValueError: it exists and must not be overwritten, or is not all of our making, or the disk has no room.
    """
    if os.path.lexists(folder):
        if not overwrite:
            raise ValueError(
                f"{folder} exists; choose another --out, or replace it with --overwrite"
            )
        _check_written_here(folder)
    disk = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if num_bytes > free:
        raise ValueError(
            f"{folder} takes {num_bytes:,} bytes, but {free:,} are free in {disk}; make room, or choose another --out"
        )


def _check_written_here(folder: Path) -> None:
    if not (folder / MARK).is_file():
        raise ValueError(
            f"{folder} is no folder that symbiotic convert wrote and is not overwritten; choose another --out"
        )
    written = read_json(folder / MARK, _KIND, ("names",))["names"]
    more = sorted(path.name for path in folder.iterdir() if path.name not in {MARK, *written})
    if more:
        raise ValueError(
            f"{folder} holds {more[0]}, which was not written with it, and is not overwritten; move that, or choose another --out"
        )


def _has_tensors(folder: Path) -> bool:
    return (folder / ".metadata").is_file() or any(folder.glob("*.safetensors"))


@contextmanager
def new_folder(folder: Path, *, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """A folder to fill, beside ``folder``, which takes its name when the block ends well and is removed otherwise. What was there
    is replaced at the end only, so both need room for a while. Of two that write one folder at a time, the first to end has it; the
    other finds it there.

    Raises:
        ValueError: as ``check_target``, or a model would be replaced by its shape alone.
        OSError: the disk is full, or the like.
    """
    check_target(folder, overwrite=overwrite, num_bytes=num_bytes)
    place = folder.resolve()  # a link goes on to point there
    _remove_left(place)
    unfinished = _beside(place, "incomplete")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        names = sorted(path.name for path in unfinished.iterdir())
        write_json(unfinished / MARK, _KIND, {"names": names})
        check_target(folder, overwrite=overwrite)  # it may have come meanwhile
        if _has_tensors(place) and not _has_tensors(unfinished):
            raise ValueError(
                f"{folder} holds tensors and is not replaced by a shape alone; choose another --out"
            )
        old = _put_in_place(unfinished, place)
    except OSError as error:
        raise OSError(f"writing {folder} failed: {error}; nothing of it was kept") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if old is not None:
        shutil.rmtree(old)


def _beside(place: Path, state: str) -> Path:
    """A name of this process's own, so that no other writes there."""
    return place.with_name(f"{place.name}.{state}-{socket.gethostname()}-{os.getpid()}")


def _remove_left(place: Path) -> None:
    """Remove what processes of this machine left unfinished when they were killed."""
    start = f"{place.name}.incomplete-{socket.gethostname()}-"
    for left in place.parent.glob(glob.escape(start) + "*"):
        process = left.name.removeprefix(start)
        if process.isdecimal() and not _runs(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # no signal, only the question
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _put_in_place(finished: Path, place: Path) -> Path | None:
    """Where the folder is now that had this place, if one had."""
    if not place.exists():
        finished.rename(place)
        return None
    old = _beside(place, "replaced")
    place.rename(old)
    try:
        finished.rename(place)
    except BaseException:
        if not place.exists():
            old.rename(place)
        raise
    return old
