"""Gradient norm and update-to-weight ratio of each parameter group, over all ranks. Computed on logged steps only.

Parameters that are spread over ranks, each over a mesh of its own: this rank's part, and sums over all parts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

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


Group = dict[str, Any]


def _square(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()


def _norms(
    groups: list[Group], squares: Callable[[Group, torch.Tensor], torch.Tensor]
) -> dict[str, list[float]]:
    """Group name -> roots of the sums of ``squares(group, parameter)``, a vector over this rank's part of the parameter."""
    owners = [(group, parameter) for group in groups for parameter in group["params"]]
    sums = sum_over_shards([squares(*owner) for owner in owners], [p for _, p in owners])
    roots = {}
    for group in groups:
        own = [row for row, (owner, _) in zip(sums, owners, strict=True) if owner is group]
        roots[group["name"]] = torch.stack(own).sum(0).sqrt().tolist()  # device sync
    return roots


def group_grad_norms(groups: list[Group]) -> dict[str, float]:
    """L2 norm of the gradient of each parameter group. A collective where parameters are sharded."""

    def squares(group: Group, parameter: torch.Tensor) -> torch.Tensor:
        if parameter.grad is None:
            return torch.zeros(1, device=parameter.device)
        return _square(local_part(parameter.grad)).reshape(1)

    return {name: norm for name, (norm,) in _norms(groups, squares).items()}


def adam_update(parameter: torch.Tensor, group: Group, state: dict[str, Any]) -> torch.Tensor:
    """What Adam's last step took from this rank's part of ``parameter``, in float32, found from the state it left.

    lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) of Adam (1412.6980, algorithm 1), whose decay is part of m and v.
    AdamW (1711.05101, algorithm 2) takes lr * decay * w more, w the weight before the step: (w_after + the above) / (1 - lr * decay).
    """
    beta1, beta2 = group["betas"]
    step = state["step"].double()  # in float32, 1 - 0.999 has four digits
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
    """L2 norm of each parameter group's last update over that of its weights. A collective where parameters are sharded.

    Call it between the optimizer's step and the schedule's, while gradients are there and rates are those of the step. It
    needs no copy of the weights: the update is computed again from Adam's state, in the memory of a few copies of one
    parameter. That is the reason why only Adam and AdamW have a ratio; groups of other optimizers are left out. For weights
    in bfloat16 it is the update as it was meant, before rounding.
    """
    ratios: dict[str, float] = {}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Adam) and not optimizer.defaults["amsgrad"]:
            norms = _norms(optimizer.param_groups, _update_and_weight(optimizer))
            ratios |= {name: u / w if w else 0.0 for name, (u, w) in norms.items()}
    return ratios


def _update_and_weight(
    optimizer: torch.optim.Optimizer,
) -> Callable[[Group, torch.Tensor], torch.Tensor]:
    def squares(group: Group, parameter: torch.Tensor) -> torch.Tensor:
        weight = _square(local_part(parameter))
        if parameter.grad is None:  # Adam passed it over
            return torch.stack([torch.zeros_like(weight), weight])
        update = adam_update(parameter, group, optimizer.state[parameter])
        return torch.stack([_square(update), weight])

    return squares
