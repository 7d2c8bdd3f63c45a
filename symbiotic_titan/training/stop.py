"""Stop signals, and pauses of training for validation and sampling."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools import utils
from torchtitan.tools.logging import logger


class StopRequest:
    """Records the first stop signal. A second SIGINT interrupts at once, as a user who presses Ctrl-C twice expects."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Handle SIGTERM and SIGINT in this process (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Only recorded: the step must finish, or its collectives would hang on the other ranks.
        self.signal_name = signal.Signals(number).name


class Interrupted(Exception):
    """A stop signal came while training was paused."""


@contextlib.contextmanager
def paused_training(model: nn.Module, metrics: MetricsProcessor, activity: str) -> Iterator[None]:
    """Evaluation mode for ``activity``, a measurement on the model in training. ``Interrupted`` ends it and is logged.

    The pause is left out of the throughput; afterwards the model is in training mode and resharded.
    """
    utils.device_module.synchronize()  # device sync: the step's kernels are not this measurement's time
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        yield
    except Interrupted:
        logger.info(f"{activity} interrupted by a stop signal")
    finally:
        model.train(was_training)
        _reshard(model)
        metrics.time_last_log += time.perf_counter() - start


def _reshard(model: nn.Module) -> None:
    """Free the gathered weights that FSDP keeps for a backward, which does not follow here."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
