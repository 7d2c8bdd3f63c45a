"""What is wrong with a checkpoint on disk.

A distributed checkpoint's ``.metadata`` is written last and lists every file with the byte ranges that it holds, so a
save that was cut off, or a file that was lost or truncated afterwards, can be told without reading tensors.
"""

import pickle
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file it lists is there in full length."""
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
