"""Which checkpoints on disk are complete, and what is wrong with the others, as far as lengths and metadata show it.

A distributed checkpoint's ``.metadata`` is written last and lists every file with the byte ranges in it. A save that was cut off, and
a file that was lost or truncated later, are therefore found without reading tensors. Bytes that changed in place are found by the
digests that were written with them, see ``weights.digests``; all ranks read the tensors for that, in ``checkpoint.verify``. A save into
a folder that already contains a checkpoint would go unnoticed, so damaged folders are renamed before training goes on.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata


def read_metadata(folder: Path) -> tuple[Metadata | None, str | None]:
    """(the metadata of a checkpoint folder, None if they cannot be read; what is wrong with it, None if every file that it lists exists
    in full length). At 30 billion parameters on 256 ranks this would take about 45 s (LOG.md), so read them once.

    Raises:
        UnsafeContent: they name what may run code. That is no damage to be passed over.
    """
    # Imported here, because only a run that starts from a checkpoint needs it.
    from symbiotic_titan.weights.metadata import UnsafeContent, load_metadata

    if not (folder / ".metadata").is_file():
        return None, "it has no .metadata: the save did not finish"
    from symbiotic_titan.weights.digests import METADATA, read_sums

    try:
        sums = read_sums(folder)
    except ValueError as error:
        return None, str(error)
    data = (folder / METADATA).read_bytes()
    if sums is not None and METADATA not in sums:
        return None, "its SHA256SUMS has no digest of .metadata"
    if sums is not None and hashlib.sha256(data).hexdigest() != sums[METADATA]:
        return (
            None,
            f"the bytes of its file {METADATA} are damaged (another SHA-256 than in SHA256SUMS)",
        )
    try:
        metadata = load_metadata(folder, data)
    except UnsafeContent:
        raise
    except ValueError as error:
        return None, f"its .metadata cannot be read ({error})"
    return metadata, _damage(folder, metadata, sums)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if every file that it lists exists in full length."""
    return read_metadata(folder)[1]


def _damage(folder: Path, metadata: Metadata, sums: Mapping[str, str] | None) -> str | None:
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        end = info.offset + info.length
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
    for name, length in needed.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if sums is not None and name not in sums:
            return f"its SHA256SUMS has no digest of {name}"
        if path.stat().st_size < length:
            return f"its file {name} has {path.stat().st_size} bytes instead of {length}"
    return None


def complete_metadata(folder: Path, key: str, remedy: str) -> Metadata:
    """The metadata of ``folder``, the value of the config's ``key``, which must be a complete checkpoint.

    Raises:
        ValueError: the folder does not exist, or is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{key}: no such folder: {folder}; {remedy}")
    metadata, damage = read_metadata(folder)
    if metadata is None or damage is not None:
        raise ValueError(f"{key}: checkpoint {folder} is not complete: {damage}; {remedy}")
    return metadata


def step_of(folder: Path) -> int | None:
    """The step number of a folder named ``step-N``, else None."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match.group(1)) if match else None


def newest_complete_step(
    folder: Path, every: int = 1
) -> tuple[int, dict[Path, str], Metadata | None]:
    """(the newest step with a complete checkpoint, or -1; the damaged ones after it and what is wrong with each; its metadata). Only
    multiples of ``every`` are looked at."""
    damaged: dict[Path, str] = {}
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    candidates = [path for path, step in steps.items() if step % every == 0]
    for path in sorted(candidates, key=steps.__getitem__, reverse=True):
        metadata, damage = read_metadata(path)
        if damage is None:
            return steps[path], damaged, metadata
        damaged[path] = damage
    return -1, damaged, None


def choose_step(folder: Path) -> tuple[int, dict[Path, str], Metadata | None]:
    """As ``newest_complete_step``, for a run that must not silently start from scratch.

    Raises:
        ValueError: there are checkpoints, but none is complete.
    """
    step, damaged, metadata = newest_complete_step(folder)
    if step == -1 and damaged:
        path, damage = next(iter(damaged.items()))
        raise ValueError(
            f"no checkpoint in {folder} is complete ({path.name}: {damage}); remove the folder to start anew, "
            "or choose another job.dump_folder"
        )
    return step, damaged, metadata


def find_checkpoint(path: Path | str, subfolder: str) -> Path:
    """``path``, or its newest complete checkpoint if it is the folder of a run or of a run's checkpoints.

    Raises:
        ValueError: there are checkpoints, but none is complete.
    """
    path = Path(path)
    for folder in (path / subfolder, path):
        if folder.is_dir() and any(step_of(child) is not None for child in folder.iterdir()):
            return folder / f"step-{choose_step(folder)[0]}"
    return path


def rename_as(path: Path, kind: str) -> Path:
    """Rename ``step-N``, or another folder with a number, to ``KIND-N`` (or the next free name), so that nothing resumes from it or
    saves into it."""
    base = path.with_name(f"{kind}-{path.name.split('-')[1]}")
    target, number = base, 2
    while target.exists():
        target, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path.rename(target)
