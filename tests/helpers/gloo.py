"""Run a function on several gloo processes of this machine."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.helpers.forked import ensure_server


def _run(
    rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    # Read by torch's launcher conventions, as if torchrun had started this process.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A file to meet at: no port that another test may have taken.
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(fn(rank, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``fn(rank, *args)`` on every rank of a gloo world, and what each returned, by rank.

    ``fn`` must be defined at the top of a module that can be imported by name (``tests.distributed...``), and its result must
    be something ``torch.save`` writes. An exception on any rank is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, fn, args)
        ensure_server()
        multiprocessing.start_processes(
            _run, arguments, nprocs=world_size, start_method="forkserver"
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]
