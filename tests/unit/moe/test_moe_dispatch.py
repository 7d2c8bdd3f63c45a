"""Sorting copies by expert and putting them back."""

import pytest
import torch

from symbiotic_titan.moe.dispatch import LocalDispatcher
from symbiotic_titan.moe.kernels import row_multiple

SIZES = (3, 2)


def dispatch(dtype=torch.float64):
    """6 tokens, 2 copies each: understanding, generation, padding."""
    group_T = torch.tensor([1, 0, 2, 0, 1, 0])
    experts_TK = torch.tensor([[4, 3], [2, 0], [0, 4], [0, 2], [3, 4], [2, 0]])
    counts_E = torch.tensor([3, 0, 3, 2, 2])
    x_TD = torch.arange(1.0, 7).unsqueeze(-1).repeat(1, 4).to(dtype).requires_grad_()
    dispatcher = LocalDispatcher()
    dispatched, layout = dispatcher.dispatch(x_TD, experts_TK, group_T, counts_E, SIZES, (2, 2))
    return dispatcher, x_TD, dispatched, layout


def test_rows_are_sorted_by_expert_and_by_token_inside_one():
    _, _, dispatched, _ = dispatch()
    assert dispatched.rows[0][:, 0].tolist() == [2, 4, 6, 2, 4, 6]  # experts 0 and 2
    assert dispatched.rows[1][:, 0].tolist() == [1, 5, 1, 5]  # experts 3 and 4
    assert [c.tolist() for c in dispatched.counts] == [[3, 0, 3], [2, 2]]


def test_zero_rows_round_every_expert_up():
    multiple = row_multiple(torch.device("cpu"), torch.bfloat16)
    _, _, dispatched, _ = dispatch(torch.bfloat16)
    assert [c.tolist() for c in dispatched.counts] == [[multiple, 0, multiple], [multiple] * 2]
    rows = dispatched.rows[0][:, 0]
    assert rows[:3].tolist() == [2, 4, 6] and rows[multiple : multiple + 3].tolist() == [2, 4, 6]
    assert rows.count_nonzero() == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_combine_is_the_weighted_sum_of_each_tokens_copies(dtype):
    dispatcher, x_TD, dispatched, layout = dispatch(dtype)
    weights_TK = torch.tensor([[0.25, 0.5]] * 6)
    rows = tuple(10 * r for r in dispatched.rows)
    out_TD = dispatcher.combine(rows, weights_TK, layout)
    expected_TD = 7.5 * x_TD.detach()
    expected_TD[2] = 0
    torch.testing.assert_close(out_TD, expected_TD)


def test_gradients_equal_those_of_plain_indexing():
    dispatcher, x_TD, dispatched, layout = dispatch()
    factors = [torch.randn_like(r) for r in dispatched.rows]
    weights_TK = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    rows = tuple(f * r for f, r in zip(factors, dispatched.rows, strict=True))
    direction_TD = torch.randn(6, 4, dtype=torch.float64)
    loss = (dispatcher.combine(rows, weights_TK, layout) * direction_TD).sum()
    found = torch.autograd.grad(loss, [x_TD, weights_TK])

    total = 0.0
    for factor, group in zip(factors, layout, strict=True):
        (block,) = group.blocks
        plain = factor * x_TD[group.source_n]
        for token, row_K in zip(block.token_t.tolist(), block.row_tK, strict=True):
            total = total + (weights_TK[token] @ plain[row_K] * direction_TD[token]).sum()
    for grad, wanted in zip(found, torch.autograd.grad(total, [x_TD, weights_TK]), strict=True):
        torch.testing.assert_close(grad, wanted)
    assert found[0][2].count_nonzero() == 0 and found[1][2].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_are_sums_in_float32_rounded_once(dtype):
    num_tokens, dim = 300, 256  # several chunks, the last one not full
    experts_TK = torch.stack([torch.randperm(5)[:2] for _ in range(num_tokens)])
    counts_E = torch.bincount(experts_TK.flatten(), minlength=5)
    x_TD = torch.randn(num_tokens, dim, dtype=dtype)
    group_T = torch.zeros(num_tokens, dtype=torch.int64)
    dispatcher = LocalDispatcher()
    dispatched, layout = dispatcher.dispatch(x_TD, experts_TK, group_T, counts_E, (5,), (2,))
    rows = (torch.randn_like(dispatched.rows[0]),)
    weights_TK = torch.rand(num_tokens, 2, requires_grad=True)
    direction_TD = torch.randn_like(x_TD)
    out_TD = dispatcher.combine(rows, weights_TK, layout)
    (found_TK,) = torch.autograd.grad((out_TD * direction_TD).sum(), weights_TK)
    (block,) = layout[0].blocks
    wanted_TK = torch.einsum(
        "tkd,td->tk", rows[0].double()[block.row_tK], direction_TD.double()[block.token_t]
    )
    wanted_TK = torch.zeros_like(wanted_TK).index_copy(0, block.token_t, wanted_TK)
    torch.testing.assert_close(
        found_TK,
        wanted_TK.float(),
        atol=1e-4,
        rtol=torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-4,
    )


def test_dispatcher_keeps_nothing_between_calls():
    dispatcher, _, first, first_layout = dispatch()
    x_TD = torch.zeros(1, 4, dtype=torch.float64)
    one = torch.tensor([[0, 1]])
    dispatcher.dispatch(x_TD, one, torch.tensor([0]), torch.tensor([1, 1, 0, 0, 0]), SIZES, (1, 1))
    out_TD = dispatcher.combine(first.rows, torch.ones(6, 2), first_layout)
    assert out_TD[:, 0].tolist() == [2, 4, 0, 8, 10, 12]
    assert vars(dispatcher) == {}
