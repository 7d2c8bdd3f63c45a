"""Exponential moving average (EMA) of the weights: average <- decay * average + (1 - decay) * weight, after the optimizer's step.

Averages are float32 whatever the weights' dtype: with a decay of 0.9999 an update moves them by less than bfloat16 can resolve. They
are sharded like the weights, so an update needs no collective. For BAGEL (arXiv 2505.14683) the average is the released model.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.optimizer import Ema, ParamGroupRow, clean_name
from symbiotic_titan.optim.build import claim_parameters
from symbiotic_titan.optim.group_norms import group_norms, group_ratios, local_part, squared_norm

logger = logging.getLogger(__name__)


def averaged_groups(config: JobConfig) -> list[str]:
    """Names of the parameter groups that [ema] averages.

    Raises:
        ValueError: ``ema.groups`` names a group that does not exist or is not trained, or no group is trained.
    """
    rows = config.optimizer.param_groups or [ParamGroupRow(name="all", match=[".*"])]
    reasons = {row.name: _why_not_trained(row, config) for row in rows}
    for name in config.ema.groups:
        if name not in reasons:
            raise ValueError(
                f"ema.groups: [[optimizer.param_groups]] has no group {name!r}; choose from {', '.join(reasons)}"
            )
        if reasons[name]:
            raise ValueError(
                f"ema.groups: the group {name!r} {reasons[name]}, so an average of its weights is the weights themselves; remove it "
                "from ema.groups, or train the group"
            )
    chosen = config.ema.groups or [name for name, reason in reasons.items() if not reason]
    if not chosen:
        raise ValueError(
            "ema.enable = true: no parameter group is trained, so there is nothing to average; set it to false, or train a group"
        )
    return [name for name in reasons if name in chosen]


def _why_not_trained(row: ParamGroupRow, config: JobConfig) -> str | None:
    if row.frozen:
        return "is frozen"
    rate = config.optimizer.lr if row.lr is None else row.lr
    rates = [rate, *(stage.lr[row.name] for stage in config.data.stages if row.name in stage.lr)]
    return None if any(rates) else "has the learning rate 0"


def averaged_parameters(names: Iterable[str], config: JobConfig) -> dict[str, list[str]]:
    """Group -> its parameters, for the groups that [ema] averages; empty where it is off. ``names``: of all parameters."""
    if not config.ema.enable:
        return {}
    claimed = claim_parameters(names, config.optimizer.param_groups)
    return {group: claimed[group] for group in averaged_groups(config)}


class EMA:
    """The average of ``groups``: group -> names of its parameters. It begins as a copy of the weights.

    A checkpoint entry; ``checkpoint.manager.read_beforehand`` reads it back. Tied parameters are saved under each of their names, as
    those of the model are.
    """

    def __init__(
        self, model: nn.Module, groups: Mapping[str, Iterable[str]], settings: Ema
    ) -> None:
        self.settings = settings
        self.num_updates = 0
        self.decay = 0.0  # of the last update
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._groups = {
            group: [parameters[name] for name in names] for group, names in groups.items()
        }
        self._averages = {
            parameter: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for members in self._groups.values()
            for parameter in members
        }
        self._names = {
            clean_name(name): parameter
            for name, parameter in parameters.items()
            if parameter in self._averages
        }
        self.restart()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Averages by the names of their parameters in checkpoints."""
        return {name: self._averages[parameter] for name, parameter in self._names.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the current weights."""
        self.num_updates = 0
        for parameter, average in self._averages.items():
            average.copy_(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call it after each optimizer step with its number; every ``ema.interval`` steps it updates the average."""
        if step % self.settings.interval:
            return
        self.decay = decay_of_update(self.settings, self.num_updates)
        lerp = get_ema_multi_avg_fn(self.decay)
        plain: list[tuple[Tensor, Tensor]] = []
        for average, weight in self._local_pairs():
            if weight.dtype == average.dtype:
                plain.append((average, weight))
            else:  # one at a time, because the float32 copy takes memory
                lerp((average,), (weight.float(),), None)
        if plain:
            averages, weights = zip(*plain, strict=True)
            lerp(averages, weights, None)
        self.num_updates += 1

    def _local_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(average, weight) on this rank, views. Without gradients."""
        for parameter, average in self._averages.items():
            yield local_part(average), local_part(parameter.detach())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model, whose gathered weights must be freed before. At the end, also by an exception, the model has
        its own weights again, to the last bit.

        Float32 weights and their averages change places, which takes the memory of one tensor. Other weights are copied meanwhile.
        """
        with contextlib.ExitStack() as undo:
            for average, weight in self._local_pairs():
                undo.callback(exchange(average, weight))
            yield

    def metrics(self) -> dict[str, float]:
        """Decay of the last update, and L2 norm of (weights - average) / that of the weights by group. A collective if parameters are
        sharded."""

        def squares(group: dict[str, Any], parameter: Any) -> Tensor:
            weight = local_part(parameter.detach()).float()
            distance = weight - local_part(self._averages[parameter])
            return torch.stack([squared_norm(distance), squared_norm(weight)])

        groups = [{"name": name, "params": members} for name, members in self._groups.items()]
        ratios = group_ratios(group_norms(groups, squares))
        return {"decay": self.decay, **{f"distance/{name}": r for name, r in ratios.items()}}

    def state_dict(self) -> dict[str, Any]:
        averages = {f"weights.{name}": average for name, average in self.tensors.items()}
        return {**averages, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_updates = state_dict["num_updates"]  # tensors were filled in place


def decay_of_update(settings: Ema, number: int) -> float:
    """Decay of update ``number``, counted from 0."""
    return min(settings.decay, (1 + number) / (10 + number)) if settings.warmup else settings.decay


@torch.no_grad()
def exchange(average: Tensor, weight: Tensor) -> Callable[[], object]:
    """Copy ``average`` into ``weight``; returns what brings both back."""
    own = weight.clone()
    weight.copy_(average)
    if weight.dtype != average.dtype:
        return torch.no_grad()(lambda: weight.copy_(own))
    average.copy_(own)
    return lambda: exchange(average, weight)


def build_ema(model: nn.Module, config: JobConfig) -> EMA:
    """The average that [ema] asks for."""
    names = [name for name, _ in model.named_parameters()]
    groups = averaged_parameters(names, config)
    ema = EMA(model, groups, config.ema)
    logger.info(f"EMA of {len(ema.tensors)} parameters, groups {', '.join(groups)}")
    return ema
