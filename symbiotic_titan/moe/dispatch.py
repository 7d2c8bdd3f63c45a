"""Permute copies of tokens into expert order, and combine the experts' outputs into tokens again.

1. Every token has one copy per chosen expert. The T*K copies are sorted once, stably, by the slot of their expert; padding, and
   the unused places of tokens whose group chooses fewer than K experts, sort last and are cut off. Without expert parallelism a
   slot is an expert's number; see ``moe.partition``.
2. ``permute`` gathers the tokens in that order, one tensor per expert group. If the kernel requires it, each expert's rows are
   padded with zeros to whole blocks (``padded_counts``).
3. The experts compute.
4. ``unpermute``: every token gathers its rows and sums them, weighted.

Both gathers are autograd functions, because the backward of each is the forward of the other: a gather and a sum over K in a fixed
order. Autograd's own backward would be a scatter-add, which is slow on a CPU and nondeterministic on a GPU. On CUDA each is one
kernel of ``moe.row_kernels``; the functions here are what these must equal.

How many rows a group has follows from the modalities of the batch, not from the router. Where the host knows their counts, it
gives each group the most rows that its experts can need (``_most_rows``) and never waits for the device. Rows that no expert needs are
zero rows of the last one: rows of no expert would be uninitialised memory, which later kernels read. Groups in one buffer whose
boundary only the device knows would have to stack their weights, because a grouped matmul starts at row 0.

Shape letters: sequence/shapes.py. N are the rows of one group (copies and zero rows) or, before they are split by group, all T*K.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from symbiotic_titan.moe.kernels import row_multiple

# 128 tokens x 8 copies x 512 channels in bf16 are 1 MiB, half of a core's L2 cache where this was measured.
_TOKENS_PER_CHUNK = 128


@dataclass(frozen=True)
class TokenBlock:
    """Tokens with equally many copies, and where these are.

    token_t    (t,) int64    ascending.
    row_tK     (t, K) int64  rows of each token; K is the number of its copies.
    """

    token_t: Tensor
    row_tK: Tensor


@dataclass(frozen=True)
class RowLayout:
    """Assignment of one group's rows to tokens, in both directions.

    source_n   (n,) int64    token of each copy, sorted by slot.
    row_n      (n,) int64    row of each copy; all other rows are zero.
    counts_e   (e,) int64    copies of each expert.
    padded_e   (e,) int64    rows of each expert: its copies, then its zero rows.
    num_rows                 N.
    blocks                   the tokens routed to this group. All copies of a token are in one group.
    """

    source_n: Tensor
    row_n: Tensor
    counts_e: Tensor
    padded_e: Tensor
    num_rows: int
    blocks: tuple[TokenBlock, ...]

    @cached_property
    def offsets_N(self) -> Tensor:
        """(N,) int64: number of copies before each row."""
        is_copy_N = torch.zeros(self.num_rows, dtype=torch.int64, device=self.row_n.device)
        is_copy_N[self.row_n] = 1
        return is_copy_N.cumsum(0) - is_copy_N

    @cached_property
    def zero_z(self) -> Tensor:
        """(N - n,) int64: the rows that are zero."""
        num_zeros = self.num_rows - self.row_n.shape[0]
        copies_before_z = self.counts_e.cumsum(0).repeat_interleave(
            self.padded_e - self.counts_e, output_size=num_zeros
        )
        return copies_before_z + torch.arange(num_zeros, device=self.row_n.device)


@dataclass(frozen=True)
class RowCounts:
    """Sizes of one group on the host: its copies, its rows (copies and zero rows), and the (tokens, copies of each) of its blocks."""

    copies: int
    rows: int
    blocks: tuple[tuple[int, int], ...]


def _multiple_of(x_TD: Tensor, block_rows: int) -> int:
    return math.lcm(row_multiple(x_TD.device, x_TD.dtype), block_rows or 1)


def padded_counts(counts: Tensor, x_TD: Tensor, block_rows: int) -> Tensor:
    """``counts`` with zero rows: rounded up to the ``row_multiple`` of ``x_TD`` and, if ``block_rows`` is not 0, to whole blocks of
    ``block_rows`` rows, at least one block per expert."""
    multiple = _multiple_of(x_TD, block_rows)
    # Grouped kernels on some devices (sm_100) give an expert without rows a wrong weight gradient, so it gets a zero row.
    if block_rows or x_TD.is_cuda:
        counts = counts.clamp(min=1)
    return (counts + (multiple - 1)) // multiple * multiple


def _most_rows(copies: int, num_experts: int, multiple: int) -> int:
    """The most rows that ``padded_counts`` can give to so many copies and experts."""
    # No expert gets more than ``multiple`` zero rows, and the sum is a multiple too.
    return (copies // multiple + num_experts) * multiple


def _fill_up(padded_e: Tensor, num_rows: int) -> Tensor:
    """``padded_e`` with as many more rows for the last expert as make ``num_rows``."""
    return torch.cat([padded_e[:-1], (num_rows - padded_e[:-1].sum()).unsqueeze(0)])


def _rows_of_copies(counts_e: Tensor, padded_e: Tensor, num_copies: int) -> Tensor:
    """(n,): row of each copy; every expert's copies are followed by its zero rows."""
    before_e = (padded_e - counts_e).cumsum(0) - (padded_e - counts_e)
    # Without ``output_size`` repeat_interleave would sync with the device.
    zero_rows_before_n = before_e.repeat_interleave(counts_e, output_size=num_copies)
    return zero_rows_before_n + torch.arange(num_copies, device=counts_e.device)


