"""Parameter groups and their optimizer: every parameter belongs to the first rule that matches its name.

On resume, settings (rates, decay, betas, schedule) come from the config and state from the checkpoint, so a run may change its
settings; ``group_record`` logs the changes.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims

from symbiotic_titan.config.optimizer import (
    OPTIMIZER_BUILDERS,
    Optimizer,
    ParamGroupRow,
    clean_name,
)


def claim_parameters(names: Iterable[str], rules: list[ParamGroupRow]) -> dict[str, list[str]]:
    """Rule name -> names of the parameters it matches first, in the given order. Without rules, one group ``all``.

    Raises:
        ValueError: a rule claims nothing, or no rule claims a parameter; the names are listed.
    """
    names = list(names)
    if not rules:
        return {"all": names}
    claimed: dict[str, list[str]] = {rule.name: [] for rule in rules}
    unclaimed: list[str] = []
    for name in names:
        rule = next(
            (r for r in rules if any(re.search(p, clean_name(name)) for p in r.match)), None
        )
        (claimed[rule.name] if rule else unclaimed).append(name)
    if unclaimed:
        raise ValueError(
            f"[[optimizer.param_groups]]: no rule claims {len(unclaimed)} parameters, e.g. "
            f"{', '.join(clean_name(n) for n in unclaimed[:5])}; add a last rule with match = ['.*']"
        )
    for i, rule in enumerate(rules):
        if not claimed[rule.name]:
            raise ValueError(
                f"[[optimizer.param_groups]] #{i + 1} ({rule.name}): match {rule.match} claims no parameter that "
                "an earlier rule left; correct the expressions, reorder the rules, or remove this one"
            )
    return claimed


ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What Adam and AdamW keep of each parameter."""

_CLASSES = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def freeze_parameters(model: nn.Module, rules: list[ParamGroupRow]) -> None:
    """Turn off gradients for the parameters of frozen groups. Run before FSDP, which reads ``requires_grad`` when it shards."""
    frozen = {rule.name for rule in rules if rule.frozen}
    parameters = dict(model.named_parameters())
    for group, names in claim_parameters(parameters, rules).items():
        for name in names:
            parameters[name].requires_grad_(group not in frozen)


def torch_param_groups(model: nn.Module, config: Optimizer) -> list[dict[str, Any]]:
    """torch.optim parameter groups in the order of the rules, without frozen ones. Each has its ``name`` and its ``schedule``: the
    keys in which it differs from [lr_scheduler].
    """
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
                "schedule": rule.schedule(),
            }
        )
    return groups


class ParamGroupOptimizers(OptimizersContainer):
    """One torch optimizer over the groups of ``torch_param_groups``; its state is saved by parameter name.

    The saved state has no settings and nothing of frozen parameters, so it loads on other numbers of ranks and with other groups.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model_parts = [model]
        self.optimizers = [optimizer]  # type: ignore[list-item]
        self._post_init([p for group in self.groups for p in group["params"]], optimizer.defaults)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The torch parameter groups, each with its ``name``."""
        return self.optimizers[0].param_groups

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k.startswith("state.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch also expects settings in the state: pass those of this run.
        settings = {k: v for k, v in super().state_dict().items() if not k.startswith("state.")}
        super().load_state_dict({**state_dict, **settings})


OptimizerBuilder = Callable[[nn.Module, Optimizer, ParallelDims], ParamGroupOptimizers]
"""(parallel, initialised model; [optimizer]; ranks) -> optimizer. Any torchtitan OptimizersContainer with ``groups``: the torch
parameter groups, each with a ``name``, in the order of its ``optimizers``."""


def build_adam(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """Adam or AdamW over the configured groups."""
    return _CLASSES[config.name](
        torch_param_groups(model, config),
        lr=config.lr,
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def param_group_optimizers(
    model: nn.Module, config: Optimizer, parallel_dims: ParallelDims
) -> ParamGroupOptimizers:
    """The default builder."""
    return ParamGroupOptimizers(model, build_adam(model, config))


def build_optimizers(
    model_parts: list[nn.Module], config: Optimizer, parallel_dims: ParallelDims
) -> ParamGroupOptimizers:
    """The optimizer of the configured builder, for the train spec."""
    (model,) = model_parts  # the checks refuse pipeline parallelism
    return OPTIMIZER_BUILDERS[config.builder](model, config, parallel_dims)
