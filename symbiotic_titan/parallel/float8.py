"""Float8 training: the model converter ``float8``.

It converts the linear layers of attention, dense feed-forward and shared experts (to torchao's Float8Linear), and the matmuls of the
grouped experts (by replacing their kernel). Routers, heads and embeddings keep the model's precision, as in arXiv 2412.19437
section 3.3.1, and so do the latent modules and the ViT.

Names and shapes of parameters do not change, so checkpoints are interchangeable. Without ``emulate`` this needs a GPU;
``training.checks`` refuses what the GPU cannot do.

Shape letters: sequence/shapes.py. N are rows sorted by expert.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import model_converter as upstream
from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.moe.experts import GroupedExperts, PartitionedMoE, SwiGLUKernel
from symbiotic_titan.moe.float8_matmul import emulated_float8_swiglu

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig


from symbiotic_titan.config.job import Float8
from symbiotic_titan.device import cuda_capability, device_type
from symbiotic_titan.model.args import ModelArgs

NAME = "float8"  # what the user writes into model.converters
FLOAT8_MULTIPLE = 16  # float8 matmuls on a GPU read rows of whole 16 bytes

_LINEAR_LAYERS = re.compile(
    r"^layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]|moe\.shared_experts\.w[123])$"
)


def float8_linear_config(job_config: JobConfig, sharded: bool) -> "Float8LinearConfig":
    """torchao's configuration for what [float8] says; ``sharded``: FSDP gathers the weights."""
    from torchao.float8 import (
        Float8LinearConfig,  # imported lazily, because importing torchao prints warnings
    )

    options = job_config.float8
    return replace(
        Float8LinearConfig.from_recipe_name(options.recipe),
        emulate=options.emulate,
        enable_fsdp_float8_all_gather=options.all_gather and sharded,
    )


def scaled_float8_swiglu() -> SwiGLUKernel:
    """The kernel for a GPU. Operands are bfloat16; each expert's rows are whole blocks of ``FLOAT8_MULTIPLE``, at least one block."""
    # At least one: the rounding kernels cannot be launched on zero rows, and a grouped matmul over zero rows leaves its part of the
    # weights' gradient unwritten on some GPUs (pytorch issue 172439).
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as scaled_mm

    def swiglu(
        rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
    ) -> Tensor:
        offsets_E = counts_E.cumsum(0).to(torch.int32)

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            return scaled_mm(
                x, weight.transpose(1, 2), offsets_E, pad_token_groups_for_grouped_mm=False
            )

        hidden_NF = F.silu(linear(rows_ND, w1_EFD)) * linear(rows_ND, w3_EFD)
        return linear(hidden_NF, w2_EDF)

    return swiglu


def convert_linear_layers(model: nn.Module, config: "Float8LinearConfig") -> tuple[int, list[str]]:
    """(number of layers converted in place, names of those left alone because a dim is not a multiple of 16)."""
    from torchao.float8 import convert_to_float8_training

    linear_layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _LINEAR_LAYERS.match(name)
    }
    fitting = {
        name
        for name, module in linear_layers.items()
        if module.in_features % FLOAT8_MULTIPLE == 0 and module.out_features % FLOAT8_MULTIPLE == 0
    }
    convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: name in fitting
    )
    return len(fitting), sorted(linear_layers.keys() - fitting)


def convert_grouped_experts(model: nn.Module, emulate: bool) -> int:
    """Number of ``GroupedExperts`` converted in place."""
    kernel = emulated_float8_swiglu if emulate else scaled_float8_swiglu()
    num_groups = 0
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.swiglu = kernel
            num_groups += 1
        elif isinstance(module, PartitionedMoE) and not emulate:
            module.block_rows = FLOAT8_MULTIPLE
    return num_groups


class Float8Converter(upstream.ModelConverter):
    """torchtitan's converter interface; it runs before the model is made parallel."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        self.options = job_config.float8
        self.linear_config = float8_linear_config(job_config, parallel_dims.fsdp_enabled)

    def convert(self, model: nn.Module) -> None:
        num_linear, skipped = convert_linear_layers(model, self.linear_config)
        num_groups = (
            convert_grouped_experts(model, self.options.emulate) if self.options.experts else 0
        )
        how = "emulated" if self.options.emulate else "on the GPU"
        logger.info(
            f"float8, {how}: {num_linear} linear layers ({self.options.recipe}), {num_groups} groups of experts"
        )
        if skipped:
            logger.warning(
                f"float8 leaves out {', '.join(skipped)}: a dim is no multiple of {FLOAT8_MULTIPLE}"
            )

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        if self.linear_config.enable_fsdp_float8_all_gather:
            for part in model if isinstance(model, list) else [model]:
                compute_scales(part)


def compute_scales(model: nn.Module) -> None:
    """Compute the scales of all weights that FSDP gathers in float8 with one all-reduce instead of one per weight."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def refresh_scales(model: nn.Module, config: JobConfig) -> None:
    """To be called after weights were changed by other means than an optimizer step."""
    if NAME in config.model.converters and config.float8.all_gather:
        compute_scales(model)


