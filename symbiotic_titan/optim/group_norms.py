"""Gradient norm and update-to-weight ratio of each parameter group, over all ranks. Computed on logged steps only.

Parameters may be sharded over different meshes, so squares are summed over each parameter's shards.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of ``tensor`` as a view; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(
    sums: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """``sums[i]``, computed over this rank's shard of ``tensors[i]``, summed over all its shards.

    All ``sums`` have the same shape. One all-reduce per sharded axis for all tensors with the same mesh and placement; a collective
    of all ranks that hold shards.
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


Group = dict[str, Any]


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()


def group_norms(
    groups: list[Group], squares: Callable[[Group, torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Group name -> vector of norms. ``squares(group, parameter)``: vector of sums of squares over this rank's shard of the parameter."""
    owners = [(group, parameter) for group in groups for parameter in group["params"]]
    sums = sum_over_shards([squares(*owner) for owner in owners], [p for _, p in owners])
    roots = {}
    for group in groups:
        own = [row for row, (owner, _) in zip(sums, owners, strict=True) if owner is group]
        roots[group["name"]] = torch.stack(own).sum(0).sqrt()
    return roots


def group_ratios(norms: dict[str, torch.Tensor]) -> dict[str, float]:
    """Group name -> the first of its two norms over the second."""
    if not norms:
        return {}
    pairs = torch.stack(list(norms.values())).tolist()  # device sync
    return {name: u / w if w else 0.0 for name, (u, w) in zip(norms, pairs, strict=True)}


def group_grad_norms(groups: list[Group]) -> dict[str, torch.Tensor]:
    """() L2 norm of each parameter group's gradient. A collective if parameters are sharded."""

    def squares(group: Group, parameter: torch.Tensor) -> torch.Tensor:
        if parameter.grad is None:
            return torch.zeros(1, device=parameter.device)
        return squared_norm(local_part(parameter.grad)).reshape(1)

    return {name: norm for name, (norm,) in group_norms(groups, squares).items()}


def adam_update(parameter: torch.Tensor, group: Group, state: dict[str, Any]) -> torch.Tensor:
    """The last update that Adam subtracted from this rank's shard of ``parameter``, float32, recomputed from Adam's state.

    lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) of Adam (arXiv 1412.6980, algorithm 1), whose decay is part of m and v.
    AdamW (arXiv 1711.05101, algorithm 2) also subtracts lr * decay * w, w the weight before the step:
    (w_after + the above) / (1 - lr * decay).
    """
    beta1, beta2 = group["betas"]
    step = state[
        "step"
    ].double()  # float64, because in float32 1 - 0.999 has only four correct digits
    mean = local_part(state["exp_avg"]).float() / (1 - beta1**step)
    root = (local_part(state["exp_avg_sq"]).float() / (1 - beta2**step)).sqrt()
    update = mean.mul_(group["lr"]).div_(root.add_(group["eps"]))
    decay = group["lr"] * group["weight_decay"]
    if group["decoupled_weight_decay"] and decay:
        before = (local_part(parameter).float() + update).div_(1 - decay)
        update = before.mul_(decay).add_(update)
    return update


@torch.no_grad()
def group_update_ratios(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, float]:
    """L2 norm of each parameter group's last update / that of its weights. A collective if parameters are sharded.

    Call it between the optimizer's step and the scheduler's, while gradients exist and rates are those of the step. To save a copy of
    the weights, the update is recomputed from Adam's state, one parameter at a time; groups of optimizers other than Adam and AdamW
    are left out. For bfloat16 weights it is the update before rounding.
    """
    ratios: dict[str, float] = {}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Adam) and not optimizer.defaults["amsgrad"]:
            ratios |= group_ratios(
                group_norms(optimizer.param_groups, _update_and_weight(optimizer))
            )
    return ratios


def _update_and_weight(
    optimizer: torch.optim.Optimizer,
) -> Callable[[Group, torch.Tensor], torch.Tensor]:
    def squares(group: Group, parameter: torch.Tensor) -> torch.Tensor:
        weight = squared_norm(local_part(parameter))
        if parameter.grad is None:  # Adam skipped it
            return torch.stack([torch.zeros_like(weight), weight])
        update = adam_update(parameter, group, optimizer.state[parameter])
        return torch.stack([squared_norm(update), weight])

    return squares
