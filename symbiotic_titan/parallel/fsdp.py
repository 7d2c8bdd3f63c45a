"""FSDP2: the wrapping plan and the gradient arithmetic.

Units inside a block: shared experts, each expert bank, then the rest of the block (attention, norms, router), so that no
reduce-scatter of a bank waits between the two all-to-alls of the backward. Losses are divided by global token counts, so
gradients are summed over ranks, never averaged.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims

from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.layer import PartitionedMoE


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


def apply_fsdp(
    model: SymbioticModel, parallel_dims: ParallelDims, config: JobConfig, device_type: str
) -> None:
    """Shard ``model`` in place.

    Inputs are not cast by FSDP (timesteps must stay float32); the model casts patches and latents itself.
    """
    training = config.training
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,
    )
    reshard = config.parallelism.fsdp_reshard_after_forward != "never"
    options = {"mp_policy": policy, "reshard_after_forward": reshard}
    dense = {"mesh": data_mesh(parallel_dims), **options}
    banks = {"mesh": expert_mesh(parallel_dims), **options}

    for module in (model.vit, model.latent_embedding):
        fully_shard(module, **dense)
    if (
        not model.args.tie_embeddings
    ):  # tied, the weight belongs to the root unit together with the output
        fully_shard(model.tok_embeddings, **dense)
    for block in model.layers.values():
        moe: PartitionedMoE | None = getattr(block, "moe", None)
        if moe is not None:
            for bank in moe.experts.values():
                fully_shard(bank, **banks)
            if moe.shared_experts is not None:
                fully_shard(moe.shared_experts, **dense)
        fully_shard(block, **dense)
    fully_shard(model, **dense)
    sum_gradients(model, device_type)
