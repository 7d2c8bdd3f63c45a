"""Every key of the config: what it may be. Of torchtitan's own: the ranges, and those that this trainer ignores, which are refused."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast, get_type_hints

import tyro
from torchtitan.config.job_config import (
    DataLoader,
    FaultTolerance,
    MemoryEstimation,
    Quantize,
)
from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.rows import (
    LINE,
    MODULE,
    PATH,
    PATH_OR_NONE,
    POSITIVE,
    SEED,
    SHARE,
    STEPS,
    TEXT,
    Range,
    Rows,
    Rule,
    Text,
    check_row,
    check_value,
    rules_in,
    shown,
)
from symbiotic_titan.registry import Registry, registry_of


@dataclass(frozen=True)
class Unsupported:
    """A torchtitan option, or a section of them, that this trainer ignores, so it must stay at its default ``allowed``."""

    key: str
    allowed: Any
    remedy: str


UNSUPPORTED = (
    Unsupported(
        "parallelism.tensor_parallel_degree",
        1,
        "use parallelism.expert_parallel_degree and FSDP",
    ),
    Unsupported("parallelism.pipeline_parallel_degree", 1, "use FSDP and expert parallelism"),
    Unsupported(
        "parallelism.disable_loss_parallel", False, "remove it, there is no tensor parallelism"
    ),
    *(
        Unsupported(f"parallelism.{key}", default, "remove it, there is no pipeline parallelism")
        for key, default in (
            ("module_fqns_per_model_part", None),
            ("pipeline_parallel_first_stage_less_layers", 1),
            ("pipeline_parallel_last_stage_less_layers", 1),
            ("pipeline_parallel_layers_per_stage", None),
            ("pipeline_parallel_schedule", "1F1B"),
            ("pipeline_parallel_schedule_csv", ""),
            ("pipeline_parallel_microbatch_size", 1),
            ("pipeline_parallel_expert_parallel_overlap", True),
        )
    ),
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
    Unsupported("fault_tolerance", FaultTolerance(), "resume from a checkpoint"),
    Unsupported("checkpoint.enable_ft_dataloader_checkpoints", True, "resume from a checkpoint"),
    Unsupported("memory_estimation", MemoryEstimation(), "run a few steps with metrics on"),
    Unsupported(
        "activation_checkpoint.memory_budget", 0.5, "choose an activation_checkpoint.mode instead"
    ),
    Unsupported(
        "activation_checkpoint.visualize_memory_budget_pareto",
        False,
        "choose an activation_checkpoint.mode instead",
    ),
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
        "checkpoint.initial_load_in_hf_quantized",
        False,
        "leave it out; checkpoint.initial_load_path is read according to what it contains",
    ),
    Unsupported(
        "checkpoint.create_seed_checkpoint",
        False,
        "initial weights do not depend on the number of ranks",
    ),
    Unsupported(
        "parallelism.enable_async_tensor_parallel",
        False,
        "remove it, there is no tensor parallelism",
    ),
    Unsupported("model.tokenizer_path", None, "name the file in tokenizer.path"),
    Unsupported(
        "model.hf_assets_path",
        ".",
        "name a tokenizer in tokenizer.path, weights in checkpoint.initial_load_path",
    ),
    Unsupported("experimental.custom_args_module", "", "use job.custom_config_module"),
    Unsupported(
        "quantize",
        Quantize(),
        "its converters do not handle grouped experts; use model.converters = ['float8'] and [float8]",
    ),
    Unsupported("comm.mode", "default", "for a dry run use `symbiotic show-parallel`"),
    Unsupported("debug.moe_force_load_balance", False, "train with real routing"),
)

# (key of torchtitan, a choice of it that this trainer does not have, remedy).
REFUSED_CHOICES = (
    ("activation_checkpoint.mode", "memory_budget", "use 'none', 'selective' or 'full'"),
)


def value_of(config: JobConfig, key: str) -> Any:
    """The value of ``section.key``, or of a key in a section of a section."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_supported(config: JobConfig) -> None:
    """Options of torchtitan that this trainer ignores must stay at their defaults."""
    for option in UNSUPPORTED:
        key, value = _first_difference(option.key, value_of(config, option.key), option.allowed)
        if value != option.allowed:
            raise ValueError(
                f"{key} = {shown(value)} is not supported by this trainer; {option.remedy}"
            )
    for key, choice, remedy in REFUSED_CHOICES:
        if value_of(config, key) == choice:
            raise ValueError(f"{key} = {choice!r} is not supported by this trainer; {remedy}")


