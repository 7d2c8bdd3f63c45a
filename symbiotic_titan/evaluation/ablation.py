"""Ablations (``--probe``): what a model still does when the routed experts of some groups output zero.

none            the model as it is.
shared_only     no routed expert contributes: what the shared expert alone carries (arXiv 2604.07753).
without:GROUP   one group's experts do not contribute; tokens of its modalities get the shared expert alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from symbiotic_titan.evaluation.kept import NONE, SHARED_ONLY
from symbiotic_titan.moe.experts import PartitionedMoE

_WITHOUT = "without:"


def masked_groups(model: nn.Module, ablation: str) -> set[str]:
    """Names of the groups whose routed experts output zero under ``ablation``.

    Raises:
        ValueError: an unknown ablation or group, or nothing would be left of the model's feed-forward.
    """
    if ablation == NONE:
        return set()
    layers = list(_layers(model))
    groups = {name: None for layer in layers for name in layer.experts}
    where = f"--probe {ablation}"
    if not layers:
        raise ValueError(f"{where}: the model has no routed experts; leave --probe out")
    if ablation == SHARED_ONLY:
        if any(layer.shared_experts is None for layer in layers):
            raise ValueError(f"{where}: the model has no shared expert; leave --probe out")
        return set(groups)
    if ablation.startswith(_WITHOUT) and ablation.removeprefix(_WITHOUT) in groups:
        return {ablation.removeprefix(_WITHOUT)}
    known = [NONE, SHARED_ONLY, *(_WITHOUT + name for name in groups)]
    raise ValueError(f"{where}: unknown for this model; choose from {', '.join(known)}")


@contextmanager
def ablated(model: nn.Module, ablation: str) -> Iterator[None]:
    """Within the block ``model`` runs under ``ablation``; ValueError as in ``masked_groups``.

    Masked experts are still computed, because other ranks wait for their tokens under expert parallelism, and routing is
    counted as always.
    """
    masked = masked_groups(model, ablation)
    groups = [layer.experts[name] for layer in _layers(model) for name in masked]
    handles = [experts.register_forward_hook(_zero) for experts in groups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> Iterator[PartitionedMoE]:
    return (module for module in model.modules() if isinstance(module, PartitionedMoE))


def _zero(experts: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)
