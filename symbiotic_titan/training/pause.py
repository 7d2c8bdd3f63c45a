"""Pauses of training for validation and sampling, which a stop signal interrupts."""

import contextlib
import time
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools import utils
from torchtitan.tools.logging import logger


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
