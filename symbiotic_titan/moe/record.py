"""RoutingRecord: what a MoE layer returns besides its output.

Records are returned, not stored on the module: activation checkpointing runs a layer's forward twice, and a stored count would be
added twice. Shape letters: sequence/shapes.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class RoutingRecord:
    """Routing statistics of one layer on one batch, without padding.

    counts     (M, E) int64         assignments per modality and expert, its group's top_k per token.
    prob_sum   G x (E_g,) float32   sum over the group's tokens of the router's probability for each of its experts
                                    (softmax score, or sigmoid score normalised to sum 1). It has a gradient.
    num_tokens (G,) int64           tokens routed in each group.
    z_sum      (G,) float32         squared logsumexp of the logits of a token's group, summed over the group's tokens; with a gradient.
                                    None unless ``Router.measures_z``.
    """

    counts: Tensor
    prob_sum: tuple[Tensor, ...]
    num_tokens: Tensor
    z_sum: Tensor | None = None


@dataclass(frozen=True)
class RoutingTotals:
    """Counts of all layers, ready to be summed over ranks and micro-batches (both are plain sums).

    counts     (Y, M, E) int64
    num_tokens (Y, G) int64
    z_sum      (Y, G) float32, or None
    """

    counts: Tensor
    num_tokens: Tensor
    z_sum: Tensor | None = None

    def __add__(self, other: "RoutingTotals") -> "RoutingTotals":
        z_sum = None
        if self.z_sum is not None and other.z_sum is not None:
            z_sum = self.z_sum + other.z_sum
        return RoutingTotals(self.counts + other.counts, self.num_tokens + other.num_tokens, z_sum)

    def map(self, function: Callable[[Tensor], Tensor]) -> "RoutingTotals":
        """``function`` of each tensor."""
        z_sum = None if self.z_sum is None else function(self.z_sum)
        return RoutingTotals(function(self.counts), function(self.num_tokens), z_sum)


@dataclass(frozen=True)
class LoggedRouting:
    """What is logged about routing in a step, over all ranks.

    step    the step's own.
    recent  (Y, M, E) int64 assignments of the last ``metrics.routing_window`` steps, this one included.
    """

    step: RoutingTotals
    recent: Tensor


def routing_totals(records: Sequence[RoutingRecord]) -> RoutingTotals:
    """The counts of several layers of equal shape, stacked; without gradient."""
    z_sums = [record.z_sum.detach() for record in records if record.z_sum is not None]
    return RoutingTotals(
        counts=torch.stack([record.counts for record in records]),
        num_tokens=torch.stack([record.num_tokens for record in records]),
        z_sum=torch.stack(z_sums) if z_sums else None,
    )


# Activation checkpointing and FSDP find tensors through pytree, which must know the dataclasses.
pytree.register_dataclass(RoutingRecord)
pytree.register_dataclass(RoutingTotals)
