"""Choose the checkpoint to resume from, the newest complete one, and see whether it fits the run.

A distributed checkpoint's ``.metadata`` is written last and lists every file with the byte ranges that it holds, so a first
save that was cut off, or a file that was lost or truncated afterwards, can be told without reading tensors. A save into a
folder that already holds a checkpoint could not: damaged folders are therefore moved aside before training goes on.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from symbiotic_titan.weights.damage import damage_of

START = "checkpoint.initial_load_path"
Shape = tuple[int, ...]


def step_of(folder: Path) -> int | None:
    """Step number of a folder named ``step-N``, else None."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match.group(1)) if match else None


def newest_complete_step(folder: Path) -> tuple[int, dict[Path, str]]:
    """(the newest step whose checkpoint is complete, or -1; the newer ones that were passed over and what is wrong)."""
    damaged: dict[Path, str] = {}
    candidates = [path for path in folder.iterdir() if step_of(path) is not None]
    for path in sorted(candidates, key=lambda p: step_of(p) or 0, reverse=True):
        damage = damage_of(path)
        if damage is None:
            return step_of(path) or 0, damaged
        damaged[path] = damage
    return -1, damaged


def choose_step(folder: Path) -> tuple[int, dict[Path, str]]:
    """As ``newest_complete_step``, for a run that must not silently start anew.

    Raises:
        ValueError: there are checkpoints, and none is complete.
    """
    step, damaged = newest_complete_step(folder)
    if step == -1 and damaged:
        path, damage = next(iter(damaged.items()))
        raise ValueError(
            f"no checkpoint in {folder} is complete ({path.name}: {damage}); remove the folder to start anew, "
            "or choose another job.dump_folder"
        )
    return step, damaged


def find_checkpoint(path: Path | str, subfolder: str) -> Path:
    """``path``, or its newest complete checkpoint where it is the folder of a run or of a run's checkpoints.

    Raises:
        ValueError: there are checkpoints, and none is complete.
    """
    path = Path(path)
    for folder in (path / subfolder, path):
        if folder.is_dir() and any(step_of(child) is not None for child in folder.iterdir()):
            return folder / f"step-{choose_step(folder)[0]}"
    return path


def set_aside(path: Path) -> Path:
    """Rename ``step-N`` to ``damaged-N`` (or the next free name), so that nothing takes it for a checkpoint or saves into it."""
    base = path.with_name(f"damaged-{step_of(path)}")
    target, number = base, 2
    while target.exists():
        target, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path.rename(target)


def holds(folder: Path, key: str) -> bool:
    """Whether a distributed checkpoint has the entry ``key``."""
    return key in FileSystemReader(folder).read_metadata().state_dict_metadata


def check_whole(folder: Path, key: str, remedy: str) -> None:
    """See that a folder, which the config names by ``key``, is a complete checkpoint.

    Raises:
        ValueError: there is no such folder, or it is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{key}: no such folder: {folder}; {remedy}")
    damage = damage_of(folder)
    if damage is not None:
        raise ValueError(f"{key}: checkpoint {folder} is not complete: {damage}; {remedy}")


def check_start(
    start: Path, checkpoints: Path, shapes: Mapping[str, Shape], *, model_only: bool
) -> None:
    """See that a new run can begin with the checkpoint ``start``. ``shapes``: of all parameters, by name.

    Raises:
        ValueError: ``start`` is missing, damaged or of another model, or would not be read.
    """
    check_whole(start, START, "train or convert that model first, or correct the path")
    saved = FileSystemReader(start).read_metadata().state_dict_metadata
    has_run = "train_state.step" in saved
    check_weights(start, checkpoints, _sizes(saved), shapes, model_only=model_only or has_run)


def check_weights(
    start: Path,
    checkpoints: Path,
    held: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    *,
    model_only: bool,
) -> None:
    """See that a new run, which saves into ``checkpoints``, can begin with ``start``, which holds tensors of the shapes ``held``.

    Raises:
        ValueError: they are of another model, or would not be read, or more than the model is asked for.
    """
    if checkpoints.is_dir():
        raise ValueError(
            f"{START}: {start} is not read where {checkpoints} exists, and that holds no checkpoint; remove it"
        )
    misfit = _misfit(held, shapes)
    if misfit:
        raise ValueError(
            f"{START}: {start} is of another model: {misfit}; split it as [experts] says with symbiotic convert, or name one "
            "that was"
        )
    if not model_only:
        raise ValueError(
            f"{START}: {start} holds the model alone; set checkpoint.initial_load_model_only = true"
        )


def _sizes(saved: Mapping[str, object]) -> dict[str, Shape]:
    """Shapes of the tensors in a checkpoint's metadata."""
    return {n: tuple(size) for n, e in saved.items() if (size := getattr(e, "size", None))}


def _misfit(held: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> str | None:
    """The first tensor that is not held in the shape asked for."""
    for name, shape in shapes.items():
        if held.get(name) != shape:
            found = f"has shape {held[name]}" if name in held else "is missing"
            return f"{name} {found} in it and has shape {shape} here"
    return None


def check_fits(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], trainable: Iterable[str]
) -> None:
    """See that a checkpoint holds a whole run of this model. ``shapes``: of all parameters, by name.

    Raises:
        ValueError: it holds the model alone, or a model of another shape, or no optimizer state for a trainable parameter.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    if "train_state.step" not in saved:
        raise ValueError(
            f"checkpoint {folder} holds the model alone (checkpoint.last_save_model_only), so this run cannot go on; "
            "name an older one with --checkpoint.load_step, or start another job.dump_folder with checkpoint.initial_load_path"
        )
    misfit = _misfit(_sizes(saved), shapes)
    if misfit:
        raise ValueError(
            f"checkpoint {folder} is of another model: {misfit}; resume with the model.flavor and [experts] it was saved "
            "with, or start another job.dump_folder"
        )
    with_state = {key.rpartition(".")[0] for key in saved if key.startswith("optimizer.state.")}
    for name in trainable:
        if with_state and f"optimizer.state.{name}" not in with_state:
            raise ValueError(
                f"checkpoint {folder} has no optimizer state of {name}, which was frozen when it was saved; keep it frozen "
                "(optimizer.param_groups), or start another job.dump_folder with checkpoint.initial_load_path"
            )
