"""Rules that span several config sections, checked before anything is built."""

import importlib.util
import os
from pathlib import Path

from torchtitan.tools.logging import logger

from symbiotic_titan.build import global_batch_size
from symbiotic_titan.config.files import check_output_folder
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.upstream import (
    check_ranges,
    check_supported,
    value_of,
    warn_of_unused,
)
from symbiotic_titan.data.loader import streams_of_rank
from symbiotic_titan.device import device_type, has_slow_bfloat16, supports_flex_attention
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.moe.partition import check_expert_parallel_degree
from symbiotic_titan.moe.router import check_score
from symbiotic_titan.optim.shield_schedule import check_schedule
from symbiotic_titan.parallel.float8 import check_converters, check_float8
from symbiotic_titan.parallel.ranks import check_degrees
from symbiotic_titan.process import is_first_process


def check_device(config: JobConfig, args: ModelArgs) -> None:
    """Refuse now what would fail on this device only at the first backward; say now what is slow on it."""
    if args.attention_backend == "flex" and not supports_flex_attention():
        raise ValueError(
            "attention_backend = 'flex' needs a CUDA device: FlexAttention has no backward on this one; use 'sdpa'"
        )
    if device_type() != "cpu":
        return
    if config.training.enable_cpu_offload:
        raise ValueError(
            "training.enable_cpu_offload = True needs an accelerator: without one the weights are on the CPU already; remove it"
        )
    for key, why in (
        ("profiling.enable_memory_snapshot", "it records the allocations of one's memory"),
        ("training.gc_debug", "it looks for tensors in one's memory"),
    ):
        if value_of(config, key):
            raise ValueError(f"{key} = true needs an accelerator: {why}; remove it")
    if config.training.dataloader.pin_memory:
        logger.warning("training.dataloader.pin_memory = true has no effect without an accelerator")
    if config.checkpoint.async_mode == "async_with_pinned_mem":
        raise ValueError(
            "checkpoint.async_mode = 'async_with_pinned_mem' needs an accelerator; use 'async'"
        )
    if config.training.mixed_precision_param == "bfloat16" and has_slow_bfloat16():
        logger.warning(
            "training.mixed_precision_param = 'bfloat16': this CPU has no instructions for it (AVX512, AMX), and steps take several times "
            "as long as with 'float32'"
        )


def check_installed(config: JobConfig) -> None:
    """Refuse on this machine what needs a package that it lacks."""
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "metrics.enable_wandb = true needs the package wandb, which is not installed; install it, or set it to false"
        )


def check_profiling(config: JobConfig) -> None:
    """A cycle of the profiler must have room for its warmup and its active steps, and a run for a cycle."""
    profiling = config.profiling
    needed = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < needed:
        raise ValueError(
            f"profiling.profile_freq = {profiling.profile_freq}: must be at least profiling.profiler_warmup + profiler_active = {needed}; "
            "raise it"
        )
    if profiling.enable_profiling and profiling.profile_freq > config.training.steps:
        logger.warning(
            f"profiling.enable_profiling = true has no effect: the first trace is written at step profiling.profile_freq = "
            f"{profiling.profile_freq}, after training.steps = {config.training.steps}; lower it"
        )


def check_compile(config: JobConfig) -> None:
    """Where anything is compiled, torch must have the backend."""
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


def check_parallelism(
    config: JobConfig, args: ModelArgs, world_size: int, *, is_training: bool = True
) -> None:
    """Degrees must factor the number of ranks, the experts and the batch."""
    sharded, num_data_ranks = check_degrees(config, world_size, share_sequences=is_training)
    if config.training.enable_cpu_offload and world_size == 1:
        raise ValueError(
            "training.enable_cpu_offload = True: FSDP does it, and one rank runs without FSDP; use at least 2 ranks or remove it"
        )
    degree = config.parallelism.expert_parallel_degree
    if sharded % degree != 0:
        raise ValueError(
            f"parallelism.expert_parallel_degree = {degree} does not divide the "
            f"{sharded} ranks that a replica is sharded over"
        )
    check_expert_parallel_degree(args.groups, degree)
    check_batch(config, num_data_ranks)


def check_batch(config: JobConfig, num_data_ranks: int) -> None:
    """The global batch must be whole micro-batches on every rank, and the ranks must share the streams of rows evenly."""
    local, total = config.training.local_batch_size, config.training.global_batch_size
    at_once = local * num_data_ranks
    if total > 0 and total % at_once != 0:
        remedy = f"set it to {at_once * max(1, round(total / at_once))}"
        if total % num_data_ranks == 0:
            rows = total // num_data_ranks
            fitting = max(n for n in range(1, local + 1) if rows % n == 0)
            remedy += f", or training.local_batch_size to {fitting}"
        raise ValueError(
            f"training.global_batch_size = {total} must be a multiple of training.local_batch_size ({local}) "
            f"x data-parallel ranks ({num_data_ranks}) = {at_once}; {remedy}"
        )
    rows = global_batch_size(config, num_data_ranks)
    if config.parallelism.fsdp_gradient_sync == "last" and (num_data_ranks == 1 or rows == at_once):
        logger.warning(
            f"parallelism.fsdp_gradient_sync = 'last' has no effect with {num_data_ranks} data-parallel ranks and {rows // at_once} "
            "micro-batches a step"
        )
    num_streams = config.data.num_streams(rows)
    streams_of_rank(num_streams, 0, num_data_ranks)


