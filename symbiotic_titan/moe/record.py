"""RoutingRecord: what a MoE layer returns besides its output.

Records are returned, not stored on the module: activation checkpointing runs a layer's forward twice, and a stored count would be
added twice. Shape letters: sequence/shapes.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class RoutingRecord:
    """Routing statistics of one layer on one batch, without padding.

    counts     (M, E) int64         assignments per modality and expert, its group's top_k per token.
    prob_sum   G x (E_g,) float32   sum over the group's tokens of the router's probability for each of its experts
                                    (softmax score, or sigmoid score normalised to sum 1). The only part with a gradient.
    num_tokens (G,) int64           tokens routed in each group.
    """

    counts: Tensor
    prob_sum: tuple[Tensor, ...]
    num_tokens: Tensor


@dataclass(frozen=True)
class RoutingTotals:
    """Counts of all layers, ready to be summed over ranks and micro-batches (both are plain sums).

    counts     (Y, M, E) int64
    num_tokens (Y, G) int64
    """

    counts: Tensor
    num_tokens: Tensor

    def __add__(self, other: "RoutingTotals") -> "RoutingTotals":
        return RoutingTotals(self.counts + other.counts, self.num_tokens + other.num_tokens)


def routing_totals(records: Sequence[RoutingRecord]) -> RoutingTotals:
    """The counts of several layers of equal shape, stacked; without gradient."""
    return RoutingTotals(
        counts=torch.stack([record.counts for record in records]),
        num_tokens=torch.stack([record.num_tokens for record in records]),
    )


# Activation checkpointing and FSDP find tensors through pytree, which must know the dataclasses.
pytree.register_dataclass(RoutingRecord)
pytree.register_dataclass(RoutingTotals)
