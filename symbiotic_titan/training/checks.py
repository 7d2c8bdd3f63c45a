"""Rules that span several config sections, checked before anything is built."""

import math
import os
from dataclasses import dataclass, is_dataclass
from typing import Any

from torchtitan.config.job_config import DataLoader
from torchtitan.tools.logging import logger

from symbiotic_titan.codecs.codec import codec_info
from symbiotic_titan.config.data import used_sources
from symbiotic_titan.config.experts import PARTITION_RULES
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.optimizer import OPTIMIZER_BUILDERS
from symbiotic_titan.data.images import aspect_buckets
from symbiotic_titan.data.latents import generates
from symbiotic_titan.data.tokenizer import open_tokenizer
from symbiotic_titan.device import device_type, has_slow_bfloat16, supports_flex_attention
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.moe.partition import check_expert_parallel_degree
from symbiotic_titan.moe.router import check_score
from symbiotic_titan.optim.shield_schedule import check_schedule
from symbiotic_titan.parallel.float8 import check_converters, check_float8
from symbiotic_titan.sequence.geometry import ImageGeometry


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
    Unsupported(
        "parallelism.context_parallel_degree", 1, "use a shorter training.seq_len and more rows"
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


def _value(config: JobConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_supported(config: JobConfig) -> None:
    """Options of torchtitan that this trainer ignores must stay at their defaults."""
    for option in _UNSUPPORTED:
        value = _value(config, option.key)
        if value != option.allowed:
            raise ValueError(
                f"{option.key} = {value!r} is not supported by this trainer; {option.remedy}"
            )
    if config.activation_checkpoint.mode == "memory_budget":
        raise ValueError(
            "activation_checkpoint.mode = 'memory_budget' is not supported by this trainer; "
            "use 'none', 'selective' or 'full'"
        )
    for component in config.compile.components:
        if component not in ("model", "loss"):
            raise ValueError(
                f"compile.components: unknown component {component!r}; choose from model, loss"
            )


def check_numbers(config: JobConfig) -> None:
    """Ranges of torchtitan's numbers, and no float of any section that is not finite."""
    schedule = config.lr_scheduler
    rules = (
        ("metrics.log_freq", config.metrics.log_freq >= 1, "at least 1"),
        ("lr_scheduler.warmup_steps", schedule.warmup_steps >= 0, "zero or positive"),
        ("lr_scheduler.decay_ratio", 0.0 <= (schedule.decay_ratio or 0.0) <= 1.0, "in [0, 1]"),
        ("lr_scheduler.min_lr_factor", 0.0 <= schedule.min_lr_factor <= 1.0, "in [0, 1]"),
        ("training.max_norm", config.training.max_norm > 0, "positive"),
    )
    for key, holds, rule in rules:
        if not holds:
            raise ValueError(f"{key}: must be {rule}, got {_value(config, key)}")
    option = config.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isdigit() and int(option) > 0):
        raise ValueError(
            f"activation_checkpoint.selective_ac_option: must be 'op' or a positive number of layers, got {option!r}"
        )
    _check_finite("", config)


def _check_finite(where: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: must be a finite number, got {value}")
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for name, item in value.items():
            _check_finite(f"{where}.{name}" if where else name, item)
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_finite(f"{where}[{i}]", item)


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
    for key in ("profiling.enable_profiling", "profiling.enable_memory_snapshot"):
        if _value(config, key):
            raise ValueError(
                f"{key} needs an accelerator; on a CPU measure with tools/bench/step.py"
            )
    if config.checkpoint.async_mode == "async_with_pinned_mem":
        raise ValueError(
            "checkpoint.async_mode = 'async_with_pinned_mem' needs an accelerator; use 'async'"
        )
    if config.training.mixed_precision_param == "bfloat16" and has_slow_bfloat16():
        logger.warning(
            "training.mixed_precision_param = 'bfloat16': this CPU has no instructions for it (AVX512, AMX), and steps take several times "
            "as long as with 'float32'"
        )


def check_parallelism(config: JobConfig, args: ModelArgs, world_size: int) -> None:
    """Degrees must factor the number of ranks, the experts and the batch."""
    p = config.parallelism
    replicate, shard = p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    for key in ("data_parallel_replicate_degree", "expert_parallel_degree"):
        if getattr(p, key) < 1:
            raise ValueError(f"parallelism.{key}: must be at least 1, got {getattr(p, key)}")
    if shard == -1:
        shard = world_size // replicate
    if shard < 1 or replicate * shard != world_size:
        raise ValueError(
            f"parallelism: data_parallel_replicate_degree ({replicate}) x data_parallel_shard_degree ({shard}) "
            f"must equal the number of ranks ({world_size}); set the shard degree to -1 to use what is left"
        )
    if replicate > 1 and shard == 1:
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree = {replicate}: replication without sharding is not supported; "
            "use fewer replicas, so that each is sharded over at least 2 ranks"
        )
    if config.training.enable_cpu_offload and world_size == 1:
        raise ValueError(
            "training.enable_cpu_offload = True: FSDP does it, and one rank runs without FSDP; use at least 2 ranks or remove it"
        )
    if shard % p.expert_parallel_degree != 0:
        raise ValueError(
            f"parallelism.expert_parallel_degree = {p.expert_parallel_degree} does not divide the "
            f"{shard} ranks that a replica is sharded over"
        )
    check_expert_parallel_degree(args.groups, p.expert_parallel_degree)
    check_batch(config, world_size)


def check_batch(config: JobConfig, num_data_ranks: int) -> None:
    """The global batch must be whole micro-batches on every rank."""
    local, total = config.training.local_batch_size, config.training.global_batch_size
    if local < 1:
        raise ValueError(f"training.local_batch_size: must be at least 1, got {local}")
    if total > 0 and total % (local * num_data_ranks) != 0:
        raise ValueError(
            f"training.global_batch_size = {total} must be a multiple of training.local_batch_size ({local}) "
            f"x data-parallel ranks ({num_data_ranks}) = {local * num_data_ranks}"
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


def check_validation(config: JobConfig) -> None:
    """Held-out losses need held-out data."""
    if config.validation.enable and not config.validation.sources:
        raise ValueError(
            "validation.enable = true needs held-out data; name at least one source in [[validation.sources]], or set it to false"
        )


def check_sampling(config: JobConfig, geometry: ImageGeometry) -> None:
    """Check that the images can be generated and shown, and that the run trains image generation.

    Raises:
        ValueError: names the key.
    """
    sampling = config.sampling
    why = None
    if not sampling.prompts:
        why = "there are no prompts; give captions in sampling.prompts"
    elif not generates(used_sources(config.data.sources, config.data.stages)):
        why = "no source in [[data.sources]] has target images; add one"
    elif not config.metrics.enable_tensorboard:
        why = "sample grids are shown in TensorBoard; set metrics.enable_tensorboard = true"
    if why is not None:
        raise ValueError(f"sampling.enable = true: {why}, or set it to false")
    codec_info(config.latents)  # raises where latents could not be decoded
    try:
        _check_request(config, geometry)
    except ValueError as error:
        raise ValueError(f"[sampling] {error}") from None


def _check_request(config: JobConfig, geometry: ImageGeometry) -> None:
    # Imported here: training without sample grids loads nothing of inference.
    from symbiotic_titan.flow.solver import SolverOptions
    from symbiotic_titan.inference.images import choose_size
    from symbiotic_titan.inference.prompts import PromptMaker

    sampling, data, side = config.sampling, config.data, geometry.vae_token_pixels
    shift = config.flow.shift if sampling.shift is None else sampling.shift
    SolverOptions(sampling.steps, sampling.sampler, shift, sampling.guidance)
    buckets = aspect_buckets(data.vae_pixels, side, data.max_aspect)
    height, width = choose_size(None, sampling.aspect, buckets)
    maker = PromptMaker(open_tokenizer(config.tokenizer), geometry, data, config.training.seq_len)
    captions = [maker.image(prompt) for prompt in sampling.prompts]
    num_tokens = height // side * (width // side)
    maker.check_room(captions, [num_tokens] * len(captions), "of its image")


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


def check_job(config: JobConfig, *, is_training: bool = True) -> None:
    """All rules that span sections. A single process that does not train holds the whole model, whatever ``[parallelism]`` says.

    Raises:
        ValueError: names key, value, rule and remedy.
    """
    check_supported(config)
    check_numbers(config)
    if config.model.name != "symbiotic":
        raise ValueError(
            f"model.name = {config.model.name!r}: this trainer trains 'symbiotic'; choose its size with model.flavor"
        )
    if config.training.steps < 1:
        raise ValueError(f"training.steps: must be at least 1, got {config.training.steps}")
    if not config.data.sources:
        raise ValueError("[[data.sources]]: none given; name at least one source of samples")
    PARTITION_RULES.check("experts.partition_rule", config.experts.partition_rule)
    OPTIMIZER_BUILDERS.check("optimizer.builder", config.optimizer.builder)
    check_stages(config)
    check_validation(config)
    check_start(config)
    check_ema(config)
    check_converters(config)
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    check_score(args.moe_args.score_function)
    check_z_loss(config, args)
    check_shielding(config, args)
    if config.sampling.enable:
        check_sampling(config, args.geometry)
    check_device(config, args)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if is_training or world_size > 1:
        check_parallelism(config, args, world_size)
    else:
        check_batch(config, num_data_ranks=1)
    check_float8(config, args, world_size)
