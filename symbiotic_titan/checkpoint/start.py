"""Where a run starts: its own newest complete checkpoint or the step that the config names, another run's weights, or from scratch.

``find_start`` decides it before anything is built, on the first process alone: no other one reads the metadata of a checkpoint, which can
be large. ``share_start`` tells the others; ``checkpoint.manager`` then reads it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.protocols.train_spec import get_train_spec

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.optimizer import DEFAULT_BUILDER, Weights
from symbiotic_titan.optim.build import ADAM_STATE, freeze_parameters
from symbiotic_titan.process import NothingToDo, is_first_process
from symbiotic_titan.weights.damage import complete_metadata, newest_complete_step
from symbiotic_titan.weights.reader import CheckpointReader, Entries, Shape
from symbiotic_titan.weights.weight_files import has_weights

START = "checkpoint.initial_load_path"


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run begins with.

    step:           of the run's own checkpoint, 0 for initial weights.
    went_back_to:   ``checkpoint.load_step`` of the config; 0 where that names none.
    entries:        what it has.
    is_distributed: whether torch.distributed.checkpoint reads it; if not, it is in safetensors.
    metadata:       of a distributed checkpoint, on the first process; None on the others.
    """

    folder: Path
    step: int
    entries: Entries
    is_distributed: bool
    metadata: Metadata | None
    went_back_to: int = 0


# ---- before anything is built ---------------------------------------------------------------------------------------------


def find_start(config: JobConfig) -> Start | None:
    """The checkpoint that will be loaded, checked; None for a run from scratch. Where ``checkpoint.load_step`` names none, it is the
    newest complete one of the run. What was damaged or cut off after it is renamed, unless the run only reads. Only the first process
    looks; the others get None.

    Raises:
        ValueError: none of several checkpoints is complete, or the one chosen does not suit the config's model.
    """
    options = config.checkpoint
    if not options.enable or not is_first_process():
        return None
    from symbiotic_titan.checkpoint.history import step_to_resume

    folder = Path(config.job.dump_folder) / options.folder
    step, metadata = step_to_resume(folder, options.load_step, may_change=not options.load_only)
    if step > 0:
        start = _own_checkpoint(config, folder / f"step-{step}", step, metadata)
        return replace(start, went_back_to=max(options.load_step, 0))
    if options.initial_load_path:
        return _initial_weights(config, Path(options.initial_load_path))
    return None


def _own_checkpoint(config: JobConfig, chosen: Path, step: int, metadata: Metadata | None) -> Start:
    if metadata is None:
        remedy = "name another step, or leave the key out"
        metadata = complete_metadata(chosen, "checkpoint.load_step", remedy)
    start = Start(chosen, step, entries_of(metadata), True, metadata)
    model = _model_without_values(config)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    # What another builder's optimizer keeps is known once it is built: ``load`` asks then.
    state = ADAM_STATE if config.optimizer.builder == DEFAULT_BUILDER else ()
    check_resumable(chosen, start.entries, _shapes(model), trainable, state)
    return start


def _initial_weights(config: JobConfig, folder: Path) -> Start:
    options, metadata = config.checkpoint, None
    is_distributed = (folder / ".metadata").is_file() or not has_weights(folder)
    if is_distributed:
        remedy = "train or convert that model first, or correct the path"
        metadata = complete_metadata(folder, START, remedy)
        entries: Entries = entries_of(metadata)
    else:
        entries = {name: spec.shape for name, spec in open_weights(folder).tensors.items()}
    shapes = _shapes(_model_without_values(config))
    check_weights(folder, entries, shapes, model_only=options.initial_load_model_only)
    if options.initial_load_weights == "ema":
        _check_has_average(folder, entries)
    return Start(folder, 0, entries, is_distributed, metadata)


def _model_without_values(config: JobConfig) -> nn.Module:
    spec = get_train_spec(config.model.name)
    args = spec.model_args[config.model.flavor]
    args.update_from_config(config)
    with torch.device("meta"):
        model = cast(nn.Module, spec.model_cls(args))
    freeze_parameters(model, config.optimizer.param_groups)
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_has_average(folder: Path, entries: Entries) -> None:
    from symbiotic_titan.weights.dcp import check_has_average

    check_has_average(folder, averaged(entries), "checkpoint.initial_load_weights = 'ema'")


# ---- whether a checkpoint suits the run -----------------------------------------------------------------------------------


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
    remedy = "resume with the model.flavor and [experts] it was saved with, or start another job.dump_folder"
    _check_is_model(f"checkpoint {folder}", saved, shapes, remedy)
    from symbiotic_titan.weights.dcp import check_holds

    with_state = {key.rpartition(".")[0] for key in saved if key.startswith("optimizer.state.")}
    for name in trainable:
        if with_state and f"optimizer.state.{name}" not in with_state:
            raise ValueError(
                f"checkpoint {folder} has no optimizer state of {name}, which was frozen when it was saved; keep it frozen "
                "(optimizer.param_groups), or start another job.dump_folder with checkpoint.initial_load_path"
            )
        if with_state:
            check_holds(folder, saved, [f"optimizer.state.{name}.{key}" for key in state])


