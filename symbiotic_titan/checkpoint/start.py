"""Where a run starts: its own newest complete checkpoint or the step that the config names, another run's weights, or from scratch."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.tools.logging import logger

from symbiotic_titan.checkpoint.resume import (
    check_resumable,
    check_start,
    check_weights,
    holds,
)
from symbiotic_titan.config.job import Checkpoint
from symbiotic_titan.config.optimizer import Weights, clean_name
from symbiotic_titan.process import is_first_process
from symbiotic_titan.weights.damage import (
    check_complete,
    choose_step,
    rename_damaged,
)
from symbiotic_titan.weights.reader import CheckpointReader, some_of
from symbiotic_titan.weights.weight_files import has_weights

if TYPE_CHECKING:  # loaded by the runs that use it
    from symbiotic_titan.optim.ema import EMA


def choose_start(config: Checkpoint, folder: Path, model: nn.Module) -> Path | None:
    """The checkpoint that will be loaded, or None. Where ``config.load_step`` names none, it is set to the newest complete
    checkpoint in ``folder``, and damaged ones after it are renamed. Collective: every rank must call it.

    Raises:
        ValueError: no complete checkpoint, or it belongs to another model.
    """
    parameters = {clean_name(n): p for n, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if config.load_step == -1 and folder.is_dir():
        config.load_step, damaged = choose_step(folder)
        _rename_all(damaged)
    if config.load_step > 0:
        chosen = folder / f"step-{config.load_step}"
        check_complete(chosen, "checkpoint.load_step", "name another step, or leave the key out")
        check_resumable(chosen, shapes, [n for n, p in parameters.items() if p.requires_grad])
        return chosen
    if config.initial_load_path:
        start, model_only = Path(config.initial_load_path), config.initial_load_model_only
        if is_distributed(start):
            check_start(start, folder, shapes, model_only=model_only)
        else:
            held = {name: spec.shape for name, spec in _open(start).tensors.items()}
            wanted = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
            check_weights(start, folder, held, wanted, model_only=model_only)
        if config.initial_load_weights == "ema":
            _check_has_average(start)
        return start
    return None


def is_distributed(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint reads ``folder``: always, unless it has safetensors only."""
    return (folder / ".metadata").is_file() or not has_weights(folder)


def read_weights(folder: Path, model: nn.Module, weights: Weights, ema: "EMA | None") -> None:
    """Fill ``model``, sharded or not, and start its average from there. Of safetensors every rank reads all tensors, one at a time,
    and keeps its shards.
    """
    logger.info(f"Loading the weights in {folder} ({weights}).")
    _open(folder, weights).read_into(_tensors(model))
    if ema is not None:
        ema.restart()


def read_beforehand(folder: Path, ema: "EMA | None") -> list[str]:
    """Read what the checkpointer cannot from the checkpoint ``folder``, which is resumed. Returns the entries that it must leave out."""
    # It fails on a tensor that the checkpoint lacks, and this run may average other groups than the one before.
    _restore_average(folder, ema)
    excluded = [] if ema is None else ["ema"]
    # Older checkpoints have no record of the parameter groups.
    return excluded if holds(folder, "param_groups.json") else [*excluded, "param_groups"]


def _restore_average(folder: Path, ema: "EMA | None") -> None:
    """Go on with the average in ``folder``. A parameter that has none there gets its weights as average. Differences from the run before
    are logged.
    """
    if ema is None and not holds(folder, "ema.num_updates"):
        return
    from symbiotic_titan.weights.dcp import DistributedCheckpoint

    stored = DistributedCheckpoint(folder)
    names = set() if ema is None else ema.tensors.keys()
    if new := sorted(names - stored.averaged):
        logger.info(
            f"[ema]: {folder} has no average of {some_of(new)}, which starts from the weights"
        )
    if old := sorted(stored.averaged - names):
        what = "is off" if ema is None else "averages other groups now"
        logger.info(f"[ema] {what}: the average of {some_of(old)} in {folder} is not used")
    if ema is not None:
        reader = DistributedCheckpoint(folder, "ema") if stored.averaged else stored
        reader.read_into(ema.tensors)
        ema.load_state_dict({"num_updates": stored.num_updates or 0})


def _check_has_average(start: Path) -> None:
    from symbiotic_titan.weights.dcp import DistributedCheckpoint, check_has_average

    averaged = DistributedCheckpoint(start).averaged if is_distributed(start) else set()
    check_has_average(start, averaged, "checkpoint.initial_load_weights = 'ema'")


def _open(folder: Path, weights: Weights = "trained") -> CheckpointReader:
    # Imported here, because only a run that starts from initial weights needs it.
    from symbiotic_titan.hf.model import open_model

    return open_model(folder, weights)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under their names in a checkpoint."""
    return cast(dict[str, Tensor], get_model_state_dict(model))


def _rename_all(damaged: dict[Path, str]) -> None:
    """Rename damaged checkpoints on the first rank. The first barrier waits until every rank has chosen its step from the old names;
    the second keeps ranks from saving before the renaming is done."""
    dist.barrier()
    if is_first_process():
        for path, damage in damaged.items():
            logger.warning(
                f"checkpoint {path} is skipped and renamed to {rename_damaged(path).name}: {damage}"
            )
    dist.barrier()
