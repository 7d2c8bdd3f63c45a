"""[losses] and [flow]: the terms of the loss and the flow-matching path."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Losses:
    text: float = 1.0
    """Weight of the next-token cross entropy."""

    flow: float = 1.0
    """Weight of the flow-matching error."""

    balance: float = 0.01
    """Weight of the load-balancing loss."""

    balance_scope: Literal["local", "global"] = "local"
    """Over which tokens expert shares are counted: those of one micro-batch on one rank, or all of the step. ``global`` with
    gradient accumulation runs every micro-batch's forward once more, without gradients, to know the shares beforehand."""

    def __post_init__(self) -> None:
        for name in ("text", "flow", "balance"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"losses.{name}: must be zero or positive, got {getattr(self, name)}"
                )


@dataclass
class Flow:
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    """Law of the timestep t, before the shift."""

    mean: float = 0.0
    """Mean of the normal under ``logit_normal``."""

    std: float = 1.0
    """Standard deviation of the normal under ``logit_normal``."""

    shift: float = 1.0
    """s in t <- s t / (1 + (s - 1) t); above 1 it moves timesteps towards noise."""

    seed: int = 0
    """Seed of noise and timesteps."""

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"flow.std: must be positive, got {self.std}")
        if self.shift <= 0:
            raise ValueError(f"flow.shift: must be positive, got {self.shift}")
