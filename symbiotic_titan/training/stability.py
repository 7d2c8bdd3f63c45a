"""Bad steps: what [stability] counts as one, and how many of them a run passes over or rolls back from.

A step whose loss or gradient norm is not finite, or many times the median of the steps before, is found before the optimizer acts on
it. The authors of PaLM (arXiv 2204.02311, section 5.1) left out the batches around each spike of the loss; the same batches gave no
spike to weights in another state, so this loses nothing but their share of the data. They started again from a checkpoint about 100 steps
before the spike, as ``roll_back`` does: what damaged the weights may lie some steps before what shows it.
"""

import json
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Protocol

from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import Stability


class WayBack(Protocol):
    """The checkpoints of a run, as far as it rolls back to them; the run's manager."""

    def find_way_back(self) -> Any:
        """The checkpoint to go back to, which has its ``step``; None if there is none. Collective."""

    def roll_back(self, start: Any) -> None:
        """Make weights, optimizer state and average those of ``start``. Collective."""


class BadSteps:
    """Finds bad steps. What it decides depends on values that are the same on all ranks, and on its state, which is a checkpoint entry: a
    resumed run decides as an uninterrupted one.

    counts: ``skipped_steps`` and ``rolled_back_steps`` since the start of training.
    """

    def __init__(self, settings: Stability, way_back: WayBack) -> None:
        self._settings, self._way_back = settings, way_back
        self._last = {name: deque[float](maxlen=settings.window) for name in ("loss", "grad_norm")}
        self._limits = {"loss": settings.loss_spike, "grad_norm": settings.grad_norm_spike}
        self._in_a_row = 0
        self._times_back = 0  # to the same weights
        self._back_to = self._back_at = 0  # steps: of the checkpoint, and of the bad step
        self.counts = {"skipped_steps": 0, "rolled_back_steps": 0}

    def pass_over(
        self, step: int, loss: float, grad_norm: float, not_finite: Mapping[str, float]
    ) -> bool:
        """Whether the step must not change the weights; they are rolled back where [stability] says so. ``not_finite``: those of the
        step's losses and norm. Where it names some and this returns False, the run must stop. Collective.

        Raises:
            FloatingPointError: a spike, and the run must stop.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        spike = None if not_finite else self._spike(values)
        if not not_finite and spike is None:
            for name, value in values.items():
                self._last[name].append(value)
            self._in_a_row = 0
            return False
        reason = spike or f"{', '.join(not_finite)} not finite"
        if self._answers(step, reason):
            return True
        if spike is not None:
            raise FloatingPointError(
                f"step {step}: {spike}; the weights were not changed. Resume from the last checkpoint with a lower learning rate or other "
                "data, or let stability.on_bad_step skip such steps or roll them back"
            )
        return False

    def _answers(self, step: int, reason: str) -> bool:
        """Skip the bad ``step``, or roll back. False where the run must stop."""
        kind = self._settings.on_bad_step
        if kind == "stop":
            return False
        if self._in_a_row >= self._settings.max_in_a_row:
            logger.warning(f"{self._in_a_row} steps in a row were bad, see stability.max_in_a_row")
            return False
        if kind == "skip":
            name, done, outcome = "skipped_steps", "skipped", "the weights were not changed"
        elif self._rolls_back(step):
            name, done = "rolled_back_steps", "rolled back"
            outcome = (
                f"weights, optimizer state and average are those of step {self._back_to} again"
            )
        else:
            return False
        self._in_a_row += 1
        self.counts[name] += 1
        logger.warning(
            f"step {step} is {done}: {reason}; {outcome} ({self._in_a_row} in a row, {self.counts[name]} since the start)"
        )
        return True

    def _rolls_back(self, step: int) -> bool:
        """Go back from the bad ``step``, unless there is no checkpoint, or the run has come back there too often."""
        start = self._way_back.find_way_back()
        if start is None:
            logger.warning(
                "the run has no complete checkpoint at a multiple of checkpoint.interval to roll back to"
            )
            return False
        # One saved right after a roll back has the weights of the checkpoint before.
        again = self._times_back and start.step in (self._back_to, self._back_at)
        times = self._times_back + 1 if again else 1
        if times > self._settings.max_in_a_row:
            logger.warning(
                f"the run has rolled back to the weights of step {self._back_to} {self._times_back} times, see stability.max_in_a_row"
            )
            return False
        self._way_back.roll_back(start)
        self._times_back, self._back_to, self._back_at = times, start.step, step
        return True

    def _spike(self, values: Mapping[str, float]) -> str | None:
        for name, value in values.items():
            last, limit = self._last[name], self._limits[name]
            if limit and len(last) == last.maxlen and value > limit * median(last):
                return (
                    f"{name} {value:.4g} is more than {limit:g} times {median(last):.4g}, the median of {len(last)} steps "
                    f"(stability.{name}_spike)"
                )
        return None

    def state_dict(self) -> dict[str, Any]:
        # As text it is a single entry of any length. JSON keeps every bit of a float.
        state: dict[str, Any] = {"in_a_row": self._in_a_row}
        state |= {"num_skipped": self.counts["skipped_steps"]}
        state |= {"num_rolled_back": self.counts["rolled_back_steps"]}
        state |= {"way_back": [self._times_back, self._back_to, self._back_at]}
        return {"json": json.dumps(state | {name: list(last) for name, last in self._last.items()})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = json.loads(state_dict["json"])
        self.counts["skipped_steps"], self._in_a_row = state["num_skipped"], state["in_a_row"]
        # Older checkpoints lack these two.
        self.counts["rolled_back_steps"] = state.get("num_rolled_back", 0)
        self._times_back, self._back_to, self._back_at = state.get("way_back", (0, 0, 0))
        for name, last in self._last.items():
            last.clear()
            last.extend(state[name])