def check_weights(
    start: Path,
    held: Entries,
    shapes: Mapping[str, Shape],
    *,
    model_only: bool,
) -> None:
    """Pass if a new run can start from ``start``, which has the entries ``held``. ``shapes``: of all tensors of the model, by name.

    Raises:
        ValueError: they belong to another model, or lack the training state that the config asks for.
    """
    remedy = "split it as [experts] says with symbiotic convert, or name one that was"
    _check_is_model(f"{START}: {start}", held, shapes, remedy)
    if not model_only and "train_state.step" not in held:
        raise ValueError(
            f"{START}: {start} holds the model alone; set checkpoint.initial_load_model_only = true"
        )


def _check_is_model(
    checkpoint: str, held: Entries, shapes: Mapping[str, Shape], remedy: str
) -> None:
    """Pass if ``held`` has all ``shapes``. ``checkpoint``: how a message begins."""
    from symbiotic_titan.weights.compatibility import check_num_embeddings

    check_num_embeddings(checkpoint, held, shapes)
    for name, shape in shapes.items():
        if held.get(name) != shape:
            found = f"has shape {held[name]}" if name in held else "is missing"
            raise ValueError(
                f"{checkpoint} is of another model: {name} {found} in it and has shape {shape} here; {remedy}"
            )


# ---- once the process group exists ----------------------------------------------------------------------------------------


def share_start(start: Start | None, config: JobConfig) -> Start | None:
    """What ``find_start`` found on the first process, on all of them, its bytes verified, and ``checkpoint.load_step`` set to it. A
    damaged checkpoint is renamed, and the one before it is taken. Collective.

    Raises:
        ValueError: a checkpoint that the config names is damaged, or no other one is complete.
        NothingToDo: the run has no step left to take.
    """
    options = config.checkpoint
    start = _told(start)
    while start is not None and options.verify:
        from symbiotic_titan.checkpoint.verify import damage_on_any_rank, tell_all

        damage = damage_on_any_rank(start.folder)
        if damage is None:
            break
        mistake = None
        if is_first_process():
            try:
                start = _start_instead(start, config, damage)
            except ValueError as error:
                mistake = str(error)
        tell_all(mistake)
        start = _told(start)
    if start is not None and start.step >= config.training.steps:
        raise NothingToDo(
            f"nothing to do: the run is at step {start.step} ({start.folder}), and training.steps = {config.training.steps}; raise it to "
            "train on"
        )
    if start is not None and start.step > 0:
        options.load_step = start.step
    return start


def _told(start: Start | None) -> Start | None:
    """What the first process has, on the others without the metadata. Collective."""
    told = [start if start is None else replace(start, metadata=None)]
    dist.broadcast_object_list(told, src=0)
    return start if is_first_process() else told[0]


def _start_instead(start: Start, config: JobConfig, damage: str) -> Start | None:
    """What the run starts from since ``start`` is damaged.

    Raises:
        ValueError: the config names ``start`` or forbids renaming it, or no other checkpoint is complete.
    """
    if start.step == 0:
        raise ValueError(
            f"{START}: checkpoint {start.folder} is damaged: {damage}; use another copy of it"
        )
    options = config.checkpoint
    if start.step == options.load_step:
        raise ValueError(
            f"checkpoint.load_step: checkpoint {start.folder} is damaged: {damage}; name another step, or leave the key out"
        )
    if options.load_only:
        raise ValueError(
            f"checkpoint.load_only: checkpoint {start.folder} is damaged: {damage}; name an older one with checkpoint.load_step"
        )
    from symbiotic_titan.checkpoint.history import skip_damaged

    skip_damaged({start.folder: damage}, rename=True)
    return find_start(config)


def share_way_back(folder: Path, interval: int, *, verify: bool) -> Start | None:
    """The newest complete checkpoint in ``folder`` whose step is a multiple of ``interval``, on all ranks; None if there is none.
    ``verify``: its bytes are verified. Damaged ones are renamed. Collective.

    Raises:
        ValueError: the folder cannot be read or changed.
    """
    from symbiotic_titan.checkpoint.verify import damage_on_any_rank, tell_all

    start, damaged = None, dict[Path, str]()
    while True:
        mistake = None
        if is_first_process():
            try:
                start = _way_back(folder, interval, damaged)
            except (OSError, ValueError) as error:
                mistake = f"the run cannot roll back: {error}"
        tell_all(mistake)
        start = _told(start)
        damage = damage_on_any_rank(start.folder) if start is not None and verify else None
        if start is None or damage is None:
            return start
        damaged = {start.folder: damage}


def _way_back(folder: Path, interval: int, damaged: Mapping[Path, str]) -> Start | None:
    from symbiotic_titan.checkpoint.history import skip_damaged

    skip_damaged(damaged, rename=True)
    step, damaged, metadata = newest_complete_step(folder, interval)
    skip_damaged(damaged, rename=True)
    if metadata is None:
        return None
    return Start(folder / f"step-{step}", step, entries_of(metadata), True, metadata)


def averaged(entries: Entries) -> dict[str, str]:
    """Parameter -> the entry that holds its average, for those that have one."""
    from symbiotic_titan.weights.dcp import AVERAGE

    names = {key.removeprefix(AVERAGE): key for key in entries if key.startswith(AVERAGE)}
    return {name: key for name, key in names.items() if name in entries}


def open_weights(folder: Path, weights: Weights = "trained") -> CheckpointReader:
    # Imported here, because only a run that starts from initial weights needs it.
    from symbiotic_titan.hf.model import open_model

    return open_model(folder, weights)
