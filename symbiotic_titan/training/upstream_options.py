"""Rules for torchtitan's own options: those that this trainer ignores, and the ranges of the others."""

import importlib.util
import math
from dataclasses import dataclass, is_dataclass
from typing import Any

from torchtitan.config.job_config import DataLoader

from symbiotic_titan.config.job import JobConfig

FLOAT32_MAX = 3.4e38  # of larger numbers torch makes infinities


@dataclass(frozen=True)
class Unsupported:
    """A torchtitan option that this trainer ignores, so it must stay at its default ``allowed``."""

    key: str
    allowed: Any
    remedy: str


_UNSUPPORTED = (
    Unsupported(
        "parallelism.tensor_parallel_degree",
        1,
        "use parallelism.expert_parallel_degree and FSDP",
    ),
    Unsupported("parallelism.pipeline_parallel_degree", 1, "use FSDP and expert parallelism"),
    Unsupported("parallelism.context_parallel_load_balancer", "headtail", "leave it at 'headtail'"),
    Unsupported(
        "parallelism.context_parallel_rotate_method", "allgather", "leave it at 'allgather'"
    ),
    Unsupported("parallelism.expert_tensor_parallel_degree", 1, "leave it at 1"),
    Unsupported("parallelism.expert_parallel_comm_backend", "standard", "leave it at 'standard'"),
    Unsupported("training.dataset", "c4_test", "name files in [[data.sources]]"),
    Unsupported("training.dataset_path", None, "name files in [[data.sources]]"),
    Unsupported(
        "training.dataloader.persistent_workers",
        False,
        "loader workers always live as long as the run",
    ),
    Unsupported("validation.dataset", "c4_validation", "name files in [[validation.sources]]"),
    Unsupported("validation.dataset_path", None, "name files in [[validation.sources]]"),
    Unsupported("validation.local_batch_size", 8, "validation uses the batch size of training"),
    Unsupported("validation.seq_len", 2048, "validation uses training.seq_len"),
    Unsupported(
        "validation.dataloader", DataLoader(), "held-out sequences are packed once, before training"
    ),
    Unsupported("fault_tolerance.enable", False, "resume from a checkpoint"),
    Unsupported("memory_estimation.enable", False, "run a few steps with metrics on"),
    Unsupported(
        "optimizer.early_step_in_backward",
        False,
        "gradients are clipped, which needs all of them at once",
    ),
    Unsupported("checkpoint.last_save_in_hf", False, "save a distributed checkpoint"),
    Unsupported(
        "checkpoint.initial_load_in_hf",
        False,
        "leave it out; checkpoint.initial_load_path is read according to what it contains",
    ),
    Unsupported(
        "checkpoint.create_seed_checkpoint",
        False,
        "initial weights do not depend on the number of ranks",
    ),
    Unsupported(
        "parallelism.enable_async_tensor_parallel", False, "there is no tensor parallelism"
    ),
    Unsupported("model.tokenizer_path", None, "name the file in tokenizer.path"),
    Unsupported("comm.mode", "default", "for a dry run use `symbiotic show-parallel`"),
    Unsupported("debug.moe_force_load_balance", False, "train with real routing"),
)


def value_of(config: JobConfig, key: str) -> Any:
    """The value of ``section.key``, or of a key in a section of a section."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_supported(config: JobConfig) -> None:
    """Options of torchtitan that this trainer ignores must stay at their defaults."""
    for option in _UNSUPPORTED:
        value = value_of(config, option.key)
        if value != option.allowed:
            raise ValueError(
                f"{option.key} = {value!r} is not supported by this trainer; {option.remedy}"
            )
    if config.activation_checkpoint.mode == "memory_budget":
        raise ValueError(
            "activation_checkpoint.mode = 'memory_budget' is not supported by this trainer; "
            "use 'none', 'selective' or 'full'"
        )
    check_compile(config)


# Key -> the smallest value; None is allowed where it is the default.
_AT_LEAST = {
    "training.seq_len": 1,
    "training.local_batch_size": 1,
    "training.steps": 1,
    "training.gc_freq": 1,
    "training.dataloader.num_workers": 0,
    "training.dataloader.prefetch_factor": 1,
    "lr_scheduler.warmup_steps": 0,
    "lr_scheduler.total_steps": 1,
    "metrics.log_freq": 1,
    "checkpoint.load_step": -1,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.trace_buf_size": 0,
}


def check_numbers(config: JobConfig) -> None:
    """Ranges of torchtitan's numbers, and no float of any section that is not a finite float32."""
    for key, least in _AT_LEAST.items():
        value = value_of(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key}: must be at least {least}, got {value}")
    schedule, seed = config.lr_scheduler, config.debug.seed
    rules = (
        ("lr_scheduler.decay_ratio", 0.0 <= (schedule.decay_ratio or 0.0) <= 1.0, "in [0, 1]"),
        ("lr_scheduler.min_lr_factor", 0.0 <= schedule.min_lr_factor <= 1.0, "in [0, 1]"),
        ("training.max_norm", config.training.max_norm > 0, "positive"),
        ("debug.seed", seed is None or 0 <= seed < 2**63, "in [0, 2**63)"),
        (
            "training.global_batch_size",
            config.training.global_batch_size >= 1 or config.training.global_batch_size == -1,
            "positive, or -1 for one micro-batch on each rank",
        ),
    )
    for key, holds, rule in rules:
        if not holds:
            raise ValueError(f"{key}: must be {rule}, got {value_of(config, key)}")
    option = config.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isdigit() and int(option) > 0):
        raise ValueError(
            f"activation_checkpoint.selective_ac_option: must be 'op' or a positive number of layers, got {option!r}"
        )
    _check_finite("", config)


def _check_finite(where: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: must be a finite number, got {value}")
    if isinstance(value, float) and abs(value) > FLOAT32_MAX:
        raise ValueError(f"{where}: must be at most {FLOAT32_MAX} in size, got {value}")
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for name, item in value.items():
            _check_finite(f"{where}.{name}" if where else name, item)
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_finite(f"{where}[{i}]", item)


def check_installed(config: JobConfig) -> None:
    """Refuse on this machine what needs a package that it lacks."""
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "metrics.enable_wandb = true needs the package wandb, which is not installed; install it, or set it to false"
        )


def check_compile(config: JobConfig) -> None:
    """The parts to compile and, where anything is compiled, torch's backend."""
    for component in config.compile.components:
        if component not in ("model", "loss"):
            raise ValueError(
                f"compile.components: unknown component {component!r}; choose from model, loss"
            )
    if not config.compile.enable:
        return
    # Imported here: it takes as long as all other imports of a check, and is needed by what compiles.
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=())
    if config.compile.backend not in known:
        usual = ", ".join(list_backends())
        raise ValueError(
            f"compile.backend = {config.compile.backend!r}: torch has no such backend; choose from {usual}"
        )