@dataclass(frozen=True)
class Unused:
    """An option of torchtitan that does nothing ``without`` another one, told by its ``has_effect``, and is then at its ``default``."""

    key: str
    default: Any
    without: str
    has_effect: Callable[[JobConfig], bool]


UNUSED = (
    *(
        Unused(
            f"checkpoint.{key}", False, "checkpoint.enable = true", lambda c: c.checkpoint.enable
        )
        for key in ("load_only", "enable_first_step_checkpoint", "last_save_model_only")
    ),
    Unused(
        "checkpoint.export_dtype",
        "float32",
        "checkpoint.last_save_model_only = true",
        lambda c: c.checkpoint.last_save_model_only,
    ),
    Unused(
        "checkpoint.initial_load_model_only",
        True,
        "checkpoint.initial_load_path",
        lambda c: bool(c.checkpoint.initial_load_path),
    ),
    Unused(
        "activation_checkpoint.selective_ac_option",
        "2",
        "activation_checkpoint.mode = 'selective'",
        lambda c: c.activation_checkpoint.mode == "selective",
    ),
    Unused("compile.backend", "inductor", "compile.enable = true", lambda c: c.compile.enable),
    Unused(
        "training.dataloader.prefetch_factor",
        None,
        "training.dataloader.num_workers",
        lambda c: c.training.dataloader.num_workers > 0,
    ),
    Unused(
        "debug.deterministic_warn_only",
        False,
        "debug.deterministic = true",
        lambda c: c.debug.deterministic,
    ),
)


def warn_of_unused(config: JobConfig) -> None:
    """A line for each option that is set and has no effect, where it may wait for another one that switches it on."""
    for option in UNUSED:
        value = value_of(config, option.key)
        if value != option.default and not option.has_effect(config):
            logger.warning(
                f"{option.key} = {shown(value)} has no effect without {option.without}; set that, or remove it"
            )


def _first_difference(key: str, value: Any, allowed: Any) -> tuple[str, Any]:
    """The key whose value is not the allowed one, and that value: in a section, that of a key in it."""
    if is_dataclass(allowed) and value != allowed:
        for f in fields(allowed):
            own = getattr(value, f.name)
            if own != getattr(allowed, f.name):
                return _first_difference(f"{key}.{f.name}", own, getattr(allowed, f.name))
    return key, value


_ROWS = Range(1, 2**16)  # of a batch, each with a stream of its own
_DEGREE = Range(1, 2**20)
_STEPS_OR_NONE = Range(0, 10**9)
_TIMEOUT = Range(1, 10**7)  # seconds; torch's are 64-bit nanoseconds

