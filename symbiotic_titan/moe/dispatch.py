"""Sort copies of tokens by expert, and put the experts' outputs back.

1. R = T*K copies are sorted once, stable, by the slot of their expert; padding sorts last and is cut off.
2. ``rows_of_copies`` gathers the tokens into that order, one tensor per bank (consecutive slots).
3. The banks compute.
4. ``sum_of_copies``: every token gathers its K rows and adds them, weighted.

Both gathers are autograd functions, because each one's backward is the other: a gather and a sum over K in a fixed order.
What autograd would do on its own is a scatter-add, which is slow on a CPU and not deterministic on a GPU.

Letters: T tokens, D width, K experts per token, R copies (T*K), E experts, N rows of one bank, t tokens of one bank.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BankRows:
    """Which copies one bank's rows are.

    token_N     (N,) int64    the token of each row.
    tokens_t    (t,) int64    the tokens with copies here, ascending. All K copies of a token are in one bank.
    rows_tK     (t, K) int64  the rows of each of them.
    """

    token_N: Tensor
    tokens_t: Tensor
    rows_tK: Tensor


def plan_rows(slots_TK: Tensor, bank_T: Tensor, rows_per_bank: list[int]) -> tuple[BankRows, ...]:
    """Where every copy goes, for all banks.

    slots_TK: slot of each copy's expert; of padding, anything behind all slots. Slots of bank 0 come first, then bank 1's.
    bank_T: the bank of each token; of padding, ``len(rows_per_bank)``.
    rows_per_bank: number of copies in each bank, on the host.
    """
    num_tokens, top_k = slots_TK.shape
    order_R = torch.argsort(slots_TK.flatten(), stable=True)
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    row_TK = row_R.view(num_tokens, top_k)
    token_R = order_R // top_k
    token_of_bank_T = torch.argsort(bank_T, stable=True)
    plans, first_row, first_token = [], 0, 0
    for num_rows in rows_per_bank:
        tokens_t = token_of_bank_T[first_token : first_token + num_rows // top_k]
        plans.append(
            BankRows(
                token_N=token_R[first_row : first_row + num_rows],
                tokens_t=tokens_t,
                rows_tK=row_TK[tokens_t] - first_row,
            )
        )
        first_row += num_rows
        first_token += num_rows // top_k
    return tuple(plans)


def _add_copies(rows_ND: Tensor, plan: BankRows, weights_TK: Tensor | None, out_TD: Tensor) -> None:
    """Write each token's (weighted) sum of rows into ``out_TD``; tokens of other banks are left alone."""
    if plan.tokens_t.numel() == 0:
        return
    weights_tK = None if weights_TK is None else weights_TK[plan.tokens_t].to(rows_ND.dtype)
    # A bag is one pass over the rows; gathering (t, K, D) and reducing it is 10 times slower on a CPU (tools/bench/moe.py).
    sums_tD = F.embedding_bag(plan.rows_tK, rows_ND, mode="sum", per_sample_weights=weights_tK)
    out_TD.index_copy_(0, plan.tokens_t, sums_tD)


class _RowsOfCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plans: tuple[BankRows, ...]) -> tuple[Tensor, ...]:
        ctx.plans, ctx.num_tokens = plans, x_TD.shape[0]
        return tuple(x_TD.index_select(0, plan.token_N) for plan in plans)

    @staticmethod
    def backward(ctx: Any, *grads_ND: Tensor) -> tuple[Tensor, None]:
        grad_TD = grads_ND[0].new_zeros(ctx.num_tokens, grads_ND[0].shape[1])
        for grad_ND, plan in zip(grads_ND, ctx.plans, strict=True):
            _add_copies(grad_ND, plan, None, grad_TD)
        return grad_TD, None


class _SumOfCopies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, plans: tuple[BankRows, ...], *rows_ND: Tensor
    ) -> Tensor:
        ctx.plans = plans
        ctx.save_for_backward(weights_TK, *rows_ND)
        out_TD = rows_ND[0].new_zeros(weights_TK.shape[0], rows_ND[0].shape[1])
        for bank_ND, plan in zip(rows_ND, plans, strict=True):
            _add_copies(bank_ND, plan, weights_TK, out_TD)
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        weights_TK, *rows_ND = ctx.saved_tensors
        grad_weights_TK = torch.zeros_like(weights_TK)
        grads_ND = []
        for bank_ND, plan in zip(rows_ND, ctx.plans, strict=True):
            grad_ND = grad_TD.index_select(0, plan.token_N)
            dot_N = (grad_ND * bank_ND).sum(-1, dtype=torch.float32)
            grad_weights_TK.index_copy_(0, plan.tokens_t, dot_N[plan.rows_tK].to(weights_TK.dtype))
            weights_N = grad_ND.new_empty(grad_ND.shape[0], 1)
            weights_N[plan.rows_tK.flatten(), 0] = (
                weights_TK[plan.tokens_t].flatten().to(grad_ND.dtype)
            )
            grads_ND.append(grad_ND.mul_(weights_N))
        return grad_weights_TK, None, *grads_ND


def rows_of_copies(x_TD: Tensor, plans: tuple[BankRows, ...]) -> tuple[Tensor, ...]:
    """One (N, D) tensor per bank: the tokens of its copies, sorted by expert. Differentiable."""
    return _RowsOfCopies.apply(x_TD, plans)


def sum_of_copies(
    rows_ND: tuple[Tensor, ...], weights_TK: Tensor, plans: tuple[BankRows, ...]
) -> Tensor:
    """(T, D): each token's weighted sum over its K rows; exactly 0 for padding. Differentiable in rows and weights.

    The weights are rounded to the rows' dtype; their gradient is computed in float32.
    """
    return _SumOfCopies.apply(weights_TK, plans, *rows_ND)


@dataclass(frozen=True)
class Dispatched:
    """What the banks work on.

    rows    one (N_g, D) tensor per group, sorted by expert.
    counts  one (e_g,) int64 tensor per group: rows of each of the group's experts that live on this rank.
    """

    rows: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]


class Dispatcher(Protocol):
    """Brings copies to the experts and their outputs back. Holds no state between the two: ``combine`` takes what
    ``dispatch`` returned."""

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, group_T: Tensor, counts_E: Tensor, group_sizes: tuple[int, ...]
    ) -> tuple[Dispatched, Any]: ...

    def combine(self, rows: tuple[Tensor, ...], weights_TK: Tensor, plan: Any) -> Tensor: ...


class LocalDispatcher:
    """All experts are on this rank: a slot is an expert, and the rows of a group are a bank's."""

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, group_T: Tensor, counts_E: Tensor, group_sizes: tuple[int, ...]
    ) -> tuple[Dispatched, tuple[BankRows, ...]]:
        """Rows of every bank, and the plan that ``combine`` needs."""
        counts = counts_E.split(group_sizes)
        rows_per_bank = torch.stack([c.sum() for c in counts]).tolist()  # device sync
        padding_T1 = (group_T == len(group_sizes)).unsqueeze(-1)
        slots_TK = experts_TK.masked_fill(padding_T1, sum(group_sizes))
        plan = plan_rows(slots_TK, group_T, rows_per_bank)
        return Dispatched(rows_of_copies(x_TD, plan), counts), plan

    def combine(
        self, rows: tuple[Tensor, ...], weights_TK: Tensor, plan: tuple[BankRows, ...]
    ) -> Tensor:
        return sum_of_copies(rows, weights_TK, plan)
