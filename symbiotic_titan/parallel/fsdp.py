"""FSDP2: the wrapping plan, what is gathered ahead of time, and the gradient arithmetic.

Units inside a block: shared experts, each expert bank, then the rest of the block (attention, norms, router), so that no
reduce-scatter of a bank waits between the two all-to-alls of the backward. Outside: every block of the ViT, its rest, the
latent embedding, the token embeddings; the root holds what is left (norm, output, flow head). Losses are divided by global
token counts, so gradients are summed over ranks, never averaged.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

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

# ``parallelism.fsdp_reshard_after_forward`` -> whether weights are freed behind the forward: (of the units, of the last block and
# the root). The backward starts with these two, so by default they stay.
_RESHARD = {"default": (True, False), "always": (True, True), "never": (False, False)}


def data_mesh(parallel_dims: ParallelDims) -> DeviceMesh:
    """Mesh over which dense parameters are sharded (and replicated, with HSDP)."""
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    return parallel_dims.get_mesh(names)


def expert_mesh(parallel_dims: ParallelDims) -> DeviceMesh:
    """Mesh over which an expert bank is sharded besides the ``ep`` axis."""
    if not parallel_dims.ep_enabled:
        return data_mesh(parallel_dims)
    names = ["dp_replicate", "efsdp"] if parallel_dims.dp_replicate_enabled else ["efsdp"]
    return parallel_dims.get_mesh(names)


def sum_gradients(model: nn.Module, device_type: str) -> None:
    """Make every FSDP unit sum gradients over ranks. gloo has no pre-scaled sum, so on CPU the plain sum is forced."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)


def expert_shard_placement(num_ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Where FSDP cuts an expert weight (E, rows, columns) over ``num_ranks``: between experts where each rank gets equally
    many (None, FSDP's default), else inside every expert. Four experts over 32 ranks would be gathered as 32 otherwise."""

    def cut(weight: nn.Parameter) -> Shard | None:
        num_experts, num_rows = local_tensor(weight).shape[:2]
        inside = num_experts % num_ranks != 0 and num_rows % num_ranks == 0
        return Shard(1) if inside else None

    return cut


def units_inside(block: nn.Module) -> list[nn.Module]:
    """What of a decoder block is sharded apart from the rest of it, in the order that it runs."""
    moe: PartitionedMoE | None = getattr(block, "moe", None)
    if moe is None:
        return []
    shared = [moe.shared_experts] if moe.shared_experts is not None else []
    return [*moe.experts.values(), *shared]


def gather_ahead(model: SymbioticModel, *, end_is_freed: bool) -> None:
    """Start the all-gathers of the next block when a block begins, in both directions.

    Without it the host, which waits for token counts in every MoE layer, would start them too late. Costs the memory of one
    more gathered block. Only a block's own unit starts gathers: its hook runs once per direction, while those of the units
    inside run again when activation checkpointing recomputes the block. They must never gather there: per-op checkpointing
    would look for the gather among the operations of the forward. So where the last block was freed, the root starts its
    gathers; that hook runs for every tensor the model returns, which costs one gather of the last block too many. The rest of the
    ViT, which may return several tensors (``deepstack``), starts none for the same reason: its last block is gathered with it.
    """
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


def apply_fsdp(
    model: SymbioticModel, parallel_dims: ParallelDims, config: JobConfig, device_type: str
) -> None:
    """Shard ``model`` in place.

    Inputs are not cast by FSDP (timesteps must stay float32); the model casts patches and latents itself.
    """
    training = config.training
    free, free_end = _RESHARD[config.parallelism.fsdp_reshard_after_forward]
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy(),
    }
    dense = {**options, "mesh": data_mesh(parallel_dims)}
    banks = {**options, "mesh": expert_mesh(parallel_dims)}
    banks["shard_placement_fn"] = expert_shard_placement(banks["mesh"].shape[-1])

    for part in (*model.vit.layers.values(), model.vit, model.latent_embedding):
        fully_shard(part, reshard_after_forward=free, **dense)
    if not model.args.tie_embeddings:  # tied, the weight is the root's, together with the output
        unit = fully_shard(model.tok_embeddings, reshard_after_forward=free, **dense)
        unit.set_unshard_in_backward(False)  # a look-up's backward reads no weight
    last = list(model.layers.values())[-1]
    for block in model.layers.values():
        free_block = free_end if block is last else free
        for part in units_inside(block):
            where = banks if isinstance(part, GroupedExperts) else dense
            fully_shard(part, reshard_after_forward=free_block, **where)
        fully_shard(block, reshard_after_forward=free_block, **dense)
    fully_shard(model, reshard_after_forward=free_end, **dense)
    sum_gradients(model, device_type)
    gather_ahead(model, end_is_freed=free_end)
