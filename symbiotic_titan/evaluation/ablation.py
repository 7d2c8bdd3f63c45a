"""Probes: what a model still does when the routed experts of some groups give nothing.

none            the model as it is.
shared_only     no routed expert gives anything: what the shared expert alone carries (arXiv 2604.07753).
without:GROUP   those of one group do not; tokens of its modalities have the shared expert alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from symbiotic_titan.moe.experts import PartitionedMoE

NONE = "none"
SHARED_ONLY = "shared_only"
_WITHOUT = "without:"


def masked_groups(model: nn.Module, probe: str) -> set[str]:
    """Names of the groups whose routed experts give nothing under ``probe``.

    Raises:
        ValueError: there is no such probe or group, or nothing is left of the model's feed-forward.
    """
    if probe == NONE:
        return set()
    layers = list(_layers(model))
    groups = {name: None for layer in layers for name in layer.experts}
    where = f"--probe {probe}"
    if not layers:
        raise ValueError(f"{where}: the model has no routed experts; leave --probe out")
    if probe == SHARED_ONLY:
        if any(layer.shared_experts is None for layer in layers):
            raise ValueError(f"{where}: the model has no shared expert; leave --probe out")
        return set(groups)
    if probe.startswith(_WITHOUT) and probe.removeprefix(_WITHOUT) in groups:
        return {probe.removeprefix(_WITHOUT)}
    known = [NONE, SHARED_ONLY, *(_WITHOUT + name for name in groups)]
    raise ValueError(
        f"{where}: there is no such probe of this model; choose from {', '.join(known)}"
    )


@contextmanager
def probed(model: nn.Module, probe: str) -> Iterator[None]:
    """Within it ``model`` is as ``probe`` says; ValueError as in ``masked_groups``.

    Masked experts are still computed: under expert parallelism other ranks wait for their rows. Routing is counted as ever.
    """
    masked = masked_groups(model, probe)
    banks = [layer.experts[name] for layer in _layers(model) for name in masked]
    handles = [bank.register_forward_hook(_nothing) for bank in banks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> Iterator[PartitionedMoE]:
    return (module for module in model.modules() if isinstance(module, PartitionedMoE))


def _nothing(bank: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)
