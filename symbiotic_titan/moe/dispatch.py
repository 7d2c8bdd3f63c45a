"""Sort copies of tokens by expert, and put the experts' outputs back.

1. R = T*K copies are sorted once, stable, by the slot of their expert; padding sorts last and is cut off.
2. ``permute`` gathers the tokens into that order, one tensor per bank (a run of consecutive slots). Where the bank
   asks for it, zero rows round each expert's share up to whole blocks (``padded_counts``).
3. The banks compute.
4. ``unpermute``: every token gathers its K rows and adds them, weighted.

Both gathers are autograd functions, because each one's backward is the other: a gather and a sum over K in a fixed order.
What autograd would do on its own is a scatter-add, which is slow on a CPU and not deterministic on a GPU.

Letters: T tokens, D width, K experts per token, R copies (T*K), E experts, S slots of one bank, N rows of one bank,
n copies in one bank, t tokens of one bank.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from symbiotic_titan.moe.kernels import row_multiple

# 128 tokens x 8 copies x 512 channels in bf16 are 1 MiB, half of a core's L2 cache where this was measured.
_TOKENS_PER_PIECE = 128


@dataclass(frozen=True)
class RowLayout:
    """Which copies one bank's rows are.

    source_n   (n,) int64    the token of each copy, sorted by slot.
    row_n      (n,) int64    the row of each copy; rows that are no copy's are zero rows.
    offsets_N  (N,) int64    copies in the rows before each row.
    token_t    (t,) int64    the tokens with copies here, ascending. All K copies of a token are in one bank.
    row_tK     (t, K) int64  the rows of each of them.
    """

    source_n: Tensor
    row_n: Tensor
    offsets_N: Tensor
    token_t: Tensor
    row_tK: Tensor


@dataclass(frozen=True)
class RowCounts:
    """Numbers of one bank on the host: its copies, and its rows (copies and zero rows)."""

    copies: int
    rows: int


def padded_counts(counts: Tensor, x_TD: Tensor, block_rows: int) -> Tensor:
    """Rows of each expert, zero rows included: the multiple that ``row_multiple`` gives for ``x_TD``. With ``block_rows`` (0 is
    no demand) they are also whole blocks of that many, and at least one."""
    multiple = math.lcm(row_multiple(x_TD.device, x_TD.dtype), block_rows or 1)
    if (
        block_rows or x_TD.is_cuda
    ):  # grouped kernels give an expert without rows a wrong gradient on some devices (sm_100)
        counts = counts.clamp(min=1)
    return (counts + (multiple - 1)) // multiple * multiple


def spread_rows(counts_e: Tensor, padded_e: Tensor, size: RowCounts) -> tuple[Tensor, Tensor]:
    """(row of each copy (n,), copies before each row (N,)) when every slot's copies are followed by its zero rows."""
    before_e = (padded_e - counts_e).cumsum(0) - (padded_e - counts_e)
    zero_rows_before_n = before_e.repeat_interleave(counts_e, output_size=size.copies)
    row_n = zero_rows_before_n + torch.arange(size.copies, device=counts_e.device)
    is_copy_N = torch.zeros(size.rows, dtype=torch.int64, device=counts_e.device)
    is_copy_N[row_n] = 1
    return row_n, is_copy_N.cumsum(0) - is_copy_N


