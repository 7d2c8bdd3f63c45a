"""What a run's folder of checkpoints has been through: where each one comes from, which ones the run left, and what is deleted.

``step-N`` is a checkpoint, complete once it has its ``.metadata``. Each follows from the one before, and a run goes on from the newest.
Other folders have names that nothing resumes from: ``damaged-N``, a save that was cut off or lost files, and
``abandoned-N``, a checkpoint of a branch that the run went back from. ``deleting-N`` is on its way out. The first process alone changes
the folder.
"""

import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.tools.logging import logger

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.weights.damage import newest_complete_step, rename_as, step_of

LINEAGE = "lineage.json"
"""Name of the file in a checkpoint's folder that has its ``Lineage``."""

KEPT_DAMAGED = 2
"""Damaged folders that are kept while a run has no ``checkpoint.keep_latest_k`` other ones."""

_LINEAGE_KIND = "lineage of a checkpoint"
_GOING_BACK = "going_back.json"
_GOING_BACK_KIND = "list of checkpoints that a run goes back from"


# ---- where a checkpoint comes from ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lineage:
    """Where a checkpoint comes from.

    id:           its own; unique.
    parent:       id of the checkpoint before it in the run; empty where there is none, or where that one has no lineage.
    parent_step:  its step; 0 where there is none.
    source:       what the run began with (``checkpoint.initial_load_path``); empty for new weights. Only in a run's first process.
    went_back_to: ``checkpoint.load_step`` of the process that saved it; 0 where it went on from the newest one.
    started:      when that process began, UTC.
    completed:    when the checkpoint was complete, UTC; empty before.
    """

    id: str
    step: int
    parent: str
    parent_step: int
    source: str
    went_back_to: int
    host: str
    started: str
    completed: str = ""


def read_lineage(folder: Path) -> Lineage | None:
    """The lineage of the checkpoint in ``folder``; None where it has none, as older ones, or none that can be read."""
    names = tuple(Lineage.__dataclass_fields__)
    try:
        values = read_json(folder / LINEAGE, _LINEAGE_KIND, names)
    except (OSError, ValueError):
        return None
    types = {name: int if "step" in name or name == "went_back_to" else str for name in names}
    if any(type(values[name]) is not kind for name, kind in types.items()):
        return None
    return Lineage(**{name: values[name] for name in names})


def _write_lineage(folder: Path, lineage: Lineage) -> None:
    write_json(folder / LINEAGE, _LINEAGE_KIND, asdict(lineage))


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


# ---- before a run ---------------------------------------------------------------------------------------------------------