def check_checkpointed_layers(config: JobConfig, args: ModelArgs) -> None:
    """Activation checkpointing of every N-th layer needs N layers."""
    chosen = config.activation_checkpoint
    every = chosen.selective_ac_option
    if chosen.debug and chosen.mode == "selective" and every == "op":
        raise ValueError(
            "activation_checkpoint.debug = true: torch cannot debug the checkpointing of single operators; set it to false, or choose "
            "another selective_ac_option or mode"
        )
    if chosen.mode == "selective" and every != "op" and int(every) > args.num_layers:
        raise ValueError(
            f"activation_checkpoint.selective_ac_option = {every!r} checkpoints no layer, flavor {config.model.flavor!r} has "
            f"{args.num_layers}; choose at most that, or activation_checkpoint.mode = 'none'"
        )


def check_shielding(config: JobConfig, args: ModelArgs) -> None:
    """Shielding needs shared experts, on whose gradients it acts."""
    check_schedule(config.shielding, config.training.steps)
    if config.shielding.enabled and not args.shared_hidden_dim:
        why, remedy = "experts.shared = false", "keep the shared expert"
        if config.experts.shared:
            why = f"model.flavor = {config.model.flavor!r}, which has no shared expert"
            remedy = "give it one with experts.new_shared_experts"
        raise ValueError(
            f"[shielding] has no effect with {why}; set shielding.steps = 0 and shielding.after_scale = 1, or {remedy}"
        )


def check_stages(config: JobConfig) -> None:
    """Learning rates of [[data.stages]] are those of trained groups; a stage after the last step is reported."""
    rows = {row.name: row for row in config.optimizer.param_groups}
    for number, stage in enumerate(config.data.stages, start=1):
        where = f"[[data.stages]] #{number}"
        for name in stage.lr:
            if name in rows and rows[name].frozen:
                raise ValueError(
                    f"{where}.lr.{name}: the group is frozen, so it has no learning rate; remove it, or train the group"
                )
            # Other builders may name groups of their own; the optimizer is asked when it is built.
            known = list(rows) or ["all"]
            if name not in known and config.optimizer.builder == "param_groups":
                raise ValueError(
                    f"{where}.lr: [[optimizer.param_groups]] has no group {name!r}; choose from {', '.join(known)}"
                )
        if stage.from_step > config.training.steps:
            logger.warning(
                f"{where}: from_step = {stage.from_step} has no effect, the run ends at training.steps = {config.training.steps}"
            )


def check_ema(config: JobConfig) -> None:
    """[ema] averages trained groups, and is on where its average is used."""
    for name in ("validation", "sampling"):
        if getattr(config, name).weights == "ema" and not config.ema.enable:
            raise ValueError(
                f"{name}.weights = 'ema': no average is kept with ema.enable = false; set it to true, or {name}.weights = 'trained'"
            )
    if not config.ema.enable:
        return
    from symbiotic_titan.optim.ema import averaged_groups

    averaged_groups(config)  # raises where a group is unknown or not trained
    if config.checkpoint.last_save_model_only:
        raise ValueError(
            "checkpoint.last_save_model_only = true: the last checkpoint would lack the average of [ema]; set it to false (symbiotic "
            "convert to-hf --weights ema writes the averaged model alone)"
        )


def check_stability(config: JobConfig) -> None:
    """A run that rolls back needs checkpoints of its own."""
    options = config.checkpoint
    if config.stability.on_bad_step != "roll_back":
        return
    for key, refused in (("enable", False), ("load_only", True)):
        if getattr(options, key) is refused:
            raise ValueError(
                f"stability.on_bad_step = 'roll_back': the run saves no checkpoint to go back to with checkpoint.{key} = "
                f"{str(refused).lower()}; change that, or choose 'skip'"
            )
    if options.interval >= config.training.steps:
        logger.warning(
            f"stability.on_bad_step = 'roll_back' has no effect: with checkpoint.interval = {options.interval} no step of training.steps = "
            f"{config.training.steps} follows a checkpoint to go back to, so a bad one stops the run; choose a smaller interval"
        )


