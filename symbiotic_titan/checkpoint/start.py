"""Where a run starts: its own newest complete checkpoint or the step that the config names, another run's weights, or from scratch."""

from pathlib import Path
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.config.job_config import Checkpoint
from torchtitan.tools.logging import logger

from symbiotic_titan.checkpoint.resume import (
    check_resumable,
    check_start,
    check_weights,
)
from symbiotic_titan.config.optimizer import clean_name
from symbiotic_titan.process import is_first_process
from symbiotic_titan.weights.damage import (
    check_complete,
    choose_step,
    rename_damaged,
)
from symbiotic_titan.weights.reader import CheckpointReader
from symbiotic_titan.weights.weight_files import has_weights


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
        return start
    return None


def is_distributed(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint reads ``folder``: always, unless it has safetensors only."""
    return (folder / ".metadata").is_file() or not has_weights(folder)


def read_weights(folder: Path, model: nn.Module) -> None:
    """Fill ``model``, sharded or not, from safetensors. Every rank reads all tensors, one at a time, and keeps its shards."""
    _open(folder).read_into(_tensors(model))


def _open(folder: Path) -> CheckpointReader:
    # Imported here, because only a run that starts from safetensors needs it.
    from symbiotic_titan.hf.model import open_model

    return open_model(folder)


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
