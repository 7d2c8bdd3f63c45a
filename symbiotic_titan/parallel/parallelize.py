"""The order in which a finished single-device model is made parallel, on one screen."""

from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.device import device_type
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.parallel.activation_checkpoint import apply_activation_checkpoint
from symbiotic_titan.parallel.compile import apply_compile
from symbiotic_titan.parallel.expert_parallel import apply_expert_parallel
from symbiotic_titan.parallel.fsdp import apply_fsdp


def parallel_dims_of(config: JobConfig, world_size: int) -> ParallelDims:
    """The mesh that a config's degrees give; the kinds of parallelism that are not supported stay at 1."""
    degrees = config.parallelism
    return ParallelDims(
        dp_replicate=degrees.data_parallel_replicate_degree,
        dp_shard=degrees.data_parallel_shard_degree,
        cp=1,
        tp=1,
        pp=1,
        ep=degrees.expert_parallel_degree,
        etp=1,
        world_size=world_size,
    )


def parallelize_symbiotic(
    model: SymbioticModel, parallel_dims: ParallelDims, job_config: JobConfig
) -> SymbioticModel:
    """Fills the train spec's parallelize slot: expert parallel -> activation checkpoint -> compile -> FSDP2.

    One process keeps the plain model: the same code runs without any of it.
    """
    if parallel_dims.ep_enabled:
        apply_expert_parallel(model, parallel_dims.get_mesh("ep"))
    apply_activation_checkpoint(model, job_config.activation_checkpoint, job_config.job.dump_folder)
    if job_config.compile.enable and "model" in job_config.compile.components:
        apply_compile(model, job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        apply_fsdp(model, parallel_dims, job_config, device_type())
        logger.info(
            f"Applied FSDP2: {parallel_dims.dp_replicate} x {parallel_dims.dp_shard} ranks, "
            f"expert parallel {parallel_dims.ep}"
        )
    return model
