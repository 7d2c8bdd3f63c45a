"""Degrees of parallelism: their rules, the device meshes they describe, and data ranks, the processes that read different data."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.device import device_type

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def parallel_dims_of(
    config: JobConfig, world_size: int, *, share_sequences: bool = True
) -> ParallelDims:
    """The meshes that a config's degrees describe; unsupported kinds of parallelism stay at 1.

    share_sequences: False for what runs without context parallelism; its ranks then read rows of their own.
    """
    degrees = config.parallelism
    shard, context = degrees.data_parallel_shard_degree, degrees.context_parallel_degree
    if not share_sequences:
        shard, context = shard if shard == -1 else shard * context, 1
    return ParallelDims(
        dp_replicate=degrees.data_parallel_replicate_degree,
        dp_shard=shard,
        cp=context,
        tp=1,
        pp=1,
        ep=degrees.expert_parallel_degree,
        etp=1,
        world_size=world_size,
    )


@contextmanager
def traces_made_later(config: JobConfig) -> Iterator[None]:
    """In the block torchtitan makes the process group, and the ranks agree that the run starts; then the folder of ``comm``'s traces is
    made. torchtitan would make it first, also on a rank that waits for one that refuses the start."""
    comm = config.comm
    # Always overridden, which torchtitan warns of; torchrun sets it.
    os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING", None)
    config.comm = replace(comm, save_traces_folder=tempfile.gettempdir())
    try:
        yield
    finally:
        config.comm = comm
    if comm.trace_buf_size > 0:
        traces = Path(config.job.dump_folder, comm.save_traces_folder)
        traces.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(traces / comm.save_traces_file_prefix)


def check_degrees(
    config: JobConfig, world_size: int, *, share_sequences: bool = True
) -> tuple[int, int]:
    """(ranks over which FSDP shards a replica, data ranks) with these degrees, see ``parallel_dims_of``.

    Raises:
        ValueError: the degrees do not fit the number of ranks, or the sequences.
    """
    p = config.parallelism
    for name in ("data_parallel_replicate", "expert_parallel", "context_parallel"):
        value = getattr(p, f"{name}_degree")
        if value < 1:
            raise ValueError(f"parallelism.{name}_degree: must be at least 1, got {value}")
    replicate, shard = p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    context = p.context_parallel_degree
    if not share_sequences:
        shard, context = shard if shard == -1 else shard * context, 1
    _check_context(context, config.training.seq_len, world_size)
    if shard == -1:
        shard = world_size // (replicate * context)
    if shard < 1 or replicate * shard * context != world_size:
        shared = f"x context_parallel_degree ({context}) " if context > 1 else ""
        raise ValueError(
            f"parallelism: data_parallel_replicate_degree ({replicate}) x data_parallel_shard_degree ({shard}) {shared}"
            f"must equal the number of ranks ({world_size}); set the shard degree to -1 to use what is left"
        )
    if replicate > 1 and shard * context == 1:
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree = {replicate}: replication without sharding is not supported; "
            "use fewer replicas, so that each is sharded over at least 2 ranks"
        )
    return shard * context, replicate * shard


def _check_context(degree: int, seq_len: int, world_size: int) -> None:
    key = f"parallelism.context_parallel_degree = {degree}"
    if world_size % degree:
        raise ValueError(
            f"{key} does not divide the number of ranks ({world_size}); start a multiple of {degree}, or choose a divisor"
        )
    if degree > 1 and seq_len % (2 * degree):
        longer = -(-seq_len // (2 * degree)) * 2 * degree
        raise ValueError(
            f"{key}: training.seq_len = {seq_len} must be a multiple of {2 * degree}, because every rank has two chunks of each "
            f"sequence; set it to {longer}, or choose another degree"
        )


@dataclass(frozen=True)
class DataRanks:
    """This process's rank among those that read different data.

    rank, size: of the data-parallel ranks; expert parallelism runs inside these, so its ranks read different data too. The ranks of
                context parallelism share the rows of one data rank.
    dims:       None if this process is alone.
    """

    device: torch.device
    rank: int
    size: int
    dims: ParallelDims | None

    def sum(self, values: Tensor) -> Tensor:
        """``values``, of each process's part of the data, summed over all processes, in place."""
        if self.dims is not None:
            dist.all_reduce(values, group=self.dims.get_mesh("loss").get_group())
        return values

    def sum_over_parts(self, values: Tensor) -> Tensor:
        """``values`` summed over the processes that share this one's rows."""
        if self.dims is not None and self.dims.cp_enabled:
            values = values.clone()
            dist.all_reduce(values, group=self.dims.get_mesh("cp").get_group())
        return values

    @property
    def counts_rows(self) -> bool:
        """Whether this process counts whole rows, for ``sum``: one of those that share them does."""
        mesh = None if self.dims is None else self.dims.get_optional_mesh("cp")
        return mesh is None or mesh.get_local_rank() == 0

    def once(self, counts: list[Number]) -> list[Number]:
        """``counts`` of whole rows on the process that counts them, 0 on the others."""
        return counts if self.counts_rows else [type(n)() for n in counts]

    def each(self) -> "DataRanks":
        """The same processes where none shares rows with another."""
        if self.dims is None:
            return self
        mesh = self.dims.get_mesh("loss")
        return replace(self, rank=mesh.get_local_rank(), size=mesh.size())


def data_ranks(device: torch.device, dims: ParallelDims) -> DataRanks:
    """This process in the meshes of ``dims``."""
    if not dims.dp_cp_enabled:
        return DataRanks(device, 0, 1, None)
    mesh = dims.get_optional_mesh("batch")  # None where all processes share the same rows
    rank, size = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
    return DataRanks(device, rank, size, dims)


def join_ranks(config: JobConfig) -> DataRanks:
    """Join the processes that torchrun started, or return this process alone. Without context parallelism, which is for training."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(device_type(), int(os.environ.get("LOCAL_RANK", "0")))
    # Before the process group is made: NCCL would otherwise create its context on device 0 of every process.
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if size == 1:
        return DataRanks(device, 0, 1, None)
    if not dist.is_initialized():  # the trainer or a test may have joined already
        dist_utils.init_distributed(config.comm, base_folder=config.job.dump_folder)
    return data_ranks(device, parallel_dims_of(config, size, share_sequences=False))


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
