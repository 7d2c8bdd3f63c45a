"""Losses of the routers, computed separately for each group: load balancing and the z-loss.

**Balance.** Per group g: E_g * sum over its experts of f_e * P_e, where f_e is the share of the group's assignments that go to expert e
(sums to 1 whatever the group's top-k, no gradient) and P_e the router's mean probability for e over the group's tokens. 1.0 when uniform.
(Switch Transformer, arXiv 2101.03961, eq. 4 to 6, with top-k assignments.)

**z-loss.** Per group g: the mean over its tokens of the squared logsumexp of its own logits, so that logits stay small, where float32
resolves them and the softmax is not saturated. (ST-MoE, arXiv 2202.08906, eq. 5.) A group's mean is over its own tokens: the larger
group does not outvote the smaller one. Both losses are means over layers and sums over groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.moe.record import RoutingRecord, RoutingTotals, routing_totals


def balance_loss(
    records: Sequence[RoutingRecord],
    totals: RoutingTotals | None = None,
    batches_G: Tensor | None = None,
) -> Tensor:
    """() float32: mean over layers, sum over groups.

    A group without tokens contributes 0, and its router gets a zero gradient rather than none.

    ``totals``: counts of more tokens than these records', by default of theirs. The result is then these records' share: with the counts
    of all ranks and micro-batches (``global`` scope) the shares of all of them *sum* to the loss of the whole step.
    ``batches_G``: number of micro-batches over which each group's loss is averaged; the result is the records' share of that mean.
    """
    assert records, "balance_loss needs the record of at least one layer"
    if totals is None:
        totals = routing_totals(records)
    sizes = [prob_sum.shape[0] for prob_sum in records[0].prob_sum]
    # Over modalities: a group is balanced by all tokens that its experts receive.
    counts = totals.counts.sum(1).float().split(sizes, dim=-1)
    loss = counts[0].new_zeros(())
    for group, counts_YE in enumerate(counts):
        prob_sum_YE = torch.stack([record.prob_sum[group] for record in records])
        share_YE = counts_YE / counts_YE.sum(-1, keepdim=True).clamp(min=1)
        tokens_Y1 = totals.num_tokens[:, group].float().clamp(min=1).unsqueeze(-1)
        of_group = sizes[group] * (share_YE * prob_sum_YE / tokens_Y1).sum()
        loss = loss + (of_group if batches_G is None else of_group / batches_G[group].clamp(min=1))
    return loss / len(records)


def balance(inputs: StepInputs) -> Tensor:
    """() the micro-batch's share of the step's balancing loss; 0 without MoE layers.

    With the step's counts (``global`` scope) the shares sum to the loss of the whole step. Without them a group's loss of the step is the
    mean of its losses over the micro-batches, of all ranks, in which it has tokens.
    """
    if not inputs.records:
        return torch.zeros((), device=inputs.batch.tokens.device)
    if inputs.step_routing is not None:
        return balance_loss(inputs.records, inputs.step_routing)
    return balance_loss(inputs.records, inputs.routing, inputs.group_batches)


def z_loss(inputs: StepInputs) -> Tensor:
    """() the micro-batch's share of the step's z-loss; 0 where the routers do not measure it (``Router.measures_z``).

    Its sums are divided by ``group_tokens``, so that the shares of all ranks and micro-batches sum to the loss of the whole step. A
    group without tokens contributes 0.
    """
    sums = [record.z_sum for record in inputs.records if record.z_sum is not None]
    if not sums or inputs.group_tokens is None:
        return torch.zeros((), device=inputs.batch.tokens.device)
    return (torch.stack(sums).mean(0) / inputs.group_tokens.clamp(min=1)).sum()


def z_by_group(totals: RoutingTotals, names: Sequence[str]) -> dict[str, float]:
    """``z_loss/<group>`` of the groups that have tokens, from the totals of the whole step; {} where it is not measured. Their sum is the
    step's z-loss."""
    if totals.z_sum is None:
        return {}
    means_G = (totals.z_sum / totals.num_tokens.clamp(min=1)).mean(0)
    both_2G = torch.stack([means_G.double(), totals.num_tokens[0].double()]).tolist()  # device sync
    found = zip(names, *both_2G, strict=True)
    return {f"z_loss/{name}": mean for name, mean, tokens in found if tokens}
