"""Choose the checkpoint to resume from: the newest complete one.

A distributed checkpoint's ``.metadata`` is written last and lists every file with the byte ranges that it holds, so a save
that was cut off, or a file that was lost or truncated afterwards, can be told without reading tensors.
"""

import pickle
import re
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata


def step_of(folder: Path) -> int | None:
    """Step number of a folder named ``step-N``, else None."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match.group(1)) if match else None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file it lists is there in full length."""
    if (folder / "model.safetensors.index.json").is_file():
        return None  # an export for other tools; torchtitan reads it itself
    if not (folder / ".metadata").is_file():
        return "it has no .metadata: the save did not finish"
    try:
        metadata: Metadata = FileSystemReader(folder).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        return f"its .metadata cannot be read ({type(error).__name__})"
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        end = info.offset + info.length
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
    for name, length in needed.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size < length:
            return f"its file {name} has {path.stat().st_size} bytes instead of {length}"
    return None


def newest_complete_step(folder: Path) -> tuple[int, list[str]]:
    """(the newest step whose checkpoint is complete, or -1; one line for every newer one that was passed over)."""
    skipped: list[str] = []
    candidates = [path for path in folder.iterdir() if step_of(path) is not None]
    for path in sorted(candidates, key=lambda p: step_of(p) or 0, reverse=True):
        damage = damage_of(path)
        if damage is None:
            return step_of(path) or 0, skipped
        skipped.append(f"checkpoint {path} is skipped: {damage}")
    return -1, skipped
