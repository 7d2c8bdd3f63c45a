"""Output folders: written completely or not at all, never inside what is being read, and replaced only if we wrote them."""

import glob
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.process import DiskFull, is_full, is_running

# The list of files in every folder that we write. A downloaded release has no such list, so --overwrite never deletes it: it may be
# the only copy.
MANIFEST = ".symbiotic_titan"
_KIND = "list of what was written"


def check_target(folder: Path, *, overwrite: bool, num_bytes: int = 0) -> None:
    """Pass if a checkpoint of ``num_bytes`` may be written to ``folder``.

    Raises:
        ValueError: it exists and ``overwrite`` is off, or contains files that we did not write, or the disk has no room.
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


def check_apart(out: Path, sources: Iterable[Path | str | None], option: str = "--out") -> None:
    """Pass if writing ``out`` cannot touch ``sources``, the files and folders that a command reads (None: not given).

    Raises:
        ValueError: one of them is ``out``, is inside it, or contains it.
    """
    target = out.resolve()
    for source in (Path(name) for name in sources if name is not None):
        path = source.resolve()
        if target == path:
            relation = f"is {source}"
        elif target in path.parents:
            relation = f"holds {source}"
        elif path in target.parents:
            relation = f"lies in {source}"
        else:
            continue
        raise ValueError(f"{option}: {out} {relation}, which this command reads; choose another")


def _check_written_here(folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} was not written by symbiotic convert and is not overwritten; choose another --out"
        )
    written = read_json(folder / MANIFEST, _KIND, ("names",))["names"]
    more = sorted(path.name for path in folder.iterdir() if path.name not in {MANIFEST, *written})
    if more:
        raise ValueError(
            f"{folder} contains {more[0]}, which was not written with it, and is not overwritten; move that file, or choose another --out"
        )


def _has_tensors(folder: Path) -> bool:
    return (folder / ".metadata").is_file() or any(folder.glob("*.safetensors"))


@contextmanager
def new_folder(folder: Path, *, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """A temporary folder to write to, renamed to ``folder`` when the block succeeds and removed when it fails. An old ``folder`` is
    replaced at the end only, so the disk needs room for both. Of two processes that write the same folder, the first to finish
    gets it and the other fails.

    Raises:
        ValueError: as ``check_target``, or a model with tensors would be replaced by its config alone.
        OSError: writing failed.
    """
    check_target(folder, overwrite=overwrite, num_bytes=num_bytes)
    final = folder.resolve()  # of a symbolic link the target is replaced, and the link stays
    _remove_abandoned(final)
    unfinished = _sibling(final, "incomplete")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        names = sorted(path.name for path in unfinished.iterdir())
        write_json(unfinished / MANIFEST, _KIND, {"names": names})
        check_target(folder, overwrite=overwrite)  # another process may have written it since
        if _has_tensors(final) and not _has_tensors(unfinished):
            raise ValueError(
                f"{folder} holds tensors and is not replaced by a shape alone; choose another --out"
            )
        old = _swap_in(unfinished, final)
    except OSError as error:
        kind = DiskFull if is_full(error) else OSError
        raise kind(f"writing {folder} failed: {error}; nothing of it was kept") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if old is not None:
        shutil.rmtree(old)


def _sibling(final: Path, state: str) -> Path:
    """A name that only this process uses, in the same folder: a rename is atomic only within one file system."""
    return final.with_name(f"{final.name}.{state}-{socket.gethostname()}-{os.getpid()}")


def _remove_abandoned(final: Path) -> None:
    """Remove unfinished folders of processes of this machine that were killed."""
    start = f"{final.name}.incomplete-{socket.gethostname()}-"
    for left in final.parent.glob(glob.escape(start) + "*"):
        process = left.name.removeprefix(start)
        if process.isdecimal() and not is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _swap_in(finished: Path, final: Path) -> Path | None:
    """Rename ``finished`` to ``final``; returns where the old ``final`` is now, if there was one."""
    if not final.exists():
        finished.rename(final)
        return None
    # A folder that has files cannot be renamed over, so the old one is renamed first, and back if the second rename fails.
    old = _sibling(final, "replaced")
    final.rename(old)
    try:
        finished.rename(final)
    except BaseException:
        if not final.exists():
            old.rename(final)
        raise
    return old