# Key of a section that is torchtitan's -> its range. Ours are written in the annotations of our own classes. Keys that must stay at
# their defaults (``UNSUPPORTED``) need none.
RANGES: dict[str, Rule] = {
    "job.config_file": PATH,
    "job.dump_folder": PATH,
    "job.description": TEXT,
    "job.save_config_file": PATH,
    "job.custom_config_module": MODULE,
    "profiling.save_traces_folder": PATH,
    "profiling.profile_freq": STEPS,
    "profiling.profiler_active": STEPS,
    "profiling.profiler_warmup": _STEPS_OR_NONE,
    "profiling.save_memory_snapshot_folder": PATH,
    "metrics.log_freq": STEPS,
    "metrics.save_tb_folder": PATH,
    "model.converters": LINE,
    "lr_scheduler.warmup_steps": _STEPS_OR_NONE,
    "lr_scheduler.total_steps": STEPS,
    "lr_scheduler.decay_ratio": SHARE,
    "lr_scheduler.min_lr_factor": SHARE,
    "training.local_batch_size": _ROWS,
    "training.global_batch_size": replace(_ROWS, also={-1: "one micro-batch on each rank"}),
    "training.seq_len": Range(1, 2**20),
    "training.max_norm": POSITIVE,
    "training.steps": STEPS,
    "training.gc_freq": STEPS,
    "training.dataloader.num_workers": Range(0, 4096),
    "training.dataloader.prefetch_factor": Range(1, 1024),
    "parallelism.data_parallel_replicate_degree": _DEGREE,
    "parallelism.data_parallel_shard_degree": replace(_DEGREE, also={-1: "all ranks left"}),
    "parallelism.context_parallel_degree": _DEGREE,
    "parallelism.expert_parallel_degree": _DEGREE,
    "parallelism.context_parallel_load_balancer": LINE,  # torchtitan refuses "" by itself
    "checkpoint.folder": PATH,
    "checkpoint.interval": STEPS,
    "checkpoint.initial_load_path": PATH_OR_NONE,
    "checkpoint.keep_latest_k": Range(
        2,
        10**6,
        also={0: "all"},
        remedy="the newest may still be in the middle of its save, so one alone cannot be kept",
    ),
    "checkpoint.load_step": Range(-1, 10**9),
    "checkpoint.exclude_from_loading": LINE,
    "activation_checkpoint.selective_ac_option": Text(
        "'op' or a positive number of layers", r"op|[1-9]\d{0,5}"
    ),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": LINE,
    "activation_checkpoint.determinism_check": Text("'default' or 'none'", "default|none"),
    "compile.components": Text("'model' or 'loss'", "model|loss"),
    "compile.backend": LINE,
    "comm.init_timeout_seconds": _TIMEOUT,
    "comm.train_timeout_seconds": _TIMEOUT,
    "comm.trace_buf_size": Range(0, 10**8),
    "comm.save_traces_folder": PATH,
    "comm.save_traces_file_prefix": PATH_OR_NONE,
    "experimental.custom_import": MODULE,
    "debug.seed": SEED,
}


@dataclass(frozen=True)
class Setting:
    """A key of the config.

    annotation    its type, without what else the annotation says.
    rules         its range; a bool, a Literal and what names a part of a ``registry`` have none but their values.
    in_file_only  whether the command line cannot set it.
    row           the class of its tables, if it is a list or a table of them.
    """

    annotation: Any
    rules: tuple[Rule, ...]
    in_file_only: bool
    registry: Registry[Any] | None
    row: type | None


def settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """``section.key`` -> what it is, for every field of a config class and of the sections in it: all that a user can set."""
    for name, setting in own_settings(cls, prefix).items():
        if isinstance(setting, Setting):
            yield name, setting
        else:
            yield from settings(setting, f"{name}.")


@functools.lru_cache(maxsize=256)
def own_settings(cls: type, prefix: str = "") -> Mapping[str, Setting | type]:
    """The same for the fields of ``cls`` itself, and the class of each section in it."""
    found: dict[str, Setting | type] = {}
    hints = get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        hint, key = hints[f.name], f"{prefix}{f.name}"
        notes = getattr(hint, "__metadata__", ())
        rows = [note.row for note in notes if isinstance(note, Rows)]
        if is_dataclass(hint):
            found[key] = cast(type, hint)
            continue
        found[key] = Setting(
            hint.__origin__ if notes else hint,
            (*rules_in(hint), *((RANGES[key],) if key in RANGES else ())),
            tyro.conf.Fixed in notes,
            registry_of(f),
            rows[0] if rows else None,
        )
    return found


def check_setting(key: str, value: Any, setting: Setting) -> None:
    """Pass if ``value`` is one that the setting ``key`` can have.

    Raises:
        ValueError: names key, value and rule.
    """
    if setting.registry is not None and isinstance(value, str):
        setting.registry.check(key, value)
    else:
        check_value(key, value, setting.annotation, setting.rules)


def check_ranges(config: JobConfig) -> None:
    """Every key of a config that was read, or changed since, has its type and range."""
    for key, setting in settings(type(config)):
        value = value_of(config, key)
        check_setting(key, value, setting)
        rows = value if isinstance(value, list) else value.values() if setting.row else ()
        for number, row in enumerate(rows, 1):
            if setting.row is not None and isinstance(row, setting.row):
                check_row(f"{key} #{number}", row)
