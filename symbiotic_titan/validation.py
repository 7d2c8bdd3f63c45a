"""Held-out losses while training: the same rows, noise and timesteps at every validation, whatever the number of ranks.

Rows are made once, before training, by the loader's own code, and stay in the host's memory. Timesteps follow the law of
training, so that the numbers compare with the training losses; the seeds are fixed, so that a difference between two
validations, or between two runs, is the weights' and not the draw's. Nothing is drawn from a global generator and nothing the
optimizer sees is touched: training with and without validation is bitwise the same.
Letters: J tasks.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import BaseValidator
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.losses import Flow
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.flow.path import interpolate, velocity_target
from symbiotic_titan.flow.timesteps import draw_noise_and_timesteps
from symbiotic_titan.losses.report import accuracies, correct_tokens, mean_losses
from symbiotic_titan.losses.terms import LossTerms, loss_terms
from symbiotic_titan.sequence.batch import PackedBatch

# Of the order of the held-out samples and of their noise, so that runs with other seeds compare too.
SEED = 0
# The step that noise is drawn for; training's first step is 1.
NOISE_STEP = 0


def held_out_losses(
    model: nn.Module,
    batches: Iterable[PackedBatch],
    flow: Flow,
    *,
    first_rows: Iterable[int] | None = None,
    loss_fn: Callable[..., LossTerms] = loss_terms,
    autocast: contextlib.AbstractContextManager | None = None,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Mean losses of ``model`` over all rows of ``batches``, and the share of labelled tokens that it gets right, by name.

    Names are the trainer's, ``text``, ``flow`` and ``by_task/*``, and ``accuracy/<task>``; what has no token is left out.
    ``batches`` lie on the model's device. ``first_rows`` are the indices of their first rows among the held-out rows of all
    ranks (None: they follow each other): a row's noise depends on its index alone. Under FSDP or expert parallelism every rank
    must bring equally many batches. The model is put back into its mode.
    """
    was_training = model.training
    model.eval()
    sums: list[torch.Tensor] = []
    try:
        with torch.no_grad():
            for first_row, batch in _numbered(batches, first_rows):
                sums.append(_sums_of_batch(model, batch, flow, first_row, loss_fn, autocast))
    finally:
        model.train(was_training)
    total = torch.stack(sums).sum(0)
    if sum_over_ranks is not None:
        total = sum_over_ranks(total)
    *parts, correct_J = total.cpu().unbind()  # device sync
    terms = LossTerms(*parts)
    return mean_losses(terms) | accuracies(correct_J, terms.text_count)


def _numbered(
    batches: Iterable[PackedBatch], first_rows: Iterable[int] | None
) -> Iterator[tuple[int, PackedBatch]]:
    if first_rows is not None:
        yield from zip(first_rows, batches, strict=True)
        return
    row = 0
    for batch in batches:
        yield row, batch
        row += batch.tokens.shape[0]


def _sums_of_batch(
    model: nn.Module,
    batch: PackedBatch,
    flow: Flow,
    first_row: int,
    loss_fn: Callable[..., LossTerms],
    autocast: contextlib.AbstractContextManager | None,
) -> torch.Tensor:
    """(5, J) float64: the fields of LossTerms in their order, then correct tokens."""
    noise_BLZ, timesteps_BL = draw_noise_and_timesteps(
        batch.vae_image,
        batch.latents.shape[-1],
        config=replace(flow, seed=SEED),
        step=NOISE_STEP,
        first_row=first_row,
    )
    noised_BLZ = interpolate(batch.latents, noise_BLZ, timesteps_BL)
    shield_scale = torch.ones((), device=batch.tokens.device)  # acts on gradients alone
    with autocast or contextlib.nullcontext():
        output = model(batch, noised_BLZ, timesteps_BL, shield_scale)
    target_BLZ = velocity_target(batch.latents, noise_BLZ)
    terms = loss_fn(output.logits, output.velocity, target_BLZ, batch)
    parts = [getattr(terms, f.name) for f in fields(LossTerms)]
    return torch.stack([*parts, correct_tokens(output.logits, batch)]).double()


def held_out_data(config: JobConfig) -> Data:
    """[data] for the held-out sources: a fixed order, no caption dropped, and a lane for every row of a global batch.

    What keeps training's batches mixed and what ends them is training's alone; a held-out source may still say ``at_end``.
    """
    return replace(
        config.data,
        sources=config.validation.sources,
        seed=SEED,
        num_lanes=0,
        condition_dropout=0.0,
        at_end="repeat",
        max_row_share={},
    )


@dataclass(frozen=True)
class HeldOutRows:
    """A rank's share of the held-out rows, on the CPU; ``first_rows[i]`` is the index of the first row of ``batches[i]`` over all ranks.

    On another number of ranks the shares differ, but not the rows and their indices.
    """

    batches: list[PackedBatch]
    first_rows: list[int]

    @property
    def num_bytes(self) -> int:
        return sum(getattr(b, f.name).nbytes for b in self.batches for f in fields(b))


def read_held_out(
    loader: PackedLoader, steps: int, local_batch_size: int, dp_rank: int, dp_world_size: int
) -> HeldOutRows:
    """The rank's rows of ``steps`` global batches, as a ``loader`` with one lane per row of the global batch hands them out."""
    rows_of_rank = len(loader.lanes)
    per_step = rows_of_rank // local_batch_size
    first_rows = [
        step * rows_of_rank * dp_world_size + dp_rank * rows_of_rank + i * local_batch_size
        for step in range(steps)
        for i in range(per_step)
    ]
    return HeldOutRows(list(itertools.islice(loader, len(first_rows))), first_rows)


class Interrupted(Exception):
    """A stop signal came during a measurement."""


@contextlib.contextmanager
def aside(model: nn.Module, metrics: MetricsProcessor, what: str) -> Iterator[None]:
    """A frame for ``what``, a measurement on the model in training. ``Interrupted`` ends it and is told; the time that passes is
    not counted in the throughput, which is training's."""
    utils.device_module.synchronize()  # device sync: the step's kernels are not this measurement's time
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        yield
    except Interrupted:
        logger.info(f"{what} broken off: a stop signal came")
    finally:
        model.train(was_training)
        _reshard(model)
        metrics.time_last_log += time.perf_counter() - start


class SymbioticValidator(BaseValidator):
    """Fills the train spec's validator slot. The trainer connects it before the first validation."""

    def __init__(
        self,
        job_config: JobConfig,
        rows: HeldOutRows,
        loss_fn: Callable[..., LossTerms],
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
    ) -> None:
        """What only the trainer has. ``stop_requested`` is a collective with one answer for all ranks."""
        self.to_device = to_device
        self.autocast = autocast
        self.sum_over_ranks = sum_over_ranks
        self.stop_requested = stop_requested

    def should_validate(self, step: int) -> bool:
        """Every ``validation.freq`` steps, step 0 included, and at the last step."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Measure and log. On a stop signal it ends behind the current batch, without a number."""
        (model,) = model_parts
        with aside(model, self.metrics_processor, f"validation at step {step}"):
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
            if self.stop_requested():
                raise Interrupted
            yield self.to_device(batch)

    def _log(self, losses: dict[str, float], step: int, seconds: float) -> None:
        metrics = {f"validation/{name}": value for name, value in losses.items()}
        self.metrics_processor.logger.log(metrics, step)
        color = self.metrics_processor.color
        totals = "  ".join(
            f"{name}: {losses[name]:7.4f}" for name in ("text", "flow") if name in losses
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


def _reshard(model: nn.Module) -> None:
    """Free the gathered weights that FSDP keeps behind a forward for the backward, which does not come here."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
