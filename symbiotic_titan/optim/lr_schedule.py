"""Learning-rate schedules per parameter group: warm-up, stable phase, decay (arXiv 2404.06395)."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler
from torchtitan.tools.logging import logger

from symbiotic_titan.config.optimizer import (
    LR_DECAYS,
    LRDecay,
)


class GroupRates(LambdaLR):
    """The rate of each group: its own learning rate, or that of the stage, times its factor."""

    def __init__(self, optimizer: Optimizer, factors: list[Callable[[int], float]]) -> None:
        # Per group: (index of the first step, learning rate) of each stage that changes it. LambdaLR's constructor asks for rates.
        self.stages: list[list[tuple[int, float]]] = [[] for _ in factors]
        super().__init__(optimizer, factors)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the step with the index ``last_epoch``, counted from 0."""
        return [
            self._base(group, base) * factor(self.last_epoch)
            for group, (base, factor) in enumerate(zip(self.base_lrs, self.lr_lambdas, strict=True))
        ]

    def _base(self, group: int, base: float | Tensor) -> float | Tensor:
        reached = [rate for first, rate in self.stages[group] if first <= self.last_epoch]
        return reached[-1] if reached else base


class StepLRSchedulers(LRSchedulersContainer):
    """A factor on the learning rate of each group. Only the step is saved, so that a resume uses the rates of its own config."""

    def __init__(
        self, optimizers: OptimizersContainer, factors: list[list[Callable[[int], float]]]
    ) -> None:
        self.schedulers = [
            GroupRates(optimizer, own) for optimizer, own in zip(optimizers, factors, strict=True)
        ]

    def set_stages(self, rates: dict[str, list[tuple[int, float]]]) -> None:
        """Group -> (first step, learning rate) of the stages that change it; steps are counted from 1. Call before the first step.

        Raises:
            ValueError: the optimizer has no such group.
        """
        groups = {
            group["name"]: (scheduler, number, group)
            for scheduler in self.schedulers
            for number, group in enumerate(scheduler.optimizer.param_groups)
        }
        for name, own in rates.items():
            if name not in groups:
                raise ValueError(
                    f"[[data.stages]] lr.{name}: the optimizer trains no group of that name; choose from {', '.join(groups)}"
                )
            scheduler, number, group = groups[name]
            scheduler.stages[number] = [(first - 1, rate) for first, rate in own]
            group["schedule"]["stages"] = own  # for the record in the checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            # LambdaLR sets rates only at its next step; without this the first step after a resume would use the initial ones.
            scheduler.last_epoch = state_dict["last_epoch"]
            rates = scheduler.get_lr()
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates


# Points of a decay that are looked at before training.
_PROBES = 1000


def linear(progress: float) -> float:
    return 1 - progress


def sqrt(progress: float) -> float:
    return 1 - math.sqrt(progress)


def cosine(progress: float) -> float:
    """Half a period of a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def schedule_factor(config: LRScheduler, training_steps: int) -> Callable[[int], float]:
    """Step, counted from 0 -> factor on the rate: linear warm-up, stable phase, decay.

    Equal to torchtitan's own schedule for its three decays (tested); torchtitan's cannot be extended by another decay.
    """
    total = training_steps if config.total_steps is None else config.total_steps
    warmup = _at_most(total, int(config.warmup_steps), "lr_scheduler.warmup_steps")
    decay = total - warmup
    if config.decay_ratio is not None:
        wanted = round(total * config.decay_ratio)
        decay = _at_most(total - warmup, wanted, "lr_scheduler.decay_ratio, in steps")
    factor = functools.partial(
        _factor,
        warmup=warmup,
        # One step longer than the run, so that the rate of the last step is not zero.
        stable_end=total + 1 - decay,
        decay_steps=decay,
        decay=LR_DECAYS[config.decay_type],
        least=config.min_lr_factor,
    )
    for i in range(1, 1 + _PROBES) if decay else ():
        # Raises before training what would otherwise end it in its last part.
        _share_left(LR_DECAYS[config.decay_type], i / _PROBES)
    return factor


def _at_most(most: int, wanted: int, key: str) -> int:
    if wanted > most:
        logger.warning(f"{key}: {wanted} is more than the schedule has left; using {most}")
    return min(wanted, most)


def _factor(
    step: int, *, warmup: int, stable_end: int, decay_steps: int, decay: LRDecay, least: float
) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if step < stable_end or not decay_steps:
        return 1.0
    # A run that is longer than lr_scheduler.total_steps stays at the end of its decay.
    progress = min(1.0, (step + 1 - stable_end) / decay_steps)
    return least + (1 - least) * _share_left(decay, progress)


def _share_left(decay: LRDecay, progress: float) -> float:
    """What ``decay`` gives, which may come from a user's module.

    Raises:
        ValueError: it is no number in [0, 1]: a rate would be negative, or above the one configured.
    """
    share = decay(progress)
    if not isinstance(share, (int, float)) or not 0.0 <= share <= 1.0:
        name = next(n for n in LR_DECAYS if LR_DECAYS[n] is decay)
        raise ValueError(
            f"lr_scheduler.decay_type = {name!r}: gave {share!r} at progress {progress:.4g}; it must be a number in [0, 1]"
        )
    return share


def build_schedulers(
    optimizers: OptimizersContainer, config: LRScheduler, training_steps: int
) -> StepLRSchedulers:
    """The schedules of all groups, for the train spec: [lr_scheduler], overridden by a group's own keys.

    Afterwards every group's ``schedule`` holds all settings that its factor depends on.
    """
    factors = []
    known: dict[str, Callable[[int], float]] = {}  # each is checked, and warned of, once
    for optimizer in optimizers:
        own = []
        for group in optimizer.param_groups:
            shape = dataclasses.replace(config, **group.get("schedule", {}))
            if str(shape) not in known:
                known[str(shape)] = schedule_factor(shape, training_steps)
            own.append(known[str(shape)])
            group["schedule"] = dataclasses.asdict(shape)
            if shape.total_steps is None:
                group["schedule"]["total_steps"] = training_steps
            if shape.decay_ratio == 0:
                del group["schedule"]["total_steps"]  # the rate does not depend on it
        factors.append(own)
    return StepLRSchedulers(optimizers, factors)
