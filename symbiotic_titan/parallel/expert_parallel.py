"""Experts of every group sharded over one mesh axis, and the dispatcher that brings copies of tokens to them.

The experts of a rank are one contiguous range of *slots*: its share of group 0, then its share of group 1, and so on. Copies
sorted by slot are therefore sorted by rank, so one all-to-all out and one back serve any number of groups.

Shape letters: sequence/shapes.py. N are the rows that this rank receives.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from symbiotic_titan.moe.dispatch import (
    Dispatched,
    RowCounts,
    RowLayout,
    lay_out_rows,
    padded_counts,
    permute,
    row_counts,
    unpermute,
)
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import check_expert_parallel_degree


def experts_by_slot(group_sizes: tuple[int, ...], degree: int, device: torch.device) -> Tensor:
    """(E,) int64: the expert in each slot. Rank r's slots are the r-th of ``degree`` equal parts."""
    ends = list(accumulate(group_sizes))
    shares_Xe = [
        torch.arange(end - size, end, device=device).view(degree, size // degree)
        for size, end in zip(group_sizes, ends, strict=True)
    ]
    return torch.cat(shares_Xe, dim=1).flatten()


@dataclass(frozen=True)
class AllToAllLayout:
    """Everything ``combine`` needs to undo ``dispatch``.

    copies:         rows of the tensor that this rank sends, sorted by slot.
    received:       rows of each group, where a received row counts as a token with one copy.
    send, receive:  numbers of rows to and from each rank.
    """

    copies: tuple[RowLayout, ...]
    received: tuple[RowLayout, ...]
    send: list[int]
    receive: list[int]


class AllToAllDispatcher:
    """Every rank of ``mesh`` (one axis) owns an equal share of every group.

    Every collective runs on every call, even on a rank with padding only: a rank that skipped one would make the others hang.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        assert mesh.ndim == 1, f"expert parallelism spans one mesh axis, got {mesh}"
        self.group = mesh.get_group()
        self.degree = mesh.size()

    def dispatch(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        group_T: Tensor,
        counts_E: Tensor,
        group_sizes: tuple[int, ...],
        top_ks: tuple[int, ...],
        block_rows: int = 0,
        group_tokens: tuple[int, ...]
        | None = None,  # not needed: the host must know what others send
    ) -> tuple[Dispatched, AllToAllLayout]:
        shares = [size // self.degree for size in group_sizes]
        expert_of_slot_E = experts_by_slot(group_sizes, self.degree, x_TD.device)
        sent_E = counts_E[expert_of_slot_E]
        # Counts are exchanged before rows: a receiver must know how many rows of each of its experts each rank sends.
        received_Xe = collectives.all_to_all_single(sent_E, None, None, self.group).view(
            self.degree, -1
        )
        counts = received_Xe.sum(0).split(shares)
        padded = padded_counts(received_Xe.sum(0), x_TD, block_rows).split(shares)
        # The host needs the sizes of all following tensors. Joined into one tensor they cost one device sync instead of five.
        own = counts_E.split(group_sizes)
        numbers = [sent_E.view(self.degree, -1).sum(1), received_Xe.sum(1)]
        numbers += [torch.stack([c.sum() for c in parts]) for parts in (own, counts, padded)]
        host = torch.cat(numbers).cpu().split([len(part) for part in numbers])  # device sync
        send, receive, own_copies, copies_here, rows_here = (part.tolist() for part in host)
        sizes = row_counts(copies_here, rows_here, (1,) * len(shares))

        copies = self._sent_layout(
            experts_TK,
            group_T,
            sent_E,
            expert_of_slot_E,
            row_counts(own_copies, own_copies, top_ks),
        )
        received = self._received_layout(received_Xe, shares, counts, padded, sizes, sum(receive))
        (sent_rows,) = permute(x_TD, copies)
        rows_ND = collectives.wait_tensor(self._exchange(sent_rows, receive, send))
        layout = AllToAllLayout(copies, received, send, receive)
        return Dispatched(permute(rows_ND, received), padded), layout

    def start_combine(self, rows: tuple[Tensor, ...], layout: AllToAllLayout) -> tuple[Tensor, ...]:
        # The inverse permutation only: each received row is one copy. The sum over K is left to the token's rank.
        rows_ND = unpermute(rows, None, layout.received, sum(layout.receive))
        # Not waited for: the shared expert computes during the transfer.
        return (self._exchange(rows_ND, layout.send, layout.receive),)

    def combine(
        self, sent: tuple[Tensor, ...], weights_TK: Tensor, layout: AllToAllLayout
    ) -> Tensor:
        back_ND = collectives.wait_tensor(sent[0])
        # Weighted here, on the token's own rank, so that router weights need not be sent.
        return unpermute((back_ND,), weights_TK, layout.copies, weights_TK.shape[0])

    def _exchange(self, rows_ND: Tensor, receive: list[int], send: list[int]) -> Tensor:
        """Start an all-to-all; its result must be waited for before it is read."""
        return collectives.all_to_all_single_autograd(
            rows_ND.contiguous(), receive, send, self.group
        )

    def _sent_layout(
        self,
        experts_TK: Tensor,
        group_T: Tensor,
        sent_E: Tensor,
        expert_of_slot_E: Tensor,
        groups: list[RowCounts],
    ) -> tuple[RowLayout, ...]:
        """The slots of all ranks as one group, without zero rows, which the receiver adds."""
        beyond = sent_E.shape[0]
        # One more entry: the slot of unused places.
        slot_of_expert_E = F.pad(torch.argsort(expert_of_slot_E), (0, 1), value=beyond)
        is_padding_T = group_T == len(groups)
        slots_TK = slot_of_expert_E[experts_TK].masked_fill(is_padding_T.unsqueeze(-1), beyond)
        blocks = tuple(block for group in groups for block in group.blocks)
        block_T, top_ks = group_T, {top_k for _, top_k in blocks}
        if len(top_ks) == 1:  # fewer kernels: tokens of all groups form one block
            block_T, blocks = is_padding_T.long(), ((sum(t for t, _ in blocks), top_ks.pop()),)
        num_copies = sum(group.copies for group in groups)
        size = RowCounts(num_copies, num_copies, blocks)
        return lay_out_rows(slots_TK, block_T, (sent_E,), (sent_E,), [size])

    def _received_layout(
        self,
        received_Xe: Tensor,
        shares: list[int],
        counts: tuple[Tensor, ...],
        padded: tuple[Tensor, ...],
        sizes: list[RowCounts],
        num_rows: int,
    ) -> tuple[RowLayout, ...]:
        """Received rows are sorted by (source rank, slot); the experts need them sorted by slot, then by source rank."""
        device = received_Xe.device
        slot_Xe = torch.arange(sum(shares), device=device).expand_as(received_Xe)
        group_Xe = torch.cat(
            [torch.full((share,), group, device=device) for group, share in enumerate(shares)]
        ).expand_as(received_Xe)
        repeats = received_Xe.flatten()
        slot_N, group_N = (
            t.flatten().repeat_interleave(repeats, output_size=num_rows)
            for t in (slot_Xe, group_Xe)
        )
        return lay_out_rows(slot_N.unsqueeze(-1), group_N, counts, padded, sizes)


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the grouped experts of every ``PartitionedMoE`` in ``model`` over ``mesh`` and give each layer the dispatcher.

    Parameters become DTensors ``Shard(0)``; each rank keeps its slice of its own values, without communication.

    Raises:
        ValueError: the degree does not divide a group.
    """
    for layer in model.modules():
        if not isinstance(layer, PartitionedMoE):
            continue
        check_expert_parallel_degree(layer.args.groups, mesh.size())
        for experts in layer.experts.values():
            for name, parameter in list(experts.named_parameters(recurse=False)):
                # src_data_rank=None: every rank has the same values (or meta tensors), so there is nothing to broadcast.
                sharded = distribute_tensor(
                    parameter.detach(), mesh, [Shard(0)], src_data_rank=None
                )
                experts.register_parameter(
                    name, nn.Parameter(sharded, requires_grad=parameter.requires_grad)
                )
        layer.dispatcher = AllToAllDispatcher(mesh)
