"""Bad steps: what [stability] counts as one, and how many of them a run passes over.

A step whose loss or gradient norm is not finite, or many times the median of the steps before, is found before the optimizer acts on
it. The authors of PaLM (arXiv 2204.02311, section 5.1) left out the batches around each spike of the loss; the same batches gave no
spike to weights in another state, so this loses nothing but their share of the data.
"""

import json
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import Stability


class BadSteps:
    """Finds bad steps. What it decides depends on values that are the same on all ranks, and on its state, which is a checkpoint entry: a
    resumed run decides as an uninterrupted one.

    num_skipped: steps since the start of training that changed no weight.
    """

    def __init__(self, settings: Stability) -> None:
        self._settings = settings
        self._last = {name: deque[float](maxlen=settings.window) for name in ("loss", "grad_norm")}
        self._limits = {"loss": settings.loss_spike, "grad_norm": settings.grad_norm_spike}
        self._in_a_row = 0
        self.num_skipped = 0

    def skips(
        self, step: int, loss: float, grad_norm: float, not_finite: Mapping[str, float]
    ) -> bool:
        """Whether the weights are to stay as they are. ``not_finite``: those of the step's losses and norm. Where it names some and this
        returns False, the run must stop.

        Raises:
            FloatingPointError: a spike that is not to be skipped.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        spike = None if not_finite else self._spike(values)
        if not not_finite and spike is None:
            for name, value in values.items():
                self._last[name].append(value)
            self._in_a_row = 0
            return False
        reason = spike or f"{', '.join(not_finite)} not finite"
        if self._settings.on_bad_step == "skip" and self._in_a_row < self._settings.max_in_a_row:
            self._in_a_row += 1
            self.num_skipped += 1
            logger.warning(
                f"step {step} is skipped: {reason}; the weights were not changed ({self._in_a_row} in a row, {self.num_skipped} since the "
                "start)"
            )
            return True
        if self._in_a_row:
            logger.warning(
                f"{self._in_a_row} steps in a row were skipped, see stability.max_in_a_row"
            )
        if spike is not None:
            raise FloatingPointError(
                f"step {step}: {spike}; the weights were not changed. Resume from the last checkpoint with a lower learning rate or other "
                "data, or skip such steps with stability.on_bad_step"
            )
        return False

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
        state = {"num_skipped": self.num_skipped, "in_a_row": self._in_a_row}
        return {"json": json.dumps(state | {name: list(last) for name, last in self._last.items()})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = json.loads(state_dict["json"])
        self.num_skipped, self._in_a_row = state["num_skipped"], state["in_a_row"]
        for name, last in self._last.items():
            last.clear()
            last.extend(state[name])
