"""Optimizer with parameter groups, and its learning-rate schedule, for the train spec.

Rates come from the config, state from the checkpoint: a resumed run uses the rates its config says, so they may change.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler
from torchtitan.distributed import ParallelDims

from symbiotic_titan.config.optimizer import Optimizer, ParamGroupRow
from symbiotic_titan.optim.param_groups import claim_parameters

_CLASSES = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def freeze_parameters(model: nn.Module, rules: list[ParamGroupRow]) -> None:
    """Parameters of frozen groups stop requiring gradients. Run before FSDP, which looks at the flag when it shards."""
    frozen = {rule.name for rule in rules if rule.frozen}
    parameters = dict(model.named_parameters())
    for group, names in claim_parameters(parameters, rules).items():
        for name in names:
            parameters[name].requires_grad_(group not in frozen)


def torch_param_groups(model: nn.Module, config: Optimizer) -> list[dict[str, Any]]:
    """torch.optim parameter groups, in the order of the rules, each with its ``name``. Frozen groups are left out."""
    parameters = dict(model.named_parameters())
    rules = {rule.name: rule for rule in config.param_groups}
    groups = []
    for name, claimed in claim_parameters(parameters, config.param_groups).items():
        rule = rules.get(name, ParamGroupRow(name=name, match=[".*"]))
        if rule.frozen:
            continue
        groups.append(
            {
                "name": name,
                "params": [parameters[n] for n in claimed],
                "lr": config.lr if rule.lr is None else rule.lr,
                "betas": tuple(rule.betas or (config.beta1, config.beta2)),
                "weight_decay": config.weight_decay
                if rule.weight_decay is None
                else rule.weight_decay,
            }
        )
    return groups


class ParamGroupOptimizers(OptimizersContainer):
    """One optimizer whose parameter groups follow [[optimizer.param_groups]].

    Its state is keyed by parameter name, so it loads on other ranks and under other groups. What a group sets (rate, decay,
    betas) is the config's, never the checkpoint's.
    """

    def __init__(self, model: nn.Module, config: Optimizer) -> None:
        self.model_parts = [model]
        groups = torch_param_groups(model, config)
        defaults = {"lr": config.lr, "eps": config.eps}
        implementation = {
            "fused": config.implementation == "fused",
            "foreach": config.implementation == "foreach",
        }
        self.optimizers = [_CLASSES[config.name](groups, **defaults, **implementation)]  # type: ignore[arg-type]
        self._post_init([p for group in groups for p in group["params"]], defaults)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The torch parameter groups, each with its ``name``."""
        return self.optimizers[0].param_groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        configured = [
            {key: copy.copy(value) for key, value in group.items() if key != "params"}
            for group in self.groups
        ]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.groups, configured, strict=True):
            group.update(settings)


class StepLRSchedulers(LRSchedulersContainer):
    """torchtitan's schedule, whose saved state is the step alone: base rates stay the config's on a resume."""

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch = state_dict["last_epoch"]
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates


def build_optimizers(
    model_parts: list[nn.Module], config: Optimizer, parallel_dims: ParallelDims
) -> ParamGroupOptimizers:
    """Fills the train spec's optimizer slot."""
    (model,) = model_parts  # pipeline parallelism is refused by the checks
    return ParamGroupOptimizers(model, config)


def build_schedulers(
    optimizers: OptimizersContainer, config: LRScheduler, training_steps: int
) -> StepLRSchedulers:
    """Fills the train spec's schedule slot: torchtitan's warm-up, stable, decay factor on every group's rate."""
    upstream = build_lr_schedulers(optimizers, config, training_steps)
    factor: Callable[[int], float] = upstream.schedulers[0].lr_lambdas[0]
    return StepLRSchedulers(optimizers, factor)
