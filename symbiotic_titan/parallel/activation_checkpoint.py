"""Activation checkpointing: torchtitan's, with the list of results that the per-op mode saves."""

import torch
import torch.utils.checkpoint
from torch import nn
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

from symbiotic_titan.moe import (  # noqa: F401 - they register ops
    float8_matmul,
)

# The per-op mode keeps matrix products, attention and what crossed the network; the rest is recomputed.
_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_grouped_mm.default,
    torch.ops.symbiotic_titan.swiglu_loop.default,
    torch.ops.symbiotic_titan.float8_grouped_linear.default,
    torch.ops.aten.max.default,  # a float8 scale is one number for a whole tensor
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}


def _ignore_profiler_ops() -> None:
    """From torch 2.13 on, FSDP's profiler marks inside a checkpointed block trip the per-op mode unless it ignores them."""
    ignored = getattr(torch.utils.checkpoint, "SAC_IGNORED_OPS", None)
    if ignored is not None:
        ignored |= {
            torch.ops.profiler._record_function_enter_new.default,
            torch.ops.profiler._record_function_exit._RecordFunction,
        }


def apply_activation_checkpoint(
    model: nn.Module, config: ActivationCheckpoint, base_folder: str
) -> None:
    """Wrap the blocks in ``model.layers`` in place; ``none`` does nothing."""
    if config.mode == "none":
        return
    _ignore_profiler_ops()
    apply_ac(model, config, op_sac_save_list=_SAVED_OPS, base_folder=base_folder)
