"""From noise to data: solve the flow's ordinary differential equation from t = 1 to t = 0, along the path of ``flow.path``.

A velocity model is any function of (state, timestep). With N steps the error falls as 1/N for Euler and as 1/N^2 for Heun, which
evaluates the velocity twice per step.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from symbiotic_titan.config.generation import SOLVERS
from symbiotic_titan.flow.path import shift_timesteps

# (state x_t, timestep t) -> dx_t/dt, of the state's shape.
VelocityModel = Callable[[torch.Tensor, float], torch.Tensor]


def euler_step(velocity: VelocityModel, x_t: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """Euler's method: order 1, one evaluation."""
    return x_t + (t_next - t) * velocity(x_t, t)


def heun_step(velocity: VelocityModel, x_t: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """Heun's method, the mean of the velocities at t and after an Euler step: order 2, two evaluations."""
    start = velocity(x_t, t)
    end = velocity(x_t + (t_next - t) * start, t_next)
    return x_t + (t_next - t) * (start + end) / 2


@functools.cache
def check_solver(name: str) -> None:
    """Try a step of the solver ``name`` on a velocity model that is known, before an image is generated with it.

    Raises:
        ValueError: it is not registered, or does not return the next state.
    """
    state = torch.linspace(-1, 1, 24).view(2, 3, 4)
    result = SOLVERS[name](lambda x_t, t: x_t, state, 1.0, 0.5)
    if isinstance(result, torch.Tensor) and result.shape == state.shape:
        if result.dtype == state.dtype and bool(result.isfinite().all()):
            return
        got = f"{result.dtype}, {int((~result.isfinite()).sum())} of {result.numel()} values not finite"
    else:
        got = f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else repr(result)
    raise ValueError(
        f"{SOLVERS.key} = {name!r}: a step must return the next state, finite and of the state's shape and dtype (here "
        f"{tuple(state.shape)}, {state.dtype}), got {got}"
    )


@dataclass(frozen=True)
class SolverOptions:
    """How an image is generated.

    steps:    steps from noise to data.
    sampler:  a name registered in ``SOLVERS``.
    shift:    as in training; above 1, more steps are near the noise.
    guidance: scale of classifier-free guidance (arXiv 2207.12598); 1 is no guidance, more strengthens the caption's effect.

    Raises:
        ValueError: a number out of range, or an unknown sampler.
    """

    steps: int
    sampler: str
    shift: float
    guidance: float

    def __post_init__(self) -> None:
        check_solver(self.sampler)
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
        """Whether the velocity without a caption is needed as well, which doubles the cost."""
        return self.guidance != 1.0


def time_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 timesteps from 1 to 0: evenly spaced, then shifted as in training."""
    # float64: step sizes are differences of neighbours, whose rounding errors would add up.
    return shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def solve(
    velocity: VelocityModel,
    noise: torch.Tensor,
    options: SolverOptions,
    after_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Solve from ``noise`` at t = 1 to data at t = 0. Guidance is part of ``velocity``."""
    step, x_t = SOLVERS[options.sampler], noise
    for t, t_next in pairwise(time_grid(options.steps, options.shift)):
        x_t = step(velocity, x_t, t, t_next)
        after_step()
    return x_t


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """The velocity extrapolated from the unconditional through the conditional one (arXiv 2207.12598, eq. 6, w = guidance - 1)."""
    return unconditional + guidance * (conditional - unconditional)
