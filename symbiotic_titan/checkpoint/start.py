"""What a run begins with: its own newest complete checkpoint, the one that the config names, the weights of another, or nothing."""

from pathlib import Path

import torch.distributed as dist
from torch import nn
from torchtitan.config.job_config import Checkpoint
from torchtitan.tools.logging import logger

from symbiotic_titan.checkpoint.resume import (
    check_fits,
    check_start,
    check_whole,
    choose_step,
    set_aside,
)
from symbiotic_titan.config.parameter_names import clean_name


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
        start = Path(config.initial_load_path)
        check_start(start, folder, shapes, model_only=config.initial_load_model_only)
        return start
    return None


def _set_all_aside(damaged: dict[Path, str]) -> None:
    """Name the checkpoints that are passed over, and rename them once every rank has looked."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path, damage in damaged.items():
            logger.warning(
                f"checkpoint {path} is skipped and renamed to {set_aside(path).name}: {damage}"
            )
    dist.barrier()