def lay_out_rows(
    slots_TK: Tensor,
    bank_T: Tensor,
    counts: tuple[Tensor, ...],
    padded: tuple[Tensor, ...],
    sizes: list[RowCounts],
) -> tuple[RowLayout, ...]:
    """Where every copy goes, for all banks.

    slots_TK: slot of each copy's expert; of padding, anything behind all slots. Slots of bank 0 come first, then bank 1's.
    bank_T: the bank of each token; of padding, the number of banks.
    counts, padded: per bank, copies of each slot, and the same rounded up.
    """
    top_k = slots_TK.shape[1]
    order_N = torch.argsort(slots_TK.flatten(), stable=True)
    rank_N = torch.empty_like(order_N)  # inverse of the permutation
    rank_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    rank_TK = rank_N.view_as(slots_TK)
    token_by_bank_T = torch.argsort(bank_T, stable=True)
    plans, copy, token = [], 0, 0
    for counts_e, padded_e, size in zip(counts, padded, sizes, strict=True):
        row_n, offsets_N = spread_rows(counts_e, padded_e, size)
        token_t = token_by_bank_T[token : token + size.copies // top_k]
        plans.append(
            RowLayout(
                source_n=order_N[copy : copy + size.copies] // top_k,
                row_n=row_n,
                offsets_N=offsets_N,
                token_t=token_t,
                row_tK=row_n[rank_TK[token_t] - copy],
            )
        )
        copy += size.copies
        token += size.copies // top_k
    return tuple(plans)


def _bags(index: Tensor, x: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
    """Sums of rows of ``x``. One pass over memory, and a row without copies is zero: 2 to 10 times faster on a CPU than
    gathering with ``index_select`` and reducing."""
    if index.numel() == 0:
        num_rows = index.shape[0] if offsets is None else offsets.shape[0]
        return x.new_zeros(num_rows, x.shape[1])
    return F.embedding_bag(index, x, offsets, mode="sum", per_sample_weights=weights)


def _gather(x_TD: Tensor, plan: RowLayout, weight_n: Tensor | None = None) -> Tensor:
    """(N, D): the token of each row, times its weight; zero rows are 0."""
    return _bags(plan.source_n, x_TD, plan.offsets_N, weight_n)


def _collect(
    rows: tuple[Tensor, ...],
    plans: tuple[RowLayout, ...],
    weights_TK: Tensor | None,
    num_tokens: int,
) -> Tensor:
    """(T, D): each token's (weighted) sum of its rows; 0 for a token without rows."""
    out_TD = rows[0].new_zeros(num_tokens, rows[0].shape[1])
    for rows_ND, plan in zip(rows, plans, strict=True):
        weights_tK = None if weights_TK is None else weights_TK[plan.token_t].to(rows_ND.dtype)
        out_TD.index_copy_(0, plan.token_t, _bags(plan.row_tK, rows_ND, None, weights_tK))
    return out_TD


def _dots(rows_ND: Tensor, row_tK: Tensor, grad_tD: Tensor) -> Tensor:
    """(t, K): each token's gradient times each of its rows, summed over D in float32 and rounded once.

    In pieces that fit a core's cache, except on a GPU: a copy of all rows costs 4 times as much on a CPU.
    """
    piece = row_tK.shape[0] if rows_ND.device.type == "cuda" else _TOKENS_PER_PIECE
    dots = [
        torch.bmm(rows_ND[index_pK], grad_pD.unsqueeze(-1)).squeeze(-1)
        for index_pK, grad_pD in zip(
            row_tK.split(max(piece, 1)), grad_tD.split(max(piece, 1)), strict=True
        )
    ]
    return torch.cat(dots)


class _RowsOfCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plans: tuple[RowLayout, ...]) -> tuple[Tensor, ...]:
        ctx.plans, ctx.num_tokens = plans, x_TD.shape[0]
        return tuple(_gather(x_TD, plan) for plan in plans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _collect(grads, ctx.plans, None, ctx.num_tokens), None


class _SumOfCopies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights_TK: Tensor | None,
        plans: tuple[RowLayout, ...],
        num_tokens: int,
        *rows: Tensor,
    ) -> Tensor:
        ctx.plans = plans
        if weights_TK is not None:
            ctx.save_for_backward(weights_TK, *rows)
        return _collect(rows, plans, weights_TK, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD = grad_TD.contiguous()
        saved = ctx.saved_tensors  # activation checkpointing allows one look
        if not saved:
            return None, None, None, *(_gather(grad_TD, plan) for plan in ctx.plans)
        weights_TK, *rows = saved
        grad_weights_TK = torch.zeros_like(weights_TK)
        grads = []
        for rows_ND, plan in zip(rows, ctx.plans, strict=True):
            weight_N = rows_ND.new_zeros(rows_ND.shape[0])
            weight_N[plan.row_tK] = weights_TK[plan.token_t].to(rows_ND.dtype)
            grads.append(_gather(grad_TD, plan, weight_N[plan.row_n]))
            dots_tK = _dots(rows_ND, plan.row_tK, grad_TD[plan.token_t])
            grad_weights_TK[plan.token_t] = dots_tK.to(weights_TK.dtype)
        return grad_weights_TK, None, None, *grads


def permute(x_TD: Tensor, plans: tuple[RowLayout, ...]) -> tuple[Tensor, ...]:
    """One (N, D) tensor per bank: the tokens of its copies, sorted by slot, with zero rows between. Differentiable."""
    return _RowsOfCopies.apply(x_TD, plans)


def unpermute(
    rows: tuple[Tensor, ...],
    weights_TK: Tensor | None,
    plans: tuple[RowLayout, ...],
    num_tokens: int,
) -> Tensor:
    """(T, D): each token's weighted sum over its K rows; exactly 0 for padding. Differentiable in rows and weights.

    The weights and their gradient are rounded to the rows' dtype. Without weights it is a plain sum.
    """
    return _SumOfCopies.apply(weights_TK, plans, num_tokens, *rows)


@dataclass(frozen=True)
class Dispatched:
    """What the banks work on.

    rows    one (N, D) tensor per group, sorted by expert.
    counts  one int64 tensor per group: rows of each of the group's experts on this rank, zero rows included.
    """

    rows: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]


class Dispatcher(Protocol):
    """Brings copies to the experts and their outputs back. It holds no state between: ``start_combine`` and ``combine`` take the
    plan that ``dispatch`` returned. What runs between these two hides the transfer."""

    def dispatch(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        group_T: Tensor,
        counts_E: Tensor,
        group_sizes: tuple[int, ...],
        block_rows: int = 0,
    ) -> tuple[Dispatched, Any]:
        """(rows of every bank, plan).

        experts_TK: group-major numbers; ignored for padding. group_T: the number of groups for padding.
        counts_E: copies of each expert on this rank, without padding. block_rows: see ``padded_counts``.
        """

    def start_combine(self, rows: tuple[Tensor, ...], plan: Any) -> tuple[Tensor, ...]:
        """Start the way back. ``rows``: one output per bank, laid out as its input was. The result is for ``combine`` only."""

    def combine(self, sent: tuple[Tensor, ...], weights_TK: Tensor, plan: Any) -> Tensor:
        """(T, D): the weighted sum of each token's copies, from what ``start_combine`` returned."""


def row_counts(counts: tuple[Tensor, ...], padded: tuple[Tensor, ...]) -> list[RowCounts]:
    """Copies and rows of every bank, copied to the host."""
    sums = torch.stack([c.sum() for c in (*counts, *padded)]).tolist()  # device sync
    return [RowCounts(*pair) for pair in zip(sums[: len(counts)], sums[len(counts) :], strict=True)]


class LocalDispatcher:
    """All experts are on this rank: a slot is an expert, a bank is a group."""

    def dispatch(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        group_T: Tensor,
        counts_E: Tensor,
        group_sizes: tuple[int, ...],
        block_rows: int = 0,
    ) -> tuple[Dispatched, tuple[RowLayout, ...]]:
        counts = counts_E.split(group_sizes)
        padded = padded_counts(counts_E, x_TD, block_rows).split(group_sizes)
        sizes = row_counts(counts, padded)
        is_padding_T1 = (group_T == len(group_sizes)).unsqueeze(-1)
        slots_TK = experts_TK.masked_fill(is_padding_T1, sum(group_sizes))
        plan = lay_out_rows(slots_TK, group_T, counts, padded, sizes)
        return Dispatched(permute(x_TD, plan), padded), plan

    def start_combine(
        self, rows: tuple[Tensor, ...], plan: tuple[RowLayout, ...]
    ) -> tuple[Tensor, ...]:
        return rows

    def combine(
        self, sent: tuple[Tensor, ...], weights_TK: Tensor, plan: tuple[RowLayout, ...]
    ) -> Tensor:
        return unpermute(sent, weights_TK, plan, weights_TK.shape[0])
