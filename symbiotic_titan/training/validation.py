"""Held-out losses while training: the same sequences, noise and timesteps at every validation, on any number of ranks.

Held-out sequences are packed once, before training, by the loader itself, and stay in host memory. Timesteps follow the distribution
of training, so that the losses are comparable with training losses; seeds are fixed, so that two validations, or two runs, differ only
by the weights. Validation changes no global random state and nothing that the optimizer reads: training with and without it is
bitwise equal.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator
from torchtitan.tools.logging import logger

from symbiotic_titan.build import loader_options
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.data.pipeline import build_loader
from symbiotic_titan.inference.held_out import held_out_data, held_out_losses
from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.training.pause import Interrupted, paused_training
from symbiotic_titan.training.step_data import error_of_ranks


@dataclass(frozen=True)
class HeldOutRows:
    """A rank's share of the held-out rows, on the CPU; ``first_rows[i]`` is the global index of the first row of ``batches[i]``.

    Other numbers of ranks divide the same rows, with the same indices.
    """

    batches: list[PackedBatch]
    first_rows: list[int]

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for b in self.batches for t in b.tensors().values())


def read_held_out(
    loader: PackedLoader, steps: int, local_batch_size: int, dp_rank: int, dp_world_size: int
) -> HeldOutRows:
    """The rank's rows of ``steps`` global batches, read from a ``loader`` with one stream per row of the global batch."""
    rows_of_rank = len(loader.streams)
    per_step = rows_of_rank // local_batch_size
    first_rows = [
        step * rows_of_rank * dp_world_size + dp_rank * rows_of_rank + i * local_batch_size
        for step in range(steps)
        for i in range(per_step)
    ]
    return HeldOutRows(list(itertools.islice(loader, len(first_rows))), first_rows)


def read_held_out_together(
    loader: PackedLoader, steps: int, local_batch_size: int, dp_rank: int, dp_world_size: int
) -> HeldOutRows:
    """``read_held_out`` on all ranks. If one cannot read its rows, all raise the same ValueError, which names it."""
    rows, error = None, None
    try:
        rows = read_held_out(loader, steps, local_batch_size, dp_rank, dp_world_size)
    except Exception as failure:  # noqa: BLE001
        error = failure
    message = error_of_ranks(error)
    if message is not None:
        raise ValueError(f"[[validation.sources]]: {message}")
    loader.check_skipped()
    assert rows is not None
    return rows


class SymbioticValidator(BaseValidator):
    """Fills the train spec's validator slot. The trainer connects it before the first validation."""

    def __init__(
        self,
        job_config: JobConfig,
        rows: HeldOutRows,
        loss_fn: LossFunction,
        metrics_processor: MetricsProcessor,
    ) -> None:
        super().__init__(job_config)
        self.rows = rows
        self.loss_fn = loss_fn
        self.metrics_processor = metrics_processor

    def connect(
        self,
        to_device: Callable[[PackedBatch], PackedBatch],
        autocast: contextlib.AbstractContextManager,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        stop_requested: Callable[[], bool],
        weights: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Set what only the trainer has. ``stop_requested`` is a collective, with the same answer on all ranks; ``weights`` gives the
        model those that are measured.
        """
        self.to_device = to_device
        self.autocast = autocast
        self.sum_over_ranks = sum_over_ranks
        self.stop_requested = stop_requested
        self.weights = weights

    def should_validate(self, step: int) -> bool:
        """Every ``validation.freq`` steps, step 0 included, and at the last step."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Measure and log. A stop signal ends it after the current batch, without a result."""
        model = cast(SymbioticModel, model_parts[0])
        activity = f"validation at step {step}"
        with paused_training(model, self.metrics_processor, activity), self.weights():
            start = time.perf_counter()
            losses = held_out_losses(
                model,
                self._batches(),
                self.job_config.flow,
                first_rows=self.rows.first_rows,
                loss_fn=self.loss_fn,
                autocast=self.autocast,
                sum_over_ranks=self.sum_over_ranks,
            )
            self._log(losses, step, time.perf_counter() - start)

    def _batches(self) -> Iterator[PackedBatch]:
        for batch in self.rows.batches:
            # A collective: all ranks leave at the same batch, so that none waits in an all-gather of the model.
            if self.stop_requested():
                raise Interrupted
            yield self.to_device(batch)

    def _log(self, losses: dict[str, float], step: int, seconds: float) -> None:
        metrics = {f"validation/{name}": value for name, value in losses.items()}
        self.metrics_processor.logger.log(metrics, step)
        color = self.metrics_processor.color
        totals = "  ".join(
            f"{name}: {value:7.4f}" for name, value in losses.items() if "/" not in name
        )
        correct = ", ".join(
            f"{name.removeprefix('accuracy/')} {value:.3f}"
            for name, value in losses.items()
            if name.startswith("accuracy/")
        )
        logger.info(
            f"{color.yellow}validation at step {step}:  {color.green}{totals}  "
            f"{color.orange}accuracy: {correct}  {color.blue}{seconds:.1f} s{color.reset}"
        )
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            logger.warning(f"validation at step {step}: {', '.join(bad)} not finite")


def build_validator(
    *,
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    loss_fn: LossFunction,
    metrics_processor: MetricsProcessor,
    **unused: Any,
) -> SymbioticValidator:
    """The validator with its held-out rows. ``unused``: what upstream passes for pipelines and its own validator."""
    loader = build_loader(
        held_out_data(job_config),
        **loader_options(job_config, tokenizer, dp_rank, dp_world_size),
        table="[[validation.sources]]",
    )
    rows = read_held_out_together(
        loader,
        job_config.validation.steps,
        job_config.training.local_batch_size,
        dp_rank,
        dp_world_size,
    )
    logger.info(
        f"validation: {rows.num_bytes / 2**20:.1f} MiB of held-out rows in the memory of each rank"
    )
    return SymbioticValidator(job_config, rows, loss_fn, metrics_processor)
