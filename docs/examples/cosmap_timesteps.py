"""A distribution of timesteps: CosMap (arXiv 2403.03206, eq. 21)."""

import math

import torch
from torch import Tensor

from symbiotic_titan.config.losses import Flow
from symbiotic_titan.extend import register_timestep_distribution


@register_timestep_distribution("cosmap")
def cosmap(shape: tuple[int, ...], config: Flow, generator: torch.Generator) -> Tensor:
    u = torch.rand(shape, generator=generator)
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
