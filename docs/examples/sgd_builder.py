"""An optimizer builder: stochastic gradient descent over the configured groups, with an option of its own."""

from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from symbiotic_titan.config.optimizer import Optimizer
from symbiotic_titan.config.rows import row_from_dict
from symbiotic_titan.extend import register_optimizer_builder
from symbiotic_titan.optim.build import ParamGroupOptimizers, torch_param_groups


@dataclass
class Options:
    momentum: float = 0.9


@register_optimizer_builder("sgd")
def sgd(model: nn.Module, config: Optimizer, parallel_dims: ParallelDims) -> ParamGroupOptimizers:
    options = row_from_dict(Options, config.builder_options, "optimizer.builder_options")
    groups = torch_param_groups(model, config)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=options.momentum)
    return ParamGroupOptimizers(model, optimizer)
