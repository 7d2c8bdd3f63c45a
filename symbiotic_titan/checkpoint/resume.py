"""Checks that a run can resume from, or start from, a checkpoint: every tensor of the model must be in it in the right shape."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from symbiotic_titan.weights.damage import check_complete

START = "checkpoint.initial_load_path"
Shape = tuple[int, ...]


def holds(folder: Path, key: str) -> bool:
    """Whether a distributed checkpoint has the entry ``key``."""
    return key in FileSystemReader(folder).read_metadata().state_dict_metadata


def check_resumable(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], trainable: Iterable[str]
) -> None:
    """Pass if a checkpoint has the whole training state of this model. ``shapes``: of all parameters, by name.

    Raises:
        ValueError: it has no training state, belongs to another model, or lacks the optimizer state of a trainable parameter.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    if "train_state.step" not in saved:
        raise ValueError(
            f"checkpoint {folder} holds the model alone (checkpoint.last_save_model_only), so this run cannot go on; "
            "name an older one with --checkpoint.load_step, or start another job.dump_folder with checkpoint.initial_load_path"
        )
    mismatch = _mismatch(_shapes_of(saved), shapes)
    if mismatch:
        raise ValueError(
            f"checkpoint {folder} is of another model: {mismatch}; resume with the model.flavor and [experts] it was saved "
            "with, or start another job.dump_folder"
        )
    with_state = {key.rpartition(".")[0] for key in saved if key.startswith("optimizer.state.")}
    for name in trainable:
        if with_state and f"optimizer.state.{name}" not in with_state:
            raise ValueError(
                f"checkpoint {folder} has no optimizer state of {name}, which was frozen when it was saved; keep it frozen "
                "(optimizer.param_groups), or start another job.dump_folder with checkpoint.initial_load_path"
            )


def check_start(
    start: Path, checkpoints: Path, shapes: Mapping[str, Shape], *, model_only: bool
) -> None:
    """Pass if a new run can start from the distributed checkpoint ``start``. ``shapes``: of all parameters, by name.

    Raises:
        ValueError: ``start`` is missing or damaged, belongs to another model, or would be ignored because ``checkpoints`` exists.
    """
    check_complete(start, START, "train or convert that model first, or correct the path")
    saved = FileSystemReader(start).read_metadata().state_dict_metadata
    has_training_state = "train_state.step" in saved
    model_only = model_only or has_training_state
    check_weights(start, checkpoints, _shapes_of(saved), shapes, model_only=model_only)


def check_weights(
    start: Path,
    checkpoints: Path,
    held: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    *,
    model_only: bool,
) -> None:
    """Pass if a new run, which saves into ``checkpoints``, can start from ``start``, which has tensors of the shapes ``held``.

    Raises:
        ValueError: they belong to another model, would be ignored because ``checkpoints`` exists, or lack the training state that
            the config asks for.
    """
    if checkpoints.is_dir():
        raise ValueError(
            f"{START}: {start} is not read where {checkpoints} exists, and that holds no checkpoint; remove it"
        )
    mismatch = _mismatch(held, shapes)
    if mismatch:
        raise ValueError(
            f"{START}: {start} is of another model: {mismatch}; split it as [experts] says with symbiotic convert, or name one "
            "that was"
        )
    if not model_only:
        raise ValueError(
            f"{START}: {start} holds the model alone; set checkpoint.initial_load_model_only = true"
        )


def _shapes_of(saved: Mapping[str, object]) -> dict[str, Shape]:
    """Shapes of the tensors in a checkpoint's metadata; other entries have no size."""
    return {n: tuple(size) for n, e in saved.items() if (size := getattr(e, "size", None))}


def _mismatch(held: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> str | None:
    """Describes the first of ``shapes`` that is missing from ``held`` or differs there; None if all match."""
    for name, shape in shapes.items():
        if held.get(name) != shape:
            found = f"has shape {held[name]}" if name in held else "is missing"
            return f"{name} {found} in it and has shape {shape} here"
    return None
