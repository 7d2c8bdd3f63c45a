"""What a run begins with: its own newest complete checkpoint, the one that the config names, the weights of another, or nothing."""

from pathlib import Path
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.config.job_config import Checkpoint
from torchtitan.tools.logging import logger

from symbiotic_titan.checkpoint.resume import (
    check_fits,
    check_start,
    check_weights,
    check_whole,
    choose_step,
    set_aside,
)
from symbiotic_titan.config.optimizer import clean_name
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.process import is_first_process
from symbiotic_titan.weights.safetensors import has_weights


def choose_start(config: Checkpoint, folder: Path, model: nn.Module) -> Path | None:
    """Point ``config.load_step`` at the newest complete checkpoint in ``folder`` where it names none; the checkpoint that will be
    loaded, or None. Called on every rank; damaged ones are renamed.

    Raises:
        ValueError: none is complete, or what is there, or what a new run is to begin with, is of another model.
    """
    parameters = {clean_name(n): p for n, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if config.load_step == -1 and folder.is_dir():
        config.load_step, damaged = choose_step(folder)
        _set_all_aside(damaged)
    if config.load_step > 0:
        chosen = folder / f"step-{config.load_step}"
        check_whole(chosen, "checkpoint.load_step", "name another step, or leave the key out")
        check_fits(chosen, shapes, [n for n, p in parameters.items() if p.requires_grad])
        return chosen
    if config.initial_load_path:
        start, model_only = Path(config.initial_load_path), config.initial_load_model_only
        if is_distributed(start):
            check_start(start, folder, shapes, model_only=model_only)
        else:
            held = {name: kind.shape for name, kind in open_model(start).tensors.items()}
            wanted = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
            check_weights(start, folder, held, wanted, model_only=model_only)
        return start
    return None


def is_distributed(folder: Path) -> bool:
    """Whether ``folder`` is, or is taken for, a checkpoint that torch wrote; else it has safetensors."""
    return (folder / ".metadata").is_file() or not has_weights(folder)


def read_weights(folder: Path, model: nn.Module) -> None:
    """Fill ``model``, sharded or not, from safetensors. Every rank reads all of it, tensor by tensor, and keeps its part."""
    open_model(folder).read_into(_tensors(model))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names of a checkpoint."""
    return cast(dict[str, Tensor], get_model_state_dict(model))


def _set_all_aside(damaged: dict[Path, str]) -> None:
    """Name the checkpoints that are passed over, and rename them once every rank has looked."""
    dist.barrier()
    if is_first_process():
        for path, damage in damaged.items():
            logger.warning(
                f"checkpoint {path} is skipped and renamed to {set_aside(path).name}: {damage}"
            )
    dist.barrier()
