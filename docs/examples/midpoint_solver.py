"""A solver: the midpoint method, of order 2 with two evaluations per step."""

from torch import Tensor

from symbiotic_titan.extend import register_solver
from symbiotic_titan.flow.solver import VelocityModel


@register_solver("midpoint")
def midpoint_step(velocity: VelocityModel, x_t: Tensor, t: float, t_next: float) -> Tensor:
    middle = (t + t_next) / 2
    x_middle = x_t + (middle - t) * velocity(x_t, t)
    return x_t + (t_next - t) * velocity(x_middle, middle)
