"""From noise to data: follow the flow's velocity from t = 1 down to t = 0, along the path of ``flow.path``.

A velocity is any function of (state, timestep); nothing here knows a model. Its error behind N steps falls with 1/N for Euler
and with 1/N^2 for Heun, which asks for the velocity twice per step.
Letters: L latent tokens of an image, Z numbers per latent patch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from symbiotic_titan.flow.path import (
    keyed_generator,
    shift_timesteps,
)
from symbiotic_titan.registry import Registry

# (state x_t, timestep t) -> derivative of x_t by t, of the state's shape.
Velocity = Callable[[torch.Tensor, float], torch.Tensor]
# (velocity, state at the first timestep, first timestep, second timestep) -> state at the second one.
Step = Callable[[Velocity, torch.Tensor, float, float], torch.Tensor]


def euler_step(velocity: Velocity, x: torch.Tensor, t: float, following: float) -> torch.Tensor:
    """Along the tangent: order 1, one velocity."""
    return x + (following - t) * velocity(x, t)


def heun_step(velocity: Velocity, x: torch.Tensor, t: float, following: float) -> torch.Tensor:
    """Along the mean of the velocities at both ends: order 2, two velocities. (The trapezoidal rule after an Euler step.)"""
    slope = velocity(x, t)
    behind = velocity(x + (following - t) * slope, following)
    return x + (following - t) * (slope + behind) / 2


# Name -> one step of a solver.
SOLVERS: Registry[Step] = Registry("sampler")
SOLVERS.register("euler", euler_step)
SOLVERS.register("heun", heun_step)


@dataclass(frozen=True)
class SolverOptions:
    """How an image is drawn. ``shift``: as at training, above 1 it spends more of the steps near the noise. ``guidance``: 1 follows
    the caption as trained, more exaggerates what it changes (arXiv 2207.12598).

    Raises:
        ValueError: a number out of range, or an unknown sampler.
    """

    steps: int
    sampler: str
    shift: float
    guidance: float

    def __post_init__(self) -> None:
        _ = SOLVERS[self.sampler]  # raises where nobody registered it
        rules = (
            ("steps", self.steps >= 1, "at least 1"),
            ("shift", 0 < self.shift < math.inf, "positive"),
            ("guidance", 0 <= self.guidance < math.inf, "zero or positive"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name}: must be {rule}, got {getattr(self, name)}")

    @property
    def is_guided(self) -> bool:
        """Whether the velocity without a caption is asked for too."""
        return self.guidance != 1.0


def time_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 timesteps from 1 to 0: evenly spaced, then shifted as at training."""
    return shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def solve(
    velocity: Velocity,
    noise: torch.Tensor,
    sampling: SolverOptions,
    after_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """The data that ``noise`` flows to. A pure function of its arguments; guidance is the velocity's own business."""
    step, x = SOLVERS[sampling.sampler], noise
    for t, following in pairwise(time_grid(sampling.steps, sampling.shift)):
        x = step(velocity, x, t, following)
        after_step()
    return x


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Velocity on from the unconditional one through the conditional one (arXiv 2207.12598, eq. 6, with w = guidance - 1)."""
    return unconditional + guidance * (conditional - unconditional)


def noise_of_image(seed: int, index: int, num_tokens: int, num_values: int) -> torch.Tensor:
    """(L, Z) float32 on the CPU: a function of its arguments alone, so that an image is the same in any batch."""
    generator = keyed_generator("image", seed, index)
    return torch.randn(num_tokens, num_values, generator=generator)
