"""Where a run starts: its own newest complete checkpoint or the step that the config names, another run's weights, or from scratch.

``find_start`` decides it before anything is built, on the first process alone: no other one reads the metadata of a checkpoint, which can
be large. ``share_start`` tells the others.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import MODEL, CheckpointManager
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from symbiotic_titan.checkpoint.resume import (
    START,
    Entries,
    check_resumable,
    check_weights,
    entries_of,
)
from symbiotic_titan.config.job import Checkpoint, JobConfig
from symbiotic_titan.config.optimizer import DEFAULT_BUILDER, Weights, clean_name
from symbiotic_titan.optim.build import ADAM_STATE, freeze_parameters
from symbiotic_titan.process import is_first_process
from symbiotic_titan.weights.damage import (
    choose_step,
    complete_metadata,
    rename_damaged,
)
from symbiotic_titan.weights.reader import CheckpointReader, some_of
from symbiotic_titan.weights.weight_files import has_weights

if TYPE_CHECKING:  # loaded by the runs that use it
    from symbiotic_titan.optim.ema import EMA


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run begins with.

    step:           of the run's own checkpoint, 0 for initial weights.
    entries:        what it has.
    is_distributed: whether torch.distributed.checkpoint reads it; if not, it is in safetensors.
    metadata:       of a distributed checkpoint, on the first process; None on the others.
    """

    folder: Path
    step: int
    entries: Entries
    is_distributed: bool
    metadata: Metadata | None

    def load(self, state: dict[str, Any]) -> None:
        """Fill ``state`` from a distributed checkpoint. Collective.

        Raises:
            ValueError: an entry is missing or damaged.
        """
        from symbiotic_titan.checkpoint.load import load

        load(state, self.folder, self.entries, self.metadata)


# ---- before anything is built ---------------------------------------------------------------------------------------------


def find_start(config: JobConfig) -> Start | None:
    """The checkpoint that will be loaded, checked; None for a run from scratch. Where ``checkpoint.load_step`` names none, it is the
    newest complete one of the run, and damaged ones after it are renamed. Only the first process looks; the others get None.

    Raises:
        ValueError: no complete checkpoint, or it does not suit the config's model.
    """
    options = config.checkpoint
    if not options.enable or not is_first_process():
        return None
    folder = Path(config.job.dump_folder) / options.folder
    step, metadata = options.load_step, None
    if step == -1 and folder.is_dir():
        step, damaged, metadata = choose_step(folder)
        _rename_all(damaged)
    if step > 0:
        return _own_checkpoint(config, folder / f"step-{step}", step, metadata)
    if options.initial_load_path:
        return _initial_weights(config, Path(options.initial_load_path), folder)
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


def _initial_weights(config: JobConfig, folder: Path, checkpoints: Path) -> Start:
    options, metadata = config.checkpoint, None
    is_distributed = (folder / ".metadata").is_file() or not has_weights(folder)
    if is_distributed:
        remedy = "train or convert that model first, or correct the path"
        metadata = complete_metadata(folder, START, remedy)
        entries: Entries = entries_of(metadata)
    else:
        entries = {name: spec.shape for name, spec in _open(folder).tensors.items()}
    shapes = _shapes(_model_without_values(config))
    check_weights(folder, checkpoints, entries, shapes, model_only=options.initial_load_model_only)
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


def _rename_all(damaged: dict[Path, str]) -> None:
    for path, damage in damaged.items():
        logger.warning(
            f"checkpoint {path} is skipped and renamed to {rename_damaged(path).name}: {damage}"
        )


# ---- once the process group exists ----------------------------------------------------------------------------------------


def share_start(start: Start | None, options: Checkpoint) -> Start | None:
    """What the first process found, on all of them, and ``options.load_step`` set to it. Collective."""
    told = [start if start is None else replace(start, metadata=None)]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None and told[0].step > 0:
        options.load_step = told[0].step
    return start if start is not None else told[0]


