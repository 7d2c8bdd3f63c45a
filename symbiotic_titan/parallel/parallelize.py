"""Make a finished single-device model parallel: expert parallelism, activation checkpointing, torch.compile, FSDP2, in this order."""

import torch
import torch.utils.checkpoint
from torch import nn
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe import float8_matmul  # noqa: F401 - registers a custom op that is listed below
from symbiotic_titan.moe.router import Router
from symbiotic_titan.optim.build import (
    freeze_parameters,
)
from symbiotic_titan.parallel.compile import (
    apply_compile,
    checkpointing,
    compiles_model,
)
from symbiotic_titan.parallel.expert_parallel import apply_expert_parallel
from symbiotic_titan.parallel.fsdp import apply_fsdp

# Per-op activation checkpointing saves matrix products, attention and what crossed the network; the rest is recomputed.
_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_grouped_mm.default,
    torch.ops.symbiotic_titan.swiglu_loop.default,
    torch.ops.symbiotic_titan.float8_grouped_linear.default,
    torch.ops.aten.max.default,  # a float8 scale: one number for a whole tensor, costly to compute
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}


def parallelize(
    model: SymbioticModel, parallel_dims: ParallelDims, job_config: JobConfig
) -> SymbioticModel:
    """The parallelize function of the train spec. In a single process the model stays as it is, apart from checkpointing and compile.

    Frozen parameter groups are frozen before anything else, since FSDP reads requires_grad when it shards; routers measure what the
    losses need. Expert parallelism comes next, because it replaces parameters; context parallelism changes no module. Checkpoint wrappers
    come before compile, which looks inside them, and FSDP comes last, because its hooks must stand outside the wrappers and the
    compiled parts.
    """
    freeze_parameters(model, job_config.optimizer.param_groups)
    for module in model.modules():
        if isinstance(module, Router):
            module.measures_z = job_config.losses.weight("z_loss") > 0
    if parallel_dims.ep_enabled:
        apply_expert_parallel(model, parallel_dims.get_mesh("ep"))
    if parallel_dims.cp_enabled:
        from symbiotic_titan.parallel.context_parallel import apply_context_parallel

        apply_context_parallel(model, parallel_dims.get_mesh("cp"))
    apply_activation_checkpoint(model, checkpointing(job_config), job_config.job.dump_folder)
    if compiles_model(job_config):
        apply_compile(model, job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        apply_fsdp(model, parallel_dims, job_config)
        logger.info(
            f"Applied FSDP2: {parallel_dims.dp_replicate} x {parallel_dims.dp_shard} ranks, "
            f"expert parallel {parallel_dims.ep}, context parallel {parallel_dims.cp}"
        )
    return model


def apply_activation_checkpoint(
    model: nn.Module, config: ActivationCheckpoint, base_folder: str
) -> None:
    """Wrap the blocks in ``model.layers`` in place; mode ``none`` does nothing."""
    if config.mode == "none":
        return
    _ignore_profiler_ops()
    apply_ac(model, config, op_sac_save_list=_SAVED_OPS, base_folder=base_folder)


def _ignore_profiler_ops() -> None:
    """Let per-op checkpointing ignore the profiler ops of FSDP's hooks."""
    # From torch 2.13 on FSDP emits these ops inside a checkpointed block. The recomputation emits more of them than the forward
    # did, and per-op checkpointing fails on an op that it has no result for. Older versions have neither the list nor the failure.
    ignored = getattr(torch.utils.checkpoint, "SAC_IGNORED_OPS", None)
    if ignored is not None:
        ignored |= {
            torch.ops.profiler._record_function_enter_new.default,
            torch.ops.profiler._record_function_exit._RecordFunction,
        }