def lay_out_rows(
    slots_TK: Tensor,
    group_T: Tensor,
    counts: tuple[Tensor, ...],
    padded: tuple[Tensor, ...],
    sizes: list[RowCounts],
) -> tuple[RowLayout, ...]:
    """The row layout of each group.

    slots_TK: slot of each copy's expert; for padding and unused places, any number above all slots. Group 0 has the first slots,
        then group 1. A token's unused places are its last.
    group_T: the block of each token, in the order of all groups' blocks; for padding, the number of blocks.
    counts, padded: copies of each expert per group, without and with zero rows.
    """
    places = slots_TK.shape[1]
    # Stable: equal slots keep the order of their tokens, so sums over an expert's rows always run in the same order.
    order_N = torch.argsort(slots_TK.flatten(), stable=True)
    rank_N = torch.empty_like(order_N)  # inverse of the permutation
    rank_N.scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    rank_TK = rank_N.view_as(slots_TK)
    token_by_group_T = torch.argsort(group_T, stable=True)
    layouts, copy, token = [], 0, 0
    for counts_e, padded_e, size in zip(counts, padded, sizes, strict=True):
        row_n = _rows_of_copies(counts_e, padded_e, size.copies)
        blocks = []
        for num_tokens, top_k in size.blocks:
            token_t = token_by_group_T[token : token + num_tokens]
            blocks.append(TokenBlock(token_t, row_n[rank_TK[:, :top_k][token_t] - copy]))
            token += num_tokens
        source_n = order_N[copy : copy + size.copies] // places
        layouts.append(RowLayout(source_n, row_n, counts_e, padded_e, size.rows, tuple(blocks)))
        copy += size.copies
    return tuple(layouts)


