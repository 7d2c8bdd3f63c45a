"""What is logged, under which name, and the console line of a step."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import LoggerContainer, MetricsProcessor, TensorBoardLogger
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flops import ModelCost
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.moe.statistics import capacity_rate, idle_experts, imbalance_ratio
from symbiotic_titan.sequence.modality import MODALITY_NAMES, NUM_MODALITIES


@dataclass(frozen=True)
class StepReport:
    """What one logged step has to tell; all numbers are over all ranks.

    losses       by name; ``total``, ``text``, ``flow``, ``balance`` and ``by_task/*``.
    grad_norms   before clipping; ``all`` and one per parameter group.
    rates        learning rate of each parameter group.
    assignments  (layers, modalities, E) routed assignments of the step; None without MoE layers.
    fill         share of positions that are not padding.
    tokens_seen  (modalities,) tokens since the start of training.
    """

    step: int
    losses: dict[str, float]
    grad_norms: dict[str, float]
    rates: dict[str, float]
    assignments: torch.Tensor | None
    shield_scale: float
    fill: float
    num_skipped: int
    tokens_seen: torch.Tensor


def group_grad_norms(groups: list[dict[str, Any]]) -> dict[str, float]:
    """L2 norm of the gradient of each parameter group. A collective where parameters are sharded."""
    norms = {}
    for group in groups:
        by_mesh: dict[Any, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                by_mesh.setdefault(mesh, []).append(parameter.grad)
        squares = 0.0
        for grads in by_mesh.values():
            norm = torch.nn.utils.get_total_norm(grads)
            squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
        norms[group["name"]] = squares**0.5
    return norms


def routing_metrics(
    assignments_LME: torch.Tensor, groups: tuple[ExpertGroup, ...], capacity_factor: float
) -> dict[str, float]:
    """Routing statistics, averaged over layers, of modalities that have tokens.

    Experts are compared with those of their own group: a token cannot reach the others, so a group is uniform when its own
    experts share its tokens evenly. ``all`` is the mean over groups, weighted by their assignments (idle experts: the sum).
    """
    by_group = assignments_LME.split([group.num_experts for group in groups], dim=-1)
    metrics: dict[str, float] = {}
    total = float(assignments_LME.sum())
    weighted = {"capacity_rate": 0.0, "imbalance": 0.0}
    idle = 0.0
    for group, counts_LME in zip(groups, by_group, strict=True):
        for modality in group.modalities:
            counts_LE = counts_LME[:, modality]
            if counts_LE.sum() > 0:
                name = MODALITY_NAMES[modality]
                for key, value in _expert_use(counts_LE, capacity_factor).items():
                    metrics[f"routing/{key}/{name}"] = value
        counts_LE = counts_LME.sum(1)
        if counts_LE.sum() > 0:
            use = _expert_use(counts_LE, capacity_factor)
            idle += use["idle_experts"]
            for key in weighted:
                weighted[key] += use[key] * float(counts_LE.sum()) / total
    for key, value in {**weighted, "idle_experts": idle}.items():
        metrics[f"routing/{key}/all"] = value
    return metrics


def _expert_use(counts_LE: torch.Tensor, capacity_factor: float) -> dict[str, float]:
    """Means over layers of the statistics of one group's counts."""
    return {
        "capacity_rate": float(capacity_rate(counts_LE, capacity_factor).mean()),
        "imbalance": float(imbalance_ratio(counts_LE).mean()),
        "idle_experts": float(idle_experts(counts_LE).float().mean()),
    }


class SymbioticMetrics(MetricsProcessor):
    """torchtitan's loggers and memory monitor, with this project's metric names."""

    time_last_log: float
    ntokens_since_last_log: int

    def __init__(
        self, job_config: JobConfig, parallel_dims: ParallelDims, groups: tuple[ExpertGroup, ...]
    ) -> None:
        super().__init__(job_config, parallel_dims)
        self.groups = groups
        self.num_steps = job_config.training.steps
        self.capacity_factor = job_config.experts.capacity_factor
        self.last_logged_step: int | None = None
        self.cost: ModelCost | None = None  # set by the trainer, which has the model
        self.tokens_at_last_log = torch.zeros(NUM_MODALITIES, dtype=torch.int64)

    def should_log(self, step: int) -> bool:
        """As upstream, and the last step."""
        return super().should_log(step) or step == self.num_steps

    def flops_per_token(self, tokens_seen: torch.Tensor) -> float:
        """Training FLOPs of a token, with the modalities' real shares since the last call."""
        assert self.cost is not None
        shares = (tokens_seen - self.tokens_at_last_log).tolist()
        self.tokens_at_last_log = tokens_seen.clone()
        return self.cost.training_flops_per_token(tuple(float(share) for share in shares))

    def performance(self, step: int, tokens_seen: torch.Tensor) -> dict[str, float]:
        """Throughput since the last call; model FLOPS utilisation only where the device's peak is known."""
        elapsed = time.perf_counter() - self.time_last_log
        num_steps = max(step - (self.last_logged_step or step - 1), 1)
        tokens_per_second = self.ntokens_since_last_log / elapsed
        loading = sum(self.data_loading_times)
        per_device = tokens_per_second / self.parallel_dims.world_size
        flops = self.flops_per_token(tokens_seen) * per_device
        utilisation = 100 * flops / self.gpu_peak_flops
        memory = self.device_memory_monitor.get_peak_stats()
        metrics = {
            "perf/tokens_per_second": tokens_per_second,
            "perf/tflops_per_device": flops / 1e12,
            "perf/step_seconds": elapsed / num_steps,
            "perf/data_loading_percent": 100 * loading / elapsed,
            "perf/memory_gib": memory.max_reserved_gib,
        }
        if utilisation == utilisation:  # nan where the peak is unknown
            metrics["perf/mfu"] = utilisation
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
        self.time_last_log = time.perf_counter()
        self.last_logged_step = step
        return metrics

    def log_step(self, report: StepReport) -> None:
        """Write one step to TensorBoard (or W&B) and to the console."""
        metrics = {f"loss/{name}": value for name, value in report.losses.items()}
        metrics |= {f"grad_norm/{name}": value for name, value in report.grad_norms.items()}
        metrics |= {f"lr/{name}": value for name, value in report.rates.items()}
        if report.assignments is not None:
            metrics |= routing_metrics(report.assignments, self.groups, self.capacity_factor)
        metrics |= {
            f"tokens/{name}": int(count)
            for name, count in zip(MODALITY_NAMES, report.tokens_seen, strict=True)
        }
        metrics |= {"shield/scale": report.shield_scale}
        metrics |= {"data/fill": report.fill, "data/skipped": report.num_skipped}
        metrics |= self.performance(report.step, report.tokens_seen)
        self.logger.log(metrics, report.step)
        self.log_heat_maps(report)
        self.log_console(report, metrics)

    def log_heat_maps(self, report: StepReport) -> None:
        """One image per modality: layers down, experts across; white is the layer's most used expert."""
        writers = [
            sink.writer
            for sink in getattr(self.logger, "_loggers", [])
            if isinstance(self.logger, LoggerContainer) and isinstance(sink, TensorBoardLogger)
        ]
        if not writers or report.assignments is None:
            return
        for i, name in enumerate(MODALITY_NAMES):
            counts_LE = report.assignments[:, i].float().cpu()
            if counts_LE.sum() == 0:
                continue
            shares_LE = counts_LE / counts_LE.max(dim=1, keepdim=True).values.clamp(min=1)
            image = shares_LE.repeat_interleave(16, 0).repeat_interleave(8, 1).unsqueeze(0)
            for writer in writers:
                writer.add_image(f"routing/experts/{name}", image, report.step)

    def log_console(self, report: StepReport, metrics: dict[str, float]) -> None:
        color = self.color
        capacity = metrics.get("routing/capacity_rate/all", float("nan"))
        logger.info(
            f"{color.red}step: {report.step:2}  "
            f"{color.green}text: {report.losses['text']:7.4f}  flow: {report.losses['flow']:7.4f}  "
            f"balance: {report.losses['balance']:6.3f}  "
            f"{color.orange}capacity: {capacity:5.3f}  "
            f"{color.yellow}grad_norm: {report.grad_norms['all']:8.4f}  "
            f"{color.turquoise}memory: {metrics['perf/memory_gib']:5.2f}GiB  "
            f"{color.blue}tokens/s: {metrics['perf/tokens_per_second']:,.0f}{color.reset}"
        )


def build_metrics(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: ModelArgs
) -> SymbioticMetrics:
    """Fills the train spec's metrics slot."""
    return SymbioticMetrics(job_config, parallel_dims, model_args.groups)
