"""What a checkpoint must have to be written: finite numbers, and room on its disk.

A weight that no token of a step has read, a row of the embedding or an expert, can be NaN while losses and gradients are finite. Saved
as good, such checkpoints would push the last good one out.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.utils import get_total_norm
from torchtitan.components.checkpoint import DATALOADER

from symbiotic_titan.optim.group_norms import local_part
from symbiotic_titan.parallel.ranks import gather_over_ranks
from symbiotic_titan.process import DiskFull, is_first_process, is_full
from symbiotic_titan.weights.reader import some_of

# Bytes of a checkpoint besides its tensors, for each part of a tensor: every part is an archive of its own with a row in the metadata.
BYTES_BESIDES = 2048
# Seconds that a save waits for older checkpoints to be removed. The other ranks wait as well, and their collective has a timeout.
PURGE_TIMEOUT_S = 30.0


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``state``, as ``torch.distributed.checkpoint.save`` takes it, by their names in a checkpoint. The data loader has
    none and is not asked, since it would gather its state from all ranks."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == DATALOADER:
            continue
        if isinstance(value, Tensor):
            found[name] = value
            continue
        inner = value.state_dict() if hasattr(value, "state_dict") else value
        if isinstance(inner, Mapping):
            found |= {f"{name}.{key}": tensor for key, tensor in tensors_of(inner).items()}
    return found


# ---- finite numbers -------------------------------------------------------------------------------------------------------


def not_finite(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Those of ``tensors`` whose part on this rank has NaN or infinities, and which. One wait for the device where there is none."""
    parts = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
    # An empty part has no largest number.
    parts = {name: t for name, t in parts.items() if t.is_floating_point() and t.numel()}
    # The largest number is finite where all are: each is read once, and nothing as large as a tensor is written.
    if math.isfinite(get_total_norm(parts.values(), norm_type=math.inf).item()):  # device sync
        return {}
    bad = {name: part for name, part in parts.items() if not part.isfinite().all()}
    return {name: "NaN" if part.isnan().any() else "inf" for name, part in bad.items()}


def not_finite_on_any_rank(tensors: Mapping[str, Tensor]) -> str | None:
    """Names those of ``tensors`` that have NaN or infinities on any rank, and the ranks; the same text on all, None if there is none.
    Collective."""
    on_ranks = gather_over_ranks(not_finite(tensors))
    bad = {name: kind for found in reversed(on_ranks) for name, kind in found.items()}
    if not bad:
        return None
    ranks = ", ".join(str(rank) for rank, found in enumerate(on_ranks) if found)
    named = some_of(f"{name} ({bad[name]})" for name in tensors if name in bad)
    return f"{len(bad)} of {len(tensors)} tensors on rank {ranks}: {named}"


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Pass if ``tensors``, which the checkpoint of ``step`` would hold, are finite on all ranks. Collective.

    Raises:
        FloatingPointError: names what is not, on all ranks.
    """
    bad = not_finite_on_any_rank(tensors)
    if bad is not None:
        raise FloatingPointError(
            f"step {step}: its checkpoint was not written, because it is not finite in {bad}. The last checkpoint is kept; go on from it "
            "with a lower learning rate, a larger optimizer.eps or other data"
        )


def check_loaded(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Pass if ``tensors``, which were read from the checkpoint in ``folder``, are finite on all ranks. Where it gave a weight no value, NaN
    of ``model.initialize`` is left. Collective.

    Raises:
        ValueError: names what is not, on all ranks.
    """
    bad = not_finite_on_any_rank(tensors)
    if bad is not None:
        raise ValueError(
            f"checkpoint {folder} is not finite, or has no values, in {bad}; use another one, or name an older one with "
            "checkpoint.load_step"
        )


# ---- room on the disk -----------------------------------------------------------------------------------------------------


def bytes_of(tensors: Mapping[str, Tensor], num_ranks: int) -> int:
    """What a checkpoint of ``tensors``, each of them sharded over at most ``num_ranks`` ranks, takes on disk; up to 2 % more."""
    parts = len(tensors) * num_ranks
    return sum(t.numel() * t.itemsize for t in tensors.values()) + parts * BYTES_BESIDES


def check_room(tensors: Mapping[str, Tensor], folder: Path, step: int, *, purging: bool) -> None:
    """Pass if the disk of ``folder`` has room for ``tensors``. The first process looks, and all agree. Collective.

    purging: older checkpoints may be being removed; that is waited for.

    Raises:
        DiskFull: on all ranks, with the bytes needed and free.
    """
    shortage = None
    if is_first_process():
        needed = bytes_of(tensors, dist.get_world_size() if dist.is_initialized() else 1)
        free = room_for(needed, folder, PURGE_TIMEOUT_S if purging else 0.0)
        if free < needed:
            shortage = f"it takes {in_words(needed)} and {in_words(free)} are free"
    shortage = gather_over_ranks(shortage)[0]
    if shortage is not None:
        raise DiskFull(full_text(folder, step, shortage))


def room_for(needed: int, folder: Path, timeout: float) -> int:
    """Bytes that are free on the disk of ``folder``, which need not exist. Where they are fewer than ``needed`` but grow, they are
    awaited."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    end, free = time.monotonic() + timeout, shutil.disk_usage(place).free
    while free < needed and time.monotonic() < end:
        before = free
        time.sleep(timeout / 10)
        free = shutil.disk_usage(place).free
        if free <= before:
            break
    return free


def in_words(size: int) -> str:
    """``size`` bytes in a unit that suits it."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def full_text(folder: Path, step: int, what: str) -> str:
    return (
        f"step {step}: the disk of {folder} has no room for a checkpoint: {what}. Nothing of it is left; the one before is kept. Free some "
        "space, or keep fewer with checkpoint.keep_latest_k, and start again"
    )


def as_disk_full(error: BaseException, folder: Path, step: int) -> DiskFull | None:
    """What to raise for ``error``, with which the save of ``step`` into ``folder`` ended: None where its reason is not a full disk.

    What was written is removed: it can never become complete, and the next start would find the disk as full.
    """
    reason = next((cause for cause in causes_of(error) if is_full(cause)), None)
    if reason is None:
        return None
    unfinished = folder / f"step-{step}"
    if is_first_process() and not (unfinished / ".metadata").exists():
        shutil.rmtree(unfinished, ignore_errors=True)
    why = getattr(reason, "strerror", None) or str(reason)
    return DiskFull(full_text(folder, step, f"{why} while it was written"))


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """``error``, what it came from, and where it stands for the errors of several ranks, theirs."""
    seen, left = set[int](), [error]
    while left:
        now = left.pop(0)
        if id(now) in seen:
            continue
        seen.add(id(now))
        yield now
        left += [cause for cause in (now.__cause__, now.__context__) if cause is not None]
        if isinstance(now, CheckpointException):
            left += [failure for failure, _ in now.failures.values()]