def check_start(config: JobConfig) -> None:
    """The checkpointer reads initial weights, so it must be enabled."""
    path, enabled = config.checkpoint.initial_load_path, config.checkpoint.enable
    if config.checkpoint.initial_load_weights == "ema":
        key = "checkpoint.initial_load_weights = 'ema'"
        if not path:
            raise ValueError(
                f"{key} needs checkpoint.initial_load_path; name a checkpoint that has an average, or use 'trained'"
            )
        if not config.checkpoint.initial_load_model_only:
            raise ValueError(
                f"{key}: the optimizer state of {path} belongs to the trained weights; set checkpoint.initial_load_model_only = true, "
                "or use 'trained'"
            )
    if path and not enabled:
        raise ValueError(
            f"checkpoint.initial_load_path = {path!r} has no effect with checkpoint.enable = false; set it to true, or remove "
            "the path"
        )


def check_folders(config: JobConfig, *, elsewhere: bool = False) -> None:
    """Refuse folders of the run that cannot be written. The first process looks: a folder that another one tries out, and removes again,
    would seem to be one."""
    if not is_first_process():
        return
    dump = Path(config.job.dump_folder)
    folders = {"job.dump_folder": dump}
    if config.checkpoint.enable and not config.checkpoint.load_only:
        folders["checkpoint.folder"] = dump / config.checkpoint.folder
    if config.metrics.enable_tensorboard or config.metrics.enable_wandb:
        folders["metrics.save_tb_folder"] = dump / config.metrics.save_tb_folder
    for key, folder in folders.items():
        check_output_folder(folder, key, elsewhere=elsewhere)


def check_validation(config: JobConfig) -> None:
    """Held-out losses need held-out data."""
    if config.validation.enable and not config.validation.sources:
        raise ValueError(
            "validation.enable = true needs held-out data; name at least one source in [[validation.sources]], or set it to false"
        )


def check_task_weights(config: JobConfig) -> None:
    """Tasks of ``losses.task_weights`` are those of a source."""
    tasks = sorted({row.task for row in config.data.sources})
    for task in config.losses.task_weights:
        if task not in tasks:
            raise ValueError(
                f"losses.task_weights.{task}: no source has this task; there are {', '.join(tasks)}"
            )


def check_z_loss(config: JobConfig, args: ModelArgs) -> None:
    """Rules of ``losses.z_loss``."""
    weight = config.losses.weight("z_loss")
    if not weight:
        return
    if args.score_function != "softmax":
        raise ValueError(
            f"losses.z_loss = {weight}: is the squared logsumexp that a softmax divides by, and the router's scores are "
            f"{args.score_function!r}; set it to 0, or experts.score_function = 'softmax'"
        )
    if args.num_dense_layers == args.num_layers:
        raise ValueError(
            f"losses.z_loss = {weight}: flavor {config.model.flavor!r} has no layer with a router; set it to 0"
        )


def check_job(
    config: JobConfig,
    num_ranks: int | None = None,
    *,
    is_training: bool = True,
    elsewhere: bool = False,
) -> None:
    """All rules that span sections. A single process that does not train holds the whole model, whatever ``[parallelism]`` says.

    num_ranks: of the run; None: those that torchrun has started.
    elsewhere: the run is on another machine, so what this one has is not asked.

    Raises:
        ValueError: names key, value, rule and remedy.
    """
    check_ranges(config)
    check_supported(config)
    warn_of_unused(config)
    check_profiling(config)
    check_compile(config)
    if config.model.name != "symbiotic":
        raise ValueError(
            f"model.name = {config.model.name!r}: this trainer trains 'symbiotic'; choose its size with model.flavor"
        )
    if not config.data.sources:
        raise ValueError("[[data.sources]]: none given; name at least one source of samples")
    check_stages(config)
    check_task_weights(config)
    check_validation(config)
    check_start(config)
    check_ema(config)
    check_stability(config)
    check_converters(config)
    args = model_args(config)
    check_score(args.moe_args.score_function)
    check_z_loss(config, args)
    check_shielding(config, args)
    check_checkpointed_layers(config, args)
    if config.sampling.enable:
        from symbiotic_titan.training.check_parts import check_sampling  # loads the generator

        check_sampling(config, args.geometry, elsewhere=elsewhere)
    if is_training:
        check_folders(config, elsewhere=elsewhere)
    if not elsewhere:
        check_installed(config)
        check_device(config, args)
    if num_ranks is None:
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if is_training or num_ranks > 1:
        check_parallelism(config, args, num_ranks, is_training=is_training)
    else:
        check_batch(config, num_data_ranks=1)
    check_float8(config, args, num_ranks, elsewhere=elsewhere)


def check_run(config: JobConfig, num_ranks: int) -> list[str]:
    """Refuse what a run on ``num_ranks`` ranks of another machine would refuse before it builds the model. Returns what depends on that
    machine and was not checked, in words.

    Raises:
        ValueError: the same message as from the run.
    """
    from symbiotic_titan.training.check_parts import check_parts  # loads the data pipeline

    check_job(config, num_ranks, elsewhere=True)
    return check_parts(config)
