"""Device meshes from the config, and data ranks: the processes that read different data."""

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.device import device_type

T = TypeVar("T")


def parallel_dims_of(config: JobConfig, world_size: int) -> ParallelDims:
    """The meshes that a config's degrees describe; unsupported kinds of parallelism stay at 1."""
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


@dataclass(frozen=True)
class DataRanks:
    """This process's rank among those that read different data.

    rank, size: of the data-parallel ranks; expert parallelism runs inside these, so its ranks read different data too.
    dims:       None if this process is alone.
    """

    device: torch.device
    rank: int
    size: int
    dims: ParallelDims | None

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over all data ranks, in place."""
        if self.dims is not None:
            dist.all_reduce(values, group=self.dims.get_mesh("batch").get_group())
        return values


def data_ranks(device: torch.device, dims: ParallelDims) -> DataRanks:
    """This process in the meshes of ``dims``."""
    if not dims.dp_enabled:
        return DataRanks(device, 0, 1, None)
    mesh = dims.get_mesh("batch")
    return DataRanks(device, mesh.get_local_rank(), mesh.size(), dims)


def join_ranks(config: JobConfig) -> DataRanks:
    """Join the processes that torchrun started, or return this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(device_type(), int(os.environ.get("LOCAL_RANK", "0")))
    # Before the process group is made: NCCL would otherwise create its context on device 0 of every process.
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if size == 1:
        return DataRanks(device, 0, 1, None)
    if not dist.is_initialized():  # the trainer or a test may have joined already
        dist_utils.init_distributed(config.comm, base_folder=config.job.dump_folder)
    return data_ranks(device, parallel_dims_of(config, size))


def gather_over_ranks(value: T) -> list[T]:
    """The ``value`` of every process, by rank; that of this one where no process group exists. Pickled: not for every step."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_host(*tensors: Tensor) -> list[Tensor]:
    """The values of ``tensors``, which lie on one device, as flat float64 tensors on the host: in all one wait for the device."""
    parts = [tensor.detach().flatten().double() for tensor in tensors]
    values = torch.cat([part.to(parts[0].device) for part in parts]).cpu()  # device sync
    return list(values.split([part.numel() for part in parts]))
