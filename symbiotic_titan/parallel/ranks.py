"""This process among those that read different rows."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.device import device_type
from symbiotic_titan.parallel.parallelize import parallel_dims_of


@dataclass(frozen=True)
class DataRanks:
    """This process among those that read different rows. ``dims`` is None where there is one."""

    device: torch.device
    rank: int
    size: int
    dims: ParallelDims | None

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the processes, in place."""
        if self.dims is not None:
            dist.all_reduce(values, group=self.dims.get_mesh("batch").get_group())
        return values


def data_ranks(device: torch.device, dims: ParallelDims) -> DataRanks:
    """This process in ``dims``."""
    if not dims.dp_enabled:
        return DataRanks(device, 0, 1, None)
    mesh = dims.get_mesh("batch")
    return DataRanks(device, mesh.get_local_rank(), mesh.size(), dims)


def join_ranks(config: JobConfig) -> DataRanks:
    """The processes that torchrun started, joined; or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(device_type(), int(os.environ.get("LOCAL_RANK", "0")))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if size == 1:
        return DataRanks(device, 0, 1, None)
    if not dist.is_initialized():
        dist_utils.init_distributed(config.comm, base_folder=config.job.dump_folder)
    return data_ranks(device, parallel_dims_of(config, size))