def _bags(index: Tensor, x: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
    """Sums of indexed rows of ``x``, per bag; an empty bag gives zeros."""
    # One pass over memory: 2 to 10 times faster on a CPU than index_select and a reduction. embedding_bag rejects an empty index.
    if index.numel() == 0:
        num_rows = index.shape[0] if offsets is None else offsets.shape[0]
        return x.new_zeros(num_rows, x.shape[1])
    return F.embedding_bag(index, x, offsets, mode="sum", per_sample_weights=weights)


def _spread(x_TD: Tensor, layouts: tuple[RowLayout, ...]) -> list[Tensor]:
    """(N, D) of each group: each row's token; rows without a copy are 0."""
    if x_TD.is_cuda:
        from symbiotic_titan.moe.row_kernels import arguments, spread

        return spread(x_TD, *arguments(layouts))
    return [_bags(layout.source_n, x_TD, layout.offsets_N, None) for layout in layouts]


def _collect(
    rows: Sequence[Tensor],
    layouts: tuple[RowLayout, ...],
    weights_TK: Tensor | None,
    num_tokens: int,
) -> Tensor:
    """(T, D): each token's (weighted) sum of its rows; 0 for a token without rows."""
    if rows[0].is_cuda:
        from symbiotic_titan.moe.row_kernels import arguments, collect

        return collect(list(rows), weights_TK, *arguments(layouts)[:3], num_tokens)
    out_TD = rows[0].new_zeros(num_tokens, rows[0].shape[1])
    for rows_ND, block in _blocks(rows, layouts):
        weights_tK = None if weights_TK is None else _weights_of(weights_TK, block, rows_ND.dtype)
        # A token is in one group only, so no index occurs twice: index_copy_ never accumulates and is deterministic.
        out_TD.index_copy_(0, block.token_t, _bags(block.row_tK, rows_ND, None, weights_tK))
    return out_TD


def _blocks(
    rows: Sequence[Tensor], layouts: tuple[RowLayout, ...]
) -> Iterator[tuple[Tensor, TokenBlock]]:
    """Every block, with the rows of its group."""
    for rows_ND, layout in zip(rows, layouts, strict=True):
        for block in layout.blocks:
            yield rows_ND, block


def _weights_of(weights_TK: Tensor, block: TokenBlock, dtype: torch.dtype) -> Tensor:
    """(t, K): the weights of a block's copies."""
    return weights_TK[:, : block.row_tK.shape[1]].index_select(0, block.token_t).to(dtype)


def _dots(rows_ND: Tensor, row_tK: Tensor, grad_tD: Tensor) -> Tensor:
    """(t, K): dot products of each token's gradient with its rows, summed over D in float32 and rounded once."""
    # In chunks that fit a core's cache: gathering all rows at once takes 4 times as long. A product and a sum take a third of the time
    # of a batch of matrix-vector products, and ``index_select`` of plain indexing.
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    dots_tK = grad_tD.new_empty(row_tK.shape)
    chunks = (t.split(_TOKENS_PER_CHUNK) for t in (row_tK, grad_tD, dots_tK))
    for index_tK, grad_part_tD, out_tK in zip(*chunks, strict=True):
        rows_nD = rows_ND.index_select(0, index_tK.flatten()).to(dtype)
        products_tKD = rows_nD.view(*index_tK.shape, rows_nD.shape[1]).mul_(
            grad_part_tD.unsqueeze(1)
        )
        out_tK.copy_(products_tKD.sum(-1))
    return dots_tK


def _collect_backward(
    grad_TD: Tensor, rows: Sequence[Tensor], layouts: tuple[RowLayout, ...], weights_TK: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the weights (T, K) and of each group's rows (N, D)."""
    if grad_TD.is_cuda:
        from symbiotic_titan.moe.row_kernels import arguments, collect_backward

        return collect_backward(grad_TD, list(rows), weights_TK, *arguments(layouts)[:4])
    grad_weights_TK = torch.zeros_like(weights_TK)
    grads = []
    for rows_ND, layout in zip(rows, layouts, strict=True):
        weight_N = rows_ND.new_zeros(rows_ND.shape[0])
        for block in layout.blocks:
            weight_N[block.row_tK] = _weights_of(weights_TK, block, rows_ND.dtype)
            dots_tK = _dots(rows_ND, block.row_tK, grad_TD.index_select(0, block.token_t))
            copies = block.row_tK.shape[1]
            grad_weights_TK[:, :copies][block.token_t] = dots_tK.to(weights_TK.dtype)
        weight_n = weight_N[layout.row_n]
        grads.append(_bags(layout.source_n, grad_TD, layout.offsets_N, weight_n))
    return grad_weights_TK, grads


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layouts: tuple[RowLayout, ...]) -> tuple[Tensor, ...]:
        ctx.layouts, ctx.num_tokens = layouts, x_TD.shape[0]
        return tuple(_spread(x_TD, layouts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _collect(grads, ctx.layouts, None, ctx.num_tokens), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights_TK: Tensor | None,
        layouts: tuple[RowLayout, ...],
        num_tokens: int,
        *rows: Tensor,
    ) -> Tensor:
        ctx.layouts = layouts
        if weights_TK is not None:
            ctx.save_for_backward(weights_TK, *rows)
        return _collect(rows, layouts, weights_TK, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD = grad_TD.contiguous()
        # Read once: under activation checkpointing, unpacking saved tensors twice is an error.
        saved = ctx.saved_tensors
        if not saved:
            return None, None, None, *_spread(grad_TD, ctx.layouts)
        weights_TK, *rows = saved
        grad_weights_TK, grads = _collect_backward(grad_TD, rows, ctx.layouts, weights_TK)
        return grad_weights_TK, None, None, *grads


def permute(x_TD: Tensor, layouts: tuple[RowLayout, ...]) -> tuple[Tensor, ...]:
    """One (N, D) tensor per group: copies of its tokens sorted by slot, each expert's padded with zero rows. Differentiable."""
    return _Permute.apply(x_TD, layouts)


def unpermute(
    rows: tuple[Tensor, ...],
    weights_TK: Tensor | None,
    layouts: tuple[RowLayout, ...],
    num_tokens: int,
) -> Tensor:
    """(T, D): each token's weighted sum over its rows; exactly 0 for padding. Differentiable in rows and weights.

    The weights and their gradient are rounded to the rows' dtype. ``None`` weights give a plain sum.
    """
    return _Unpermute.apply(weights_TK, layouts, num_tokens, *rows)


@dataclass(frozen=True)
class Dispatched:
    """What the experts compute on.

    rows    one (N, D) tensor per group, sorted by expert.
    counts  one int64 tensor per group: rows of each of the group's experts on this rank, zero rows included.
    """

    rows: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]


class Dispatcher(Protocol):
    """Brings copies to the experts and their outputs back.

    Stateless between calls: ``start_combine`` and ``combine`` take the layout that ``dispatch`` returned. Computation between these
    two overlaps with the transfer.
    """

    def dispatch(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        group_T: Tensor,
        counts_E: Tensor,
        group_sizes: tuple[int, ...],
        top_ks: tuple[int, ...],
        block_rows: int = 0,
        group_tokens: tuple[int, ...] | None = None,
    ) -> tuple[Dispatched, Any]:
        """(rows of every group, layout).

        experts_TK: group-major numbers, E in unused places; ignored for padding. group_T: the number of groups for padding.
        counts_E: copies of each expert on this rank, without padding. group_sizes, top_ks: experts, and experts per token, of each
            group; K is the largest top_k. block_rows: see ``padded_counts``. group_tokens: tokens of each group, if the host knows.
        """

    def start_combine(self, rows: tuple[Tensor, ...], layout: Any) -> tuple[Tensor, ...]:
        """Start the transfer back. ``rows``: each group's output, in its input's layout. Only ``combine`` may read the result."""

    def combine(self, sent: tuple[Tensor, ...], weights_TK: Tensor, layout: Any) -> Tensor:
        """(T, D): the weighted sum of each token's copies, from what ``start_combine`` returned."""


def row_counts(copies: list[int], rows: list[int], top_ks: tuple[int, ...]) -> list[RowCounts]:
    """Sizes of every group, whose tokens form one block."""
    return [RowCounts(c, r, ((c // k, k),)) for c, r, k in zip(copies, rows, top_ks, strict=True)]


class LocalDispatcher:
    """All experts are on this rank: a slot is an expert."""

    def dispatch(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        group_T: Tensor,
        counts_E: Tensor,
        group_sizes: tuple[int, ...],
        top_ks: tuple[int, ...],
        block_rows: int = 0,
        group_tokens: tuple[int, ...] | None = None,
    ) -> tuple[Dispatched, tuple[RowLayout, ...]]:
        counts = counts_E.split(group_sizes)
        padded = padded_counts(counts_E, x_TD, block_rows).split(group_sizes)
        if group_tokens is None:
            sums = torch.stack([c.sum() for c in (*counts, *padded)]).tolist()  # device sync
            copies, rows = sums[: len(counts)], sums[len(counts) :]
        else:
            assert sum(group_tokens) <= len(group_T), "these tokens are not those of this batch"
            multiple = _multiple_of(x_TD, block_rows)
            copies = [t * k for t, k in zip(group_tokens, top_ks, strict=True)]
            rows = [_most_rows(*c, multiple) for c in zip(copies, group_sizes, strict=True)]
            padded = tuple(map(_fill_up, padded, rows))
        sizes = row_counts(copies, rows, top_ks)
        is_padding_T1 = (group_T == len(group_sizes)).unsqueeze(-1)
        slots_TK = experts_TK.masked_fill(is_padding_T1, sum(group_sizes))
        layouts = lay_out_rows(slots_TK, group_T, counts, padded, sizes)
        return Dispatched(permute(x_TD, layouts), padded), layouts

    def start_combine(
        self, rows: tuple[Tensor, ...], layout: tuple[RowLayout, ...]
    ) -> tuple[Tensor, ...]:
        return rows

    def combine(
        self, sent: tuple[Tensor, ...], weights_TK: Tensor, layout: tuple[RowLayout, ...]
    ) -> Tensor:
        return unpermute(sent, weights_TK, layout, weights_TK.shape[0])
