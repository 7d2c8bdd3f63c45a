"""Optimizer builder ``momentum_projection``: remove the component of a gradient that opposes its own momentum.

If tasks share parameters, one batch may pull against the direction that the others have built up. After clipping, if the
gradient g of a parameter opposes its Adam momentum m (<g, m> < 0), Adam gets g - <g, m> / <m, m> m instead: the component of g
orthogonal to m. This follows the gradient projection of Rosetta (arXiv 2607.00293). It is an extension like any user's own: no part of
the trainer knows it. A config enables it, for the groups whose parameters tasks share, with

    [experimental]
    custom_import = "symbiotic_titan.extensions.momentum_projection"

    [optimizer]
    builder = "momentum_projection"
    builder_options = {groups = ["understanding"]}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from symbiotic_titan.config.optimizer import Optimizer
from symbiotic_titan.config.rows import row_from_dict
from symbiotic_titan.extend import register_optimizer_builder
from symbiotic_titan.optim.build import ParamGroupOptimizers, build_adam
from symbiotic_titan.optim.group_norms import (
    local_part,
    sum_over_shards,
)


@dataclass
class Options:
    groups: list[str]
    """Names of the rows of [[optimizer.param_groups]] whose gradients are projected."""


@torch.no_grad()
def project(gradients: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor]) -> None:
    """Make each gradient that opposes its momentum orthogonal to it, in place; the others are unchanged to the last bit.

    Float32 arithmetic. One collective if gradients are sharded, no wait for the device.
    """
    pairs = [
        (local_part(g), local_part(m).float()) for g, m in zip(gradients, momenta, strict=True)
    ]
    dots = [torch.stack([(g.float() * m).sum(), m.square().sum()]) for g, m in pairs]
    # A branch on the sign would wait for the device. Clamped to 0, the factor subtracts nothing where gradient and momentum agree.
    for (gradient, momentum), dot in zip(pairs, sum_over_shards(dots, gradients), strict=True):
        opposition = (dot[0] / dot[1].clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(0.0)
        gradient.sub_(opposition * momentum)


@register_optimizer_builder("momentum_projection")
def momentum_projection(
    model: nn.Module, config: Optimizer, parallel_dims: ParallelDims
) -> ParamGroupOptimizers:
    """Adam over the configured groups, with the gradients of ``builder_options.groups`` projected before each step.

    Raises:
        ValueError: the options are malformed, or name a group that does not exist or is frozen.
    """
    options = row_from_dict(Options, config.builder_options, "optimizer.builder_options")
    adam = build_adam(model, config)
    known = [group["name"] for group in adam.param_groups]
    for name in options.groups:
        if name not in known:
            raise ValueError(
                f"optimizer.builder_options.groups: no trainable group {name!r}; choose from {', '.join(known)}"
            )

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        moving = [  # before its first step a parameter has no momentum
            parameter
            for group in optimizer.param_groups
            if group["name"] in options.groups
            for parameter in group["params"]
            if parameter.grad is not None and "exp_avg" in optimizer.state.get(parameter, {})
        ]
        project([p.grad for p in moving], [optimizer.state[p]["exp_avg"] for p in moving])

    adam.register_step_pre_hook(before_step)
    return ParamGroupOptimizers(model, adam)