def register_float8() -> None:
    """Make ``model.converters = ["float8"]`` known to torchtitan. Idempotent."""
    if NAME not in upstream._registry_model_converter_cls:
        upstream.register_model_converter(Float8Converter, NAME)  # type: ignore[arg-type]


def check_converters(config: JobConfig) -> None:
    """Converters must be known, and the section of a converter needs that converter."""
    chosen = config.model.converters
    registered = upstream._registry_model_converter_cls
    known = sorted({NAME, *(n for n in registered if not n.startswith("quantize."))})
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"model.converters: unknown converter {name!r}; choose from {', '.join(known)}"
            )
        if chosen.count(name) > 1:
            raise ValueError(f"model.converters: {name!r} is given twice; name it once")
    if config.float8 != Float8() and NAME not in chosen:
        raise ValueError(
            f"[float8] has no effect without its converter; set model.converters = ['{NAME}'] or remove it"
        )


def check_float8(
    config: JobConfig, args: ModelArgs, world_size: int, *, elsewhere: bool = False
) -> None:
    """Refuse float8 where the model, the shield, the number of ranks or the device does not allow it; the device is this one, and not
    asked for a run ``elsewhere``."""
    if NAME not in config.model.converters:
        return
    options = config.float8
    if options.all_gather:
        check_float8_all_gather(config, world_size, elsewhere=elsewhere)
    if config.shielding.enabled and config.shielding.mode == "weights":
        raise ValueError(
            "shielding.mode = 'weights' scales the gradients of the shared experts' weights, which float8 layers do not support; "
            "use shielding.mode = 'output' or train without float8"
        )
    sizes = {"dim": args.dim}
    for group, hidden_dim in zip(args.groups, args.moe_args.hidden_dims, strict=True):
        own = f"the hidden_dim of expert group {group.name!r}"
        sizes["expert_hidden_dim" if group.hidden_dim is None else own] = hidden_dim
    for name, size in sizes.items():
        if options.experts and size % FLOAT8_MULTIPLE != 0:
            raise ValueError(
                f"float8.experts: {name} = {size} of flavor {config.model.flavor!r} is not a multiple of "
                f"{FLOAT8_MULTIPLE}; set float8.experts = false or choose another {'width' if 'group' in name else 'flavor'}"
            )
    if options.emulate:
        return
    if not elsewhere:
        check_float8_device(config)
    if config.training.mixed_precision_param != "bfloat16":
        raise ValueError(
            f"training.mixed_precision_param = {config.training.mixed_precision_param!r}: float8 matmuls return bfloat16; "
            "set it to 'bfloat16', or float8.emulate = true"
        )


def check_float8_all_gather(config: JobConfig, world_size: int, *, elsewhere: bool) -> None:
    """Only FSDP between several GPUs can gather weights in float8."""
    if world_size == 1:
        why = "nothing is gathered on one rank"
    elif device_type() == "cpu" and not elsewhere:
        why = "gloo, which connects CPUs, cannot send float8"
    elif config.training.enable_cpu_offload:
        why = "weights offloaded to the CPU (training.enable_cpu_offload) have no scales there"
    else:
        return
    raise ValueError(f"float8.all_gather = true: {why}; set it to false")


def check_float8_device(config: JobConfig) -> None:
    """Float8 matmuls need a GPU that supports them."""
    options, capability = config.float8, cuda_capability()
    if options.experts:  # the grouped kernel exists for these two generations only
        needed, fits = "9.x or 10.x", capability is not None and capability[0] in (9, 10)
    elif options.recipe == "tensorwise":
        needed, fits = "8.9 or newer", capability is not None and capability >= (8, 9)
    else:
        needed, fits = "9.0 or newer", capability is not None and capability >= (9, 0)
    if not fits:
        found = "there is none" if capability is None else "this one has {}.{}".format(*capability)
        raise ValueError(
            f"model.converters = ['{NAME}'] needs a CUDA device of compute capability {needed}, {found}; "
            "set float8.emulate = true to try it here"
        )
