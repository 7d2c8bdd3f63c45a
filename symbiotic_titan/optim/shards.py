"""Parameters that are spread over ranks, each over a mesh of its own: this rank's part, and sums over all parts."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` that this rank holds, as a view; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(
    sums: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """``sums[i]``, taken over this rank's part of ``tensors[i]``, as it is over the whole tensor.

    All ``sums`` have one shape. One all-reduce for each way in which tensors are spread, whatever their number; every rank
    that holds a part of them must call this.
    """
    whole = list(sums)
    spread: dict[tuple[object, tuple[int, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            dims = tuple(d for d, p in enumerate(tensor.placements) if not p.is_replicate())
            spread.setdefault((tensor.device_mesh, dims), []).append(i)
    for (_, dims), members in spread.items():
        total = torch.stack([whole[i] for i in members])
        for dim in dims:
            dist.all_reduce(total, group=tensors[members[0]].device_mesh.get_group(dim))  # type: ignore[attr-defined]
        for i, row in zip(members, total, strict=True):
            whole[i] = row
    return whole