def begin(
    start: Start, options: Checkpoint, checkpointer: CheckpointManager, ema: "EMA | None"
) -> None:
    """Read what ``checkpointer.load``, which is called next, cannot, and let it read the rest without the metadata. Collective."""
    (model,) = checkpointer.states[MODEL].model
    if start.step == 0 and options.initial_load_model_only:
        read_weights(start, model, options.initial_load_weights, ema)
        checkpointer.initial_load_path = None
        return
    excluded = read_beforehand(start, ema)
    checkpointer.exclude_from_loading = [*options.exclude_from_loading, *excluded]

    def dcp_load(state_dict: dict[str, Any], checkpoint_id: str, **formats: bool) -> None:
        start.load(state_dict)
        checkpointer.states[MODEL].load_state_dict(state_dict)
        check_given(model, start.folder)
        del checkpointer.dcp_load  # and with it the metadata

    checkpointer.dcp_load = dcp_load  # type: ignore[method-assign, assignment]


def read_weights(start: Start, model: nn.Module, weights: Weights, ema: "EMA | None") -> None:
    """Fill ``model``, sharded or not, and start its average from there. Collective."""
    logger.info(f"Loading the weights in {start.folder} ({weights}).")
    tensors = cast(dict[str, Tensor], get_model_state_dict(model))
    if start.is_distributed:
        chosen = averaged(start.entries) if weights == "ema" else {}
        start.load({chosen.get(name, name): tensor for name, tensor in tensors.items()})
    else:
        _open(start.folder, weights).read_into(tensors)
    check_given(model, start.folder)
    if ema is not None:
        ema.restart()


def read_beforehand(start: Start, ema: "EMA | None") -> list[str]:
    """Read what the checkpointer cannot from the checkpoint that is resumed. Returns the entries that it must leave out. Collective."""
    # It fails on a tensor that the checkpoint lacks, and this run may average other groups than the one before.
    _restore_average(start, ema)
    excluded = [] if ema is None else ["ema"]
    # Older checkpoints have no record of the parameter groups.
    recorded = "param_groups.json" in start.entries
    return excluded if recorded else [*excluded, "param_groups"]


def _restore_average(start: Start, ema: "EMA | None") -> None:
    """Go on with the average of the checkpoint. A parameter that has none there gets its weights as average. Differences from the run
    before are logged.
    """
    stored = averaged(start.entries)
    names = set() if ema is None else ema.tensors.keys()
    if stored or ema is not None:
        _log_differences(start.folder, names, stored)
    if ema is None:
        return
    state: dict[str, Any] = {stored.get(n, n): tensor for n, tensor in ema.tensors.items()}
    if "ema.num_updates" in start.entries:
        state["ema.num_updates"] = 0
    start.load(state)
    ema.load_state_dict({"num_updates": state.get("ema.num_updates", 0)})


def _log_differences(folder: Path, names: Iterable[str], stored: Iterable[str]) -> None:
    names, stored = set(names), set(stored)
    if new := sorted(names - stored):
        logger.info(
            f"[ema]: {folder} has no average of {some_of(new)}, which starts from the weights"
        )
    if old := sorted(stored - names):
        what = "averages other groups now" if names else "is off"
        logger.info(f"[ema] {what}: the average of {some_of(old)} in {folder} is not used")


def averaged(entries: Entries) -> dict[str, str]:
    """Parameter -> the entry that holds its average, for those that have one."""
    from symbiotic_titan.weights.dcp import AVERAGE

    names = {key.removeprefix(AVERAGE): key for key in entries if key.startswith(AVERAGE)}
    return {name: key for name, key in names.items() if name in entries}


def check_given(model: nn.Module, folder: Path) -> None:
    """Pass if no tensor of ``model`` has NaN, which ``model.initialize`` writes where a checkpoint gives the values.

    Raises:
        ValueError: names those that have.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    local = ((n, t.to_local() if isinstance(t, DTensor) else t) for n, t in tensors)
    without = [clean_name(name) for name, tensor in local if tensor.isnan().any()]  # device sync
    if without:
        raise ValueError(
            f"checkpoint {folder} gave no values, or NaN, to {some_of(without)}, which were not initialised either; start from another "
            "checkpoint"
        )


def _open(folder: Path, weights: Weights = "trained") -> CheckpointReader:
    # Imported here, because only a run that starts from initial weights needs it.
    from symbiotic_titan.hf.model import open_model

    return open_model(folder, weights)