def folders_of(folder: Path, *kinds: str) -> list[Path]:
    """The folders ``KIND-N`` and ``KIND-N-M`` in ``folder``, by N, then M."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"(?:{'|'.join(kinds)})-(\d+)(?:-(\d+))?")
    found = [(m, path) for path in folder.iterdir() if (m := pattern.fullmatch(path.name))]
    return [path for m, path in sorted(found, key=lambda f: (int(f[0][1]), int(f[0][2] or 0)))]


def step_to_resume(
    folder: Path, load_step: int, *, may_change: bool
) -> tuple[int, Metadata | None]:
    """(the step that a run with ``checkpoint.load_step`` goes on from, 0 or less to begin anew; its metadata, if they were read).

    ``may_change``: what is damaged after it is renamed, also everything where no save ever finished.

    Raises:
        ValueError: there were complete checkpoints, and none is left; or the folder cannot be changed.
    """
    if not folder.is_dir():
        return load_step, None
    try:
        if may_change:
            tidy(folder)
        if load_step == -1:
            return _newest(folder, may_change)
        if load_step > 0 and is_restart():
            return _begun_branch(folder, load_step)
    except OSError as error:
        raise ValueError(
            f"checkpoint.folder: {folder} cannot be tidied ({error.strerror or error}); let this user write there, or choose another "
            "job.dump_folder"
        ) from None
    return load_step, None


def _newest(folder: Path, may_change: bool) -> tuple[int, Metadata | None]:
    step, damaged, metadata = newest_complete_step(folder)
    lost = had_a_complete_one(folder) if step == -1 else None
    if lost or (step == -1 and damaged and not may_change):
        found = next((f"{path.name}: {damage}" for path, damage in damaged.items()), lost)
        raise ValueError(
            f"no checkpoint in {folder} is complete ({found}); repair one, begin anew with --checkpoint.load_step 0, or choose another "
            "job.dump_folder"
        )
    skip_damaged(damaged, rename=may_change)
    if step == -1 and damaged:
        logger.warning(f"no save into {folder} has ever finished: the run begins anew")
    return step, metadata


def skip_damaged(damaged: Mapping[Path, str], *, rename: bool) -> None:
    """Tell which checkpoints are not resumed from and what is wrong with each; ``rename`` them."""
    for path, damage in damaged.items():
        name = f" and renamed to {rename_as(path, 'damaged').name}" if rename else ""
        logger.warning(f"checkpoint {path} is skipped{name}: {damage}")


def _begun_branch(folder: Path, load_step: int) -> tuple[int, Metadata | None]:
    """For a job that is started again with the same ``load_step``: the newest step of the branch that it began there."""
    step, _, metadata = newest_complete_step(folder)
    lineage = read_lineage(folder / f"step-{step}")
    if step <= load_step or lineage is None or lineage.went_back_to != load_step:
        return load_step, None
    logger.info(
        f"checkpoint.load_step = {load_step}: this job went back there before, and goes on from its step {step}"
    )
    return step, metadata


def tidy(folder: Path) -> None:
    """Finish what a process before was killed in, and delete damaged folders but for the newest ``KEPT_DAMAGED``."""
    _finish_going_back(folder)
    damaged = sorted(folders_of(folder, "damaged"), key=_written)
    for path in [*folders_of(folder, "deleting"), *damaged[:-KEPT_DAMAGED]]:
        shutil.rmtree(path, ignore_errors=True)


def had_a_complete_one(folder: Path) -> str | None:
    """What shows that a run has lost the complete checkpoints that it once had in ``folder``, in words; None where every save was cut
    off. Those that it went back from are not lost."""
    for path in folders_of(folder, "step", "damaged"):
        lineage = read_lineage(path)
        if (path / ".metadata").exists() or (lineage is not None and lineage.completed):
            return f"{path.name} was complete once"
        if lineage is not None and lineage.parent_step:
            return f"{path.name} followed step {lineage.parent_step}"
    return None


def _written(path: Path) -> float:
    return path.stat().st_mtime


# ---- going back -----------------------------------------------------------------------------------------------------------


def go_back(folder: Path, step: int) -> None:
    """Rename what is newer than ``step``, since the run goes on from there. The intention is written first: killed at any moment,
    this is finished by the next start, or nothing was done."""
    newer = [path.name for path in folders_of(folder, "step") if (step_of(path) or 0) > step]
    if not newer:
        return
    write_json(folder / _GOING_BACK, _GOING_BACK_KIND, {"step": step, "newer": newer})
    _finish_going_back(folder)


def _finish_going_back(folder: Path) -> None:
    intention = folder / _GOING_BACK
    if not intention.exists():
        return
    values = read_json(intention, _GOING_BACK_KIND, ("step", "newer"))
    left = [path for path in folders_of(folder, "step") if path.name in values["newer"]]
    moved = [(path.name, rename_as(path, _kind(path)).name) for path in left]
    intention.unlink()
    for old, new in moved:
        logger.warning(f"the run went back to step {values['step']}: {folder / old} is now {new}")


def _kind(path: Path) -> str:
    return "abandoned" if (path / ".metadata").exists() else "damaged"


# ---- while a run saves ----------------------------------------------------------------------------------------------------


class History:
    """The checkpoints that a process saves into ``folder``. ``keep``: ``checkpoint.keep_latest_k``; ``every``: see ``surplus``."""

    def __init__(self, folder: Path, keep: int, every: int = 0) -> None:
        self.folder, self.keep, self.every = folder, keep, every
        self._origin = Lineage(uuid4().hex, 0, "", 0, "", 0, socket.gethostname(), _now())
        self._last: Lineage | None = None  # the checkpoint that the next one follows

    def begin(self, step: int, source: str = "", went_back_to: int = 0) -> None:
        """The process goes on from ``step``, which it has loaded; 0: it begins anew, with the weights in ``source`` or new ones. What
        is newer gets another name."""
        go_back(self.folder, step)
        self._origin = replace(self._origin, source=source, went_back_to=went_back_to)
        if step:
            # One without lineage is known by its step.
            lineage = read_lineage(self.folder / f"step-{step}")
            self._last = lineage or replace(self._origin, id="", step=step)

    def begin_save(self, step: int) -> None:
        """Prepare the folder of a checkpoint. Nothing is ever saved over another one."""
        folder = self.folder / f"step-{step}"
        if folder.exists() and any(folder.iterdir()):  # another rank may have made it, empty
            rename_as(folder, _kind(folder))
        folder.mkdir(parents=True, exist_ok=True)
        lineage = replace(self._origin, id=uuid4().hex, step=step)
        if self._last is not None:
            lineage = replace(lineage, parent=self._last.id, parent_step=self._last.step, source="")
        _write_lineage(folder, lineage)

    def end_save(self, step: int) -> list[Path]:
        """Note that the checkpoint of ``step`` is complete. Returns the folders to delete, which have got names of their own."""
        folder = self.folder / f"step-{step}"
        lineage = read_lineage(folder)
        if lineage is not None:
            self._last = replace(lineage, completed=_now())
            _write_lineage(folder, self._last)
        doomed = surplus(self.folder, self.keep, self.every)
        return [rename_as(path, "deleting") for path in doomed]


def surplus(folder: Path, keep: int, every: int = 0) -> list[Path]:
    """The folders beyond ``keep``, where complete checkpoints come first, then abandoned ones, then damaged ones, each the newest first.
    A save that is not complete yet is none of them. Empty for 0: all are kept, and ``tidy`` sees to damaged ones.

    every: the newest complete one at a multiple of it comes before all others; 0: none does.
    """
    if not keep:
        return []
    steps = folders_of(folder, "step")
    complete = [path for path in steps if (path / ".metadata").exists()]
    newest = complete[-1] if complete else None
    cut_off = [path for path in steps if path not in complete and _is_older(path, newest)]
    damaged = [*cut_off, *sorted(folders_of(folder, "damaged"), key=_written)][::-1]
    aside = [*reversed(folders_of(folder, "abandoned")), *damaged]
    complete.reverse()
    if every:
        first = next((path for path in complete if (step_of(path) or 0) % every == 0), None)
        complete.sort(key=lambda path: path != first)
    return [*complete, *aside][keep:]


def _is_older(path: Path, newest: Path | None) -> bool:
    return newest is not None and (step_of(path) or 0) < (step_of(newest) or 0)


def is_restart() -> bool:
    """Whether torchrun or SLURM started this process again, with the command of the one that failed or was stopped."""
    counts = (os.environ.get(n, "") for n in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)
