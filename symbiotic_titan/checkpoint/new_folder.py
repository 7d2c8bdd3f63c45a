"""A folder that is written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a folder has that was written here: a distributed checkpoint, safetensors, or the shape of a model alone.
WRITTEN_HERE = (".metadata", "model.safetensors.index.json", "model.json")


def check_target(folder: Path, *, overwrite: bool, num_bytes: int = 0) -> None:
    """Pass if a checkpoint of ``num_bytes`` may be written to ``folder``.

    Raises:
        ValueError: it exists and must not be overwritten, or is not a checkpoint, or the disk has no room.
    """
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists; choose another --out, or replace it with --overwrite")
    if folder.exists() and not any((folder / name).is_file() for name in WRITTEN_HERE):
        raise ValueError(f"{folder} is no checkpoint and is not overwritten; choose another --out")
    disk = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if num_bytes > free:
        raise ValueError(
            f"{folder} takes {num_bytes:,} bytes, but {free:,} are free in {disk}; make room, or choose another --out"
        )


@contextmanager
def new_folder(folder: Path, *, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """A folder to fill, ``<folder>.incomplete``, which becomes ``folder`` when the block ends well and is removed otherwise. What
    was there is replaced at the end only, so both need room for a while.

    Raises:
        ValueError: as ``check_target``.
        OSError: the disk is full, or the like.
    """
    check_target(folder, overwrite=overwrite, num_bytes=num_bytes)
    unfinished = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _put_in_place(unfinished, folder)
    except OSError as error:
        raise OSError(f"writing {folder} failed: {error}; nothing of it was kept") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put_in_place(finished: Path, folder: Path) -> None:
    if not folder.exists():
        finished.rename(folder)
        return
    old = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old)
