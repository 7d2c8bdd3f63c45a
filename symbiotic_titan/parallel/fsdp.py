"""FSDP2: which modules are units, what is gathered ahead of time, and how gradients are reduced.

Units inside a block: the router, each group's experts, the shared expert, then the rest of the block (attention, norms), so that no
reduce-scatter of expert gradients waits between the two all-to-alls of the backward. The router is a unit of its own because it stays
float32 under mixed precision: rounded weights would choose other experts (arXiv 2101.03961, section 2.4). Outside of blocks: every
block of the ViT, its rest, the latent embedding, the token embeddings; the root holds the remainder (norm, output, flow head). Losses
are divided by global token counts, so gradients are summed over ranks, never averaged.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims

from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.experts import GroupedExperts, PartitionedMoE
from symbiotic_titan.moe.kernels import local_tensor
from symbiotic_titan.moe.router import Router

# ``parallelism.fsdp_reshard_after_forward`` -> whether weights are freed after the forward: (those of most units, those of the last
# block and the root). The backward starts with the last block and the root, so by default these stay gathered.
_RESHARD = {"default": (True, False), "always": (True, True), "never": (False, False)}


def data_mesh(parallel_dims: ParallelDims) -> DeviceMesh:
    """Mesh over which dense parameters are sharded (and replicated, with HSDP)."""
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    return parallel_dims.get_mesh(names)


def expert_mesh(parallel_dims: ParallelDims) -> DeviceMesh:
    """Mesh over which experts are sharded in addition to the ``ep`` axis."""
    if not parallel_dims.ep_enabled:
        return data_mesh(parallel_dims)
    names = ["dp_replicate", "efsdp"] if parallel_dims.dp_replicate_enabled else ["efsdp"]
    return parallel_dims.get_mesh(names)


def sum_gradients(model: nn.Module) -> None:
    """Make every FSDP unit sum gradients over ranks instead of averaging them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Without this FSDP divides by the size of a unit's own mesh, which differs between dense parameters and experts.
            module.set_gradient_divide_factor(1.0)
            # A divide factor alone selects a sum that multiplies first: gloo has none, and with NCCL it rules out sums in the network.
            module.set_force_sum_reduction_for_comms(True)


def reduce_after(model: nn.Module, *, is_last: bool, gradient_sync: str) -> None:
    """Choose what the next backward reduces: that of the last micro-batch of a step, or of one before it. ``gradient_sync``: see
    ``parallelism.fsdp_gradient_sync``. Without FSDP there is nothing to reduce."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or gradient_sync == "always")
        # The sum over replicas can wait at no cost: a rank holds one shard of the sums in any case.
        model.set_requires_all_reduce(is_last)


def expert_shard_placement(num_ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Where FSDP shards an expert weight (E, rows, columns) over ``num_ranks``: dim 0, between experts, if that is even (None, FSDP's
    default), else dim 1, inside every expert."""
    # Dim 0 is padded to a multiple of the ranks: 4 experts over 32 ranks would be gathered as 32.

    def placement(weight: nn.Parameter) -> Shard | None:
        num_experts, num_rows = local_tensor(weight).shape[:2]
        inside = num_experts % num_ranks != 0 and num_rows % num_ranks == 0
        return Shard(1) if inside else None

    return placement


def units_inside(block: nn.Module) -> list[nn.Module]:
    """Parts of a decoder block that are FSDP units of their own, in the order in which they run."""
    moe: PartitionedMoE | None = getattr(block, "moe", None)
    if moe is None:
        return []
    shared = [moe.shared_experts] if moe.shared_experts is not None else []
    return [moe.router, *moe.experts.values(), *shared]


def gather_ahead(model: SymbioticModel, *, end_is_freed: bool) -> None:
    """Start the all-gathers of the next block when a block begins, in both directions.

    Without prefetching they would start too late, because under expert parallelism the host waits for token counts in every MoE
    layer. The cost is the memory of one more gathered block.
    """
    # Only a block's own unit starts gathers: its hook runs once per direction, while the hooks of the units inside run again when
    # activation checkpointing recomputes the block. A gather during recomputation is an error under per-op checkpointing, which
    # would look for it among the operations of the forward.
    # If the last block was freed, the root starts its gathers. The root's hook runs for every tensor that the model returns, which
    # costs one superfluous gather of the last block. For the same reason the rest of the ViT, which may return several tensors
    # (``deepstack``), starts none: its last block is gathered together with it.
    blocks = [[block, *units_inside(block)] for block in model.layers.values()]
    vit_blocks = [[block] for block in model.vit.layers.values()]
    embeddings: list[list[nn.Module]] = [[model.latent_embedding]]
    if not model.args.tie_embeddings:
        embeddings.append([model.tok_embeddings])
    forward: list[list[Any]] = [[model], [model.vit], *vit_blocks, *embeddings, *blocks]
    backward: list[list[Any]] = [[model]] if end_is_freed else []
    backward += [[block, *reversed(inside)] for block, *inside in reversed(blocks)]
    last, *others = reversed(vit_blocks)
    backward += [*reversed(embeddings), [*last, model.vit], *others]
    for now, following in pairwise(forward):
        now[0].set_modules_to_forward_prefetch(following)
    for now, following in pairwise(backward):
        now[0].set_modules_to_backward_prefetch(following)


def apply_fsdp(model: SymbioticModel, parallel_dims: ParallelDims, config: JobConfig) -> None:
    """Shard ``model`` in place."""
    training = config.training
    free, free_end = _RESHARD[config.parallelism.fsdp_reshard_after_forward]
    mixed = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,  # timesteps must stay float32; the model casts patches and latents itself
    )
    options: dict[str, Any] = {
        "mp_policy": mixed,
        "offload_policy": CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy(),
    }
    dense = {**options, "mesh": data_mesh(parallel_dims)}
    router = {
        **dense,
        "mp_policy": replace(mixed, param_dtype=torch.float32, reduce_dtype=torch.float32),
    }
    experts = {**options, "mesh": expert_mesh(parallel_dims)}
    experts["shard_placement_fn"] = expert_shard_placement(experts["mesh"].shape[-1])

    for part in (*model.vit.layers.values(), model.vit, model.latent_embedding):
        fully_shard(part, reshard_after_forward=free, **dense)
    if (
        not model.args.tie_embeddings
    ):  # a tied weight belongs to the root, because the output uses it too
        unit = fully_shard(model.tok_embeddings, reshard_after_forward=free, **dense)
        unit.set_unshard_in_backward(False)  # the backward of a look-up does not read the weight
    last = list(model.layers.values())[-1]
    for block in model.layers.values():
        free_block = free_end if block is last else free
        for part in units_inside(block):
            kinds = {GroupedExperts: experts, Router: router}
            fully_shard(part, reshard_after_forward=free_block, **kinds.get(type(part), dense))
        fully_shard(block, reshard_after_forward=free_block, **dense)
    fully_shard(model, reshard_after_forward=free_end, **dense)
    sum_gradients(model)
    gather_ahead(model, end_is_freed=free_end)
