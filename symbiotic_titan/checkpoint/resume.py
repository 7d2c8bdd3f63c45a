"""Checks that a run can resume from, or start from, a checkpoint: every tensor of the model must be in it in the right shape."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

START = "checkpoint.initial_load_path"
Shape = tuple[int, ...]
Entries = Mapping[str, Shape | None]
"""What a checkpoint has, by name: the shape of a tensor, None for anything else."""


def entries_of(metadata: Metadata) -> dict[str, Shape | None]:
    """The entries of a distributed checkpoint."""
    saved = metadata.state_dict_metadata.items()
    return {name: tuple(e.size) if hasattr(e, "size") else None for name, e in saved}


def check_resumable(
    folder: Path,
    saved: Entries,
    shapes: Mapping[str, Shape],
    trainable: Iterable[str],
    state: Iterable[str] = (),
) -> None:
    """Pass if the checkpoint in ``folder``, with the entries ``saved``, has the whole training state of this model. ``shapes``: of all
    its tensors, by name; ``state``: what the optimizer is known to keep of each trainable parameter.

    Raises:
        ValueError: it has no training state, belongs to another model, or lacks the optimizer state of a trainable parameter.
    """
    if "train_state.step" not in saved:
        raise ValueError(
            f"checkpoint {folder} holds the model alone (checkpoint.last_save_model_only), so this run cannot go on; "
            "name an older one with --checkpoint.load_step, or start another job.dump_folder with checkpoint.initial_load_path"
        )
    mismatch = _mismatch(saved, shapes)
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
        if with_state:
            check_holds(folder, saved, [f"optimizer.state.{name}.{key}" for key in state])


def check_holds(folder: Path, saved: Entries, needed: Iterable[str]) -> None:
    """Pass if the checkpoint in ``folder``, with the entries ``saved``, has all those ``needed``.

    Raises:
        ValueError: names the first that is missing.
    """
    name = next((name for name in needed if name not in saved), None)
    if name is None:
        return
    if name.startswith("optimizer.state."):
        raise ValueError(
            f"optimizer.builder: checkpoint {folder} has no {name}, which the optimizer of this run keeps: another optimizer saved it; "
            "resume with the one it was saved with, or start another job.dump_folder with checkpoint.initial_load_path"
        )
    raise ValueError(
        f"checkpoint {folder} has no {name}, which this run would go on with; resume with the settings it was saved with, or start "
        "another job.dump_folder with checkpoint.initial_load_path"
    )


def check_weights(
    start: Path,
    checkpoints: Path,
    held: Entries,
    shapes: Mapping[str, Shape],
    *,
    model_only: bool,
) -> None:
    """Pass if a new run, which saves into ``checkpoints``, can start from ``start``, which has the entries ``held``. ``shapes``: of all
    tensors of the model, by name.

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
    if not model_only and "train_state.step" not in held:
        raise ValueError(
            f"{START}: {start} holds the model alone; set checkpoint.initial_load_model_only = true"
        )


def _mismatch(held: Entries, shapes: Mapping[str, Shape]) -> str | None:
    """Describes the first of ``shapes`` that is missing from ``held`` or differs there; None if all match."""
    for name, shape in shapes.items():
        if held.get(name) != shape:
            found = f"has shape {held[name]}" if name in held else "is missing"
            return f"{name} {found} in it and has shape {shape} here"
    return None
