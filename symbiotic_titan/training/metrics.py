"""The metrics of a step, their names, and the console line. Where TensorBoard or W&B cannot be written, training goes on."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    TensorBoardLogger,
    WandBLogger,
)
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import NoColor

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.losses.balance import z_by_group
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flops import NUM_PAIRS, ModelCost
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.moe.record import LoggedRouting
from symbiotic_titan.moe.routing_metrics import (
    capacity_rates,
    layer_statistics,
    means_over_layers,
    scalars_by_layer,
    write_routing,
)
from symbiotic_titan.process import duration, shows_colors
from symbiotic_titan.sequence.modality import MODALITY_NAMES, NUM_MODALITIES


@dataclass(frozen=True)
class StepReport:
    """The numbers of one logged step, over all ranks.

    losses       by name; ``total``, those of the terms and ``by_task/*``.
    grad_norms   before clipping; ``all`` and one per parameter group.
    rates        learning rate of each parameter group.
    weights      weight of each data source in this step.
    update_ratios  L2 norm of each group's last update over that of its weights.
    routing      None without MoE layers.
    fill         share of positions that are not padding.
    ema          of [ema]: ``decay`` of the last update, ``distance/<group>`` of the weights from their average.
    skipped      samples since the start of the run: ``skipped``, ``skipped/<reason>``, ``truncated``; the share ``bad_share``.
    tokens_seen  (modalities,) tokens since the start of training.
    bad_steps    ``BadSteps.counts``; empty where [stability] is not in use.
    """

    step: int
    losses: dict[str, float]
    grad_norms: dict[str, float]
    rates: dict[str, float]
    weights: dict[str, float]
    update_ratios: dict[str, float]
    routing: LoggedRouting | None
    shield_scale: float
    fill: float
    ema: dict[str, float]
    skipped: dict[str, float]
    tokens_seen: torch.Tensor
    bad_steps: dict[str, int] = field(default_factory=dict)


# Seconds after which a sink that failed is tried again.
RETRY_S = 600.0


class TolerantSink(BaseLogger):
    """A sink of metrics whose trouble, such as a full disk, is a warning and does not end the training."""

    def __init__(self, sink: BaseLogger) -> None:
        self.sink = sink
        self.num_missing = 0
        self._next_try = 0.0

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.attempt(lambda sink: sink.log(metrics, step))

    def close(self) -> None:
        self._next_try = 0.0
        self.attempt(lambda sink: sink.close())
        if self.num_missing > 1:
            logger.warning(f"{self._name()}: {self.num_missing} writes of metrics were lost")

    def attempt(self, action: Callable[[Any], object]) -> None:
        """Call ``action`` with the sink. An error of it is a warning the first time; then the sink is left alone for RETRY_S seconds."""
        if time.monotonic() < self._next_try:
            self.num_missing += 1
            return
        try:
            action(self.sink)
        except Exception as error:  # noqa: BLE001 - a program of others, over disks and networks
            if not self.num_missing:
                logger.warning(
                    f"{self._name()}: metrics cannot be written ({type(error).__name__}: {error}); training goes on without them, and "
                    f"they are tried again every {RETRY_S:.0f} s"
                )
            self.num_missing += 1
            self._next_try = time.monotonic() + RETRY_S
            if isinstance(self.sink, TensorBoardLogger):
                # The thread that writes its file has ended. The next metrics begin another file.
                self.sink.writer.file_writer = self.sink.writer.all_writers = None

    def _name(self) -> str:
        return type(self.sink).__name__.removesuffix("Logger")


def leave_to_sinks(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """``threading.excepthook`` that prints no traceback of TensorBoard's writing threads, whose errors ``TolerantSink`` reports."""

    def quiet(failure: Any) -> object:
        module = type(failure.thread).__module__
        return None if module.startswith("tensorboard.") else hook(failure)

    return quiet


class SymbioticMetrics(MetricsProcessor):
    """torchtitan's loggers and memory monitor, with this project's metric names."""

    time_last_log: float
    ntokens_since_last_log: int

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        groups: tuple[ExpertGroup, ...],
        moe_layers: range,
    ) -> None:
        super().__init__(job_config, parallel_dims)
        if not shows_colors():
            self.color = NoColor()
        self.sinks: list[TolerantSink] = []  # none on ranks that do not log
        if isinstance(self.logger, LoggerContainer):
            self.sinks = [TolerantSink(sink) for sink in self.logger._loggers]
            self.logger._loggers = list(self.sinks)
            threading.excepthook = leave_to_sinks(threading.excepthook)
        self.groups = groups
        self.moe_layers = moe_layers
        self.routing_freq = job_config.metrics.routing_freq
        self.num_steps = job_config.training.steps
        self.capacity_factor = job_config.experts.capacity_factor
        self.last_logged_step: int | None = None
        self.has_warned_of_maps = False
        self._first_logged: tuple[int, float] | None = None  # step, and when it was
        self.cost: ModelCost | None = None  # set by the trainer, which has the model
        self.labels_since_last_log = 0
        self.tokens_since_last_log = torch.zeros(NUM_MODALITIES, dtype=torch.int64)
        self.pairs_since_last_log = torch.zeros(NUM_PAIRS, dtype=torch.float64)

    def should_log(self, step: int) -> bool:
        """Besides upstream's steps: the last one, and those with a full routing report."""
        return super().should_log(step) or step == self.num_steps or self.shows_routing(step)

    def shows_routing(self, step: int) -> bool:
        """Whether ``step`` gets a full routing report, see ``metrics.routing_freq``."""
        if self.routing_freq == 0:
            return False
        return step % self.routing_freq == 0 or step in (1, self.num_steps)

    def count(self, tokens: torch.Tensor, num_labels: int, pairs: torch.Tensor) -> None:
        """Add a step's (modalities,) tokens, its labels and its ``visible_pairs`` to those since the last log."""
        self.ntokens_since_last_log += int(tokens.sum())
        self.tokens_since_last_log += tokens
        self.labels_since_last_log += num_labels
        self.pairs_since_last_log += pairs

    def flops(self) -> tuple[float, float]:
        """Training FLOPs since the last call: with attention by visible pairs, and with attention over whole rows."""
        assert self.cost is not None
        tokens = tuple(map(float, self.tokens_since_last_log))
        labels, pairs = float(self.labels_since_last_log), self.pairs_since_last_log.tolist()
        visible = self.cost.visible_training_flops(tokens, labels, pairs)
        full_rows = self.cost.training_flops_per_token(tokens, labels) * sum(tokens)
        self.tokens_since_last_log.zero_()
        self.pairs_since_last_log.zero_()
        self.labels_since_last_log = 0
        return visible, full_rows

    def performance(self, step: int) -> dict[str, float]:
        """Throughput since the last call; MFU only if the peak FLOPS of the device are known."""
        elapsed = time.perf_counter() - self.time_last_log
        num_steps = max(step - (self.last_logged_step or step - 1), 1)
        loading = sum(self.data_loading_times)
        # Of one device, in a second.
        flops, full_rows = (
            number / elapsed / self.parallel_dims.world_size for number in self.flops()
        )
        memory = self.device_memory_monitor.get_peak_stats()
        metrics = {
            "perf/tokens_per_second": self.ntokens_since_last_log / elapsed,
            "perf/tflops_per_device": flops / 1e12,
            "perf/step_seconds": elapsed / num_steps,
            "perf/data_loading_percent": 100 * loading / elapsed,
            "perf/memory_gib": memory.max_reserved_gib,
        }
        if self.gpu_peak_flops == self.gpu_peak_flops:  # nan where the peak is unknown
            metrics["perf/mfu"] = 100 * flops / self.gpu_peak_flops
            metrics["perf/mfu_full_rows"] = 100 * full_rows / self.gpu_peak_flops
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
        self.time_last_log = time.perf_counter()
        self.last_logged_step = step
        return metrics

    def time_left(self, step: int) -> str:
        """Until the last step, at the mean speed since the first logged one, validation and checkpoints included. Empty at that one,
        which also made the run ready, and at the last."""
        now = time.perf_counter()
        if self._first_logged is None:
            self._first_logged = step, now
        first, start = self._first_logged
        if not first < step < self.num_steps:
            return ""
        return duration((now - start) / (step - first) * (self.num_steps - step))

    def log_step(self, report: StepReport) -> None:
        """Write one step to TensorBoard (or W&B) and to the console; with the first one what TensorBoard is told of the run."""
        if self.last_logged_step is None:
            from symbiotic_titan.training.run_description import describe_run

            self.write_tensorboard(lambda writer: describe_run(writer, self.job_config))
        metrics = {f"loss/{name}": value for name, value in report.losses.items()}
        metrics |= {f"grad_norm/{name}": value for name, value in report.grad_norms.items()}
        metrics |= {f"lr/{name}": value for name, value in report.rates.items()}
        metrics |= {f"update_ratio/{name}": value for name, value in report.update_ratios.items()}
        if report.routing is not None:
            by_group = z_by_group(report.routing.step, [group.name for group in self.groups])
            metrics |= {f"loss/{name}": value for name, value in by_group.items()}
            metrics |= self.routing(report.step, report.routing)
        metrics |= {
            f"tokens/{name}": int(count)
            for name, count in zip(MODALITY_NAMES, report.tokens_seen, strict=True)
        }
        metrics |= {f"ema/{name}": value for name, value in report.ema.items()}
        metrics |= {f"stability/{name}": count for name, count in report.bad_steps.items()}
        metrics |= {"shield/scale": report.shield_scale}
        metrics |= {"data/fill": report.fill}
        metrics |= {f"data/weight/{name}": weight for name, weight in report.weights.items()}
        metrics |= {f"data/{name}": count for name, count in report.skipped.items()}
        metrics |= self.performance(report.step)
        self.logger.log(metrics, report.step)
        self.log_console(report, metrics)

    def log_bad_step(self, step: int, counts: Mapping[str, int]) -> None:
        """Write ``BadSteps.counts`` after ``step``, which was bad. Its losses are not logged."""
        self.logger.log({f"stability/{name}": count for name, count in counts.items()}, step)

    def routing(self, step: int, logged: LoggedRouting) -> dict[str, float]:
        """Scalars about the assignments of the step and of the last ones; the full report goes to TensorBoard where one is due."""
        counts, recent = torch.stack([logged.step.counts, logged.recent]).cpu()  # device sync
        statistics = layer_statistics(counts, self.groups)
        statistics |= capacity_rates(recent, self.groups, self.capacity_factor)
        metrics = means_over_layers(statistics)
        if self.shows_routing(step):
            metrics |= scalars_by_layer(statistics, self.moe_layers)
            self.write_tensorboard(
                lambda writer: write_routing(writer, step, counts, self.groups, self.moe_layers)
            )
            self.log_expert_maps(step, counts)
        return metrics

    def log_expert_maps(self, step: int, counts_YME: torch.Tensor) -> None:
        """A heat map of every modality that has tokens, where matplotlib is installed. ``counts_YME`` on the CPU."""
        if not self.shows_images:
            return
        try:
            from symbiotic_titan.plots.expert_maps import expert_map
            from symbiotic_titan.plots.style import as_pixels
        except ModuleNotFoundError as error:
            if not self.has_warned_of_maps:
                logger.warning(
                    f"heat maps of routing need {error.name}, of the extra plot; training goes on without them, and symbiotic plot "
                    "can show the logged counts later"
                )
            self.has_warned_of_maps = True
            return
        for modality, name in enumerate(MODALITY_NAMES):
            counts_YE = counts_YME[:, modality].numpy()
            if counts_YE.any():
                title = f"{name} tokens at step {step}"
                figure = expert_map(title, counts_YE, modality, self.groups, self.moe_layers)
                self.log_image(f"routing/experts/{name}", as_pixels(figure), step)

    @property
    def shows_images(self) -> bool:
        """Whether this rank writes to TensorBoard or W&B."""
        return any(isinstance(own.sink, TensorBoardLogger | WandBLogger) for own in self.sinks)

    def log_image(self, tag: str, image_HW3: np.ndarray, step: int) -> None:
        """Show ``image_HW3``, uint8, in TensorBoard and W&B, on ranks that write there."""
        self.write_tensorboard(
            lambda writer: writer.add_image(tag, image_HW3, step, dataformats="HWC")
        )
        for own in self.sinks:
            if isinstance(own.sink, WandBLogger):
                own.attempt(
                    lambda sink: sink.wandb.log({tag: sink.wandb.Image(image_HW3)}, step=step)
                )

    def write_tensorboard(self, write: Callable[[SummaryWriter], object]) -> None:
        """Call ``write`` with the writer of TensorBoard's files, on ranks that have one."""
        for own in self.sinks:
            if isinstance(own.sink, TensorBoardLogger):
                own.attempt(lambda sink: write(sink.writer))

    def log_console(self, report: StepReport, metrics: dict[str, float]) -> None:
        """One line: the terms of the loss, but not what the step does not have, such as targets or experts."""
        color = self.color
        left_out = {"total"} if report.routing is not None else {"total", "balance"}
        losses = [
            f"{name}: {value:7.4f}  "
            for name, value in report.losses.items()
            if "/" not in name and name not in left_out
        ]
        capacity = metrics.get("routing/capacity_rate/all")
        left = self.time_left(report.step)
        logger.info(
            f"{color.red}step: {report.step:2}  "
            f"{color.green}{''.join(losses)}"
            f"{color.orange}{'' if capacity is None else f'capacity: {capacity:5.3f}  '}"
            f"{color.yellow}grad_norm: {report.grad_norms['all']:8.4f}  "
            f"{color.turquoise}memory: {metrics['perf/memory_gib']:5.2f}GiB  "
            f"{color.blue}tokens/s: {metrics['perf/tokens_per_second']:,.0f}"
            f"{f'  left: {left}' if left else ''}{color.reset}"
        )


def build_metrics(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: ModelArgs
) -> SymbioticMetrics:
    """Fills the train spec's metrics slot."""
    moe_layers = range(model_args.num_dense_layers, model_args.num_layers)
    return SymbioticMetrics(job_config, parallel_dims, model_args.groups, moe_layers)
